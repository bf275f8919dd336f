"""The ways from an image file or a sentence to a unit vector through an exported folder, each as its users go it.

A route does its own preprocessing from the folder's files. What it has of ours is ``upright_rgb``, whose source the
model card gives.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.cores import own_threads
from distill.export.layout import INPUT_NAMES, STEMS, Precision, onnx_file, padding_of
from distill.export.runtime import ImagePreparation, TextPreparation, onnx_tower, openvino_tower

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distill.exact import Vectors
    from distill.protocols import Image, Side

    Encode = Callable[[Sequence[Any]], Vectors]

SENTENCE_TRANSFORMERS_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Normalize",
)
"""What makes a transformers repository one of sentence-transformers."""


@dataclass(frozen=True)
class Route:
    """One way for one side.

    Attributes:
        name: Of the artefact, such as ``onnx fp32``.
        side: Pictures or sentences.
        encode: Upright RGB pictures, or sentences, to unit vectors (N, D).
        files: What it is made of and what is removed where it fails, relative to the folder.
        precision: Which gate it has to pass.
    """

    name: str
    side: Side
    encode: Encode
    files: tuple[str, ...]
    precision: Precision = "fp32"

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.name}, {self.side}s"


def open_picture(content: bytes) -> Image:
    """An image file's bytes as the model card says to open it."""
    import PIL.Image

    from distill.data.upright import upright_rgb

    with PIL.Image.open(BytesIO(content)) as image:
        return upright_rgb(image)


def transformers_routes(folder: Path) -> list[Route]:
    """``AutoModel`` and ``AutoProcessor``, in both of the forms that major versions return features in."""
    import torch
    from transformers import AutoModel, AutoProcessor

    model: Any = AutoModel.from_pretrained(str(folder), use_safetensors=True).eval()
    processor: Any = AutoProcessor.from_pretrained(str(folder), backend="pil")
    padding = padding_of(folder)

    def unit(features: Any) -> Vectors:
        found = features if isinstance(features, torch.Tensor) else features.pooler_output
        vectors: Vectors = torch.nn.functional.normalize(found.float(), dim=-1).numpy()
        return vectors

    @torch.inference_mode()
    def texts(items: Sequence[str]) -> Vectors:
        given = processor(text=list(items), padding=padding, truncation=True, return_tensors="pt")
        return unit(model.get_text_features(**given))

    @torch.inference_mode()
    def images(items: Sequence[Image]) -> Vectors:
        return unit(model.get_image_features(**processor(images=list(items), return_tensors="pt")))

    files = ("model.safetensors",)
    return [Route("transformers", "text", texts, files), Route("transformers", "image", images, files)]


def sentence_transformers_routes(folder: Path) -> list[Route]:
    """``SentenceTransformer(folder).encode``, both sides through one call.

    Raises:
        ImportError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "sentence-transformers is not installed, so its way through the folder cannot be proven: pip install "
            '"sentence-transformers>=6.2", or leave it out with --without sentence-transformers'
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own loading
        model = SentenceTransformer(str(folder), device="cpu")

    def encode(items: Sequence[Any]) -> Vectors:
        return np.asarray(model.encode(list(items), batch_size=len(items), show_progress_bar=False), np.float32)

    return [Route("sentence-transformers", side, encode, SENTENCE_TRANSFORMERS_FILES) for side in ("text", "image")]


def onnx_routes(folder: Path, precision: Precision) -> list[Route]:
    """The towers of one precision that are there, in ONNX Runtime."""
    found = []
    for side in ("text", "image"):
        path = onnx_file(folder, side, precision)
        if path.is_file():
            made = (str(path.relative_to(folder)), *_external(path, folder))
            found.append(Route(f"onnx {precision}", side, _prepared(folder, side, onnx_tower(path)), made, precision))
    return found


def program_routes(folder: Path) -> list[Route]:
    """The programs of ``torch.export`` that are there."""
    import torch

    found = []
    for side in ("text", "image"):
        path = folder / "torch_export" / f"{STEMS[side]}.pt2"
        if path.is_file():
            told = {INPUT_NAMES: ""}
            module = torch.export.load(path, extra_files=told).module()
            names = told[INPUT_NAMES].split()

            @torch.inference_mode()
            def run(inputs: Any, module: Any = module, names: Sequence[str] = tuple(names)) -> Vectors:
                vectors: Vectors = module(*(torch.from_numpy(inputs[name]) for name in names)).numpy()
                return vectors

            file = str(path.relative_to(folder))
            found.append(Route("torch.export", side, _prepared(folder, side, run), (file,)))
    return found


def openvino_routes(folder: Path) -> list[Route]:
    """The OpenVINO models that are there, held to float32 arithmetic."""
    found = []
    for side, stem in STEMS.items():
        path = folder / "openvino" / f"{stem}.xml"
        if path.is_file():
            run, _ = openvino_tower(path, threads=own_threads(), precision="f32")
            files = (str(path.relative_to(folder)), str(path.with_suffix(".bin").relative_to(folder)))
            found.append(Route("openvino", side, _prepared(folder, side, run), files))
    return found


def _prepared(folder: Path, side: Side, run: Callable[[Any], Vectors]) -> Encode:
    prepare: Any = TextPreparation(folder) if side == "text" else ImagePreparation(folder)
    return lambda items: run(prepare(items))


def _external(path: Path, folder: Path) -> list[str]:
    """Files of weights that a large ONNX file keeps beside it."""
    return [str(one.relative_to(folder)) for one in path.parent.glob(f"{path.name}*") if one != path]
