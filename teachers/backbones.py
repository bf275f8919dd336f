"""Pretrained halves of a fusion teacher: any vision backbone that gives tokens or a grid, any BERT-like text encoder.

Shape key: ``N`` images, ``T`` image tokens, ``C`` width of the vision backbone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch

from teachers.processing import pixel_values

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel

TEXT_FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
_OFFSET_FAMILIES = ("roberta", "xlm-roberta", "camembert")  # their positions begin after the padding id
_CPU_IMAGES = 8  # a larger batch of a convolution network leaves the cache: 64 at once take 2.7 times as long an image
_MOST_OTHERS = 17  # a class token and registers; more than that is not a square grid with extras


@dataclass(frozen=True)
class GridShape:
    """What a vision backbone gives for one image: ``others`` tokens, then rows x columns cells, of ``channels``."""

    rows: int
    columns: int
    others: int
    channels: int

    @property
    def cells(self) -> int:
        """Cells of the grid."""
        return self.rows * self.columns


def load_vision(name_or_folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The vision tower of a checkpoint, without its pooler or classifier."""
    model = _load(name_or_folder, dtype)
    return without_pooler(getattr(model, "vision_model", model))


def load_text(name_or_folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The text encoder of a checkpoint, without its pooler. ValueError where its family cannot take cross-attention."""
    from transformers import AutoConfig

    check_text_family(AutoConfig.from_pretrained(str(name_or_folder)))
    return without_pooler(_load(name_or_folder, dtype))


def from_config_state(state: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A backbone with random weights from the dictionary of its configuration."""
    from transformers import AutoConfig, AutoModel

    state = dict(state)
    config = AutoConfig.for_model(state.pop("model_type"), **state)
    return without_pooler(AutoModel.from_config(config, dtype=dtype))


def _load(name_or_folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(
        str(name_or_folder), dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"{name_or_folder} lacks weights of {type(model).__name__}: {', '.join(missing[:4])}, ...")
    loaded: PreTrainedModel = model
    return loaded


def without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """The model without a pooler that has weights: they would never get a gradient."""
    pooler = getattr(model, "pooler", None)
    if pooler is not None and any(True for _ in pooler.parameters()):
        model.pooler = None
    return model


def check_text_family(config: Any) -> None:
    """Raise ValueError where the text encoder's layers are not those that cross-attention can be put into."""
    if config.model_type not in TEXT_FAMILIES:
        raise ValueError(
            f"the text encoder is of type {config.model_type!r}; cross-attention goes into {', '.join(TEXT_FAMILIES)}"
        )
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind not in (None, "absolute"):
        raise ValueError(f"the text encoder's position_embedding_type is {kind!r}; expected 'absolute'")


def most_text_tokens(config: Any) -> int:
    """Longest text, in tokens, that the encoder has positions for."""
    reserved = config.pad_token_id + 1 if config.model_type in _OFFSET_FAMILIES else 0
    return int(config.max_position_embeddings) - reserved


def grid_shape(vision: PreTrainedModel, processor: BaseImageProcessor) -> GridShape:
    """Shape of the backbone's output for the images the processor makes, found by running it once."""
    from PIL import Image

    pixels = pixel_values(processor, [Image.new("RGB", (64, 48))])["pixel_values"].to(vision.device, vision.dtype)
    was_training = vision.training
    vision.eval()
    with torch.no_grad():
        output = vision(pixel_values=pixels).last_hidden_state
    vision.train(was_training)
    if output.ndim == 4:
        return GridShape(rows=output.shape[2], columns=output.shape[3], others=0, channels=output.shape[1])
    count, channels = output.shape[1:]
    rows, columns = _patches(vision.config, pixels.shape[2:], count)
    return GridShape(rows=rows, columns=columns, others=count - rows * columns, channels=channels)


def _patches(config: Any, size: tuple[int, ...], tokens: int) -> tuple[int, int]:
    """Rows and columns of a token sequence: by the patch size where there is one, else the largest square."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and 0 <= tokens - (size[0] // patch) * (size[1] // patch) <= _MOST_OTHERS:
        return size[0] // patch, size[1] // patch
    side = isqrt(tokens)
    if tokens - side * side > _MOST_OTHERS:
        raise ValueError(
            f"the vision backbone gives {tokens} tokens for images of {size[0]} x {size[1]}: no known grid"
        )
    return side, side


def vision_tokens(vision: PreTrainedModel, pixels: Tensor) -> Tensor:
    """(N, 3, height, width) -> (N, T, C), row-major cells after any class token."""
    pixels = pixels.to(vision.device, vision.dtype)
    if not torch.is_grad_enabled() and pixels.device.type == "cpu" and len(pixels):
        parts = torch.split(pixels, _CPU_IMAGES)
        output = torch.cat([vision(pixel_values=part).last_hidden_state for part in parts])
    else:
        output = vision(pixel_values=pixels).last_hidden_state
    return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output


def embed_tokens(text: PreTrainedModel, ids: Tensor) -> Tensor:
    """Token ids (N, L) -> what the first layer reads (N, L, H)."""
    states: Tensor = text.embeddings(input_ids=ids)
    if hasattr(text, "embeddings_project"):  # ELECTRA's embeddings can be narrower than its layers
        states = text.embeddings_project(states)
    return states


def config_to_save(config: Any) -> dict[str, Any]:
    """The configuration as a dictionary that ``from_config_state`` builds from."""
    saved: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in saved.items() if name not in ("_name_or_path", "dtype")}
