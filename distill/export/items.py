"""A corpus' vectors in an exported folder: FAISS indexes by id, and tables with names and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import write_atomically
from distill.export.layout import embeddings_file, index_folder
from distill.index import VectorIndex
from distill.protocols import SIDES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.data.corpus import Corpus
    from distill.exact import Vectors
    from distill.protocols import Ids, Side


def write_items(folder: Path, corpus: Corpus, ids: Mapping[Side, Ids], vectors: Mapping[Side, Vectors]) -> None:
    """Write ``index/`` and ``embeddings/`` of these rows of the corpus.

    Args:
        folder: The exported folder.
        corpus: Whose rows ``ids`` are.
        ids: Rows by side, ascending.
        vectors: (N, D) unit vectors by side, in that order.

    Raises:
        MissingFaissError: FAISS is not installed.
        NotWrittenError: no room.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for side in SIDES:
        # flat, on the processor: what every FAISS reads
        VectorIndex.build(vectors[side], ids[side], device="cpu").save(index_folder(folder, side))
        path = embeddings_file(folder, side)
        array = vectors[side]
        write_atomically(path.with_suffix(".npy"), lambda file, array=array: np.save(file, array, allow_pickle=False))  # type: ignore[misc]
        table = pa.table(_columns(corpus, side, ids[side], array))
        write_atomically(path, lambda file, table=table: pq.write_table(table, file))  # type: ignore[misc]


@dataclass(frozen=True, eq=False)
class Known:
    """What an exported index of one side has to hold.

    Attributes:
        ids: (N,) all of them, ascending.
        some: (K,) of them.
        vectors: (K, D) the student's vectors of ``some``.
    """

    ids: Ids
    some: Ids
    vectors: Vectors


def item_faults(folder: Path, side: Side, known: Known, *, corpus: Corpus) -> list[str]:
    """What is wrong with the exported vectors and tables of one side, in words; empty where nothing is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from distill.faiss_setup import faiss_module

    faiss, where = faiss_module(), index_folder(folder, side)
    index = faiss.read_index(str(where / "index.faiss"))
    ids = np.load(where / "ids.npy", allow_pickle=False)
    kept = np.load(embeddings_file(folder, side).with_suffix(".npy"), allow_pickle=False)
    if not np.array_equal(ids, known.ids):
        return [f"index/{side}/ids.npy has other ids than were exported"]
    if not index.ntotal == len(ids) == len(kept):
        return [f"the index of {side}s holds {index.ntotal} vectors for {len(ids)} ids and {len(kept)} embeddings"]
    said = []
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        said.append(f"the index of {side}s does not search by inner product")
    inside = index.reconstruct_n(0, index.ntotal)
    if not np.array_equal(inside, kept):
        said.append(f"the index of {side}s and embeddings/{side}s.npy hold other vectors")
    found = inside[np.searchsorted(ids, known.some)]
    least = float((found * known.vectors).sum(axis=1).min(initial=1.0))
    if not least >= _SAME:
        said.append(f"a vector in the index of {side}s has cosine {least:.6f} with the student's, wanted {_SAME:g}")
    if not pq.read_table(embeddings_file(folder, side)).equals(pa.table(_columns(corpus, side, ids, kept))):
        said.append(f"embeddings/{side}s.parquet has other rows than the corpus and embeddings/{side}s.npy")
    return said


_SAME = 0.9999


def _columns(corpus: Corpus, side: Side, ids: Ids, vectors: Vectors) -> dict[str, Any]:
    import pyarrow as pa

    columns = _image_columns(corpus, ids) if side == "image" else _text_columns(corpus, ids)
    return columns | {"embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])}


def _image_columns(corpus: Corpus, rows: Ids) -> dict[str, Any]:
    return {
        "id": rows,
        "name": [corpus.image_names[row] for row in rows.tolist()],
        "sha256": [corpus.image_fingerprints[row] for row in rows.tolist()],
    }


def _text_columns(corpus: Corpus, rows: Ids) -> dict[str, Any]:
    import pyarrow as pa

    order = np.argsort(corpus.pairs[:, 1], kind="stable")
    texts, images = corpus.pairs[order, 1], corpus.pairs[order, 0]
    bounds = np.searchsorted(texts, rows), np.searchsorted(texts, rows, side="right")
    labelled = [images[start:stop].tolist() for start, stop in zip(*bounds, strict=True)]
    return {
        "id": rows,
        "text": [corpus.texts[row] for row in rows.tolist()],
        "images": pa.array(labelled, pa.list_(pa.int64())),
    }
