"""Every loss once more, slow and obvious: Python floats, loops and ``math``, straight from the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    student: float
    teacher: float | None  # None: not asked
    positive: bool
    in_batch: bool


def rows_of(scored):
    """Lists of the cells that are there; everything below reads only these."""
    rows = []
    for b in range(scored.student.shape[0]):
        row = []
        for k in range(scored.student.shape[1]):
            if not scored.valid[b, k].item():
                continue
            teacher = scored.teacher[b, k].item()
            row.append(
                Cell(
                    student=scored.student[b, k].item(),
                    teacher=None if math.isnan(teacher) else teacher,
                    positive=scored.positive[b, k].item(),
                    in_batch=True if scored.in_batch is None else scored.in_batch[b, k].item(),
                )
            )
        rows.append(row)
    return rows


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else 0.0


def logsumexp(values):
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def asked(row):
    return [cell for cell in row if cell.teacher is not None]


def contrastive(scored, *, factor, positives="softmax_all", negatives="in_batch"):
    def one(row):
        row = [cell for cell in row if cell.in_batch or negatives == "all"]
        pos = [factor * cell.student for cell in row if cell.positive]
        neg = [factor * cell.student for cell in row if not cell.positive]
        if positives == "softmax_all":
            return mean([logsumexp([z, *neg]) - z for z in pos]) if pos and neg else None
        return mean([logsumexp(pos + neg) - z for z in pos]) if pos and len(row) > 1 else None

    return mean([one(row) for row in rows_of(scored)])


def cprd(scored, *, factor, rule, positive="out", normalise="mean"):
    """``rule``: (negatives best first, positives) -> how many of the negatives are accepted."""

    def one(row):
        best_first = sorted(asked(row), key=lambda cell: -cell.teacher)  # stable
        pos = [cell for cell in best_first if cell.positive]
        neg = [cell for cell in best_first if not cell.positive]
        ranked = pos + neg if positive == "first" else neg
        accepted = rule(neg, pos) + (len(pos) if positive == "first" else 0)
        if not accepted or len(ranked) < 2:
            return None
        total = 0.0
        for j in range(accepted):
            total += logsumexp([factor * cell.student for cell in ranked[j:]]) - factor * ranked[j].student
        return total / accepted if normalise == "mean" else total

    return mean([one(row) for row in rows_of(scored)])


def batch_std(margins):
    centre = mean(margins)
    if len(margins) < 2 or max(margins) == min(margins):
        return 1.0
    return math.sqrt(sum((margin - centre) ** 2 for margin in margins) / (len(margins) - 1))


def hardest(cells, score):
    best = cells[0]
    for cell in cells:
        if score(cell) > score(best):
            best = cell
    return best


def margin_mse(scored, *, factor, negatives="all", teacher_std=1.0):
    rows = []
    for row in rows_of(scored):
        neg = [cell for cell in asked(row) if not cell.positive]
        if negatives == "hardest" and neg:
            neg = [hardest(neg, lambda cell: cell.teacher)]
        rows.append([(p, n) for p in asked(row) if p.positive for n in neg])
    std = batch_std([p.teacher - n.teacher for row in rows for p, n in row]) if teacher_std == "batch" else teacher_std
    return mean(
        [
            mean([(factor * (p.student - n.student) - (p.teacher - n.teacher) / std) ** 2 for p, n in row])
            if row
            else None
            for row in rows
        ]
    )


def m3se(scored, *, factor, same_index=True, teacher_std=1.0):
    rows = []
    for row in rows_of(scored):
        pos = [cell for cell in asked(row) if cell.positive]
        neg = [cell for cell in asked(row) if not cell.positive]
        if pos and neg:
            rows.append((pos, neg, hardest(neg, lambda cell: cell.teacher)))
    std = (
        batch_std([p.teacher - star.teacher for pos, _, star in rows for p in pos])
        if teacher_std == "batch"
        else teacher_std
    )
    values = []
    for pos, neg, star in rows:
        other = star if same_index else hardest(neg, lambda cell: cell.student)
        value = sum(((p.teacher - star.teacher) / std - factor * (p.student - other.student)) ** 2 for p in pos)
        if same_index:
            value += sum(max(0.0, factor * (n.student - star.student)) ** 2 for n in neg)
        values.append(value)
    return mean(values)


def log_softmax(values):
    total = logsumexp(values)
    return [value - total for value in values]


def zscores(values):
    centre = mean(values)
    std = math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))
    return [(value - centre) / (1e-7 + std) for value in values]


def kl(scored, *, factor, teacher_temperature=1.0, symmetric=False, zscore=False, times=1.0, positive="keep"):
    def one(row):
        cells = [cell for cell in asked(row) if positive == "keep" or not cell.positive]
        s, t = [cell.student for cell in cells], [cell.teacher for cell in cells]
        if len(cells) < 2:
            return None
        if zscore:
            if len(cells) < 4 or max(t) == min(t) or max(s) == min(s):
                return None
            s, t = zscores(s), zscores(t)
        log_q = log_softmax([factor * value for value in s])
        log_p = log_softmax([value / teacher_temperature for value in t])
        forward = sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        backward = sum(math.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))
        return times * ((forward + backward) / 2 if symmetric else forward)

    return mean([one(row) for row in rows_of(scored)])


def attention(scored):
    student, teacher = scored.extras["student_attention"].tolist(), scored.extras["teacher_attention"].tolist()
    values = []
    for p, tokens in enumerate(scored.extras["attention_tokens"].tolist()):
        for token, real in enumerate(tokens):
            if real:
                cells = zip(teacher[p][token], student[p][token], strict=True)
                values.append(sum(math.exp(t) * (t - s) for t, s in cells))
    return mean(values)
