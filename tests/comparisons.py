"""Made comparisons: ranks from a simple model of easy and hard images, so that the truth about each arm is known.

Every query has a difficulty; most of it is its image's, so that the captions of one image do well or badly together. An
arm's skill lowers all ranks; each training adds noise of its own.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from distill.compare import (
    Cell,
    Comparison,
    CorpusFacts,
    Example,
    FailedCell,
    Found,
    GapPoint,
    Item,
    TeacherFacts,
)
from distill.evaluate import Agreement, Evaluation
from distill.metrics import summarise
from distill.timings import Summary

LOSSES = {
    "plain": "contrastive",
    "kl": "contrastive + 1.0 kl(temperature=learned, teacher_temperature=1.0, symmetric=False)",
    "cprd": "contrastive + 0.5 cprd(accept=log_odds, positive=out, normalise=mean)",
    "margin_mse": "contrastive + 0.2 margin_mse(negatives=all, teacher_std=4.2)",
    "m3se": "contrastive + 0.2 m3se(same_index=True, teacher_std=4.2)",
    "ranknet": "contrastive + 0.5 ranknet(margin=0.0)",
    "dcd": "contrastive + 0.5 dcd(temperature=0.05)",
    "attention": "contrastive + 0.5 kl + 0.1 attention(maps=text→image)",
}
SKILL = {"plain": 0.0, "kl": 0.42, "cprd": 0.45, "margin_mse": 0.3, "m3se": 0.12, "ranknet": 0.02, "dcd": -0.15}
SKILL["attention"] = 0.44


def evaluation_of(
    skill: float, *, images: int, captions: int, draws: np.random.Generator, hard: np.ndarray
) -> Evaluation:
    """Ranks of one training: ranks grow with the image's difficulty ``hard`` (images,) and fall with skill."""
    texts = images * captions
    of_text = np.repeat(np.arange(images), captions)
    i2t = 1 + np.floor(np.exp(0.3 + hard + draws.normal(0, 0.9, images) - skill)).astype(np.int64)
    t2i = 1 + np.floor(np.exp(0.6 + hard[of_text] + draws.normal(0, 0.9, texts) - skill)).astype(np.int64)
    ids, rows = np.arange(images, dtype=np.int64), np.arange(texts, dtype=np.int64)
    return Evaluation(ids, np.clip(i2t - 1, 1, texts), rows, np.clip(t2i - 1, 1, images))


