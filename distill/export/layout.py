"""What lies where in an exported folder.

```
config.json model.safetensors tokenizer.json ...   a transformers repository of a stock class
modules.json config_sentence_transformers.json 1_Normalize/   the same for sentence-transformers
preprocessor_config.json                            how pictures become tensors, for every loader
onnx/{text,vision}_model{,_fp16,_int8}.onnx         one tower a file, unit vectors out
torch_export/{text,vision}_model.pt2                the same as programs of torch.export, where asked for
openvino/{text,vision}_model{.xml,.bin}             the same for OpenVINO, where asked for
index/{image,text}/index.faiss, ids.npy             what is searched, row by row in the order of ids
embeddings/{images,texts}.{npy,parquet}             the same vectors, with names and captions
export_report.json report.html README.md            the proof, the page that shows it, the model card
```
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from distill.protocols import Side

REPORT = "export_report.json"
FORMAT = 1
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
STEMS: dict[Side, str] = {"text": "text_model", "image": "vision_model"}
OUTPUTS: dict[Side, str] = {"text": "text_embeds", "image": "image_embeds"}
"""Name of a tower's only output, (N, D) float32 unit vectors."""

INPUT_NAMES = "input_names"
"""Extra file in a program of ``torch.export``: what its inputs are called, in their order, parted by blanks."""


class NotAnExportError(FileNotFoundError):
    """A folder that ``distill export`` did not write."""


def onnx_file(folder: str | Path, side: Side, precision: Precision) -> Path:
    """Where a tower lies: the names that transformers.js and others look for."""
    suffix = "" if precision == "fp32" else f"_{precision}"
    return Path(folder) / "onnx" / f"{STEMS[side]}{suffix}.onnx"


def index_folder(folder: str | Path, side: Side) -> Path:
    """Where the index of images, or of texts, lies."""
    return Path(folder) / "index" / side


def embeddings_file(folder: str | Path, side: Side) -> Path:
    """Parquet of the indexed items; the ``.npy`` beside it holds the vectors alone."""
    return Path(folder) / "embeddings" / f"{side}s.parquet"


def padding_of(folder: str | Path) -> str:
    """How a folder's texts are padded: SigLIP reads its vector off the last place, so a text has to fill them all."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    towers = (config, config.get("text_config") or {})
    return "max_length" if any(one.get("model_type", "").startswith("siglip") for one in towers) else "longest"


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of an exported folder.

    Raises:
        NotAnExportError: there is none.
        ValueError: of another version, or damaged.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise NotAnExportError(
            f"{folder} holds no {REPORT}, so it is no exported student: distill export RUN --to DIR makes one"
        )
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        told = report.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no report of distill export ({error}): export again") from error
    if told != FORMAT:
        raise ValueError(f"{path} has format {told!r}; this version reads {FORMAT}: export again")
    if "student" not in report:
        raise ValueError(f"{path} does not say which student it is of: export again")
    return report
