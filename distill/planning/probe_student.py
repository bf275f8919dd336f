"""What a student costs: a vector, a step of its training by each arm's loss, a checkpoint; mining by its vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.batches import Batches, PairScores
from distill.extras import TOWERS
from distill.features import Features
from distill.planning.loads import CROWDING
from distill.planning.measured import EmbeddingCost, IndexCost, TrainingCost
from distill.planning.probe import repeated
from distill.planning.probe_teacher import bytes_in, weight_bytes
from distill.planning.ranges import Range
from distill.planning.sample import StandIn, StandInVectors, StepClock
from distill.protocols import SIDES, Candidates, Direction, sides_of
from distill.sampler import BatchSampler, CandidateSampler
from distill.slow_copy import MomentumSettings
from distill.timings import Timings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from distill.batches import Source
    from distill.planning.probe import Probe
    from distill.protocols import Ids, Side
    from distill.recipe.experiment import ArmRecipe

_LEAST_STEPS, _MOST_STEPS = 3, 20
_QUERIES = 512
_MOST_ITEMS = 20_000
Beside = tuple[Direction, ...]


def probe_embedding(probe: Probe, student: Any, *, seconds: float) -> EmbeddingCost:
    """Vectors as mining and evaluation make them, from ready inputs."""
    from distill.embed import embed

    each = {}
    for side in SIDES:
        source, size = probe.ready(student, side, "student", seconds=seconds), probe.x.recipe.evaluate.batch_size
        rows = np.arange(2 * size)

        def work(number: int, side: Side = side, source: Source = source, rows: Ids = rows, size: int = size) -> None:
            embed(student, source, rows + number, side, batch_size=size, device=probe.device)

        _, took = repeated(work, seconds=seconds / 2, probe=probe)
        each[side] = Range.of([second / len(rows) for second in took])
    return EmbeddingCost(image=each["image"], text=each["text"], dim=int(student.dim))


class TrainingProbe:
    """Steps of the real training on stand-in inputs, by each arm's losses."""

    def __init__(self, probe: Probe, student: Any, *, towers: Mapping[int, int], seconds: float) -> None:
        """``towers``: width of each teacher's own vectors by its place; ``seconds``: for all steps, about."""
        self._probe, self._x, self._student, self._towers = probe, probe.x, student, towers
        arms = self._x.recipe.arms
        self._mines = any(arm.uses_candidates for arm in arms.values())
        self._seconds = seconds / (len(arms) + (3 if self._mines else 1))
        self._sources = {side: probe.ready(student, side, "student", seconds=seconds) for side in SIDES}
        self._first, self._saved, self._bytes = 0.0, list[float](), 0

    def all(self) -> TrainingCost:
        """The load model by the shared losses at three loads, then each arm at its own."""
        shared = self._x.recipe.shared_losses
        loads: list[Beside] = [()]
        if self._mines and self._x.recipe.train.candidates == "encode":
            loads += [("t2i",), ("t2i", "i2t")]
        points = [(self._load(beside), self._steps(shared, beside, name=f"load-{n}")) for n, beside in enumerate(loads)]
        base, image, text = fitted([(load, took.mid) for load, took in points])
        spread = _spread([took for _, took in points])
        loss, fixed, at = dict[str, Range](), dict[str, Range](), sum(points[-1][0])
        for name, arm in self._x.recipe.arms.items():
            beside: Beside = ("t2i", "i2t") if arm.uses_candidates else ()
            took, load = self._steps(arm.losses, beside, name=f"arm-{name}", arm=arm), self._load(beside)
            more = took.less(base + image * load[0] + text * load[1])
            grows = beside and not any(part.name == "attention" for part in arm.losses)
            (loss if grows else fixed)[name] = more
        return TrainingCost(
            base=spread * base,
            image=spread * image,
            text=spread * text,
            loss=loss,
            fixed=fixed,
            loss_items=at,
            checkpoint=Range.of(self._saved),
            checkpoint_bytes=self._bytes,
            weight_bytes=weight_bytes(self._student),
            first_step=self._first,
        )

    def _steps(self, parts: Sequence[Any], beside: Beside, *, name: str, arm: ArmRecipe | None = None) -> Range:
        from distill.train import Phase, train

        x, probe, clock = self._x, self._probe, StepClock(self._probe.settle, self._probe.clock)
        losses = x.builders.losses(parts)
        batches = self._batches(losses.needs, beside, scores=arm is not None and arm.reads_scores)
        momentum = next((MomentumSettings(p.decay, p.queue) for p in parts if p.name == "momentum"), None)
        member = next((part.member for part in parts if part.name == "embedding_match"), None)
        followed = list(self._towers).index(member) if member is not None and member in self._towers else 0
        steps, took = 2, list[float]()
        for part in range(2):  # the first two steps tell how many fit
            timings, folder = Timings(), probe.folder / f"{name}-{part}"
            phase = Phase(0, steps, batches, losses, "plan", followed, momentum)
            settings = replace(x.train_settings(), steps=max(steps, x.recipe.train.steps))
            train(
                self._student, phase, settings, folder=folder, accelerator=x.accelerator, timings=timings,
                profiler=clock,
            )  # fmt: skip
            checkpoint = probe.so_far(timings, "checkpoint")
            self._saved.append(checkpoint)
            first, took = clock.steps(checkpoint)
            if part == 0:
                self._first = max(self._first, first - took[0])
            steps = 1 + int(np.clip(self._seconds / max(took), _LEAST_STEPS, _MOST_STEPS))
        self._bytes = max(self._bytes, bytes_in(folder / "checkpoints"))
        return Range.of(took)

    def _batches(self, needs: frozenset[str], beside: Beside, *, scores: bool) -> Batches:
        x, pairs = self._x, self._x.corpus.split_pairs("train")
        found = {direction: self._drawn(direction) for direction in beside}
        maps = "student_attention" in needs
        sources = (
            {side: self._probe.ready(self._student, side, "student", seconds=0, tokens=True) for side in SIDES}
            if maps
            else self._sources
        )
        kind, per_query = x.recipe.train.candidates, x.recipe.train.candidates_per_query
        samplers = tuple(CandidateSampler(those, per_query, x.recipe.seed) for those in found.values())
        vectors = StandInVectors(int(self._student.dim))
        return Batches(
            BatchSampler(pairs, x.recipe.train.batch_size, x.recipe.seed),
            x.training_images(self._student, tokens=maps) if x.recipe.train.augment else sources["image"],
            sources["text"],
            x.corpus.matches,
            self._scores(pairs, found) if scores else None,
            () if kind == "in_batch" else samplers,
            self._maps() if maps else None,
            tuple(map(StandInVectors, self._towers.values())) if needs & TOWERS else (),
            memory=dict.fromkeys(SIDES, vectors.of) if kind == "memory" and found else {},
        )

    def _drawn(self, direction: Direction) -> Candidates:
        """Drawn candidates of every training query, as crowded as mined ones are."""
        split, k = self._x.corpus.split("train").ids, self._x.recipe.mine.k
        query, item = sides_of(direction)
        rng = np.random.default_rng([self._x.recipe.seed, len(split[item])])
        among = np.sort(rng.permutation(split[item])[: max(k, round(CROWDING.mid * len(split[item])))])
        items = np.sort(among[rng.integers(0, len(among), (len(split[query]), k))], axis=1)
        similarity = np.zeros(items.shape, np.float32)
        return Candidates(direction, split[query], items, similarity, np.zeros(items.shape, np.bool_))

    def _scores(self, pairs: Ids, found: dict[Direction, Candidates]) -> PairScores:
        from distill.asking import pairs_of_all

        images, texts = pairs_of_all(pairs, found)
        drawn = np.random.default_rng(0).normal(size=len(images)).astype(np.float32)
        return PairScores.of(images, texts, drawn, self._x.corpus.n_texts)

    def _maps(self) -> Any:
        """Maps of the pairs that the teacher was measured on, for any pairs."""
        folder = next(path for path in (self._probe.folder / "maps-0").iterdir() if path.is_dir())
        features = Features.open(folder, folder.name)
        return _AnyMaps(StandIn(features, features.rows), self._x.corpus.n_texts)

    def _load(self, beside: Beside) -> tuple[float, float]:
        """Mean distinct images and texts of the first steps, by the draws that they make."""
        batches = self._batches(frozenset(), beside, scores=False)
        sizes = []
        for step in range(4):
            pairs = batches.sampler.batch(step)
            own: dict[Direction, Ids] = {"i2t": np.unique(pairs[:, 0]), "t2i": np.unique(pairs[:, 1])}
            sides: dict[Direction, Ids] = {"t2i": own["i2t"], "i2t": own["t2i"]}  # by the direction that finds them
            for sampler in batches.candidates if not batches.memory else ():
                direction = sampler.candidates.direction
                sides[direction] = np.union1d(sides[direction], sampler.draw(step, own[direction]))
            sizes.append((len(sides["t2i"]), len(sides["i2t"])))
        images, texts = np.mean(sizes, axis=0)
        return float(images), float(texts)


