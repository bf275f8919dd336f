"""Mining hard negatives in both directions, beside sentence-transformers' own function and plain numpy.

``python -m benchmarks.mining [--quick] [--json FILE]``

Vectors are made: five captions an image around a direction of its own, so that neighbours are hard. All ways get the
same vectors and give each query its K most similar items that do not match it; what they found is compared with exact
similarities. Each way runs in a process of its own, whose anonymous memory is watched from outside; what the vectors
themselves take is subtracted.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.child import Phase, in_child, memory_of
from benchmarks.sidebyside import JsonFile, Quick, show, write_json

CAPTIONS = 5
CHECKED = 50  # queries of each direction whose negatives are looked at


@dataclass(frozen=True)
class Sizes:
    """Images, width of the vectors, negatives a query."""

    images: int = 30_000
    width: int = 256
    k: int = 32


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    images: Annotated[int | None, typer.Option(min=200, help="another number of images; five captions each")] = None,
    torch_too: Annotated[
        bool, typer.Option("--torch", help="sentence-transformers without FAISS too: 10 GB at the full size")
    ] = False,
) -> None:
    """Measure every way once, print a table."""
    sizes = Sizes(images or (2000 if quick else 30_000))
    with tempfile.TemporaryDirectory(prefix="cross2dual-mining-") as folder:
        figures = measure(Path(folder), sizes, torch_too=torch_too)
    ways = sorted({name.removesuffix("_s") for name in figures if name.endswith("_s")}, key=lambda way: way != "ours")
    rows = [
        (way, figures[f"{way}_s"], figures[f"{way}_s"] / figures["ours_s"], figures[f"{way}_bytes"] / 2**20)
        for way in ways
    ]
    texts = CAPTIONS * sizes.images
    title = f"{sizes.images:,} images x {texts:,} captions, {sizes.width} wide, K = {sizes.k}, both directions"
    show(title, ("way", "seconds", "times ours", "MiB above the vectors"), rows)
    write_json(json_file, figures)


def measure(folder: Path, sizes: Sizes, *, torch_too: bool = False) -> dict[str, float]:
    """Seconds and peak bytes of each way, by name; ``ratio_<way>``: its seconds over ours."""
    make_vectors(folder, sizes)
    ways: dict[str, Callable[..., dict[str, float]]] = {
        "ours": ours,
        "numpy": plain_numpy,
        "sentence_transformers_faiss": sentence_transformers_faiss,
    }
    if torch_too:
        ways["sentence_transformers"] = sentence_transformers_torch
    figures: dict[str, float] = {"images": sizes.images, "k": sizes.k, "width": sizes.width}
    for name, way in ways.items():
        phase = in_child(way, folder, sizes)
        figures[f"{name}_s"], figures[f"{name}_bytes"] = phase.result["s"], _above(phase)
    for name in ways:
        figures[f"ratio_{name}"] = figures[f"{name}_s"] / figures["ours_s"]
    return figures


def _above(phase: Phase) -> float:
    """Peak anonymous memory of the mining beyond that of the process with its vectors and libraries."""
    return phase.anonymous - phase.result["before"]


def make_vectors(folder: Path, sizes: Sizes) -> None:
    """``images.npy`` (N, D) and ``texts.npy`` (5 N, D), unit; text ``t`` belongs to image ``t // 5``."""
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((sizes.images, sizes.width), np.float32))
    noise = rng.standard_normal((CAPTIONS * sizes.images, sizes.width), np.float32) / np.sqrt(sizes.width)
    np.save(folder / "images.npy", images)
    np.save(folder / "texts.npy", unit(np.repeat(images, CAPTIONS, axis=0) + 1.5 * noise.astype(np.float32)))


def unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of length 1, float32."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


# ---- the ways, each in a process of its own


