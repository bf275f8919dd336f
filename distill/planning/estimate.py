"""From a measurement to the cost of every stage: counts times what one costs, each kind of growth by itself.

Pure functions. Seconds of ``host`` are those of processors that read, prepare, search and write; seconds of ``device``
those of the models, on a GPU where there is one. One process takes both, in turn or side by side (``wall``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from distill.experiment import PREPARED_AT_ONCE
from distill.pipeline import Stretch, cut_into_rounds
from distill.planning.loads import CROWDING, FRESH, asked_first, asked_later, asked_share, sources_of, step_load
from distill.planning.measured import Measured, Shape, Source
from distill.planning.ranges import NOTHING, Known, Range, as_range, total
from distill.protocols import SIDES, Side
from distill.recipe.experiment import Recipe

Growth = Literal["constant", "items", "pairs", "steps", "queries x items"]
Spread = Literal["one", "any", "items", "ranks", "searches"]
PREPARE, TEACH, EMBED, MINE, SCORE, MAPS, EVALUATE, REPORT, START = (
    "prepare", "teach", "embed", "mine", "score", "maps", "evaluate", "report", "start",
)  # fmt: skip
_DECODERS = 4  # threads that decode pictures side by side, see distill.embed.LiveSource
# Least seconds of one call of a model, and of one step, on a device that is planned for and not there; stated.
CALL_S, STEP_S = Range(0.002, 0.005, 0.02), Range(0.005, 0.01, 0.03)
_TEXTS_A_CALL, _IMAGES_A_CALL, _MAPS_A_CALL = 256, 16, 64
_TEXTS_OF_A_UNIT = Range(0.5, 0.9, 1.0)  # distinct texts a pair of a unit, where texts do not fit into memory at once


@dataclass(frozen=True)
class Stage:
    """What one stage costs.

    Attributes:
        name: As a run's timings have it.
        what: What it gets through, in words for people, and how many.
        grows: With what its time grows as the corpus does.
        host: Seconds of a processor beside the models.
        device: Seconds of the models.
        wall: Seconds of one process that does all of it.
        spread: What can share it: ``one`` process; ``any`` way of many; ranks of one launch alone, by ``items``, or in
            training (``ranks``), or by queries, each with the whole index (``searches``).
        calls: Pairs asked of the teacher.
    """

    name: str
    what: tuple[tuple[str, Range], ...]
    grows: Growth
    host: Range = NOTHING
    device: Range = NOTHING
    wall: Range = NOTHING
    spread: Spread = "one"
    calls: Range = NOTHING


@dataclass(frozen=True)
class Assumed:
    """What is stated where it cannot be measured, or not here."""

    speedup: Known = 1.0  # of the models on the planned device over the measured one
    subset: float = 1.0  # share of the candidates, of those that the recipe asks about, that the teacher is asked about
    fresh: Range = field(default=FRESH)
    crowding: Range = field(default=CROWDING)


@dataclass(frozen=True)
class Cost:
    """Seconds that come together: of processors and of models."""

    host: Range = NOTHING
    device: Range = NOTHING
    wall: Range = NOTHING

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.host + other.host, self.device + other.device, self.wall + other.wall)

    def __mul__(self, times: Known) -> Cost:
        return Cost(self.host * times, self.device * times, self.wall * times)


def on_host(seconds: Known) -> Cost:
    """Of processors alone."""
    return Cost(as_range(seconds), NOTHING, as_range(seconds))


class Estimator:
    """A recipe on a corpus of some shape, by what was measured."""

    def __init__(self, recipe: Recipe, shape: Shape, measured: Measured, assumed: Assumed | None = None) -> None:
        self._r, self._s, self._m, self._a = recipe, shape, measured, assumed or Assumed()
        self._sources = sources_of(recipe, shape, measured)
        self.rounds = cut_into_rounds(recipe.train, recipe.mine, shape.pairs)
        arms = recipe.arms.values()
        self._mines = any(arm.uses_candidates for arm in arms)
        self._asks = any(arm.reads_scores for arm in arms)

    @property
    def crowding(self) -> Range:
        """As assumed."""
        return self._a.crowding

    @property
    def fresh(self) -> Range:
        """As assumed."""
        return self._a.fresh

    def stages(self) -> list[Stage]:
        """In the order of a run; what the recipe does not have is left out."""
        return [stage for stage in self._stages() if stage.wall.high > 0]

    def _stages(self) -> Iterator[Stage]:
        yield self._start()
        yield self._prepare()
        if self._r.teach is not None:
            yield self._teach(self._r.teach.steps)
        shared, *rounds = self.rounds
        if shared.stop:
            yield self._train("shared", [shared])
        if self._mines or self._reads_vectors:
            yield self._embed()
        if self._mines:
            yield self._mine()
        if self._asks:
            yield self._score()
        if self._r.needs_maps:
            yield self._maps()
        for name in self._r.arms:
            yield self._train(name, rounds)
        yield self._evaluate()
        yield Stage(REPORT, (), "constant", *_parts(on_host(self._m.once.report)))

    # --- of each stage ------------------------------------------------------------------------------------------------

    def _start(self) -> Stage:
        once = self._m.once
        models = once.load_teacher * 2 + once.load_student * (2 * len(self._r.arms) + 2)
        cost = on_host(once.read * (self._s.all_images) + once.check + once.start + models)
        return Stage(START, (("images", as_range(self._s.all_images)),), "items", *_parts(cost))

    def _prepare(self) -> Stage:
        cost, what = Cost(), dict[str, float]()
        for source in self._sources:
            if source.kind != "live":
                count = self._items(source.side)
                cost += self._made(source) * count
                what[f"{source.side}s"] = what.get(f"{source.side}s", 0) + count
        counts = tuple((name, as_range(count)) for name, count in what.items())
        return Stage(PREPARE, counts, "items", *_parts(cost))

    def _made(self, source: Source) -> Cost:
        """An item's inputs: decoding goes on beside the tower."""
        device = self._on_device(source.device, calls=1 / PREPARED_AT_ONCE[source.side]).device
        if source.kind != "frozen":
            device = NOTHING
        threads = _DECODERS if source.side == "image" else 1
        wall = source.wall if self._as_measured else (source.host / threads).at_least(device)
        return Cost(source.host, device, wall)

    @property
    def _as_measured(self) -> bool:
        return self._a.speedup == 1.0

    def _live(self, user: str, side: Side) -> Cost:
        """What an item's inputs cost at each use; nothing where they are kept."""
        for source in self._sources:
            if source.side == side and user in source.users and source.kind == "live":
                return on_host(source.host / (_DECODERS if side == "image" else 1))
        return Cost()

    def _items(self, side: Side) -> int:
        return self._s.all_images if side == "image" else self._s.all_texts

    def _train_items(self, side: Side) -> int:
        return self._s.images if side == "image" else self._s.texts

    def _on_device(self, seconds: Known, *, calls: Known = 0.0, least: Range = CALL_S) -> Cost:
        """Seconds as measured; scaled, at least those that so many calls take however fast the device is."""
        taken = as_range(seconds)
        if not self._as_measured:
            taken = (taken / self._a.speedup).at_least(least * calls)
        return Cost(NOTHING, taken, taken)

    def _teach(self, steps: int) -> Stage:
        teaching, teach = self._m.teaching, self._r.teach
        assert teaching is not None
        assert teach is not None
        saved = -(-steps // 250)
        cost = self._on_device(teaching.step * steps, calls=steps, least=STEP_S) + on_host(teaching.checkpoint * saved)
        for side in SIDES:
            cost += self._live("teacher", side) * (steps * teach.batch_size)
        return Stage(TEACH, (("steps", as_range(steps)),), "constant", *_parts(cost))

    def step_cost(self, arm: str | None) -> Cost:
        """One step of an arm; None: of the shared steps."""
        training, uses = self._m.training, arm is not None and self._r.arms[arm].uses_candidates
        ends = [
            step_load(self._r, self._s, crowding=crowding, sides=("image", "text") if uses else ())
            for crowding in self._a.crowding.ends
        ]
        images, texts = (Range(*sorted(getattr(end, name) for end in ends)) for name in ("images", "texts"))
        seconds = training.base + training.image * images + training.text * texts
        if arm is not None:
            grown = (images + texts) * (1 / max(1.0, training.loss_items))
            seconds = seconds + training.fixed.get(arm, NOTHING) + training.loss.get(arm, NOTHING) * grown
        cost = self._on_device(seconds, calls=1, least=STEP_S)
        share = 1 / max(1, self._r.train.workers)  # loader processes
        live = {side: self._live("student", side) for side in SIDES}
        return cost + live["image"] * (images * share) + live["text"] * (texts * share)

    def _train(self, name: str, stretches: list[Stretch]) -> Stage:
        steps = sum(stretch.stop - stretch.start for stretch in stretches)
        saved = sum(_checkpoints(each, self._r.train.checkpoint_every) for each in stretches)
        cost = self.step_cost(None if name == "shared" else name) * steps
        cost += on_host(self._m.training.checkpoint * saved + self._m.training.first_step)
        return Stage(f"train {name}", (("steps", as_range(steps)),), "steps", *_parts(cost), spread="ranks")

    @property
    def minings(self) -> int:
        """Times that candidates are mined: once for all arms, then for each arm by itself."""
        arms = sum(arm.uses_candidates for arm in self._r.arms.values())
        return 1 + (len(self.rounds) - 2) * arms if self._mines else 0

    @property
    def _reads_vectors(self) -> bool:
        parts = [part for arm in self._r.arms.values() for part in arm.losses] + list(self._r.shared_losses)
        return any(part.reads_vectors for part in parts)

    def _embed(self) -> Stage:
        cost, what = Cost(), 0.0
        for side in SIDES:
            count = self._train_items(side)
            each = self._m.embedding.image if side == "image" else self._m.embedding.text
            once = self._on_device(each, calls=1 / self._r.evaluate.batch_size)
            cost += (once + self._live("student", side)) * (count * self.minings)
            what += count * self.minings
            for teacher in self._m.teachers if self._reads_vectors else ():
                if teacher.vector is not None:
                    once = self._on_device(teacher.vector[side], calls=1 / self._r.evaluate.batch_size)
                    cost += (once + self._live("teacher", side)) * count
                    what += count
        # what `distill embed` makes with a driver is for others: a run embeds in its own processes
        return Stage(EMBED, (("items", as_range(what)),), "items", *_parts(cost), spread="items")

    def _mine(self) -> Stage:
        index, shape = self._m.index, self._s
        both = (index.build + index.query) * (shape.images + shape.texts)
        cells = index.cell * (2.0 * shape.images * shape.texts)
        counts = (("queries", as_range(float((shape.images + shape.texts) * self.minings))),)
        cost = on_host((both + cells) * self.minings)
        return Stage(MINE, counts, "queries x items", *_parts(cost), spread="searches")

    @property
    def asked(self) -> Range:
        """Distinct pairs that the training asks the teacher, of all rounds."""
        if not self._asks:
            return NOTHING
        readers = sum(arm.reads_scores for arm in self._r.arms.values())
        share = self._a.subset * asked_share(self._r)
        first = asked_first(self._r, self._s).less(self._s.pairs) * share + self._s.pairs
        later = asked_later(self._r, self._s, self._a.fresh) * share
        return first + later * ((len(self.rounds) - 2) * readers)

    def _score(self) -> Stage:
        pairs, cost = self.asked, self.scoring(self.asked, images=self._s.images, texts=self._s.texts)
        return Stage(SCORE, (("pairs", pairs),), "pairs", *_parts(cost), spread="any", calls=pairs)

    def scoring(self, pairs: Range, *, images: int, texts: int) -> Cost:
        """Of so many pairs of so many images and texts, by every teacher."""
        cost = Cost()
        for teacher in self._m.teachers:
            encoded: Known = texts
            if teacher.text_bytes * texts > self._r.score.text_memory_bytes:  # then unit by unit
                encoded = pairs * _TEXTS_OF_A_UNIT
            units = pairs * (1 / self._r.score.pairs_per_unit)
            seen = units + images  # an image whose pairs are in two units is encoded twice
            seconds = teacher.pair * pairs + teacher.image * seen + teacher.text * encoded
            calls = seen * (1 / _IMAGES_A_CALL) + pairs * (1 / self._r.score.pairs_per_chunk)
            cost += self._on_device(seconds, calls=calls + encoded * (1 / _TEXTS_A_CALL))
            cost += self._live("teacher", "image") * seen + self._live("teacher", "text") * encoded
            cost += on_host(teacher.first_call)
        return cost

    def _maps(self) -> Stage:
        pairs, cost = self._s.pairs, Cost()
        for teacher in self._m.teachers:
            if teacher.map is not None:
                cost += self._on_device(teacher.map * pairs, calls=pairs / _MAPS_A_CALL)
        return Stage(MAPS, (("pairs", as_range(pairs)),), "items", *_parts(cost))

    def _evaluate(self) -> Stage:
        shape, teachers = self._s, self._m.teachers
        listed = (shape.judged_images + shape.judged_texts) * self._r.evaluate.rerank
        most = float(shape.judged_images * shape.judged_texts)
        pairs = Range(*(min(most, listed * share) for share in (0.7, 0.85, 1.0)))
        cost = self.scoring(pairs, images=shape.judged_images, texts=shape.judged_texts)
        embedding, judged = self._m.embedding, {"image": shape.judged_images, "text": shape.judged_texts}
        for side in SIDES:
            for teacher in teachers:
                if teacher.vector is not None:
                    cost += self._on_device(teacher.vector[side] * judged[side])
            each = embedding.image if side == "image" else embedding.text
            cost += self._on_device(each * judged[side]) * len(self._r.arms)
        once = self._m.once
        cost += on_host(once.judge * (len(self._r.arms) + len(teachers)) + once.load_student * len(self._r.arms))
        return Stage(EVALUATE, (("pairs", pairs),), "constant", *_parts(cost), calls=pairs)


def whole(stages: list[Stage]) -> Cost:
    """All stages together."""
    return Cost(*(total(getattr(stage, name) for stage in stages) for name in ("host", "device", "wall")))


def _parts(cost: Cost) -> tuple[Range, Range, Range]:
    return cost.host, cost.device, cost.wall


def _checkpoints(stretch: Stretch, every: int) -> int:
    """How many a stretch writes: at every so many steps of the whole, and at its end."""
    ends = stretch.stop // every - stretch.start // every
    return ends + (1 if stretch.stop % every and stretch.stop > stretch.start else 0)
