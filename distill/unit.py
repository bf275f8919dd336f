"""One finished work unit of teacher scores: an immutable Parquet file that proves its origin and its content.

Row per image: ``image_id`` int64, ``text_ids`` list<int64>, ``logits`` list<float32>. The footer holds schema version,
origin, counts, software versions, a checksum of ids and scores, and a digest of the whole file (see ``sealed``).
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np

from distill.durable import write_atomically
from distill.protocols import fingerprint
from distill.sealed import SealError, seal, unseal

if TYPE_CHECKING:
    from pathlib import Path

    from distill.pairtable import Scores, Stamp
    from distill.protocols import Ids, ScoreKind

SCHEMA_VERSION = 1
_UNIT_NAME = re.compile(r"unit-([0-9a-f]{32})\.parquet")


class BadUnitError(ValueError):
    """A unit file that is torn, altered, or of another origin. ``fault`` is the reason alone."""

    fault = "is no unit that can be used"


@dataclass(frozen=True)
class Origin:
    """What scores depend on besides their pair; scores of another origin are never mixed in.

    Raises:
        ValueError: a name that is no folder name, or a corpus whose pairs cannot be numbered.
    """

    teacher_identity: str
    corpus_fingerprint: str
    score_kind: ScoreKind
    n_images: int
    n_texts: int

    def __post_init__(self) -> None:
        for name in (self.teacher_identity, self.corpus_fingerprint):
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
                raise ValueError(f"an identity names a folder: letters, digits, '.', '_', '-' only; got {name!r}")
        if min(self.n_images, self.n_texts) < 1 or self.n_images * self.n_texts >= 2**63:
            raise ValueError(
                f"n_images and n_texts must be at least 1 and their product below 2**63; got {self.n_images}, "
                f"{self.n_texts}"
            )


@dataclass(frozen=True)
class Unit:
    """A verified unit as read."""

    keys: Ids  # (P,) image * n_texts + text, ascending
    scores: Scores  # (P,) finite
    stamp: Stamp
    content: bytes = field(repr=False)  # of the file


def unit_path(folder: Path, name: str) -> Path:
    """File of the unit with this id."""
    return folder / f"unit-{name}.parquet"


def list_units(folder: Path) -> dict[str, Stamp]:
    """Stamps of the units in a folder, by unit id; nothing is read."""
    stamps = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            named = _UNIT_NAME.fullmatch(entry.name)
            with suppress(FileNotFoundError):  # moved aside meanwhile
                if named:
                    status = entry.stat()
                    stamps[named[1]] = (status.st_size, status.st_mtime_ns)
    return stamps


def unit_id(origin: Origin, keys: Ids) -> str:
    """Name of the unit of these pairs: the same pairs of the same origin make the same file."""
    return fingerprint("unit", SCHEMA_VERSION, asdict(origin), keys)


def write_unit(folder: Path, origin: Origin, keys: Ids, scores: Scores) -> Path:
    """Write the unit of the pairs with ascending distinct keys (P,) and finite scores (P,); returns its path."""
    name = unit_id(origin, keys)
    content = _parquet(origin, name, keys, scores)
    path = unit_path(folder, name)
    write_atomically(path, lambda file: file.write(content))
    return path


def read_unit(path: Path, origin: Origin) -> Unit:
    """Read and verify one unit.

    Raises:
        BadUnitError: torn, altered, misnamed, or made with another teacher, corpus or score kind.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        content = file.read()
    try:
        footer, columns = unseal(content, ("image_id", "text_ids", "logits"))
    except SealError as error:
        raise _refused(path, str(error)) from error
    _check_footer(path, footer, origin)
    images, texts, logits = columns
    rows, ids, scores = images.to_numpy(), texts.values.to_numpy(), logits.values.to_numpy()
    keys = np.repeat(rows, np.diff(texts.offsets.to_numpy())) * origin.n_texts + ids
    if footer.get("checksum") != fingerprint(keys, scores) or footer["unit"] != unit_id(origin, keys):
        raise _refused(path, "has ids or scores that do not match its checksum")
    if not len(keys) or rows.min() < 0 or rows.max() >= origin.n_images or ids.min() < 0 or ids.max() >= origin.n_texts:
        raise _refused(path, "has no pairs, or ids outside its corpus")
    if (keys[1:] <= keys[:-1]).any():
        raise _refused(path, "holds a pair twice, or pairs out of order")
    if not np.isfinite(scores).all():
        raise _refused(path, f"holds {int((~np.isfinite(scores)).sum())} scores that are not finite")
    return Unit(keys, scores, (status.st_size, status.st_mtime_ns), content)


def read_origin(path: Path) -> Origin:
    """What a unit says of its origin, from its footer alone: quick, and not verified.

    Raises:
        BadUnitError: torn, or not a unit.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_metadata(path).metadata or {}
        footer = {key.decode(): value.decode() for key, value in found.items()}
        identity, corpus, kind = (footer[key] for key in ("teacher_identity", "corpus_fingerprint", "score_kind"))
        return Origin(identity, corpus, cast("ScoreKind", kind), int(footer["n_images"]), int(footer["n_texts"]))
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise _refused(path, f"is torn or no unit at all ({type(error).__name__})") from error


def _parquet(origin: Origin, name: str, keys: Ids, scores: Scores) -> bytes:
    import pyarrow

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
    }
    return seal(table, footer)


def _check_footer(path: Path, footer: dict[str, str], origin: Origin) -> None:
    expected = {"schema_version": str(SCHEMA_VERSION), **{key: str(value) for key, value in asdict(origin).items()}}
    for key, value in expected.items():
        if footer.get(key) != value:
            raise _refused(path, f"has {key} {footer.get(key, 'missing')!r} where this store has {value!r}")
    if footer.get("unit") is None or path != unit_path(path.parent, footer["unit"]):
        raise _refused(path, f"holds unit {footer.get('unit')!r}, which is not what its name says")


def _refused(path: Path, fault: str) -> BadUnitError:
    error = BadUnitError(
        f"score unit {path} {fault}. Nothing of it is used. Move it aside with "
        f"`distill store verify --quarantine {path.parent}` and score again: only its pairs are asked anew."
    )
    error.fault = fault
    return error
