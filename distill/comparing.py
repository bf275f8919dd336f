"""Gathers what the cells of a comparison left behind: evaluations, agreement with the teacher, gaps, examples."""

from __future__ import annotations

import json
import logging
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.asking import labelled_match
from distill.cells import Cost, Job
from distill.compare import Cell, Comparison, CorpusFacts, FailedCell, TeacherFacts
from distill.contrasts import contrasts
from distill.evaluate import Agreement, agreement, scores_of
from distill.exact import similarity_rows
from distill.gap import gap_report
from distill.index import VectorIndex
from distill.pipeline import SHARED, stretches
from distill.progress import track
from distill.protocols import DIRECTIONS, SIDES, Candidates, Direction, Ids, Side, sides_of
from distill.results import evaluate, rerank_shortlists, save_indexes, student_vectors
from distill.timings import Summary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distill.data.corpus import Split
    from distill.evaluate import Evaluation
    from distill.experiment import Experiment
    from distill.recipe.experiment import SubsetRecipe

log = logging.getLogger(__name__)
Vectors = np.ndarray[Any, np.dtype[np.float32]]
_LIBRARIES = ("cross2dual", "torch", "transformers", "accelerate", "faiss-cpu", "faiss-gpu", "numpy", "scipy")


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        runs: Seed -> the experiment of its cells.
        arms: Name -> its losses in one line.
        plain: The undistilled one.
        command: What to type to get it again.
        depths: K of the gap report.
        gap_queries: Queries of each direction that the gap report is over.
    """

    runs: Mapping[int, Experiment]
    arms: Mapping[str, str]
    plain: str
    command: str = ""
    depths: Sequence[int] = (8, 16, 64, 256)
    gap_queries: int = 200

    @property
    def first(self) -> Experiment:
        """The experiment of the first seed: corpus and teacher are the same in all."""
        return next(iter(self.runs.values()))

    @property
    def split(self) -> Split:
        """What students and teacher are evaluated on."""
        return self.first.corpus.split(self.first.recipe.evaluate.split)

    def job(self, arm: str, seed: int) -> Job:
        """The job of a cell."""
        return Job(self.runs[seed].folder, arm, "train")

    def waves(self) -> list[list[Job]]:
        """What the cells of each seed share comes first: shared steps, candidates, scores; then the cells."""
        arms = [self.first.recipe.arms[name] for name in self.arms]
        if not any(arm.uses_candidates for arm in arms):  # the undistilled cells make the shared steps
            shared = [self.job(self.plain, seed) for seed in self.runs]
        else:
            stage = "score" if any(arm.reads_scores for arm in arms) else "mine"
            shared = [Job(x.folder, SHARED, stage) for x in self.runs.values()]
        cells = [self.job(arm, seed) for seed in self.runs for arm in self.arms]
        return [shared, [job for job in cells if job not in shared]]


def gather(plan: Plan) -> Comparison:
    """Evaluate what is trained, and measure what only one seed is measured for.

    Raises:
        ValueError: No cell was trained.
    """
    x, split = plan.first, plan.split
    trained = {(arm, seed): job for arm in plan.arms for seed in plan.runs if (job := plan.job(arm, seed)).done}
    if not trained:
        raise ValueError(f"no cell of {x.folder.parent} was trained, so there is nothing to compare")
    (arm, seed), *_ = trained
    theirs, lists = rerank_shortlists(x, split, fallback=_student(plan, arm, seed))
    scores = {direction: scores_of(lists[direction], x.scorer.lookup) for direction in DIRECTIONS}
    cells, tops = [], dict[tuple[str, int], dict[Direction, Ids]]()
    for arm, seed in track(trained, "evaluating", unit="cells"):
        vectors = _vectors(plan, arm, seed)
        found = evaluate(x, vectors, split)
        found.save(plan.runs[seed].folder / "evaluation" / arm)
        tops[arm, seed] = _firsts(vectors, split)
        agreed = {d: _agreement(lists[d], scores[d], vectors, split) for d in DIRECTIONS}
        cells.append(_cell(plan, arm, seed, evaluation=found, agreed=agreed))
    labelled = labelled_match(x.corpus.split_pairs(split.name), "t2i", split.texts)
    first_seed = next(iter(plan.runs))
    shown = {cell.arm: cell for cell in cells if cell.seed == first_seed}
    answers = {arm: (cell.evaluation, tops[arm, first_seed]) for arm, cell in shown.items()}
    return Comparison(
        title=f"{x.recipe.teacher.kind} teacher on {x.corpus.name}: losses compared",
        command=plan.command,
        corpus=CorpusFacts(x.corpus.name, split.name, x.corpus.fingerprint, len(split.images), len(split.texts)),
        teacher=TeacherFacts(
            x.scorer.identity, x.scorer.score_kind, theirs.retrieval.as_dict(), x.recipe.evaluate.rerank
        ),
        arms=plan.arms,
        plain=plan.plain,
        seeds=tuple(plan.runs),
        cells=cells,
        image_ids=split.images,
        text_ids=split.texts,
        text_images=labelled,
        failed=_failed(plan),
        same=_same(plan),
        gap=_gaps(plan, shown, theirs),
        examples=contrasts(x, split, answers, seed=first_seed),
        environment=_environment(plan),
        time=Summary.read(*(own.folder for own in plan.runs.values())),
    )


# --- one cell -----------------------------------------------------------------------------------------------------


def _student(plan: Plan, arm: str, seed: int) -> Path:
    return plan.runs[seed].folder / "arms" / arm / "student"


def _vectors(plan: Plan, arm: str, seed: int) -> dict[Side, Vectors]:
    """Of the split's items; kept beside the student, for the next report."""
    folder = _student(plan, arm, seed).parent / "vectors"
    if not all((folder / side / "index.faiss").is_file() for side in SIDES):
        made = student_vectors(plan.runs[seed], folder.parent / "student", plan.split)
        save_indexes(made, plan.split, folder)
        return made
    return {side: VectorIndex.load(folder / side, device="cpu").vectors() for side in SIDES}


