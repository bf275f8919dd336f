"""Files and folders that are either complete or not there, whatever kills the process.

Everything is written under a temporary name in the same directory, fsynced, renamed, and the directory fsynced. A
temporary is locked by the process that writes it, so that ``sweep_temporaries`` removes those of dead processes only.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
TEMPORARY_PREFIX = ".partial-"


def write_atomically(path: str | Path, writer: Callable[[BinaryIO], object]) -> None:
    """Write a file so that ``path`` holds either its old content or all of the new one.

    ``writer`` gets the open binary file. Parent folders are made. If it raises, nothing is left behind.
    """
    path = Path(path)
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
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = _claim(path, _make_folder)
    try:
        yield temporary
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
        os.rename(source, target)
        shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