def made_comparison(
    skill: Mapping[str, float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    images: int = 500,
    captions: int = 2,
    world: int = 0,
    teacher: float | None = 1.5,
    **more,
) -> Comparison:
    """Arms of known skill; the first one is the undistilled one."""
    draws = np.random.default_rng(world)
    hard = draws.normal(0, 1.3, images)
    cells = [
        made_cell(arm, seed, evaluation_of(own, images=images, captions=captions, draws=draws, hard=hard), draws)
        for arm, own in skill.items()
        for seed in seeds
    ]
    ids, rows = np.arange(images, dtype=np.int64), np.arange(images * captions, dtype=np.int64)
    facts = None
    if teacher is not None:
        best = evaluation_of(teacher, images=images, captions=captions, draws=draws, hard=hard)
        facts = TeacherFacts("3f2a9c81d0b745e6a1c2f3d4e5b60718", "log_odds", best.retrieval.as_dict(), 64)
    return Comparison(
        title="Losses on made scenes",
        command="distill compare recipes/quickstart.yaml --losses all --seeds 0,1,2",
        corpus=CorpusFacts("scenes", "test", "9b1f0c2d3e4a5b6c7d8e9f0011223344", images, images * captions),
        teacher=facts,
        arms={arm: LOSSES.get(arm, "contrastive") for arm in skill},
        plain=next(iter(skill)),
        seeds=tuple(seeds),
        cells=cells,
        image_ids=ids,
        text_ids=rows,
        text_images=np.repeat(ids, captions),
        **more,
    )


def made_cell(arm: str, seed: int, evaluation: Evaluation, draws: np.random.Generator) -> Cell:
    """A cell with everything a page can show."""
    lead = evaluation.retrieval.rsum / 600
    agreement = {
        way: Agreement(0.5 * lead + 0.3, 0.4 * lead + 0.2, 60 * lead + draws.normal(0, 1), 500, 3)
        for way in ("i2t", "t2i")
    }
    distils = arm != "plain"
    steps = range(50, 1201, 50)
    curve = []
    for step in steps:
        contrastive = 4.2 * np.exp(-step / 350) + 0.9 + draws.normal(0, 0.04)
        line = {"step": step, "loss": contrastive, "loss/contrastive": contrastive, "scale": 14 + step / 90}
        if distils and step > 300:
            line["loss/distil"] = 1.4 * np.exp(-step / 600) + draws.normal(0, 0.02)
            line["loss"] += line["loss/distil"]
        curve.append(line)
    asked, served = (0, 0) if not distils else (0, 96_000) if seed else (24_000, 72_000)
    return Cell(
        arm, seed, evaluation, agreement, 41 + 6 * distils + draws.normal(0, 1.5), 812 << 20, asked, served, curve
    )


def made_gap(comparison: Comparison, arms: Sequence[str]) -> dict[str, list[GapPoint]]:
    """Each arm's way to the teacher: recall and milliseconds rise with K."""
    found = {}
    for arm in arms:
        own = comparison.cells_of(arm)[comparison.seeds[0]].evaluation.retrieval.as_dict()
        top = comparison.teacher.metrics
        points = [GapPoint("student", None, own, {"i2t": 6.1, "t2i": 2.3})]
        for k, share in ((8, 0.45), (16, 0.66), (64, 0.9), (256, 0.99)):
            mixed = {name: own[name] + share * (top[name] - own[name]) for name in own}
            points.append(GapPoint(f"teacher over K = {k}", k, mixed, {"i2t": 6.1 + 1.9 * k, "t2i": 2.3 + 2.1 * k}))
        points.append(GapPoint("teacher", None, top, {"i2t": 1900.0, "t2i": 1050.0}))
        found[arm] = points
    return found


def full_comparison() -> Comparison:
    """What a real run would give: eight arms, three seeds, pictures, a failed cell."""
    base = made_comparison(SKILL)
    cells = [cell for cell in base.cells if (cell.arm, cell.seed) != ("dcd", 2)]
    shared = {name: getattr(base, name) for name in vars(base) if name not in ("cells", "gap", "examples")}
    shared |= {
        "failed": [FailedCell("dcd", 2, "step 611: the gradient is not finite; lower train.lr or a loss's weight")],
        "same": {
            "Student": "towers, 48 px, 256 wide, weights of the same seed",
            "Steps": "1,200 of 128 pairs, the first 360 contrastive and shared by all arms",
            "Candidates": "K = 16 a query each way, mined once by the shared student of the seed",
            "Batch order": "a function of the seed alone",
            "Learning rate": "0.001, 5 % warm-up, then a cosine",
        },
        "time": made_time(),
        "environment": {
            "Device": "CPU, 2 cores, 1 thread",
            "Python": "3.11.7",
            "torch": "2.13.0",
            "cross2dual": "0.1.0",
        },
    }
    return Comparison(
        **shared,
        cells=cells,
        gap=made_gap(base, ["plain", "cprd", "kl"]),
        examples=made_examples(base),
    )


def made_time() -> Summary:
    """Of two sessions, the first of which was stopped."""
    seconds = {"train plain": 90.0, "train plain/checkpoint": 6.0, "mine": 3.0, "mine/embed": 20.0, "other": 1.0}
    return Summary(seconds, {"train plain": {"items": 9600}}, {"host": 1 << 30}, ("stopped by SIGTERM", "done"))


def made_examples(comparison: Comparison, count: int = 6) -> list[Example]:
    """Captions that ask for made scenes, and scenes that ask for captions."""
    from distill.data.scenes import make_scenes

    corpus = make_scenes(images=0, val=0, test=40, seed=3)
    draws = np.random.default_rng(5)

    def picture(row: int) -> Item:
        file = io.BytesIO()
        corpus.load_images(np.array([row]))[0].save(file, format="PNG")
        return Item(row, corpus.image_names[row], file.getvalue())

    def caption(row: int) -> Item:
        return Item(row, corpus.texts[row])

    examples = []
    for number in range(count):
        to_image = number % 3 != 2
        item = picture if to_image else caption
        right = 3 * number if to_image else 6 * number
        found = {}
        for place, arm in enumerate(comparison.arms):
            hit = (place + number) % 3 != 0
            other = int(draws.integers(0, 40))
            found[arm] = Found(item(right if hit else other), hit, 1 if hit else int(draws.integers(2, 90)))
        query = caption(6 * number) if to_image else picture(3 * number)
        true = [item(right)] + ([caption(right + 1)] if not to_image else [])
        examples.append(Example("t2i" if to_image else "i2t", query, true, found, comparison.seeds[0]))
    return examples


def ranks_summary(i2t: Sequence[int], t2i: Sequence[int]) -> float:
    """RSUM of plain lists of ranks."""
    return summarise(np.array(i2t), np.array(t2i)).rsum
