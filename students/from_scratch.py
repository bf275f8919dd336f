"""CLIP and SigLIP models of any size with random weights, for a given tokenizer."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from students.towers import DEFAULT_SCALE, Parts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerFast

Family = Literal["clip", "siglip"]
_LEGACY_EOS = 2  # modeling_clip.py: a text config with this eos id pools at the largest id of the row instead
_CONFIGS: Mapping[Family, tuple[Any, Any]] = {
    "clip": (CLIPVisionConfig, CLIPTextConfig),
    "siglip": (SiglipVisionConfig, SiglipTextConfig),
}


def random_model(
    family: Family,
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    projection_dim: int,
    tokenizer: PreTrainedTokenizerFast,
    image_size: int,
) -> Parts:
    """A CLIP or SigLIP with random weights. Torch's seed decides them.

    ``vision`` and ``text`` are fields of the family's configs; the size of pictures and vocabulary and the token ids
    are filled in. Pictures are squashed to a square, RGB / 127.5 - 1.

    Raises:
        ValueError: unknown config fields, sizes that do not fit each other, a tokenizer that does not suit the family.
    """
    if family not in _CONFIGS:
        raise ValueError(f"family is {family!r}; it can be {' or '.join(map(repr, _CONFIGS))}")
    vision_class, text_class = _CONFIGS[family]
    eye = _fields(vision, vision_class, "vision", {"image_size": image_size})
    reader = _fields(text, text_class, "text", {"vocab_size": len(tokenizer), **_special_ids(tokenizer, family)})
    patch = eye.get("patch_size", vision_class.patch_size)
    if image_size % patch:
        raise ValueError(f"image_size {image_size} is not a multiple of the vision tower's patch_size {patch}")
    own = copy.deepcopy(tokenizer)  # the caller's stays as it is
    own.model_max_length = reader.get("max_position_embeddings", text_class.max_position_embeddings)
    make = _clip if family == "clip" else _siglip
    parts = make(eye, reader, projection_dim, own)
    with torch.no_grad():
        parts.model.logit_scale.fill_(math.log(DEFAULT_SCALE))
    return parts


def _clip(vision: dict[str, Any], text: dict[str, Any], dim: int, tokenizer: PreTrainedTokenizerFast) -> Parts:
    _give_names(tokenizer, ["input_ids", "attention_mask"])
    config = CLIPConfig(
        vision_config={**vision, "projection_dim": dim},
        text_config={**text, "projection_dim": dim},
        projection_dim=dim,
    )
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Parts(CLIPModel(config), processor, tokenizer)


def _siglip(vision: dict[str, Any], text: dict[str, Any], dim: int, tokenizer: PreTrainedTokenizerFast) -> Parts:
    _give_names(tokenizer, ["input_ids"])  # no mask: SigLIP reads its padding, it was trained so
    width = vision.get("hidden_size", SiglipVisionConfig.hidden_size)
    if width != dim:
        raise ValueError(
            f"SigLIP has no image projection: projection_dim {dim} must be the vision tower's hidden_size {width}"
        )
    config = SiglipConfig(vision_config=vision, text_config={**text, "projection_size": dim})
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Parts(SiglipModel(config), processor, tokenizer)


def _give_names(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> None:
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names  # what save_pretrained writes; without it the default comes back


def _fields(
    given: Mapping[str, Any], config: type[PreTrainedConfig], name: str, filled: Mapping[str, Any]
) -> dict[str, Any]:
    # transformers takes any keyword and keeps it: a misspelt one would silently leave the default
    own = {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}
    allowed = own - set(filled) - {"projection_dim", "projection_size"}
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise ValueError(
            f"{name} has no field {', '.join(unknown)} to set; {config.__name__} has {', '.join(sorted(allowed))}"
        )
    return {**given, **filled}


def _special_ids(tokenizer: PreTrainedTokenizerFast, family: Family) -> dict[str, int | None]:
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: batches of texts need one")
    if family == "clip":
        ids = tokenizer("a")["input_ids"]
        if eos is None or eos not in ids:
            raise ValueError(
                f"CLIP reads a text at its first end token, but the tokenizer (eos or sep id {eos}) puts none into "
                f"{ids}: give it a post-processor that adds one"
            )
        if eos == _LEGACY_EOS:
            raise ValueError(
                "the tokenizer's end token has id 2, which transformers' CLIP takes for an old, wrong config and then "
                "pools at the token with the largest id: give the end token another id"
            )
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
