"""An exported student in use: its folder's own preprocessing, its towers in ONNX Runtime. No torch on the way."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.cores import own_threads
from distill.export.layout import PRECISIONS, Precision, onnx_file, padding_of, read_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from distill.exact import Vectors
    from distill.protocols import Image, Side

    Tower = Callable[[Mapping[str, np.ndarray[Any, Any]]], Vectors]

CPU = ("CPUExecutionProvider",)


class MissingOnnxError(ImportError):
    """ONNX Runtime, or what makes ONNX files, is not installed."""


def onnx_module(name: str = "onnxruntime") -> Any:
    """A module of the ``onnx`` extra, imported when it is first needed.

    Raises:
        MissingOnnxError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "openvino" if name == "openvino" else "onnx"
        raise MissingOnnxError(f'{name} is not installed: pip install "cross2dual[{extra}]"') from error


class OnnxStudent:
    """Unit vectors of texts and pictures by the ONNX files of an exported folder. Threads may share one."""

    def __init__(
        self,
        folder: str | Path,
        *,
        precision: Precision = "fp32",
        threads: int | None = None,
        providers: Sequence[str] = CPU,
    ) -> None:
        """Load preprocessing and both towers.

        Args:
            folder: What ``distill export`` wrote.
            precision: Of both towers; a tower that has no such file, since it did not pass the proof, is taken in fp32.
            threads: Of one call; None: the cores this process may use, or ``OMP_NUM_THREADS``.
            providers: ONNX Runtime's execution providers, best first.

        Raises:
            NotAnExportError: not such a folder.
            ValueError: neither tower has this precision.
            MissingOnnxError: ONNX Runtime is not installed.
        """
        self.folder = Path(folder)
        self.report = read_report(folder)
        self.precisions: Mapping[Side, Precision] = _there(self.folder, precision)
        self._towers: dict[Side, Tower] = {
            side: onnx_tower(onnx_file(folder, side, found), threads=threads, providers=providers)
            for side, found in self.precisions.items()
        }
        self._texts = TextPreparation(self.folder)
        self._images = ImagePreparation(self.folder)

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return int(self.report["student"]["dim"])

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors (N, D) float32; texts are padded to the longest and cut at the tokenizer's limit.

        Raises:
            ValueError: no text.
        """
        return self.run("text", self.prepare_texts(texts))

    def embed_images(self, images: Sequence[Image]) -> Vectors:
        """Unit vectors (N, D) float32 of upright RGB pictures, as ``distill.data.pictures.decode_image`` gives them.

        Raises:
            ValueError: no picture.
        """
        return self.run("image", self.prepare_images(images))

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
        """What the text tower reads: token ids and masks, (N, L) int64 each."""
        return self._texts(texts)

    def prepare_images(self, images: Sequence[Image]) -> dict[str, np.ndarray[Any, Any]]:
        """What the image tower reads: ``pixel_values`` (N, 3, height, width) float32."""
        return self._images(images)

    def run(self, side: Side, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Vectors:
        """Unit vectors (N, D) float32 of what ``prepare_texts`` or ``prepare_images`` made."""
        return self._towers[side](inputs)


class TextPreparation:
    """Texts to token ids, by the tokenizer's files alone."""

    def __init__(self, folder: str | Path) -> None:
        """Read the files in ``folder``."""
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self._padding = padding_of(folder)
        self._lock = threading.Lock()  # a tokenizer bears one caller at a time

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
        """``input_ids`` and, as the tokenizer has them, ``attention_mask`` and ``token_type_ids``: (N, L) int64."""
        if not texts:
            raise ValueError("there is no text to embed")
        with self._lock:
            made = self._tokenizer(
                list(texts),
                padding=self._padding,
                padding_side="right",
                truncation=True,
                return_attention_mask=True,
                return_tensors="np",
            )
        return {name: np.asarray(value, np.int64) for name, value in made.items()}


class ImagePreparation:
    """Pictures to pixel values, by ``preprocessor_config.json`` alone."""

    def __init__(self, folder: str | Path) -> None:
        """Read the file in ``folder``."""
        from transformers import AutoImageProcessor

        # The file itself: given the folder, transformers reads processor_config.json, which no other loader knows.
        # Resampling is Pillow's, as in training, whether or not torchvision is there.
        path = Path(folder) / "preprocessor_config.json"
        self._processor = AutoImageProcessor.from_pretrained(str(path), backend="pil")

    def __call__(self, images: Sequence[Image]) -> dict[str, np.ndarray[Any, Any]]:
        """``pixel_values`` (N, 3, height, width) float32."""
        if not images:
            raise ValueError("there is no picture to embed")
        made = self._processor(images=list(images), return_tensors="np")
        return {"pixel_values": np.asarray(made["pixel_values"], np.float32)}


def onnx_tower(path: str | Path, *, threads: int | None = None, providers: Sequence[str] = CPU) -> Tower:
    """An ONNX file's tower: from its named inputs, among others, to its only output; see ``open_session``."""
    session = open_session(path, threads=threads, providers=providers)
    names = [one.name for one in session.get_inputs()]

    def run(inputs: Mapping[str, np.ndarray[Any, Any]]) -> Vectors:
        vectors: Vectors = session.run(None, {name: inputs[name] for name in names})[0]
        return vectors

    return run


def openvino_tower(path: str | Path, *, threads: int, precision: str = "") -> tuple[Tower, str]:
    """An OpenVINO file's tower on the processor, and in what precision it computes.

    Args:
        path: The ``.xml``.
        threads: Of one call.
        precision: Such as ``f32``; OpenVINO's own choice, bf16 where the processor can, when empty.

    Raises:
        MissingOnnxError: OpenVINO is not installed.
    """
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = onnx_module("openvino").Core().compile_model(str(path), "CPU", settings)
    names = [port.any_name for port in compiled.inputs]

    def run(inputs: Mapping[str, np.ndarray[Any, Any]]) -> Vectors:
        return np.array(compiled({name: inputs[name] for name in names})[0], np.float32)

    return run, str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())


def open_session(path: str | Path, *, threads: int | None = None, providers: Sequence[str]) -> Any:
    """An inference session of one ONNX file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or a provider is not there.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there: export the student again")
    runtime = onnx_module()
    missing = [name for name in providers if name not in runtime.get_available_providers()]
    if missing:
        raise ValueError(
            f"ONNX Runtime here has no {', '.join(missing)}; it has {', '.join(runtime.get_available_providers())}"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or own_threads()
    options.log_severity_level = 3  # errors
    # threads that wait for the next call would keep the cores busy, and slow torch and FAISS beside them
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return runtime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # of the runtime's own kinds, all of which mean that the file is no good
        raise ValueError(f"{path} cannot be loaded ({error}): export the student again") from error


def _there(folder: Path, precision: Precision) -> dict[Side, Precision]:
    sides: tuple[Side, ...] = ("text", "image")
    found: dict[Side, Precision] = {
        side: precision if onnx_file(folder, side, precision).is_file() else "fp32" for side in sides
    }
    if precision not in found.values() or not all(onnx_file(folder, *one).is_file() for one in found.items()):
        have = [one for one in PRECISIONS if any(onnx_file(folder, side, one).is_file() for side in sides)]
        what = "tower" if precision != "fp32" and precision not in found.values() else "pair of towers"
        raise ValueError(f"{folder} has no {precision} {what}; it has {', '.join(have) or 'none at all'}")
    return found
