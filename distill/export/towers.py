"""A student's towers as files: ONNX, half-precision and int8 ONNX, programs of ``torch.export``, OpenVINO."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.export.layout import INPUT_NAMES, OUTPUTS
from distill.export.runtime import onnx_module

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from distill.protocols import Deployable, Inputs, Side

OPSET = 18
_DIMENSIONS: dict[Side, tuple[str, ...]] = {"text": ("batch", "length"), "image": ("batch",)}
_BLOCK = 32  # weights that share a scale in block-wise int8
INT8_WAYS: dict[bool, tuple[str, ...]] = {True: ("static", "dynamic"), False: ("dynamic", "blockwise")}
"""How int8 is tried, the smallest first, for a tower with convolutional layers and for one without."""


def traced(student: Deployable, side: Side, example: Inputs) -> Any:
    """A tower as a ``torch.export`` program for batches of any size and, of texts, any length.

    Args:
        student: In eval mode, on the CPU, float32.
        side: Which tower.
        example: What it is traced with: at least two items, texts of at least two tokens.
            Sizes of 0 and 1 would become constants.

    Raises:
        ValueError: the example is too small, or the tower cannot be traced; the message has torch's reason.
    """
    import torch

    tower: Any = student.standalone(side)
    inputs = tuple(example[name] for name in tower.input_names)
    if any(min(one.shape) < 2 for one in inputs):
        raise ValueError(f"a tower is traced with at least two items of two tokens, got {[*map(_shape, inputs)]}")
    free = {place: torch.export.Dim.DYNAMIC for place in range(len(_DIMENSIONS[side]))}
    try:
        with _quiet():
            program = torch.export.export(tower, inputs, dynamic_shapes={"inputs": tuple(free for _ in inputs)})
    except Exception as error:  # any of torch's many kinds, all of which say what in the model is to blame
        raise ValueError(f"the {side} tower cannot be traced by torch.export: {error}") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # lines of files on this machine
    return program


def write_onnx(program: Any, path: Path, *, side: Side, input_names: Sequence[str]) -> None:
    """A traced tower as an ONNX file with named, free dimensions and the output ``OUTPUTS[side]``.

    Raises:
        ValueError: something in it has no ONNX operator.
        MissingOnnxError: the ``onnx`` extra is not installed.
    """
    import torch

    onnx_module("onnxscript")
    onnx = onnx_module("onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                program,
                (),
                input_names=list(input_names),
                output_names=[OUTPUTS[side]],
                dynamo=True,
                opset_version=OPSET,
            )
            model = made.model_proto
    except Exception as error:
        raise ValueError(f"the {side} tower cannot be written as ONNX: {error}") from error
    for value in (*model.graph.input, *model.graph.output):
        for place, name in enumerate(_DIMENSIONS[side] if value.name != OUTPUTS[side] else ("batch",)):
            value.type.tensor_type.shape.dim[place].dim_param = name
    del model.graph.value_info[:]  # they hold the tracer's own names of the free dimensions
    _forget_where(model)
    beside = model.ByteSize() > _MOST_IN_ONE_FILE
    onnx.save(model, str(path), save_as_external_data=beside, location=f"{path.name}_data" if beside else None)


def _forget_where(model: Any) -> None:
    """The exporter notes which lines of which files on this machine each node came from."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            node.doc_string = ""
            del node.metadata_props[:]
    for described in (model, model.graph, *model.functions, *model.graph.input, *model.graph.output):
        del described.metadata_props[:]


_MOST_IN_ONE_FILE = 2_000_000_000  # protobuf's limit is 2 GiB


def write_fp16(source: Path, target: Path) -> None:
    """An ONNX file with weights and arithmetic in half precision; inputs and outputs stay float32."""
    onnx, half = onnx_module("onnx"), onnx_module("onnxruntime.transformers.float16")
    with _quiet():
        onnx.save(half.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(target))


def has_convolutions(path: Path) -> bool:
    """Whether more than a patch embedding convolves: such towers collapse under dynamic quantisation."""
    nodes = onnx_module("onnx").load(str(path)).graph.node
    return [node.op_type for node in nodes].count("Conv") > 1


def write_int8(
    source: Path, target: Path, *, way: str, calibration: Sequence[Mapping[str, np.ndarray[Any, Any]]] = ()
) -> None:
    """An ONNX file in int8.

    Args:
        source: float32.
        target: To write.
        way: ``dynamic``: weights by channel, activations by tensor as they come, of matrix products and look-ups and
            never of convolutions. ``static``: convolutions too, by ranges seen on ``calibration`` (QDQ, by channel).
            ``blockwise``: weights of matrix products by blocks of 32, activations likewise: closer, larger.
        calibration: Inputs of the tower, a batch each; training items, never those it is judged by.
    """
    with _quiet():
        if way == "blockwise":
            _blockwise(source, target)
            return
        prepared = target.with_name(f"{target.stem}-prepared.onnx")
        onnx_module("onnxruntime.quantization.shape_inference").quant_pre_process(
            str(source), str(prepared), skip_symbolic_shape=True
        )
        try:
            _dynamic(prepared, target) if way == "dynamic" else _static(prepared, target, calibration)
        finally:
            prepared.unlink(missing_ok=True)


def _dynamic(source: Path, target: Path) -> None:
    quantization = onnx_module("onnxruntime.quantization")
    quantization.quantize_dynamic(
        str(source), str(target), op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True
    )


def _static(source: Path, target: Path, calibration: Sequence[Mapping[str, Any]]) -> None:
    quantization = onnx_module("onnxruntime.quantization")
    convolutions = [node for node in onnx_module("onnx").load(str(source)).graph.node if node.op_type == "Conv"]
    quantization.quantize_static(
        str(source),
        str(target),
        _Batches(calibration),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        calibrate_method=quantization.CalibrationMethod.Percentile,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        nodes_to_exclude=[node.name for node in convolutions[:1] + [one for one in convolutions if _by_channel(one)]],
    )


def _by_channel(convolution: Any) -> bool:
    """Whether it is depthwise. Few weights, whose ranges differ most: left in float32, as is the first convolution."""
    return any(attribute.name == "group" and attribute.i > 1 for attribute in convolution.attribute)


class _Batches:
    """What the library calls a calibration data reader."""

    def __init__(self, batches: Sequence[Mapping[str, Any]]) -> None:
        self._left = iter(batches)

    def get_next(self) -> Any:
        return next(self._left, None)


def _blockwise(source: Path, target: Path) -> None:
    nbits = onnx_module("onnxruntime.quantization.matmul_nbits_quantizer")
    model = onnx_module("onnx").load(str(source))
    # accuracy level 4: products in int8
    quantizer = nbits.MatMulNBitsQuantizer(model, bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def write_program(program: Any, path: Path, *, input_names: Sequence[str]) -> None:
    """A traced tower as ``torch.export.load`` reads it; its extra file ``input_names`` says what to give in."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        torch.export.save(program, path, extra_files={INPUT_NAMES: " ".join(input_names)})


def write_openvino(source: Path, path: Path) -> None:
    """An ONNX file in OpenVINO's own form: ``path`` (``.xml``) and the weights beside it.

    Raises:
        MissingOnnxError: OpenVINO is not installed.
    """
    openvino = onnx_module("openvino")
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(openvino.convert_model(str(source)), str(path), compress_to_fp16=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print their progress, warn of what they do to their own internals, and log every node left alone."""
    log = logging.getLogger()
    before, level = logging.root.manager.disable, log.level
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        log.setLevel(level)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape)
