"""An exported folder as ``distill export`` lays it out, made by the shortest way there is."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import openvino
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from torch import nn

from distill.export.layout import OUTPUTS, onnx_file
from students.dual import DualEncoder


class _Tower(nn.Module):
    def __init__(self, student: DualEncoder, side: str, names: list[str]) -> None:
        super().__init__()
        self.student, self.side, self.names = student, side, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        found = self.student(given, None) if self.side == "image" else self.student(None, given)
        return found.images if self.side == "image" else found.texts


def export_student(student_folder: Path, to: Path) -> Path:
    """Tokenizer, image processor, towers in fp32 and int8 and for OpenVINO, and a report; the folder."""
    student = DualEncoder.load(student_folder).eval()
    student.save_pretrained(to)
    pictures = [Image.new("RGB", (80, 60), colour) for colour in ("red", "green", "blue")]
    inputs = {
        "text": student.prepare_texts(["a red ring left of a big cube", "blue", "two dogs run over grass"]),
        "image": student.prepare_images(pictures),
    }
    (to / "onnx").mkdir(parents=True, exist_ok=True)
    for side, given in inputs.items():
        path = onnx_file(to, side, "fp32")
        _export(student, side, dict(given), path)
        quantize_dynamic(
            path, onnx_file(to, side, "int8"), op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8
        )
        openvino.save_model(
            openvino.convert_model(str(path)),
            str(to / "openvino" / path.with_suffix(".xml").name),
            compress_to_fp16=False,
        )
    report = {"format": 1, "student": {"dim": student.dim, "identity": student.identity}}
    (to / "export_report.json").write_text(json.dumps(report))
    return to


def _export(student: DualEncoder, side: str, given: dict[str, torch.Tensor], path: Path) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = tuple({0: batch, 1: length} if side == "text" else {0: batch} for _ in given)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            _Tower(student, side, list(given)),
            tuple(given.values()),
            input_names=list(given),
            output_names=[OUTPUTS[side]],
            dynamo=True,
            dynamic_shapes=(shapes,),
            opset_version=18,
            verbose=False,
        )
    program.save(str(path))