def _cell(plan: Plan, arm: str, seed: int, *, evaluation: Evaluation, agreed: Mapping[Direction, Agreement]) -> Cell:
    job = plan.job(arm, seed)
    cost = Cost.load(job.record)
    lines = _lines(job.run / "arms" / arm / "metrics.jsonl")
    own = [line for line in lines if "teacher/asked" in line]
    return Cell(
        arm,
        seed,
        evaluation,
        agreed,
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
        asked=int(sum(line["teacher/asked"] for line in own)),
        served=int(sum(line["teacher/served_from_store"] for line in own)),
        curve=[line for line in lines if "loss" in line],
    )


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _agreement(listed: Candidates, scores: Vectors, vectors: Mapping[Side, Vectors], split: Split) -> Agreement:
    """Of a student with the teacher, on the teacher's own shortlist of every query."""
    query, item = sides_of(listed.direction)
    rows = split.images if item == "image" else split.texts
    there = listed.item_ids >= 0
    places = np.searchsorted(rows, np.where(there, listed.item_ids, rows[0]))
    similarity = similarity_rows(vectors[query], vectors[item][places])
    return agreement(similarity, scores, valid=there)


def _firsts(vectors: Mapping[Side, Vectors], split: Split) -> dict[Direction, Ids]:
    """The item that each query of the split is answered with first."""
    found: dict[Direction, Ids] = {}
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        rows = split.texts if item == "text" else split.images
        found[direction] = VectorIndex.build(vectors[item], rows).search(vectors[query], 1)[1][:, 0]
    return found


# --- what is shown of a comparison ------------------------------------------------------------------------------------


def _failed(plan: Plan) -> list[FailedCell]:
    found = []
    for seed, x in plan.runs.items():
        shared = Cost.load(Job(x.folder, SHARED, "score").record)
        for arm in plan.arms:
            job = plan.job(arm, seed)
            if not job.done:
                reason = Cost.load(job.record).reason or shared.reason or "it was not run"
                found.append(FailedCell(arm, seed, reason))
    return found


def _part(subset: SubsetRecipe) -> str:
    how = "at random" if subset.by == "uniform" else "the harder the likelier"
    return f"{subset.share:.0%} of them, {subset.unit} by {subset.unit}, {how}"


def _same(plan: Plan) -> dict[str, str]:
    """What all cells of a seed have in common."""
    x, train, mined = plan.first, plan.first.recipe.train, plan.first.recipe.mine
    epochs = train.steps * train.batch_size / len(x.corpus.split_pairs("train"))
    return {
        "steps": f"{train.steps}, {train.shared:.0%} of them shared by all arms ({epochs:.1f} epochs in all)",
        "batch": f"{train.batch_size} labelled pairs, in an order drawn from the seed",
        "learning rate": f"{train.lr:g}, warm-up {train.warmup:.0%}, cosine to 0; weight decay {train.weight_decay:g}",
        "candidates": f"{mined.k} a query in each direction, mined by the student of the shared steps; "
        + {
            "encode": f"{train.candidates_per_query} drawn a step",
            "memory": f"{train.candidates_per_query} drawn a step, with the vectors that they were mined by",
            "in_batch": f"batches are made of groups of {train.group} neighbours, scored among themselves",
        }[train.candidates]
        + ("" if mined.subset is None else f"; the teacher is asked about {_part(mined.subset)}"),
        "rounds": str(len(stretches(x)) - 1),
        "initial weights": "those of the seed",
    }


def _gaps(plan: Plan, shown: Mapping[str, Cell], theirs: Evaluation) -> dict[str, Any]:
    """Gap report of the undistilled student and of the best one, of the first seed."""
    best = sorted(shown, key=lambda arm: shown[arm].evaluation.retrieval.rsum)[-1:]
    names = dict.fromkeys(arm for arm in (plan.plain, *best) if arm in shown)
    seed = next(iter(plan.runs))
    return {
        arm: gap_report(
            plan.first,
            _student(plan, arm, seed),
            _vectors(plan, arm, seed),
            plan.split,
            own=shown[arm].evaluation,
            teacher=theirs,
            depths=plan.depths,
            queries=plan.gap_queries,
        )
        for arm in names
    }


def _environment(plan: Plan) -> dict[str, str]:
    costs = [Cost.load(plan.job(arm, seed).record) for arm in plan.arms for seed in plan.runs]
    threads = sorted({cost.threads for cost in costs if cost.threads})
    return {
        "device": str(plan.first.accelerator.device),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads a cell": ", ".join(map(str, threads)) or "unknown",
        "python": platform.python_version(),
        **_versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError

    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
