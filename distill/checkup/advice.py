"""Which losses suit a teacher's scores, as lines for a recipe, and whether the recipe's own settings do.

A softmax loss needs a temperature that neither leaves one candidate with all the mass nor makes all alike; a margin
loss needs both margins of one size, or it learns the scale alone; an order loss needs candidates that it accepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.checkup import separation
from distill.checkup.findings import Finding

if TYPE_CHECKING:
    from distill.checkup.figures import LossFigures
    from distill.doctor_teacher import Examination

ONE_HOT, FLAT = 0.1, 0.95  # entropy, as a share of the uniform list's
APART = 3.0  # two spreads of margins that differ by more than this factor do not meet
FEW_LISTS, MOST_ITEMS = 0.2, 0.9
USUAL_TEMPERATURE = 0.15  # spread of cosine margins, where there is no student to measure it on


@dataclass(frozen=True)
class LossAdvice:
    """How a loss meets these scores, and a line for an arm of the recipe."""

    loss: str
    measured: str
    line: str


def loss_advice(e: Examination, figures: LossFigures) -> list[LossAdvice]:
    """A line for each family of losses that reads scores."""
    kl, entropy = figures.medium_temperature, figures.entropy_at_one
    medium = "no temperature makes it half" if kl is None else f"half of it at {kl:.2g}"
    line = "{name: kl, zscore: true, temperature: 2.0, teacher_temperature: 2.0}"
    advised = [
        LossAdvice(
            "kl",
            f"the teacher's softmax over a list has {entropy:.0%} of the most entropy at temperature 1; {medium}",
            line if kl is None else f"{{name: kl, teacher_temperature: {kl:.2g}}}",
        )
    ]
    own, scale = figures.student_margin_std, figures.student_scale
    beside = (
        ""
        if own is None or scale is None
        else f"; the student's cosine margins by {own:.2g}, {own * scale:.2g} once scaled"
    )
    both = f"teacher_std: {figures.margin_std:.2g}, temperature: {own or USUAL_TEMPERATURE:.2g}"
    advised += [
        LossAdvice(
            "margin_mse", f"margins spread by {figures.margin_std:.2g}{beside}", f"{{name: margin_mse, {both}}}"
        ),
        LossAdvice("m3se", "as margin_mse; learns nothing from the order of easy negatives", f"{{name: m3se, {both}}}"),
        _cprd_advice(e, figures),
    ]
    return advised


def _cprd_advice(e: Examination, figures: LossFigures) -> LossAdvice:
    top = f"{{name: cprd, accept: top, top: {max(1, (e.training_lists.shape[1] - 1) // 2)}}}"
    if figures.accepted is None or figures.lists_accepting is None:
        return LossAdvice("cprd", f"{e.score_kind} is no log-odds, so that 0 is no even chance", top)
    said = (
        f"{figures.accepted:.0%} of the hard negatives have log-odds of at least 0; {figures.lists_accepting:.0%} of "
        "the lists hold one"
    )
    fits = figures.lists_accepting >= FEW_LISTS and figures.accepted <= MOST_ITEMS
    return LossAdvice("cprd", said, "{name: cprd}" if fits else top)


def arm_findings(e: Examination, figures: LossFigures, arms: Mapping[str, Sequence[Any]]) -> list[Finding]:
    """Whether the settings of each arm's losses (parts of the recipe, by arm) suit the scores."""
    lines = {advice.loss: advice.line for advice in loss_advice(e, figures)}
    found, fine = [], []
    for arm, parts in arms.items():
        for part in parts:
            if part.name not in lines:
                continue
            fault = _misfit(e, figures, part)
            if fault:
                found.append(Finding("WARN", f"{part.name} of arm {arm}", fault, lines[part.name]))
            else:
                fine.append(f"{part.name} of arm {arm}")
    if fine:
        found.append(Finding("OK", "the recipe's losses", f"settings that suit these scores: {', '.join(fine)}"))
    return found


def _misfit(e: Examination, figures: LossFigures, part: Any) -> str:
    """What is wrong with a part's settings for these scores; empty where nothing is."""
    if part.name == "kl":
        return _kl_misfit(e, part)
    if part.name in ("margin_mse", "m3se"):
        return _margin_misfit(figures, part)
    if part.accept != "log_odds":
        return ""
    if e.score_kind != "log_odds":
        return f"it accepts by log-odds, but these scores are {e.score_kind}"
    accepted = e.training_lists[:, 1:] >= (part.threshold or 0.0)
    lists = float(accepted.any(axis=1).mean())
    if lists < FEW_LISTS:
        return f"only {lists:.0%} of the lists hold a negative it accepts; the others teach nothing"
    if accepted.mean() > MOST_ITEMS:
        return f"it accepts {accepted.mean():.0%} of the hard negatives and so learns the order among easy ones too"
    return ""


def _kl_misfit(e: Examination, part: Any) -> str:
    if part.zscore or isinstance(part.teacher_std, str):  # its temperature does not depend on the teacher's unit
        return ""
    temperature = part.teacher_temperature * part.teacher_std
    lists = e.training_lists if part.positive == "keep" else e.training_lists[:, 1:]
    if lists.shape[1] < 2:
        return ""
    share = float(separation.entropy(lists, temperature).mean())
    said = f"at temperature {temperature:g} the teacher's softmax has {share:.0%} of the most entropy"
    if share < ONE_HOT:
        return f"{said}: one candidate has nearly all the mass, which says no more than the label"
    if share > FLAT:
        return f"{said}: it is nearly uniform, which says nothing"
    return ""


def _margin_misfit(figures: LossFigures, part: Any) -> str:
    own, scale = figures.student_margin_std, figures.student_scale
    if own is None or scale is None:
        return ""
    ours = own / part.temperature if part.temperature is not None else own * scale
    theirs = 1.0 if isinstance(part.teacher_std, str) else figures.margin_std / part.teacher_std
    if 1 / APART <= theirs / max(ours, 1e-12) <= APART:
        return ""
    return f"the teacher's margins spread by {theirs:.2g}, the student's by {ours:.2g}: the loss is mostly about scale"


def training_warnings(e: Examination) -> list[Finding]:
    """What training itself would say of lists like these."""
    from distill.losses.checks import check_teacher_scores

    lists = e.training_lists
    positive = np.zeros(lists.shape, np.bool_)
    positive[:, 0] = True
    said = check_teacher_scores(lists, np.ones_like(positive), positive, losses={})
    return [Finding("WARN", "training", warning) for warning in said]
