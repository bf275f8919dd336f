"""One finished work unit of teacher scores: an immutable Parquet file that proves its origin and its content.

Row per image: ``image_id`` int64, ``text_ids`` list<int64>, ``logits`` list<float32>. The footer holds schema version,
origin, counts, software versions, a checksum of ids and scores, and a digest of the whole file in which the digest's
own place holds zeros: no flipped byte goes unseen.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.durable import write_atomically
from distill.protocols import fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from distill.pairtable import Scores
    from distill.protocols import Ids, ScoreKind

SCHEMA_VERSION = 1
_DIGEST_PLACE = b"0" * 64
_SOFTWARE = ("cross2dual", "numpy", "pyarrow", "torch", "transformers")


class BadUnitError(ValueError):
    """A unit file that is torn, altered, or of another origin."""


@dataclass(frozen=True)
class Origin:
    """What scores depend on besides their pair; scores of another origin are never mixed in."""

    teacher_identity: str
    corpus_fingerprint: str
    score_kind: ScoreKind
    n_images: int
    n_texts: int


@dataclass(frozen=True)
class Unit:
    """A verified unit as read."""

    keys: Ids  # (P,) image * n_texts + text, ascending
    scores: Scores  # (P,)
    stamp: tuple[int, int]  # file size in bytes, modification time in ns


def unit_id(origin: Origin, keys: Ids) -> str:
    """Name of the unit of these pairs: the same pairs of the same origin make the same file."""
    return fingerprint("unit", SCHEMA_VERSION, asdict(origin), keys)


def write_unit(folder: Path, origin: Origin, keys: Ids, scores: Scores) -> Path:
    """Write the unit of the pairs with ascending distinct keys (P,) and finite scores (P,); returns its path."""
    name = unit_id(origin, keys)
    content = _parquet(origin, name, keys, scores)
    content = _replaced_last(content, _DIGEST_PLACE, hashlib.sha256(content).hexdigest().encode())
    path = folder / f"unit-{name}.parquet"
    write_atomically(path, lambda file: file.write(content))
    return path


def read_unit(path: Path, origin: Origin) -> Unit:
    """Read and verify one unit.

    Raises:
        BadUnitError: torn, altered, misnamed, or made with another teacher, corpus or score kind.
    """
    import pyarrow
    import pyarrow.parquet

    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        content = file.read()
    try:
        parquet = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        footer = {key.decode(): value.decode() for key, value in (parquet.metadata.metadata or {}).items()}
        _check_footer(path, content, footer, origin)  # before any data is decoded
        table = parquet.read(use_threads=False)
        columns = [table[name].combine_chunks() for name in ("image_id", "text_ids", "logits")]
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise _refused(path, f"is torn or no unit at all ({type(error).__name__})") from error
    images, texts, logits = columns
    lengths = np.diff(texts.offsets.to_numpy())
    keys = np.repeat(images.to_numpy(), lengths) * origin.n_texts + texts.values.to_numpy()
    scores = logits.values.to_numpy()
    if footer["checksum"] != fingerprint(keys, scores) or footer["unit"] != unit_id(origin, keys):
        raise _refused(path, "has ids or scores that do not match its checksum")
    return Unit(keys, scores, (status.st_size, status.st_mtime_ns))


def _parquet(origin: Origin, name: str, keys: Ids, scores: Scores) -> bytes:
    import pyarrow
    import pyarrow.parquet

    images, texts = np.divmod(keys, origin.n_texts)
    rows, starts = np.unique(images, return_index=True)
    offsets = pyarrow.array(np.append(starts, len(keys)).astype(np.int32))
    table = pyarrow.table(
        {
            "image_id": rows,
            "text_ids": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(texts)),
            "logits": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(scores)),
        }
    )
    footer = {
        "schema_version": str(SCHEMA_VERSION),
        **{key: str(value) for key, value in asdict(origin).items()},
        "unit": name,
        "images": str(len(rows)),
        "pairs": str(len(keys)),
        "checksum": fingerprint(keys, scores),
        "software": json.dumps(_software(), sort_keys=True),
        "file_sha256": _DIGEST_PLACE.decode(),
    }
    buffer = io.BytesIO()
    # Without the Arrow schema, a second copy of what the Parquet schema says that no reader needs.
    with pyarrow.parquet.ParquetWriter(
        buffer, table.schema, compression="zstd", use_dictionary=False, store_schema=False
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(footer)
    return buffer.getvalue()


def _check_footer(path: Path, content: bytes, footer: dict[str, str], origin: Origin) -> None:
    expected = {"schema_version": str(SCHEMA_VERSION), **{key: str(value) for key, value in asdict(origin).items()}}
    for key, value in expected.items():
        if footer.get(key) != value:
            raise _refused(path, f"has {key} {footer.get(key, 'missing')!r} where this store has {value!r}")
    if footer.get("unit") is None or path.name != f"unit-{footer['unit']}.parquet":
        raise _refused(path, f"holds unit {footer.get('unit')!r}, which is not what its name says")
    digest = footer.get("file_sha256", "missing")
    if (
        digest.encode() not in content
        or hashlib.sha256(_replaced_last(content, digest.encode(), _DIGEST_PLACE)).hexdigest() != digest
    ):
        raise _refused(path, "does not match the digest in its footer: a byte has changed")


def _replaced_last(content: bytes, old: bytes, new: bytes) -> bytes:
    """The last occurrence only: the footer comes after the data, which may hold any bytes."""
    at = content.rindex(old)
    return content[:at] + new + content[at + len(old) :]


def _refused(path: Path, fault: str) -> BadUnitError:
    return BadUnitError(
        f"score unit {path} {fault}. Nothing of it is used. Delete the file and score again: only its pairs are "
        f"asked anew."
    )


@cache
def _software() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in _SOFTWARE:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout, or not needed here
            continue
    return found