@dataclass(frozen=True)
class _AnyMaps:
    """The maps of some pairs in place of those of any."""

    features: StandIn
    n_texts: int

    def __call__(self, image_ids: Ids, text_ids: Ids) -> tuple[Tensor, Tensor]:
        inputs = self.features(image_ids * self.n_texts + text_ids)
        return inputs["map"], inputs["map_mask"].bool()


def fitted(points: Sequence[tuple[tuple[float, float], float]]) -> tuple[float, float, float]:
    """Seconds of a step, and of each image and each text of it, from ((images, texts), seconds) of some loads.

    None is below 0. With one load all is in the step itself; with two images and texts cost the same.
    """
    from scipy.optimize import nnls

    if len(points) == 1:
        return points[0][1], 0.0, 0.0
    loads, took = np.array([load for load, _ in points]), np.array([second for _, second in points])
    columns = loads if len(points) > 2 else loads.sum(axis=1, keepdims=True)
    scale = np.maximum(1.0, columns.max(axis=0))
    found, _ = nnls(np.column_stack([np.ones(len(took)), columns / scale]), took)
    each = found[1:] / scale
    return float(found[0]), float(each[0]), float(each[-1])


def _spread(ranges: Sequence[Range]) -> Range:
    """How far low and high lie from the middle, as factors, on average."""
    low, high = (np.mean([end(each) / max(each.mid, 1e-12) for each in ranges]) for end in (_low, _high))
    return Range(min(1.0, float(low)), 1.0, max(1.0, float(high)))


