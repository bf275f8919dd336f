"""Embedding as a job of units: what a plan of it holds, and a worker that does its units.

Items are batched as ``embed`` batches them all together, and a unit is so many whole batches: a vector's last digits do
not depend on who computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.drivers.plan import Plan, PlanError, write_plan
from distill.drivers.scoring import plans, recipe_of
from distill.drivers.vectors import VectorUnits, join, joined_mark
from distill.protocols import SIDES, Side, fingerprint, weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from distill.batches import Source
    from distill.experiment import Experiment
    from distill.features import Features
    from distill.protocols import Ids

_ARRAYS: dict[Side, str] = {"image": "images", "text": "texts"}


@dataclass(frozen=True)
class Wanted:
    """Whose vectors of what, and where they go."""

    to: Path
    arm: str = ""  # empty: the teacher
    split: str = ""  # empty: the whole corpus
    sides: tuple[Side, ...] = SIDES
    rows_per_unit: int = 8192


class Embedder:
    """A trained student, or the teacher, that embeds rows of the corpus."""

    def __init__(self, x: Experiment, arm: str) -> None:
        """Raises FileNotFoundError where the arm was not trained, ValueError where the teacher is an ensemble."""
        self._x, self.arm = x, arm
        self.batch_size = x.recipe.evaluate.batch_size
        if arm:
            folder = x.folder / "arms" / x.arm_named(arm) / "student"
            if not (folder / "done.json").is_file():
                raise FileNotFoundError(
                    f"{x.folder} has no trained student of the arm {arm}: distill train RECIPE --arm {arm} first"
                )
            self.model = x.saved_student(folder)
        else:
            if x.builders.ensemble is not None:
                raise ValueError("the teacher is an ensemble, which has no vectors of one width: give --arm NAME")
            self.model = x.teacher
        self._sources: dict[Side, Source] = {}

    def identity(self) -> dict[str, str | int]:
        """What the vectors depend on, besides their rows; batches, since last digits do."""
        own = getattr(self.model, "identity", None) or fingerprint("student", weights_fingerprint(self.model))
        corpus = self._x.corpus
        return {"model": own, "corpus_fingerprint": corpus.fingerprint, "batch_size": self.batch_size}

    def frozen_outputs_missing(self, side: Side) -> bool:
        """Whether a frozen tower's outputs would have to be computed first, by one process for the whole corpus."""
        from distill.feature_files import MANIFEST
        from distill.frozen import frozen_place

        place = frozen_place(self._x.corpus, side, self.model, self._x.cache)
        return place is not None and not (place[0] / MANIFEST).is_file()

    def source(self, side: Side, *, live: bool) -> Source:
        """Of the model's inputs; ``live``: decoded and prepared anew, nothing is kept."""
        from distill.embed import live_source

        if side not in self._sources:
            made = live_source(self._x.corpus, side, self.model) if live else self._x.source(self.model, side)
            self._sources[side] = made
        return self._sources[side]

    def embed(self, rows: Ids, side: Side, *, live: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Unit vectors (N, D) of the rows, in their order.

        Raises:
            ValueError: a vector is faulty (names the rows), or the teacher has no contrastive head.
        """
        from distill.embed import embed, embed_with_teacher

        run: Callable[..., Any] = embed if self.arm else embed_with_teacher
        found: np.ndarray[Any, np.dtype[np.float32]] = run(
            self.model,
            self.source(side, live=live),
            rows,
            side,
            batch_size=self.batch_size,
            device=self._x.accelerator.device,
            show=False,
        )
        return found


def plan_vectors(x: Experiment, embedder: Embedder, wanted: Wanted) -> Plan:
    """The plan of all vectors that are wanted, one that is there or a new one.

    Raises:
        ValueError: what is to be joined would lie where something else does.
    """
    from distill.features import covering

    to, identity = wanted.to.absolute(), embedder.identity()
    live = [side for side in wanted.sides if embedder.frozen_outputs_missing(side)]
    arrays: dict[str, Ids] = {}
    cuts: list[tuple[int, int, int]] = []
    names: list[str] = []
    units = VectorUnits(to / "units", identity)
    for place, side in enumerate(wanted.sides):
        rows = _rows(x, side, wanted.split)
        covering(to / _ARRAYS[side], joined_mark(identity, side), rows)  # refused now, not after the work
        lengths = getattr(embedder.source(side, live=side in live), "lengths", None)
        ordered = rows if lengths is None else rows[np.argsort(lengths(rows), kind="stable")]
        arrays[_ARRAYS[side]] = ordered
        size = max(1, wanted.rows_per_unit // embedder.batch_size) * embedder.batch_size
        for start in range(0, len(ordered), size):
            cuts.append((place, start, min(start + size, len(ordered))))
            names.append(units.name(side, ordered[start : start + size]))
    options = {"arm": wanted.arm, "to": str(to), "sides": list(wanted.sides), "live": live}
    recipe = recipe_of(x)
    folder = plans(x) / f"embed-{fingerprint('embed', identity, options, names)}"
    try:
        plan = Plan.open(folder)
        if plan.recipe == recipe:
            return plan
    except PlanError:
        pass  # none yet, or torn
    return write_plan(
        folder,
        kind="embed",
        identity=identity,
        options=options,
        recipe=recipe,
        arrays=arrays,
        cuts=cuts,
        names=names,
    )


def _rows(x: Experiment, side: Side, split: str) -> Ids:
    if split:
        return x.corpus.split(split).ids[side]
    return np.arange(x.corpus.n_images if side == "image" else x.corpus.n_texts, dtype=np.int64)


def units_of(plan: Plan) -> VectorUnits:
    """Where a plan's units go."""
    return VectorUnits(Path(plan.options["to"]) / "units", plan.identity)


def rows_of(plan: Plan, side: Side) -> Ids:
    """Rows of a side that were wanted, ascending."""
    return np.sort(plan.arrays[_ARRAYS[side]])


def join_all(plan: Plan) -> dict[Side, Features]:
    """The feature folders ``images`` and ``texts`` of a plan whose units are all there.

    Raises:
        BadVectorsError: a unit is torn or altered.
    """
    found: dict[Side, Features] = {}
    for place, side in enumerate(plan.options["sides"]):
        parts = [plan.arrays[_ARRAYS[side]][start:stop] for which, start, stop in plan.cuts.tolist() if which == place]
        found[side] = join(units_of(plan), Path(plan.options["to"]) / _ARRAYS[side], side, parts)
    return found


class EmbedJob:
    """The model of a plan, at work on its units."""

    def __init__(self, plan: Plan, x: Experiment, embedder: Embedder | None = None) -> None:
        """Everything that the work depends on is compared with the plan before the first unit.

        Raises:
            PlanError: another student, teacher or corpus.
        """
        self.plan = plan
        plan.check({"corpus_fingerprint": x.corpus.fingerprint})
        self._embedder = embedder or Embedder(x, plan.options["arm"])
        plan.check(self._embedder.identity())
        self._units = units_of(plan)

    def there(self) -> set[str]:
        """Names of the units whose files are there."""
        return self._units.there()

    def is_there(self, number: int) -> bool:
        """Whether the file of this unit is there."""
        return self._units.path(self._side(number), self.plan.names[number]).is_file()

    def _side(self, number: int) -> Side:
        side: Side = self.plan.options["sides"][int(self.plan.cuts[number, 0])]
        return side

    def do(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Embed these units into their files; a signal is heeded after each."""
        from distill import stopping

        for number in numbers:
            side, (start, stop) = self._side(number), self.plan.cuts[number, 1:].tolist()
            rows = self.plan.arrays[_ARRAYS[side]][start:stop]
            with stopping.finishing():
                vectors = self._embedder.embed(rows, side, live=side in self.plan.options["live"])
                self._units.write(side, rows, vectors)
            yield number, len(rows)
