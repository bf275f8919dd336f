"""What teachers over a published checkpoint share: every weight accounted for, processors that fit, an identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from distill.protocols import ScoreKind, fingerprint, weights_fingerprint
from teachers.identity import config_state, image_processor_state, tokenizer_state
from teachers.processing import pixel_values

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Options(Protocol):
    """What every teacher lets its user choose."""

    @property
    def score_kind(self) -> ScoreKind: ...

    @property
    def max_text_length(self) -> int: ...

    @property
    def pairs_per_chunk(self) -> int: ...


def check_options(options: Options, kinds: Sequence[ScoreKind]) -> None:
    """Raise ValueError where a number is too small or the teacher gives no such score."""
    if options.score_kind not in kinds:
        raise ValueError(f"score_kind is {options.score_kind!r}; this teacher gives {' or '.join(kinds)}")
    if options.max_text_length < 2:
        raise ValueError(f"max_text_length is {options.max_text_length}; the two special tokens alone need 2")
    if options.pairs_per_chunk < 1:
        raise ValueError(f"pairs_per_chunk is {options.pairs_per_chunk}; expected at least 1")


def load_model(
    model_class: type[PreTrainedModel], name: str, *, dtype: torch.dtype, revision: str | None = None
) -> PreTrainedModel:
    """A checkpoint (hub id or folder) of exactly this class, cast to ``dtype`` once; safetensors only, in eval mode.

    Raises:
        ValueError: the checkpoint is of another family, or lacks weights, which the library would leave random.
        OSError: there is no such checkpoint, or it has no safetensors.
    """
    revision = revision or "main"
    config_class = getattr(model_class, "config_class", None)  # an Auto class has none
    if config_class is not None:
        _check_family(config_class, name, revision)
    model, report = model_class.from_pretrained(
        name, dtype=dtype, revision=revision, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {model_class.__name__} ({', '.join(missing[:4])}, ...): it was "
            "made for another task; take a checkpoint that was trained to match images with texts"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _check_family(config_class: type[PreTrainedConfig], name: str, revision: str) -> None:
    found, _ = config_class.get_config_dict(name, revision=revision)
    if found.get("model_type") != config_class.model_type:
        raise ValueError(f"{name} is of type {found.get('model_type')!r}; expected {config_class.model_type!r}")


def image_size_made(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of every image that the processor makes, found by giving it a wide and a tall picture.

    ValueError where they differ: such images cannot be batched without padding.
    """
    from PIL import Image

    pictures = Image.new("RGB", (96, 64)), Image.new("RGB", (64, 96))
    wide, tall = (pixel_values(processor, [picture])["pixel_values"].shape[2:] for picture in pictures)
    if wide != tall:
        raise ValueError(
            f"the image processor makes images of {tuple(wide)} from wide and of {tuple(tall)} from tall pictures; "
            'expected one size: set its "size" to {"height": ..., "width": ...}, or have it crop to a square'
        )
    return wide[0], wide[1]


def check_image_size(processor: BaseImageProcessor, size: Any) -> None:
    """Raise ValueError where the processor makes other images than the tower (``image_size`` of its config) reads."""
    expected = (size, size) if isinstance(size, int) else tuple(size)
    made = image_size_made(processor)
    if made != expected:
        raise ValueError(f"the image processor makes images of {made}, the image tower reads {expected}")


def check_texts(options: Options, *, tokens: int, vocabulary: int, positions: int) -> None:
    """Raise ValueError where the tokenizer's ``tokens`` or the texts' length are beyond what the model embeds."""
    if tokens > vocabulary:
        raise ValueError(f"the tokenizer has {tokens} tokens, the model embeds only {vocabulary}")
    if options.max_text_length > positions:
        raise ValueError(f"max_text_length is {options.max_text_length}; the model has {positions} text positions")


def identity_of(
    kind: Mapping[str, Any],
    options: Mapping[str, Any],
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Fingerprint of a teacher: ``kind`` names it and its scoring version; ``options`` as a mapping.

    Precision is part of it through the weights, whose dtype counts.
    """
    chosen = {name: value for name, value in options.items() if name != "pairs_per_chunk"}  # changes no score
    return fingerprint(
        {**kind, **chosen},
        weights_fingerprint(model),
        config_state(model.config),
        image_processor_state(image_processor),
        tokenizer_state(tokenizer),
    )
