"""The folder of a teacher put together from two backbones: one settings file, one of weights, and both processors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers import backbones
from teachers.processing import image_processor_from, tokenizer_from

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Joined:
    """Two backbones with what prepares their inputs. Those of ``read_joined`` have random weights."""

    vision: PreTrainedModel
    text: PreTrainedModel
    image_processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Saved:
    """What ``read_joined`` found."""

    parts: Joined
    design: Mapping[str, Any]
    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]  # of the whole teacher


def write_joined(
    folder: str | Path,
    kind: str,
    parts: Joined,
    *,
    design: Mapping[str, Any],
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> None:
    """Write all that loading needs: ``<kind>.json``, ``<kind>.safetensors``, image processor and tokenizer."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts.image_processor.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    saved = {
        "vision": backbones.config_to_save(parts.vision.config),
        "text": backbones.config_to_save(parts.text.config),
        "design": dict(design),
        "options": dict(options),
    }
    (folder / f"{kind}.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, folder / f"{kind}.safetensors")


def read_joined(folder: str | Path, kind: str, dtype: torch.dtype) -> Saved:
    """What ``write_joined`` wrote; FileNotFoundError where it wrote nothing of this kind there."""
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / f"{kind}.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no {kind}.json: expected a folder that such a teacher's save_pretrained wrote"
        )
    saved = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
    parts = Joined(
        backbones.from_config_state(saved["vision"], dtype),
        backbones.from_config_state(saved["text"], dtype),
        image_processor_from(str(folder)),
        tokenizer_from(str(folder)),
    )
    return Saved(parts, saved["design"], saved["options"], load_file(folder / f"{kind}.safetensors"))


def from_checkpoints(vision: str | Path, text: str | Path, dtype: torch.dtype) -> Joined:
    """Two checkpoints (hub names or folders) with their image processor and tokenizer."""
    return Joined(
        backbones.load_vision(vision, dtype),
        backbones.load_text(text, dtype),
        image_processor_from(str(vision)),
        tokenizer_from(str(text)),
    )
