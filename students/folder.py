"""A student on disk: the stock files of its transformers class, and beside them what those files cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers import CLIPProcessor, SiglipProcessor, VisionTextDualEncoderProcessor

from students.options import DualOptions, options_from_json
from students.towers import Parts, load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

OPTIONS_FILE = "student.json"
HEADS_FILE = "student_heads.safetensors"
_FORMAT = 1
_PROCESSORS: Mapping[str, Any] = {
    "clip": CLIPProcessor,
    "siglip": SiglipProcessor,
    "vision-text-dual-encoder": VisionTextDualEncoderProcessor,
}


def write_folder(
    folder: str | Path, parts: Parts, *, options: DualOptions, heads: Mapping[str, Tensor], limit: int
) -> None:
    """Write model, processor and tokenizer as transformers reads them, then options and the heads it cannot hold.

    ``limit``, the tokens a text is cut at, becomes the tokenizer's own, for whoever reads the folder without options.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    parts.tokenizer.model_max_length = limit
    # a processor would cut at this one, which some checkpoints state beside the limit, and so read more than training
    parts.tokenizer.init_kwargs.pop("max_length", None)
    backend = getattr(parts.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # it remembers the padding and cut of its last call, and would write them down
        backend.no_padding()
        backend.no_truncation()
    parts.model.save_pretrained(path)
    _PROCESSORS[parts.model.config.model_type](parts.image_processor, parts.tokenizer).save_pretrained(path)
    parts.image_processor.save_pretrained(path)  # servers other than transformers look for preprocessor_config.json
    if heads:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in heads.items()}, path / HEADS_FILE)
    else:
        (path / HEADS_FILE).unlink(missing_ok=True)  # of another student saved here before
    why = options.why_not_stock
    note = {"format": _FORMAT, "stock": why is None, "why_not_stock": why, "options": options.to_json()}
    (path / OPTIONS_FILE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def is_student_folder(folder: str | Path) -> bool:
    """Whether ``write_folder`` wrote it."""
    return (Path(folder) / OPTIONS_FILE).is_file()


def read_folder(folder: str | Path) -> tuple[Parts, DualOptions, Mapping[str, Tensor]]:
    """The reverse of ``write_folder``.

    Raises:
        FileNotFoundError: no such folder, or one that this project did not write, or without its heads.
        ValueError: a folder of a newer version.
    """
    path = Path(folder)
    if not is_student_folder(path):
        raise FileNotFoundError(
            f"{path} holds no {OPTIONS_FILE}: no student was saved there. A plain transformers checkpoint is read by "
            "DualEncoder.from_pretrained."
        )
    note = json.loads((path / OPTIONS_FILE).read_text(encoding="utf-8"))
    if note.get("format") != _FORMAT:
        raise ValueError(f"{path / OPTIONS_FILE} has format {note.get('format')!r}; this version reads {_FORMAT}")
    options = options_from_json(note["options"])
    heads: Mapping[str, Tensor] = {}
    if "mlp" in (options.image_head, options.text_head):
        if not (path / HEADS_FILE).is_file():
            raise FileNotFoundError(
                f"{path} lacks {HEADS_FILE}, which holds the student's MLP heads: copy the whole folder"
            )
        heads = load_file(path / HEADS_FILE)
    return load_checkpoint(path), options, heads
