"""From photographs and captions to model inputs, the same for every teacher built on transformers' processors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.protocols import Inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from distill.protocols import Image


def pixel_values(processor: BaseImageProcessor, images: Sequence[Image]) -> Inputs:
    """{"pixel_values": (N, 3, height, width) float32}."""
    if not images:
        raise ValueError("prepare_images was given no image")
    # A grey or palette picture has other channels than the processor's mean and deviation.
    made: Any = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
    return {"pixel_values": made["pixel_values"]}


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, prompt: str, max_length: int) -> Inputs:
    """{"input_ids", "attention_mask"}: (N, L) int64, padded on the right to the longest, cut at ``max_length``."""
    if not texts:
        raise ValueError("prepare_texts was given no text")
    made: Any = tokenizer(
        [prompt + text for text in texts],
        padding="longest",  # said each time: a tokenizer file can carry a fixed length of its own
        padding_side="right",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def image_processor_from(name_or_folder: str, *, revision: str | None = None) -> BaseImageProcessor:
    """The image processor of a checkpoint, on the Pillow back-end: scores must not depend on what else is installed."""
    from transformers import AutoImageProcessor

    processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(
        name_or_folder, revision=revision or "main", backend="pil"
    )
    return processor


def tokenizer_from(name_or_folder: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_folder, revision=revision or "main")
    return tokenizer