def _low(each: Range) -> float:
    return each.low


def _high(each: Range) -> float:
    return each.high


def probe_index(probe: Probe, dim: int, *, seconds: float) -> IndexCost:
    """Searches by real mining over drawn unit vectors, at two numbers of items.

    Pictures are searched for texts: the direction with more queries.
    """
    from distill.index import VectorIndex
    from distill.mine import MineSettings, mine

    x, recipe, rng = probe.x, probe.x.recipe.mine, np.random.default_rng(0)
    split, took = x.corpus.split("train"), list[tuple[int, list[float]]]()
    items = split.texts[:_MOST_ITEMS] if len(split.texts) > len(split.images) else split.images[:_MOST_ITEMS]
    direction: Direction = "i2t" if len(split.texts) > len(split.images) else "t2i"
    asking = split.images if direction == "i2t" else split.texts
    queries = asking[:_QUERIES]
    asked = _unit(rng, len(queries), dim)
    built, on_gpu = list[float](), False
    for part in (2, 1):
        count = max(min(len(items), recipe.k + recipe.skip_top + 64), len(items) // part)
        vectors, made = _unit(rng, count, dim), dict[str, VectorIndex]()

        def build(number: int, vectors: Any = vectors, count: int = count, made: Any = made) -> None:
            made["index"] = VectorIndex.build(vectors, items[:count], factory=recipe.factory, nprobe=recipe.nprobe)

        first, more = repeated(build, seconds=seconds / 8, probe=probe, least=1, most=5)
        built += [second / count for second in more]
        index = made["index"]
        on_gpu = index.on_gpu

        def search(number: int, index: Any = index) -> None:
            mine(
                index,
                asked,
                query_ids=queries,
                matches=x.corpus.matches,
                direction=direction,
                settings=MineSettings(recipe.k, skip_top=recipe.skip_top),
            )

        _, found = repeated(search, seconds=seconds / 3, probe=probe, most=10)
        took.append((count, [second / len(queries) for second in found]))
    (fewer, quick), (whole, slow) = took
    cell = Range.of(slow) / whole if whole == fewer else _slope(quick, slow, whole - fewer, most=whole)
    return IndexCost(build=Range.of(built), query=Range.of(slow).less(cell * whole), cell=cell, on_gpu=on_gpu)


def _slope(quick: list[float], slow: list[float], more: int, *, most: int) -> Range:
    """Seconds an item more, at most all of the slower."""
    middle = max(0.0, float(np.median(slow) - np.median(quick)) / more)
    return _spread([Range.of(slow)]) * min(middle, float(np.median(slow)) / most)


def _unit(rng: np.random.Generator, count: int, dim: int) -> Any:
    drawn = rng.standard_normal((count, dim), dtype=np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
