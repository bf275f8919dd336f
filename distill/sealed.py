"""Parquet files that prove their content: a digest of the whole file in its footer, in which its own place holds zeros.

No flipped byte goes unseen, and none reaches the Parquet reader.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_DIGEST_PLACE = b"0" * 64
_DIGEST_KEY = b"file_sha256\x18\x40"  # Thrift's compact framing: a string (0x18) of 64 (0x40) bytes follows the key
_MAGIC = b"PAR1"
_SOFTWARE = ("cross2dual", "numpy", "pyarrow", "torch", "transformers")


class SealError(ValueError):
    """A file that is torn or altered; the message is the reason alone."""


def seal(table: Any, footer: Mapping[str, str], *, compression: str = "zstd") -> bytes:
    """The file of an Arrow table, with this footer, the versions of the software and the digest."""
    import pyarrow.parquet

    buffer = io.BytesIO()
    # Without the Arrow schema, a second copy of what the Parquet schema says that no reader needs.
    with pyarrow.parquet.ParquetWriter(
        buffer, table.schema, compression=compression, use_dictionary=False, store_schema=False
    ) as writer:
        writer.write_table(table)
        software = json.dumps(_software(), sort_keys=True)
        writer.add_key_value_metadata({**footer, "software": software, "file_sha256": _DIGEST_PLACE.decode()})
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest().encode()
    at = content.rindex(_DIGEST_PLACE)  # the last: the footer comes after the data, which may hold any bytes
    return content[:at] + digest + content[at + len(digest) :]


def unseal(content: bytes, columns: tuple[str, ...]) -> tuple[dict[str, str], list[Any]]:
    """Footer and columns of a file, verified before anything is parsed.

    Whoever flips a byte does not get to choose what a parser makes of it.

    Raises:
        SealError: torn, altered, or no such file.
    """
    import pyarrow
    import pyarrow.parquet

    at = content.rfind(_DIGEST_KEY) + len(_DIGEST_KEY)
    if content[:4] != _MAGIC or content[-4:] != _MAGIC or at < len(_DIGEST_KEY):
        raise SealError("is torn or no unit at all")
    view, end = memoryview(content), at + len(_DIGEST_PLACE)
    digest = hashlib.sha256(view[:at])
    digest.update(_DIGEST_PLACE)
    digest.update(view[end:])
    if digest.hexdigest().encode() != content[at:end]:
        raise SealError("does not match the digest in its footer: a byte has changed")
    try:
        parquet = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        footer = {key.decode(): value.decode() for key, value in (parquet.metadata.metadata or {}).items()}
        table = parquet.read(use_threads=False)
        return footer, [table[name].combine_chunks() for name in columns]
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise SealError(f"is torn or no unit at all ({type(error).__name__})") from error


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
