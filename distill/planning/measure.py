"""The measurement: every part of a recipe's work, a little of each, on a sample of its corpus.

What is written goes to a temporary folder; the run's folder and the caches stay as they are, but for the checks of the
data's files.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.bench.surroundings import business, machine
from distill.cores import cores
from distill.planning.loads import asked_first
from distill.planning.meaning import meaning_of
from distill.planning.measured import Machine, Measured, Once, Shape, TeacherCost, TeachingCost
from distill.planning.probe import Probe, repeated
from distill.planning.probe_student import TrainingProbe, probe_embedding, probe_index
from distill.planning.probe_teacher import probe_store, probe_teacher, probe_teaching
from distill.planning.ranges import Range
from distill.progress import hushed, is_main_process
from distill.protocols import SIDES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.data.corpus import Corpus
    from distill.experiment import Experiment
    from distill.protocols import Side

_PICTURES = 64  # whose bytes are counted
_SHARE = {"teach": 0.2, "teacher": 0.4, "student": 0.3, "index": 0.1}  # of the seconds
_READY = 0.25  # of a model's seconds, for making inputs of each side ready
_MATMUL = 2048
_CHECKERS = 8  # threads that check files side by side, see distill.data.verify


def shape_of(corpus: Corpus, judged: str) -> Shape:
    """The counts of a corpus; ``judged``: the split that students are evaluated on."""
    train, evaluated = corpus.split("train"), corpus.split(judged)
    drawn = train.images[np.linspace(0, len(train.images) - 1, min(_PICTURES, len(train.images))).astype(np.int64)]
    return Shape(
        images=len(train.images),
        texts=len(train.texts),
        pairs=len(corpus.split_pairs("train")),
        all_images=corpus.n_images,
        all_texts=corpus.n_texts,
        judged_images=len(evaluated.images),
        judged_texts=len(evaluated.texts),
        picture_bytes=float(np.mean([len(content) for content in corpus.pictures.encoded(drawn)])),
    )


def measure(x: Experiment, *, seconds: float, images: int | None = None, by_processor: bool = False) -> Measured:
    """Measure what the recipe's work costs here, in about so many seconds beside loading the models.

    Args:
        x: the experiment, nothing of it made yet or all; its recipe decides what is measured.
        seconds: for all parts together; each takes a few repetitions at least, however slow.
        images: training pictures that are planned for, where not those of the corpus: what fits on disk depends on it.
        by_processor: measure seconds of this process's processors, which others at work on the machine change little,
            in place of seconds on the clock.

    Raises:
        PreflightError, ExperimentError: the recipe could not be run.
        ValueError: ``by_processor`` where models are on a GPU.
    """
    from distill.preflight import check

    began, busy = time.perf_counter(), business()
    if by_processor and x.accelerator.device.type != "cpu":
        raise ValueError("--clock processor counts what processors do, but the models are on a GPU: --clock wall")
    shape = shape_of(x.corpus, x.recipe.evaluate.split)
    with (
        tempfile.TemporaryDirectory(prefix="cross2dual-plan-") as folder,
        only_warnings("distill"),
        hushed(),
    ):
        with x.timings.stage("check"), _words("checking the recipe"):
            check(x)
        planned = shape if images is None else shape.with_images(images)
        probe = Probe(x, planned, Path(folder), by_processor)
        return _Measurement(probe, shape, seconds).all(began, busy)


class _Measurement:
    """One measurement, part by part."""

    def __init__(self, probe: Probe, shape: Shape, seconds: float) -> None:
        self._probe, self._x, self._shape, self._seconds = probe, probe.x, shape, seconds
        self._loading: dict[str, list[float]] = {"teacher": [], "student": []}
        self._texts_an_image = asked_first(self._x.recipe, shape).mid / shape.images

    def all(self, began: float, busy: str | None) -> Measured:
        x, probe = self._x, self._probe
        teaching, teachers, store = self._teachers()
        student = self._loaded("student", x.fresh_student)
        self._loaded("student", x.fresh_student)
        seconds = self._seconds * _SHARE["student"]
        with _words("student: inputs, vectors"):
            for side in SIDES:
                probe.ready(student, side, "student", seconds=seconds * _READY)
            embedding = probe_embedding(probe, student, seconds=seconds * 0.15)
        towers = {place: teacher.dim for place, teacher in enumerate(teachers) if teacher.vector is not None}
        with _words("student: training steps"):
            training = TrainingProbe(probe, student, towers=towers, seconds=seconds * 0.5).all()
        with _words("mining"):
            index = probe_index(probe, embedding.dim, seconds=self._seconds * _SHARE["index"])
        return Measured(
            recipe=meaning_of(x.recipe),
            shape=self._shape,
            machine=self._machine(busy),
            sources=probe.sources,
            teachers=teachers,
            teaching=teaching,
            training=training,
            embedding=embedding,
            index=index,
            store=store,
            once=self._once(embedding.dim),
            seconds=time.perf_counter() - began,
            images=probe.looked_at,
        )

    def _teachers(self) -> tuple[TeachingCost | None, tuple[TeacherCost, ...], Any]:
        """Each teacher by itself, one in memory at a time; the store by the last."""
        x, teaching, costs, store = self._x, None, list[TeacherCost](), None
        parts = None if x.builders.ensemble is None else x.builders.ensemble()
        loads = {"teacher": x.untaught_teacher} if parts is None else {
            name: (lambda load=load: load(x.corpus).to(x.accelerator.device)) for name, load in parts.members.items()
        }  # fmt: skip
        for name, load in loads.items():
            teacher = self._loaded("teacher", load)
            if x.recipe.teach is not None:
                seconds = self._seconds * _SHARE["teach"]
                self._ready(teacher, seconds=seconds)
                with _words("teacher: steps of teaching"):
                    teaching = probe_teaching(self._probe, teacher, seconds=seconds * (1 - 2 * _READY))
            frozen(teacher)
            seconds = self._seconds * _SHARE["teacher"] / len(loads)
            self._ready(teacher, seconds=seconds)
            with _words(f"{name}: encoding and scoring"):
                costs.append(
                    probe_teacher(
                        self._probe, name, teacher, texts_an_image=self._texts_an_image, seconds=seconds * (1 - _READY)
                    )
                )
            store = probe_store(self._probe, teacher, texts_an_image=self._texts_an_image)
        return teaching, tuple(costs), store

    def _ready(self, teacher: Any, *, seconds: float) -> None:
        with _words("teacher: inputs"):
            for side in SIDES:
                self._probe.ready(teacher, side, "teacher", seconds=seconds * _READY)

    def _loaded(self, what: str, load: Any) -> Any:
        began = self._probe.clock()
        made = load()
        self._loading[what].append(self._probe.clock() - began)
        return made

    def _machine(self, busy: str | None) -> Machine:
        import torch

        about, device = machine(), self._probe.device
        on_gpu = device.type == "cuda"
        return Machine(
            processor=about["processor"],
            device="cuda" if on_gpu else "cpu",
            gpu=torch.cuda.get_device_name(device) if on_gpu else None,
            clock="processor" if self._probe.by_processor else "wall",
            threads=torch.get_num_threads(),
            cores=about["cores"],
            memory_bytes=memory_bytes(),
            matmul_tflops=self._matmul(),
            torch=torch.__version__,
            busy=busy,
        )

    def _matmul(self) -> float:
        """TFLOP/s of large float32 products: what a GPU's published peak is set beside."""
        import torch

        drawn = torch.randn(_MATMUL, _MATMUL, device=self._probe.device)
        _, took = repeated(lambda number: drawn @ drawn, seconds=0.5, probe=self._probe)
        return 2 * _MATMUL**3 / float(np.median(took)) / 1e12

    def _once(self, dim: int) -> Once:
        from distill.results import evaluate
        from distill.show import write_retrieval_sheet

        x, rng = self._x, np.random.default_rng(0)
        split = x.corpus.split(x.recipe.evaluate.split)
        vectors: dict[Side, Any] = {side: _unit(rng, len(rows), dim) for side, rows in split.ids.items()}
        with _words("evaluation and pictures"):
            _, judged = repeated(
                lambda number: evaluate(x, vectors, split), seconds=2, probe=self._probe, least=1, most=5
            )
            arms = list(x.recipe.arms)
            ranks = {name: rng.integers(1, 100, len(split.texts)) for name in ["teacher", *arms]}
            sheet = self._probe.folder / "sheet.png"
            _, shown = repeated(
                lambda number: write_retrieval_sheet(x, split, dict.fromkeys(arms, vectors), ranks, sheet),
                seconds=1,
                probe=self._probe,
                least=1,
                most=2,
            )
        return Once(
            start=self._probe.so_far(x.timings, "start"),
            check=Range.exactly(self._probe.so_far(x.timings, "check")),
            read=self._read(),
            load_teacher=Range.of(self._loading["teacher"]),
            load_student=Range.of(self._loading["student"]),
            judge=Range.of(judged),
            report=Range.of(shown),
        )

    def _read(self) -> Range:
        """Seconds an image of the data. Earlier checks of its files may have been on disk: then as if they were not."""
        x, probe = self._x, self._probe
        each = probe.so_far(x.timings, "read data") / x.corpus.n_images
        if x.recipe.data.source == "scenes":
            return Range.exactly(each)
        rows = probe.sample.rows("image", _PICTURES)
        _, took = repeated(lambda number: x.corpus.load_images(rows), seconds=1, probe=probe, most=10)
        side_by_side = 1 if probe.by_processor else min(_CHECKERS, cores())
        checked = float(np.median(took)) / len(rows) / side_by_side
        return Range(each, max(each, checked), each + checked)


def frozen(teacher: Any) -> None:
    """In evaluation mode, without gradients, its identity fixed: as a run's teacher is when it scores."""
    import torch

    if isinstance(teacher, torch.nn.Module):
        teacher.eval().requires_grad_(False)
    if hasattr(teacher, "fix_identity"):
        teacher.fix_identity()


def memory_bytes() -> int:
    """Of the machine."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _words(what: str) -> Iterator[None]:
    """A line when a part is done."""
    began = time.perf_counter()
    yield
    if is_main_process():
        print(f"measuring: {what}, {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def only_warnings(logger: str) -> Iterator[None]:
    """What stages say of themselves is left out in here: there are dozens of them."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.WARNING)
    try:
        yield
    finally:
        found.setLevel(before)


def _unit(rng: np.random.Generator, count: int, dim: int) -> Any:
    drawn = rng.standard_normal((count, dim), dtype=np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
