"""Files and folders that are either complete or not there, whatever kills the process.

Everything is written under a temporary name in the same directory, fsynced, renamed, and the directory fsynced. A
temporary is locked by the process that writes it, so that ``sweep_temporaries`` removes those of dead processes only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

log = logging.getLogger(__name__)
TEMPORARY_PREFIX = ".partial-"
# What the system says that no work in between could have caused: only writing meets these.
_NO_ROOM = {
    errno.ENOSPC: ("no room is left on its device", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room"),
    errno.EFBIG: ("it is larger than this process may write (see `ulimit -f`)", "raise the limit"),
    errno.EROFS: ("its file system is read-only", "make it writable or choose another folder"),
}
_REFUSED = {
    errno.EACCES: ("this user may not write there", "change the permissions or choose another folder"),
    errno.EPERM: ("this user may not write there", "change the permissions or choose another folder"),
    errno.ENOTDIR: ("what should be a folder on its path is a file", "choose another folder"),
    errno.EEXIST: ("what should be a folder on its path is a file", "choose another folder"),
    errno.EIO: ("its device reports a fault", "look at the device"),
}


class NotWrittenError(OSError):
    """Something could not be written. The message says why and what to do; what was there before is untouched."""


@contextmanager
def writing(path: str | Path, *, beside_work: bool = False) -> Iterator[None]:
    """Say it so that it can be mended when ``path`` cannot be written.

    ``beside_work``: not all that happens in here is writing, so that only a lack of room, or of a writable file system,
    is put down to ``path``.

    Raises:
        NotWrittenError: in place of what the system, or a library that writes, says.
    """
    try:
        yield
    except NotWrittenError:
        raise
    except Exception as error:
        known = _NO_ROOM if beside_work else _NO_ROOM | _REFUSED
        number = _system_error(error, set(known))
        if number is None:
            raise
        found, advice = known[number]
        free = _free(Path(path)) if number == errno.ENOSPC else ""
        told = NotWrittenError(
            f"{path} could not be written: {found}{free}. What was there before is whole: {advice}, then "
            f"the same command goes on (run and train: with --resume)"
        )
        told.errno = number
        raise told from error


def append_line(path: str | Path, values: Mapping[str, object]) -> None:
    """Add one JSON line to a log; the whole line or none of it. A line that a crash cut short ends first.

    Parent folders are made. One write, as far as the system takes it, so that two processes' lines do not mix.

    Raises:
        NotWrittenError: no room, or not writable.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        left = json.dumps(values).encode() + b"\n"
        with path.open("ab+", buffering=0) as file:  # a buffer would be written again on closing
            before = file.seek(0, os.SEEK_END)
            if before and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                left = b"\n" + left
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(before)
                raise


def write_atomically(path: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file so that ``path`` holds either its old content or all of the new one.

    ``writer`` gets the open binary file. Parent folders are made. If it raises, nothing is left behind.

    Raises:
        NotWrittenError: no room, or not writable.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _claim(path, lambda name: os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        try:
            with os.fdopen(descriptor, "w+b") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # before the lock goes with the file
            _fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Fill a sibling folder; at the end all its files are fsynced and it takes the place of ``path``.

    A folder already at ``path`` is replaced. If the block raises, ``path`` is as before and the staging folder is gone.

    Raises:
        NotWrittenError: no room, or not writable.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _claim(path, _make_folder)
    try:
        with writing(path, beside_work=True):
            yield temporary
        with writing(path):
            _fsync_tree(temporary)
            _move_folder(temporary, path)
            _fsync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


@contextmanager
def exclusively(path: str | Path, *, notice: str = "") -> Iterator[int]:
    """Let one process or thread at a time work towards ``path``; the others wait. A dead holder holds nothing.

    The lock file stays beside ``path``. Where the file system has no locks, nobody waits: then the last rename wins.
    ``notice`` is logged where there is somebody to wait for. Yields the lock's descriptor: a child that inherits
    it holds the lock too.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.parent / f".lock-{path.name}", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if not _lock(descriptor, wait=False):
            if notice:
                log.info("%s", notice)
            _lock(descriptor, wait=True)
        yield descriptor
    finally:
        os.close(descriptor)


def sweep_temporaries(folder: str | Path) -> int:
    """Remove what dead processes left half written in ``folder``; returns how many. Live writers are left alone."""
    folder = Path(folder)
    swept = 0
    for leftover in sorted(folder.glob(f"{TEMPORARY_PREFIX}*")):
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except FileNotFoundError:  # renamed or swept meanwhile
            continue
        try:
            if _lock(descriptor, wait=False):
                _remove(leftover)
                swept += 1
        finally:
            os.close(descriptor)
    return swept


def _claim(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A new locked temporary beside ``path`` and its descriptor."""
    while True:
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
        descriptor = make(temporary)
        _lock(descriptor, wait=False)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # a sweeper came between making and locking: start again


def _make_folder(name: Path) -> int:
    name.mkdir()
    return os.open(name, os.O_RDONLY)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock was got; no lock where another holds it or the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _move_folder(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        old = target.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-old-{target.name}")
        os.rename(target, old)
        try:
            os.rename(source, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # a file system that nobody may write to keeps it
            path.unlink()


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        _fsync_folder(Path(root))


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error(error: BaseException, known: set[int]) -> int | None:
    """The number that the system gave, from wherever in a chain of errors it stands."""
    at: BaseException | None = error
    while at is not None:
        number = at.errno if isinstance(at, OSError) else None
        if told := re.search(r"os error (\d+)", str(at)):  # what libraries in Rust make of it
            number = int(told[1])
        elif re.search(r"\d requested and \d+ written", str(at)):  # NumPy keeps the number to itself
            number = errno.ENOSPC
        if number in known:
            return number
        at = at.__cause__ or at.__context__
    return None


def _free(path: Path) -> str:
    """What is left there; a full device may have bytes, but no room for another file."""
    try:
        there = os.statvfs(next(folder for folder in path.absolute().parents if folder.is_dir()))
    except OSError:
        return ""
    none = ", and no file more fits" if there.f_files and not there.f_favail else ""
    return f" ({size_of(there.f_bavail * there.f_frsize)} free{none})"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 10 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
