"""By which means a training computes and mines, and whether they are there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from distill.experiment import ExperimentError
from distill.protocols import SIDES, Freezable, Recomputable

if TYPE_CHECKING:
    from distill.experiment import Experiment

log = logging.getLogger(__name__)


def check_means(x: Experiment) -> None:
    """Refuse what the student or the machine cannot do.

    Raises:
        ExperimentError, ShardingError: what is asked for, why it cannot be, and what to do instead.
    """
    from distill.sharding import check_sharding

    if x.recipe.mine.ahead and x.ranks.count > 1:
        raise ExperimentError(
            f"mine.ahead is {x.recipe.mine.ahead}: a second process mines beside one that trains, but {x.ranks.count} "
            "train: set it to 0, and they mine together when a round has ended"
        )
    check_sharding(x.accelerator, compiles=x.recipe.train.compile)
    if x.recipe.train.augment is not None:
        _check_augmenting(x)
    if x.recipe.train.gradient_checkpointing:
        _check_recomputing(x)
    if x.recipe.train.compile:
        _check_compiling(x)
    if x.recipe.train.matryoshka:
        _check_widths(x)


def _check_augmenting(x: Experiment) -> None:
    student = x.builders.student(x.corpus)
    if isinstance(student, Freezable) and student.frozen_identity("image") is not None:
        raise ExperimentError(
            "train.augment: the student's image tower is frozen, and its outputs are computed once for all epochs: "
            "leave augment out, or let the tower train (student.freeze)"
        )


def _check_recomputing(x: Experiment) -> None:
    student, instead = x.builders.student(x.corpus), "leave it out, or lower the memory by train.micro_batch"
    if not isinstance(student, Recomputable):
        raise ExperimentError(
            f"train.gradient_checkpointing: {type(student).__name__} has no recompute_activations(): {instead}"
        )
    try:
        sides = student.recompute_activations()
    except ValueError as error:
        raise ExperimentError(f"train.gradient_checkpointing: {error}; {instead}") from None
    for side in SIDES:
        does = "computes its activations anew in the backward pass" if side in sides else "is frozen or cannot do so"
        log.info("gradient checkpointing: the %s tower %s", side, does)


def _check_compiling(x: Experiment) -> None:
    from distill.compiling import check_compiler

    try:
        check_compiler(x.accelerator.device)
    except RuntimeError as error:
        raise ExperimentError(
            f"train.compile: {error}; install a C++ compiler (g++, or one that the variable CXX names), or leave "
            "train.compile out"
        ) from None


def _check_widths(x: Experiment) -> None:
    """Of vectors that are to be cut; only the student itself says how wide they are."""
    dim, widths = x.builders.student(x.corpus).dim, x.recipe.train.matryoshka
    if widths[-1] >= dim:
        below = [width for width in widths if width < dim]
        raise ExperimentError(
            f"train.matryoshka: {list(widths)} holds widths that are not below the student's own, {dim}, which is "
            f"always trained: take {below}"
            + ("" if below else ", which is to leave it out")
            + ", or give the student wider vectors (student.projection_dim)"
        )
