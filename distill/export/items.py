"""A corpus' vectors in an exported folder: FAISS indexes by id, and tables with names and captions."""

from __future__ import annotations

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
        columns = _image_columns(corpus, ids[side]) if side == "image" else _text_columns(corpus, ids[side])
        rows = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
        table = pa.table(columns | {"embedding": rows})
        write_atomically(path, lambda file, table=table: pq.write_table(table, file))  # type: ignore[misc]


def item_faults(folder: Path, side: Side, reference: Mapping[int, Vectors]) -> list[str]:
    """What is wrong with the exported vectors of one side, in words.

    Args:
        folder: The exported folder.
        side: Which.
        reference: Vectors (D,) by id that those in the index are compared with; ids that it lacks are passed over.
    """
    from distill.faiss_setup import faiss_module

    where = index_folder(folder, side)
    index = faiss_module().read_index(str(where / "index.faiss"))
    ids = np.load(where / "ids.npy", allow_pickle=False)
    kept = np.load(embeddings_file(folder, side).with_suffix(".npy"), allow_pickle=False)
    if not index.ntotal == len(ids) == len(kept):
        return [f"the index of {side}s holds {index.ntotal} vectors for {len(ids)} ids and {len(kept)} embeddings"]
    said = []
    inside = index.reconstruct_n(0, index.ntotal)
    if not np.array_equal(inside, kept):
        said.append(f"the index of {side}s and embeddings/{side}s.npy hold other vectors")
    rows = np.flatnonzero(np.isin(ids, np.fromiter(reference, np.int64)))
    wanted = np.stack([reference[int(ids[row])] for row in rows]) if len(rows) else inside[:0]
    least = float((inside[rows] * wanted).sum(axis=1).min(initial=1.0))
    if not least >= _SAME:
        said.append(f"a vector in the index of {side}s has cosine {least:.6f} with the student's, wanted {_SAME:g}")
    return said


_SAME = 0.9999


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