def ours(folder: Path, sizes: Sizes) -> dict[str, float]:
    """``VectorIndex`` and ``mine``."""
    from distill.data.matches import Matches
    from distill.index import VectorIndex
    from distill.mine import MineSettings, mine
    from distill.protocols import DIRECTIONS, sides_of

    images, texts = _loaded(folder)
    rows = {"image": np.arange(len(images)), "text": np.arange(len(texts))}
    matches = Matches(rows["text"] // CAPTIONS, rows["text"], n_images=len(images), n_texts=len(texts))
    vectors = {"image": images, "text": texts}
    before, _ = memory_of(os.getpid())
    began = time.perf_counter()
    found: dict[str, np.ndarray[Any, Any]] = {}
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        index = VectorIndex.build(vectors[item], rows[item], device="cpu")
        mined = mine(
            index,
            vectors[query],
            query_ids=rows[query],
            matches=matches,
            direction=direction,
            settings=MineSettings(sizes.k),
        )
        found[direction] = mined.item_ids
    seconds = time.perf_counter() - began
    check(images, texts, found, sizes.k)
    return {"s": seconds, "before": before}


def plain_numpy(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Blocks of a matrix product and ``argpartition``, matches masked."""
    images, texts = _loaded(folder)
    owner = np.arange(len(texts)) // CAPTIONS
    before, _ = memory_of(os.getpid())
    began = time.perf_counter()
    found = {}
    for direction, query, item in (("i2t", images, texts), ("t2i", texts, images)):
        rows = []
        for start in range(0, len(query), 512):
            similarity = query[start : start + 512] @ item.T
            block = np.arange(start, start + len(similarity))
            own = block[:, None] * CAPTIONS + np.arange(CAPTIONS) if direction == "i2t" else owner[block][:, None]
            np.put_along_axis(similarity, own, -np.inf, axis=1)
            best = np.argpartition(-similarity, sizes.k, axis=1)[:, : sizes.k]
            order = np.argsort(-np.take_along_axis(similarity, best, axis=1), axis=1)
            rows.append(np.take_along_axis(best, order, axis=1))
        found[direction] = np.concatenate(rows)
    seconds = time.perf_counter() - began
    check(images, texts, found, sizes.k)
    return {"s": seconds, "before": before}


def sentence_transformers_faiss(folder: Path, sizes: Sizes) -> dict[str, float]:
    """``sentence_transformers.util.mine_hard_negatives`` with a model that looks the vectors up, searching by FAISS."""
    return _sentence_transformers(folder, sizes, use_faiss=True)


def sentence_transformers_torch(folder: Path, sizes: Sizes) -> dict[str, float]:
    """The same, searching by torch."""
    return _sentence_transformers(folder, sizes, use_faiss=False)


class StoredVectors:
    """What ``mine_hard_negatives`` asks of a model, answered from vectors whose numbers the texts are."""

    def __init__(self, images: np.ndarray[Any, Any], texts: np.ndarray[Any, Any]) -> None:
        import torch

        self._vectors = {"i": images, "t": texts}
        self.device = torch.device("cpu")

    def encode_document(self, items: list[str], **_: object) -> np.ndarray[Any, Any]:
        """Vectors (N, D) of items such as ``t17``."""
        rows = np.fromiter((int(item[1:]) for item in items), np.int64, len(items))
        found: np.ndarray[Any, Any] = self._vectors[items[0][0]][rows]
        return found

    encode_query = encode_document

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return int(self._vectors["i"].shape[1])

    def similarity(self, first: Any, second: Any) -> Any:
        """Inner products (N, M)."""
        import torch

        return torch.as_tensor(first) @ torch.as_tensor(second).T

    def similarity_pairwise(self, first: Any, second: Any) -> Any:
        """Inner products (N,)."""
        import torch

        return (torch.as_tensor(first) * torch.as_tensor(second)).sum(dim=1)


def _sentence_transformers(folder: Path, sizes: Sizes, *, use_faiss: bool) -> dict[str, float]:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    images, texts = _loaded(folder)
    model: Any = StoredVectors(images, texts)
    owner = np.arange(len(texts)) // CAPTIONS
    columns = {"image": [f"i{row}" for row in owner], "text": [f"t{row}" for row in range(len(texts))]}
    before, _ = memory_of(os.getpid())
    found, seconds = {}, 0.0
    for direction, anchor, positive in (("i2t", "image", "text"), ("t2i", "text", "image")):
        began = time.perf_counter()
        pairs = Dataset.from_dict({anchor: columns[anchor], positive: columns[positive]})
        mined = mine_hard_negatives(
            pairs,
            model,
            anchor_column_name=anchor,
            positive_column_name=positive,
            num_negatives=sizes.k,
            output_format="n-tuple",
            use_faiss=use_faiss,
            verbose=False,
        )
        seconds += time.perf_counter() - began  # the rest is for looking at what was found
        step = CAPTIONS if direction == "i2t" else 1  # a row a pair: an image's five rows have the same negatives
        tuples = mined.select(range(0, len(mined), step)).to_dict()
        negatives = [tuples[f"negative_{number}"] for number in range(1, sizes.k + 1)]
        found[direction] = np.array([[int(item[1:]) for item in column] for column in negatives]).T
    check(images, texts, found, sizes.k)
    return {"s": seconds, "before": before}


# ---- what they have in common


def _loaded(folder: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.load(folder / "images.npy"), np.load(folder / "texts.npy")


def check(
    images: np.ndarray[Any, Any], texts: np.ndarray[Any, Any], found: dict[str, np.ndarray[Any, Any]], k: int
) -> None:
    """Each way's negatives of some queries are as similar as the true ones; AssertionError otherwise."""
    owner = np.arange(len(texts)) // CAPTIONS
    for direction, query, item in (("i2t", images, texts), ("t2i", texts, images)):
        assert found[direction].shape == (len(query), k), (direction, found[direction].shape)
        for row in np.linspace(0, len(query) - 1, CHECKED).astype(int):
            similarity = query[row].astype(np.float64) @ item.astype(np.float64).T
            matching = owner == row if direction == "i2t" else np.arange(len(item)) == owner[row]
            theirs = similarity[found[direction][row]]
            assert not matching[found[direction][row]].any(), f"{direction}: query {row} got a match as a negative"
            best = np.sort(similarity[~matching])[::-1][:k]
            assert np.allclose(np.sort(theirs)[::-1], best, atol=1e-5), f"{direction}: query {row} missed some"


if __name__ == "__main__":
    typer.run(main)
