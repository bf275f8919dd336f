"""The stock classes a dual-encoder is made of: from a checkpoint or from two towers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from transformers import BaseImageProcessor, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

MODELS: Mapping[str, Any] = {
    "clip": CLIPModel,
    "siglip": SiglipModel,
    "vision-text-dual-encoder": VisionTextDualEncoderModel,
}
"""Stock classes by ``config.model_type``. SigLIP 2 checkpoints of one fixed resolution are of type "siglip"."""
DEFAULT_SCALE = 1 / 0.07
_VISION_OF: Mapping[str, Any] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
_TEXT_OF: Mapping[str, Any] = {"clip": CLIPTextModel, "siglip": SiglipTextModel}


@dataclass(frozen=True)
class Parts:
    """A stock model and what prepares its inputs."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    tokenizer: Tokenizer
    fresh_poolers: frozenset[str] = frozenset()  # sides whose pooler the checkpoint did not hold: it is random


def load_checkpoint(name_or_folder: str | Path) -> Parts:
    """A stock dual-encoder with its image processor and tokenizer, in float32.

    Raises:
        ValueError: a model of another type, or one with weights missing.
    """
    config = AutoConfig.from_pretrained(name_or_folder)
    if config.model_type not in MODELS:
        raise ValueError(
            f"{name_or_folder} is a model of type {config.model_type!r}; a student can be {', '.join(MODELS)}. "
            "Single towers of any type go together with DualEncoder.from_towers."
        )
    model, missing = _load(MODELS[config.model_type], name_or_folder)
    if missing:
        raise ValueError(f"{name_or_folder} lacks weights of {type(model).__name__}: {_few(missing)}")
    return Parts(model, _image_processor(name_or_folder), AutoTokenizer.from_pretrained(name_or_folder))


def join_towers(vision: str | Path, text: str | Path, *, projection_dim: int) -> Parts:
    """Two pretrained towers under ``VisionTextDualEncoderModel``; the projections are new and random.

    Raises:
        ValueError: a checkpoint lacks weights of its tower other than the pooler's.
    """
    if projection_dim < 1:
        raise ValueError(f"projection_dim is {projection_dim}; it must be at least 1")
    image_processor, tokenizer = _image_processor(vision), AutoTokenizer.from_pretrained(text)
    eye, fresh_eye = _tower(vision, _VISION_OF)
    reader, fresh_reader = _tower(text, _TEXT_OF)
    # A config without hidden_size (MobileNetV2) is completed with the tower's real width, which the stock class reads.
    width = _vision_width(eye, image_processor)
    stated = getattr(eye.config, "hidden_size", None)
    if stated not in (None, width):
        raise ValueError(
            f"{vision} states hidden_size {stated} but gives vectors of {width}: no stock class can hold it"
        )
    eye.config.hidden_size = width
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        eye.config, reader.config, projection_dim=projection_dim, logit_scale_init_value=math.log(DEFAULT_SCALE)
    )
    model = VisionTextDualEncoderModel(config=config, vision_model=eye, text_model=reader)
    fresh = {side for side, is_fresh in (("image", fresh_eye), ("text", fresh_reader)) if is_fresh}
    return Parts(model, image_processor, tokenizer, frozenset(fresh))


def _image_processor(name_or_folder: str | Path) -> BaseImageProcessor:
    processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(name_or_folder, backend="pil")
    return processor


def _tower(name_or_folder: str | Path, of_pair: Mapping[str, Any]) -> tuple[PreTrainedModel, bool]:
    """A tower, and whether its pooler is random. A CLIP or SigLIP checkpoint gives its one side."""
    model_type = AutoConfig.from_pretrained(name_or_folder).model_type
    model, missing = _load(of_pair.get(model_type, AutoModel), name_or_folder)
    poolers = {name for name in missing if name.startswith("pooler.")}
    if set(missing) - poolers:
        raise ValueError(f"{name_or_folder} lacks weights of {type(model).__name__}: {_few(set(missing) - poolers)}")
    return model, bool(poolers)


def _load(model_class: type[PreTrainedModel], name_or_folder: str | Path) -> tuple[PreTrainedModel, list[str]]:
    model, info = model_class.from_pretrained(
        name_or_folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    return model, sorted(info["missing_keys"])


def _vision_width(tower: PreTrainedModel, image_processor: BaseImageProcessor) -> int:
    from PIL import Image

    made: Any = image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    with torch.no_grad():
        seen = tower(pixel_values=made["pixel_values"])
    pooled = getattr(seen, "pooler_output", None)
    if pooled is not None:
        return int(pooled.shape[1])
    return int(seen.last_hidden_state.shape[1 if seen.last_hidden_state.dim() == 4 else 2])


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
