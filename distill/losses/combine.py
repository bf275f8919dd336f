"""Weighted sums of losses, with every part reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.losses.schedule import Schedule

if TYPE_CHECKING:
    from distill.protocols import Loss, Scored


class NonFiniteLossError(ValueError):
    """A part of the loss is NaN or infinite.

    Attributes:
        part: name of the part.
        rows: rows of ``Scored`` that cause it; empty where no single row does.
    """

    def __init__(self, part: str, value: float, rows: tuple[int, ...], cause: str) -> None:
        """``cause`` is a sentence that names the rows."""
        super().__init__(f"loss {part!r} is {value}: {cause}")
        self.part, self.rows = part, rows


@dataclass(frozen=True)
class Part:
    """One loss of a sum: ``loss`` is any function of ``Scored`` that gives a scalar.

    A weight of 0 reports the part without training on it. A ``schedule`` multiplies the weight by a factor that
    changes over the training; without one it is constant.
    """

    name: str
    weight: float
    loss: Loss
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a part of the loss needs a name")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"the weight of {self.name!r} must be a number >= 0, got {self.weight!r}")
        if not callable(self.loss):
            raise TypeError(f"the loss of {self.name!r} must be a function of Scored, got {type(self.loss).__name__}")

    @property
    def needs(self) -> frozenset[str]:
        """Names of ``Scored.extras`` that the loss reads."""
        return frozenset(getattr(self.loss, "needs", ()))

    def weight_at(self, progress: float | None) -> float:
        """The weight at a progress in [0, 1] of the whole training.

        Raises:
            ValueError: the weight has a schedule and the progress is None.
        """
        if self.schedule is None:
            return self.weight
        if progress is None:
            raise ValueError(f"the weight of {self.name!r} has a schedule: the training must say its progress")
        return self.weight * self.schedule(progress)


@dataclass(frozen=True)
class Weighted:
    """Sum of weight * loss. ``parts_of`` and ``total`` give the parts and the sum without computing any part twice."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not any(part.weight > 0 for part in self.parts):
            raise ValueError(f"at least one part needs a weight above 0, got {names or 'no parts'}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each part needs a name of its own, got {', '.join(twice)} more than once")

    @property
    def needs(self) -> frozenset[str]:
        """Names of ``Scored.extras`` that any part reads."""
        return frozenset().union(*(part.needs for part in self.parts))

    def __call__(self, scored: Scored, progress: float | None = None) -> Tensor:
        """-> (), the weighted sum."""
        return self.total(self.parts_of(scored), progress)

    def weights(self, progress: float | None = None) -> dict[str, float]:
        """Each part's weight by name, as it is at a progress in [0, 1]; parts without a schedule need none."""
        return {part.name: part.weight_at(progress) for part in self.parts}

    def parts_of(self, scored: Scored, known: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Each part's unweighted scalar by name, with gradient where its weight is above 0.

        Args:
            scored: the batch.
            known: values of parts that are not computed again.

        Raises:
            NonFiniteLossError: a part is NaN or infinite.
            ValueError: a part did not give a scalar tensor.
        """
        known = known or {}
        values = {p.name: known[p.name] if p.name in known else _value(p, scored) for p in self.parts}
        finite = torch.stack([value.detach().isfinite() for value in values.values()])
        if not bool(finite.all()):  # one wait for the device, however many parts
            bad = self.parts[finite.tolist().index(False)]
            rows, cause = _cause(bad, scored)
            raise NonFiniteLossError(bad.name, values[bad.name].item(), rows, cause)
        return values

    def teacher_units(self, scored: Scored) -> dict[str, Tensor]:
        """By name of the part, what each divides the teacher's scores or margins by; for a log, without gradient.

        Only of parts whose ``teacher_std`` is measured on the scores themselves (``row``, ``batch``).
        """
        losses = {part.name: part.loss for part in self.parts}
        measured = {name: loss for name, loss in losses.items() if isinstance(getattr(loss, "teacher_std", None), str)}
        with torch.no_grad():
            return {name: loss.teacher_unit(scored) for name, loss in measured.items() if hasattr(loss, "teacher_unit")}

    def total(self, parts: Mapping[str, Tensor], progress: float | None = None) -> Tensor:
        """-> (), sum of weight * part. It is linear: parts averaged over directions or micro-batches may be given.

        Args:
            parts: values by name.
            progress: share of the whole training that is done; only parts with a schedule need it.

        Raises:
            ValueError: ``parts`` has other names than this sum, or a schedule lacks the progress.
        """
        if set(parts) != {part.name for part in self.parts}:
            raise ValueError(f"expected parts {[part.name for part in self.parts]}, got {sorted(parts)}")
        weights = self.weights(progress)
        # a factor that is 0 for now stays in the sum, so that there is a gradient (of zeros) in every step
        weighted = [weights[part.name] * parts[part.name] for part in self.parts if part.weight > 0]
        return torch.stack(weighted).sum()


def _value(part: Part, scored: Scored) -> Tensor:
    with torch.set_grad_enabled(torch.is_grad_enabled() and part.weight > 0):
        value = part.loss(scored)
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss {part.name!r} must give a scalar tensor (mean over rows), got {got}")
    return value


def _cause(part: Part, scored: Scored) -> tuple[tuple[int, ...], str]:
    """(rows, sentence): first bad inputs, since they explain everything after them; then rows that are bad alone."""
    student = (scored.valid & ~scored.student.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if student:
        return tuple(student), f"the student's similarity is not finite in {_listed(student)}"
    teacher = (scored.valid & scored.teacher.isinf()).any(dim=1).nonzero().flatten().tolist()
    if teacher:
        return tuple(teacher), f"the teacher's score is infinite in {_listed(teacher)}"
    if not bool(scored.scale.isfinite()):
        return (), f"the student's learned scale is {scored.scale.item()}"
    if part.needs:
        holding = [name for name in sorted(part.needs & set(scored.extras)) if bool(scored.extras[name].isnan().any())]
        look = ", ".join(holding or sorted(part.needs))
        return (), f"NaN in {look}" if holding else f"the scores are finite; look into {look}"
    alone = [row for row in range(scored.student.shape[0]) if not _finite_alone(part, scored, row)]
    if alone:
        return tuple(alone), f"its inputs are finite, yet {_listed(alone)} alone give it"
    return (), "every row alone is finite; together they overflow"


def _finite_alone(part: Part, scored: Scored, row: int) -> bool:
    one = slice(row, row + 1)
    alone = replace(
        scored,
        student=scored.student[one],
        teacher=scored.teacher[one],
        positive=scored.positive[one],
        valid=scored.valid[one],
        in_batch=None if scored.in_batch is None else scored.in_batch[one],
    )
    with torch.no_grad():
        return bool(part.loss(alone).isfinite())


def _listed(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return f"{len(rows)} rows ({shown}{', ...' if len(rows) > 8 else ''})"
