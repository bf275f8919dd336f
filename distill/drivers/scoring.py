"""Scoring as a job of units: what a plan of it holds, and a worker that does its units."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distill.drivers.plan import Plan, PlanError, write_plan
from distill.protocols import fingerprint
from distill.unit import list_units, unit_path
from distill.work import Work, unit_names, work_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from distill.experiment import Experiment
    from distill.protocols import Ids
    from distill.scorer import TeacherScorer


def plan_scores(
    x: Experiment, scorer: TeacherScorer, image_ids: Ids, text_ids: Ids
) -> tuple[Plan | None, list[int], int]:
    """The plan of the pairs that the store lacks, the numbers of its units that are not done, and the pairs it has.

    A plan that is there is taken where it holds those units; else it is written anew. None where nothing is missing.
    """
    origin, options = scorer.store.origin, scorer.options
    work = work_of(scorer.store, image_ids, text_ids, options.pairs_per_unit)
    if not work.units:
        return None, [], work.served
    names = unit_names(work, origin)
    folder = plans(x) / f"score-{fingerprint('score', asdict(origin), work.wanted)}"
    recipe = recipe_of(x)
    plan = _usable(folder, names, recipe)
    if plan is None:
        plan = write_plan(
            folder,
            kind="score",
            identity=asdict(origin),
            options={"member": scorer.member},
            recipe=recipe,
            arrays={"images": work.images, "texts": work.texts, "every_text": work.every_text},
            cuts=[(0, unit.start, unit.stop) for unit in work.units],
            names=names,
        )
    place = {name: number for number, name in enumerate(plan.names)}
    return plan, [place[name] for name in names], work.served


def plans(x: Experiment) -> Path:
    """Folder of the plans of all runs with this cache."""
    return (x.cache / "plans").absolute()


def recipe_of(x: Experiment) -> dict[str, Any]:
    """The resolved recipe for a worker, which may stand in another folder and tells no trackers."""
    recipe: dict[str, Any] = x.recipe.model_dump(mode="json")
    recipe["train"]["trackers"] = []
    return {**recipe, "runs": str(x.recipe.runs.absolute()), "cache": str(x.recipe.cache.absolute())}


def _usable(folder: Path, names: Sequence[str], recipe: dict[str, Any]) -> Plan | None:
    try:
        plan = Plan.open(folder)
    except PlanError:
        return None
    return plan if plan.recipe == recipe and set(names) <= set(plan.names) else None


class ScoreJob:
    """The teacher of a plan, at work on its units."""

    def __init__(self, plan: Plan, x: Experiment) -> None:
        """Everything that the work depends on is compared with the plan before the first unit.

        Raises:
            PlanError: another teacher or corpus.
        """
        self.plan = plan
        plan.check({"corpus_fingerprint": x.corpus.fingerprint})  # before a large teacher is loaded
        scorer = x.scorer_named(plan.options["member"])
        plan.check(asdict(scorer.store.origin))
        units = [slice(int(start), int(stop)) for _, start, stop in plan.cuts.tolist()]
        arrays = plan.arrays
        work = Work(arrays["images"], arrays["texts"], units, arrays["every_text"], served=0, wanted="")
        self._store, self._scoring = scorer.store, scorer.scoring(work)

    def there(self) -> set[str]:
        """Names of the store's units."""
        return set(list_units(self._store.folder))

    def is_there(self, number: int) -> bool:
        """Whether the store has this unit."""
        return unit_path(self._store.folder, self.plan.names[number]).is_file()

    def do(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Score these units into the store."""
        return self._scoring.do(numbers)
