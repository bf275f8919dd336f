"""A plan: all work units of a job, written once, read by every worker.

A folder with ``plan.json`` and memory-mappable ``.npy`` arrays: those that the kind of work names, ``cuts`` (U, 3), one
row a unit: which array, first row, row after the last; and ``units`` (U,), the names of their files. Nothing is
pickled. It holds no state: what is done is what lies in the folder of results.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from distill.durable import sha256_of, staged_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from distill.protocols import Ids

FORMAT = 1
PLAN = "plan.json"
Kind = Literal["score", "embed"]
Identity = dict[str, str | int]
_FILE = re.compile(r"\w+\.npy")  # beside the plan, nowhere else
_KEYS = {"format", "kind", "identity", "options", "recipe", "folder", "counts", "files"}


class PlanError(ValueError):
    """A plan that is torn, or not for what is here."""


@dataclass(frozen=True)
class Plan:
    """A plan as read and verified."""

    folder: Path
    kind: Kind
    identity: Identity  # what the results depend on, besides their rows
    options: dict[str, Any]  # of the kind of work
    recipe: dict[str, Any]  # the resolved recipe
    working_folder: Path  # what the recipe's relative paths are relative to
    arrays: Mapping[str, NDArray[Any]]  # memory-mapped
    cuts: Ids  # (U, 3)
    names: tuple[str, ...]  # (U,) of the units

    @classmethod
    def open(cls, folder: str | Path) -> Plan:
        """Read a plan, every byte verified.

        Raises:
            PlanError: nothing is there, torn, or of another version.
        """
        folder = Path(folder)
        about = _read(folder)
        arrays = {name.removesuffix(".npy"): _mapped(folder / name, about) for name in about["files"]}
        cuts, units = arrays.pop("cuts"), arrays.pop("units")
        return cls(
            folder,
            about["kind"],
            about["identity"],
            about["options"],
            about["recipe"],
            Path(about["folder"]),
            arrays,
            cuts,
            tuple(name.decode() for name in units.tolist()),
        )

    def check(self, found: Mapping[str, str | int]) -> None:
        """Refuse to work on a plan of something else than what was found here, by any name both have.

        Raises:
            PlanError: with what differs.
        """
        differing = [
            f"  {name}: the plan is of {self.identity[name]}, here is {value}"
            for name, value in found.items()
            if self.identity.get(name) != value
        ]
        if differing:
            raise PlanError(
                f"{self.folder} was made for something else than what this worker finds:\n"
                + "\n".join(differing)
                + "\nNothing was done. Give the worker what the plan was made with, or make the plan again by the "
                "command that made it."
            )

    def size(self, number: int) -> int:
        """Pairs or rows of a unit."""
        return int(self.cuts[number, 2] - self.cuts[number, 1])


def write_plan(
    folder: Path,
    *,
    kind: Kind,
    identity: Mapping[str, str | int],
    options: Mapping[str, Any],
    recipe: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    cuts: Sequence[tuple[int, int, int]],
    names: Sequence[str],
) -> Plan:
    """Put a plan at ``folder``, whole or not at all; one that lay there is replaced, and who has it open keeps it.

    Raises:
        NotWrittenError: no room, or not writable.
    """
    kept = {**arrays, "cuts": np.asarray(cuts, np.int64).reshape(-1, 3), "units": np.asarray(names, np.dtype("S32"))}
    with staged_folder(folder) as staging:
        files = {}
        for name, array in kept.items():
            path = staging / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        about = {
            "format": FORMAT,
            "kind": kind,
            "identity": dict(identity),
            "options": dict(options),
            "recipe": dict(recipe),
            "folder": os.getcwd(),
            "counts": {"units": len(names), "items": int((kept["cuts"][:, 2] - kept["cuts"][:, 1]).sum())},
            "files": files,
        }
        (staging / PLAN).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Plan.open(folder)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / PLAN
    if not path.is_file():
        raise PlanError(f"{folder} is no plan: it has no {PLAN}. A command with --driver makes one and names it")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _torn(path, "is no JSON") from error
    if not isinstance(about, dict) or not about.keys() >= _KEYS or about["kind"] not in get_args(Kind):
        raise _torn(path, "lacks what a plan has")
    if about["format"] != FORMAT:
        raise PlanError(
            f"{path} has format {about['format']!r}, this version reads {FORMAT}: make the plan again by the command "
            "that made it, with this version"
        )
    if not {"cuts.npy", "units.npy"} <= about["files"].keys() or not all(map(_FILE.fullmatch, about["files"])):
        raise _torn(path, "names other files than a plan has")
    return about


def _mapped(path: Path, about: Mapping[str, Any]) -> NDArray[Any]:
    told = about["files"][path.name]
    if not path.is_file():
        raise _torn(path, "is not there")
    if path.stat().st_size != told["bytes"]:
        raise _torn(path, f"has {path.stat().st_size} bytes where the plan says {told['bytes']}")
    if sha256_of(path) != told["sha256"]:
        raise _torn(path, "does not match its digest: a byte has changed")
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _torn(path: Path, fault: str) -> PlanError:
    return PlanError(
        f"{path} {fault}. Nothing of this plan is used: delete {path.parent}; the command that made it makes it again, "
        "and units that are done stay done"
    )
