"""A measurement with round numbers, so that what follows from it can be computed by hand."""

from __future__ import annotations

from typing import Any

from distill.planning.meaning import meaning_of
from distill.planning.measured import (
    EmbeddingCost,
    IndexCost,
    Machine,
    Measured,
    Once,
    Shape,
    Source,
    StoreCost,
    TeacherCost,
    TeachingCost,
    TrainingCost,
)
from distill.planning.ranges import Range
from distill.recipe.experiment import Recipe
from distill.recipe.load import load_recipe

ASKING = ["arms.kl={losses: [{name: contrastive}, {name: kl}]}"]


def recipe(*overrides: str) -> Recipe:
    """The quickstart's with an arm that reads scores."""
    return load_recipe("quickstart", [*ASKING, *overrides])


def exactly(value: float) -> Range:
    return Range.exactly(value)


SHAPE = Shape(
    images=1000,
    texts=2000,
    pairs=2000,
    all_images=1200,
    all_texts=2400,
    judged_images=100,
    judged_texts=200,
    picture_bytes=5000,
)


def measured(of: Recipe, **changes: Any) -> Measured:
    """Every item, pair and step costs a power of ten of its own."""
    parts = {
        "recipe": meaning_of(of),
        "shape": SHAPE,
        "machine": Machine(
            processor="some",
            device="cpu",
            gpu=None,
            clock="wall",
            threads=1,
            cores=4,
            memory_bytes=16 * 2**30,
            matmul_tflops=0.1,
            torch="2",
            busy=None,
        ),
        "sources": (source("image", users=("teacher", "student")), source("text", users=("teacher", "student"))),
        "teachers": (teacher(),),
        "teaching": TeachingCost(step=Range(0.9, 1.0, 1.2), checkpoint=exactly(0.5), checkpoint_bytes=1000),
        "training": TrainingCost(
            base=exactly(0.1),
            image=exactly(0.001),
            text=exactly(0.0005),
            loss={"kl": exactly(0.2)},
            fixed={"plain": exactly(0), "distilled": exactly(0)},
            loss_items=400,
            checkpoint=exactly(0.5),
            checkpoint_bytes=1000,
            weight_bytes=300,
            first_step=1,
        ),
        "embedding": EmbeddingCost(image=exactly(0.01), text=exactly(0.001), dim=64),
        "index": IndexCost(build=exactly(1e-6), query=exactly(1e-4), cell=exactly(1e-7), on_gpu=False),
        "store": StoreCost(unit_bytes=6, table_bytes=12),
        "once": Once(
            start=1,
            check=exactly(2),
            read=exactly(0.001),
            load_teacher=exactly(1),
            load_student=exactly(0.5),
            judge=exactly(0.1),
            report=exactly(1),
        ),
        "seconds": 30,
        "images": 500,
    }
    return Measured(**{**parts, **changes})


def source(side: Any, *, users: Any = ("teacher",), kind: Any = "prepared", each: float = 0.002) -> Source:
    return Source(
        users=users,
        side=side,
        kind=kind,
        wall=exactly(each),
        host=exactly(each),
        device=exactly(0),
        bytes=0 if kind == "live" else 1000,
        input_bytes=1000,
    )


def teacher(**changes: Any) -> TeacherCost:
    parts = {
        "name": "teacher",
        "image": Range(0.04, 0.05, 0.07),
        "text": exactly(0.01),
        "pair": Range(0.0009, 0.001, 0.0012),
        "vector": {"image": exactly(0.05), "text": exactly(0.01)},
        "dim": 64,
        "map": None,
        "image_bytes": 1000,
        "text_bytes": 100,
        "weight_bytes": 5000,
        "first_call": 0,
    }
    return TeacherCost(**{**parts, **changes})
