"""The ways a student encodes a query: in torch, and as the files of an exported folder in other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.export.layout import PRECISIONS, STEMS, onnx_file, read_report
from distill.export.runtime import ImagePreparation, TextPreparation, onnx_tower, openvino_tower
from distill.protocols import SIDES, Side

if TYPE_CHECKING:
    import torch

    from distill.exact import Vectors

TORCH = "torch"


@dataclass(frozen=True)
class Way:
    """Texts, or decoded pictures, to unit vectors in two steps."""

    name: str
    side: Side
    prepare: Callable[[Sequence[Any]], Any]
    tower: Callable[[Any], Vectors]  # (N, D) float32, on the host


class OtherStudentError(ValueError):
    """An exported folder that was made of another student."""


def torch_ways(student: Any, device: torch.device) -> list[Way]:
    """Of a student on its device."""
    from distill.inference import to_device

    def text(inputs: Any) -> Vectors:
        return _host(student(None, to_device(inputs, device)).texts)

    def image(inputs: Any) -> Vectors:
        return _host(student(to_device(inputs, device), None).images)

    return [Way(TORCH, "text", student.prepare_texts, text), Way(TORCH, "image", student.prepare_images, image)]


def exported_ways(folder: Path, *, identity: str, threads: int) -> list[Way]:
    """Of every tower that an exported folder has, on the processor.

    Args:
        folder: What ``distill export`` wrote.
        identity: Of the student that it has to be of.
        threads: Of one call.

    Raises:
        NotAnExportError: not such a folder.
        OtherStudentError: it is of another student.
    """
    theirs = read_report(folder)["student"].get("identity")
    if theirs != identity:
        raise OtherStudentError(
            f"{folder} was exported from another student (identity {theirs}) than this arm's ({identity}), so its "
            "times and quality say nothing about this one: export this arm again, or name another folder by --export"
        )
    prepare: dict[Side, Callable[[Sequence[Any]], Any]] = {
        "text": TextPreparation(folder),
        "image": ImagePreparation(folder),
    }
    found = []
    for side in SIDES:
        for precision in PRECISIONS:
            path = onnx_file(folder, side, precision)
            if path.is_file():
                found.append(Way(f"ONNX {precision}", side, prepare[side], onnx_tower(path, threads=threads)))
        path = folder / "openvino" / f"{STEMS[side]}.xml"
        if path.is_file():
            tower, chosen = openvino_tower(path, threads=threads)
            found.append(Way(f"OpenVINO {chosen}", side, prepare[side], tower))
    return found


def _host(vectors: torch.Tensor) -> Vectors:
    found: Vectors = vectors.float().cpu().numpy()
    return found
