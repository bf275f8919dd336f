"""All scores of a store as one file that other tools read."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from distill.durable import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any, BinaryIO

    from distill.store import ScoreStore


def export_scores(store: ScoreStore, out: Path) -> int:
    """Write every distinct pair, by image, then text: columns image_id, text_id (corpus rows) and score (float32).

    The ending of ``out`` decides: ``.parquet`` with the origin in its footer; ``.csv`` or ``.jsonl`` with the origin in
    ``<out>.origin.json`` beside it. Whatever was at ``out`` is replaced when all is written. Memory is that of a piece
    of about a million pairs.

    Returns:
        How many pairs.

    Raises:
        ValueError: another ending.
    """
    writers = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}
    write = writers.get(out.suffix)
    if write is None:
        raise ValueError(f"the ending of {out} says no format that is known here: {', '.join(writers)}")
    origin = {key: str(value) for key, value in asdict(store.origin).items()}
    n_pairs = 0

    def batches() -> Iterator[Any]:
        import pyarrow

        nonlocal n_pairs
        for images, texts, scores in store.pairs():
            n_pairs += len(scores)
            yield pyarrow.record_batch([images, texts, scores], schema=_schema())

    write_atomically(out, lambda file: write(file, batches(), origin))
    if out.suffix != ".parquet":
        about = json.dumps({**asdict(store.origin), "pairs": n_pairs}, indent=2).encode()
        write_atomically(out.with_name(f"{out.name}.origin.json"), lambda file: file.write(about))
    return n_pairs


def _schema() -> Any:
    import pyarrow

    return pyarrow.schema([("image_id", pyarrow.int64()), ("text_id", pyarrow.int64()), ("score", pyarrow.float32())])


def _write_parquet(file: BinaryIO, batches: Iterator[Any], origin: dict[str, str]) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(file, _schema(), compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
        writer.add_key_value_metadata(origin)


def _write_csv(file: BinaryIO, batches: Iterator[Any], origin: dict[str, str]) -> None:
    import pyarrow.csv

    with pyarrow.csv.CSVWriter(file, _schema()) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_jsonl(file: BinaryIO, batches: Iterator[Any], origin: dict[str, str]) -> None:
    import pyarrow
    import pyarrow.compute

    for batch in batches:
        images, texts, scores = (column.cast(pyarrow.string()) for column in batch.columns)
        lines = pyarrow.compute.binary_join_element_wise(
            '{"image_id": ', images, ', "text_id": ', texts, ', "score": ', scores, "}\n", ""
        )
        file.write("".join(lines.to_pylist()).encode())
