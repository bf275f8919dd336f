"""A whole plan: what is planned for, by which measurement and assumptions, and everything that follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from distill.planning.budget import Fit, fit
from distill.planning.estimate import CALL_S, MINE, STEP_S, Assumed, Estimator, Stage, whole
from distill.planning.gpus import GPUS, Gpu, gpu_named, is_that
from distill.planning.loads import own_load
from distill.planning.ranges import Range, as_range
from distill.planning.resources import Amounts, amounts
from distill.planning.ways import Run, runs

if TYPE_CHECKING:
    from distill.planning.against import Against
    from distill.planning.measured import Measured, Shape
    from distill.recipe.experiment import Recipe

# A GPU's models reach some part of the share of the peak that they reach here; stated.
_OF_PEAK = Range(0.3, 0.6, 1.0)
_FLOOR = (
    f"but no call of a model quicker than {1000 * CALL_S.mid:g} ms ({1000 * CALL_S.low:g} to {1000 * CALL_S.high:g}) "
    f"and no step quicker than {1000 * STEP_S.mid:g} ms ({1000 * STEP_S.low:g} to {1000 * STEP_S.high:g})"
)


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        images: Training pictures; None = the corpus as it is.
        texts: Training texts; None = as many a picture as in the corpus.
        gpu: Name of a GPU in the table; None = the machine that was measured.
        speedup: How many times as fast its models are as those measured; None = by the table.
        workers: Processes of the ways that have several.
        rate: Money an hour of a worker.
        budget: Money.
        hours: Of one worker.
        memory_gib: Of the machine that mines; None = of the machine that was measured.
        fresh: Share of a later round's candidates that are new; None = stated.
    """

    images: int | None = None
    texts: int | None = None
    gpu: str | None = None
    speedup: float | None = None
    workers: int = 2
    rate: float | None = None
    budget: float | None = None
    hours: float | None = None
    memory_gib: float | None = None
    fresh: float | None = None


@dataclass(frozen=True)
class Plan:
    """What came of it."""

    name: str
    wish: Wish
    shape: Shape
    measured: Measured
    stages: tuple[Stage, ...]
    ways: tuple[Run, ...]
    amounts: Amounts
    fit: Fit | None
    notes: tuple[str, ...]
    is_measured: bool  # on what is planned for, not scaled
    against: Against | None = None

    @property
    def memory_bytes(self) -> float:
        """Of the machine that mines."""
        gib = self.wish.memory_gib
        return self.measured.machine.memory_bytes if gib is None else gib * 2**30

    def as_dict(self) -> dict[str, Any]:
        """In plain containers; ranges as [low, mid, high]."""
        found = {
            "recipe": self.name,
            "asked": asdict(self.wish),
            "measured_on_the_spot": self.is_measured,
            "shape": self.shape.model_dump(mode="json"),
            "stages": [asdict(stage) | {"what": dict(stage.what)} for stage in self.stages],
            "all": asdict(whole(list(self.stages))),
            "ways": [asdict(run) | {"way": run.way.name} for run in self.ways],
            "disk_bytes": dict(self.amounts.disk),
            "memory_bytes": dict(self.amounts.memory),
            "network_bytes": dict(self.amounts.network),
            "shards": self.amounts.shards,
            "shard_items": self.amounts.shard_items,
            "fit": None if self.fit is None else asdict(self.fit),
            "against": None if self.against is None else asdict(self.against),
            "notes": list(self.notes),
            "measurement": self.measured.model_dump(mode="json"),
        }
        plain: dict[str, Any] = _plain(found)
        return plain


def make_plan(recipe: Recipe, measured: Measured, wish: Wish) -> Plan:
    """Estimate everything.

    Raises:
        ValueError: what is asked for cannot be: a number below 1, an unknown GPU, a budget without a rate.
    """
    check_wish(wish)
    shape = _shape(measured.shape, wish)
    speedup, scaled = _speedup(recipe, measured, wish)
    assumed = Assumed(speedup=speedup)
    if wish.fresh is not None:
        assumed = replace(assumed, fresh=Range.exactly(wish.fresh))
    estimator = Estimator(recipe, shape, measured, assumed)
    stages = estimator.stages()
    on_gpu = wish.gpu is not None or measured.machine.device == "cuda"
    memory = measured.machine.memory_bytes if wish.memory_gib is None else wish.memory_gib * 2**30
    hours = wish.hours if wish.budget is None or not wish.rate else wish.budget / wish.rate
    return Plan(
        name=recipe.name,
        wish=wish,
        shape=shape,
        measured=measured,
        stages=tuple(stages),
        ways=tuple(runs(recipe, measured, stages, workers=wish.workers, on_gpu=on_gpu, rate=wish.rate)),
        amounts=amounts(recipe, shape, measured, stages, estimator.minings, memory_bytes=memory),
        fit=None if hours is None else fit(recipe, shape, measured, assumed, hours=hours),
        notes=(*_notes(recipe, measured, shape, estimator, scaled), *_advice(recipe, stages)),
        is_measured=scaled is None,
    )


def check_wish(wish: Wish) -> None:
    """Refuse what cannot be, before anything is measured.

    Raises:
        ValueError: with the value and what is allowed.
    """
    for name, least in (("images", 1), ("texts", 1), ("workers", 1)):
        value = getattr(wish, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}: give at least {least}")
    for name in ("speedup", "rate", "budget", "hours", "memory_gib"):
        value = getattr(wish, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.removesuffix('_gib')} is {value}: give a number above 0")
    if wish.fresh is not None and not 0 <= wish.fresh <= 1:
        raise ValueError(f"--fresh is {wish.fresh}: give a share, 0 to 1")
    if wish.budget is not None and wish.rate is None:
        raise ValueError("--budget is money, so it takes --rate, the money an hour of a worker; or give --hours")
    if wish.budget is not None and wish.hours is not None:
        raise ValueError("--budget and --hours are two budgets: give one of them")
    if wish.gpu is not None and wish.speedup is None:
        gpu_named(wish.gpu)  # refused before anything is measured


def _shape(shape: Shape, wish: Wish) -> Shape:
    found = shape if wish.images is None else shape.with_images(wish.images)
    if wish.texts is None:
        return found
    pairs = max(wish.texts, found.images, round(found.pairs * wish.texts / found.texts))
    return found.model_copy(
        update={"texts": wish.texts, "pairs": pairs, "all_texts": found.all_texts - found.texts + wish.texts}
    )


def _speedup(recipe: Recipe, measured: Measured, wish: Wish) -> tuple[Range | float, str | None]:
    """How many times as fast the models are as measured, and the words that say so; None where nothing is scaled."""
    machine = measured.machine
    where = machine.gpu or f"{machine.processor}, {machine.threads} thread(s)"
    if wish.speedup is not None:
        return wish.speedup, (
            f"planned, not measured: models were measured on {where} and are taken to be {wish.speedup:g} times as "
            f"fast on {wish.gpu or 'the planned device'} (--speedup), {_FLOOR}"
        )
    if wish.gpu is None:
        return 1.0, None
    gpu = gpu_named(wish.gpu)
    if is_that(gpu, machine.gpu):
        return 1.0, None
    half = getattr(recipe.teacher, "precision", "float32") != "float32"
    here = next((each for each in GPUS.values() if is_that(each, machine.gpu)), None)
    base = machine.matmul_tflops if here is None else _peak(here, half)
    ratio = _OF_PEAK * (_peak(gpu, half) / base) if base else as_range(1.0)
    return ratio, (
        f"planned, not measured: there is no {gpu.words} here. Its published peak is {_peak(gpu, half):g} TFLOP/s "
        f"({'half precision' if half else 'float32'}), {where} reaches {base:.3g} in large float32 products; models "
        f"are taken to be {ratio.mid:,.0f} times as fast there ({ratio.low:,.0f} to {ratio.high:,.0f}: they reach "
        f"{_OF_PEAK.low:.0%} to {_OF_PEAK.high:.0%} of the share of the peak that they reach here), {_FLOOR}. "
        "Measure there with --save FILE and plan with --measured FILE, or give --speedup X"
    )


def _peak(gpu: Gpu, half: bool) -> float:
    return gpu.half if half else gpu.float32


def _notes(recipe: Recipe, measured: Measured, shape: Shape, estimator: Estimator, scaled: str | None) -> list[str]:
    machine, train = measured.machine, recipe.train
    notes = [] if scaled is None else [scaled]
    where = machine.gpu or f"{machine.processor}, {machine.threads} thread(s) of {machine.cores} core(s)"
    notes.append(
        f"measured in {measured.seconds:.0f} s on {where}, {measured.images} pictures of the corpus; ranges are the "
        "middle half of what was timed, and what is stated below; from empty caches"
    )
    if machine.busy is not None:
        notes.append(machine.busy)
    epochs = train.steps * train.batch_size / shape.pairs
    notes.append(
        f"steps are fixed by the recipe: train.steps {train.steps:,} of {train.batch_size} pairs are {epochs:.3g} "
        f"epochs of {shape.pairs:,} pairs; for more of them the training's time grows alike"
    )
    if estimator.minings:
        own = own_load(shape, train.batch_size)
        notes.append(
            "stated, not measured: mined candidates crowd on "
            f"{estimator.crowding.low:.0%} to {estimator.crowding.high:.0%} of the items, so that a step of "
            f"{own.items:,.0f} items encodes more beside them; of the pairs that both directions mine 85 to 100 % are "
            "distinct"
        )
    if len(estimator.rounds) > 2:
        notes.append(
            f"of a later round's candidates {estimator.fresh.low:.0%} to {estimator.fresh.high:.0%} are taken to be "
            "new (--fresh; a run's metrics.jsonl has candidates/fresh_share)"
        )
    if recipe.mine.drop_above_positive is not None:
        notes.append("mine.drop_above_positive asks the teacher about more candidates than are kept: not counted")
    return notes


def _advice(recipe: Recipe, stages: list[Stage]) -> list[str]:
    """Where the square of the corpus has outgrown all else."""
    mining = sum(stage.wall.mid for stage in stages if stage.name == MINE)
    if mining <= whole(stages).wall.mid / 2 or recipe.mine.factory != "Flat":
        return []
    return [
        "more than half of all is mining: a flat index compares every query with every item. An approximate index "
        "(mine.factory, e.g. IVF4096,Flat with mine.nprobe) or one on a GPU takes a fraction; give it and measure again"
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Range):
        return list(value.ends)
    if isinstance(value, dict):
        if set(value) == {"low", "mid", "high"}:
            return [value["low"], value["mid"], value["high"]]
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(value)
    return value
