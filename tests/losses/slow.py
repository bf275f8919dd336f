"""The losses over orders, pairs and single scores once more, slow and obvious; ``loops`` has the others."""

from __future__ import annotations

import itertools
import math

from tests.losses.loops import asked, batch_std, log_softmax, logsumexp, mean, rows_of


def std(values):
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def flat(values):
    return max(values) == min(values)


def order_nll(z, normalise, top=None):
    """-log of the Plackett-Luce probability of the order in which the values stand."""
    top = len(z) if top is None else min(top, len(z))
    total = sum(logsumexp(z[j:]) - z[j] for j in range(top))
    return total / top if normalise == "mean" else total


def listmle(scored, *, factor, normalise="mean", top=None):
    def one(row):
        ranked = sorted(asked(row), key=lambda cell: -cell.teacher)  # stable
        if len(ranked) < 2:
            return None
        return order_nll([factor * cell.student for cell in ranked], normalise, top)

    return mean([one(row) for row in rows_of(scored)])


def expected_order_nll(s, t, *, top):
    """Mean over every order, weighted by its Plackett-Luce probability under t."""
    total = 0.0
    for order in itertools.permutations(range(len(s))):
        chance = math.exp(-order_nll([t[i] for i in order], "sum"))
        total += chance * order_nll([s[i] for i in order], "sum", top)
    return total


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def told_apart(row):
    cells = asked(row)
    return [(i, j) for i in cells for j in cells if i.teacher > j.teacher]


def over_pairs(rows, over):
    """Rows of values: the mean of means, or one mean."""
    if over == "rows":
        return mean([mean(values) if values else None for values in rows])
    return mean([value for values in rows for value in values])


def ranknet(scored, *, factor, over="rows", log=1.0):
    rows = [[softplus(-factor * (i.student - j.student)) / log for i, j in told_apart(row)] for row in rows_of(scored)]
    return over_pairs(rows, over)


def rank_in(values, value):
    """Rank among the values, 1 = highest; equals share the mean of their ranks."""
    higher = sum(other > value for other in values)
    return higher + (sum(other == value for other in values) + 1) / 2


def gains_of(cells, gain):
    teachers = [cell.teacher for cell in cells]
    worth = {
        "reciprocal": lambda t: 1 / rank_in(teachers, t),
        "sigmoid": lambda t: 2 ** (1 / (1 + math.exp(-t))) - 1,
        "exponential": lambda t: 2 ** max(t, 0.0) - 1,
    }[gain]
    return [worth(t) for t in teachers]


def best_sum(gains):
    return sum(g / math.log2(2 + place) for place, g in enumerate(sorted(gains, reverse=True)))


def lambdarank(scored, *, factor, gain="reciprocal", over="rows", log=1.0):
    rows = []
    for row in rows_of(scored):
        cells = asked(row)
        gains = gains_of(cells, gain) if cells else []
        best = best_sum(gains) or 1.0
        discounts = [1 / math.log2(1 + rank_in([c.student for c in cells], c.student)) for c in cells]
        values = []
        for i, a in enumerate(cells):
            for j, b in enumerate(cells):
                if a.teacher > b.teacher:
                    weight = abs(gains[i] - gains[j]) / best * abs(discounts[i] - discounts[j])
                    values.append(weight * softplus(-factor * (a.student - b.student)) / log)
        rows.append(values)
    return over_pairs(rows, over)


def smooth_ranks(z):
    return [
        1 + sum(1 / (1 + math.exp(-(other - own))) for j, other in enumerate(z) if j != i) for i, own in enumerate(z)
    ]


def approx_ndcg(scored, *, factor, gain="reciprocal"):
    def one(row):
        cells = asked(row)
        if len(cells) < 2 or flat(gains_of(cells, gain)):
            return None
        gains = gains_of(cells, gain)
        ranks = smooth_ranks([factor * cell.student for cell in cells])
        return 1 - sum(g / math.log2(1 + r) for g, r in zip(gains, ranks, strict=True)) / best_sum(gains)

    return mean([one(row) for row in rows_of(scored)])


def adr_mse(scored, *, factor, discount="log2", over="rows"):
    rows = []
    for row in rows_of(scored):
        cells = asked(row)
        if len(cells) < 2:
            rows.append([])
            continue
        wanted = [rank_in([c.teacher for c in cells], c.teacher) for c in cells]
        ranks = smooth_ranks([factor * cell.student for cell in cells])
        weight = {"log2": lambda q: 1 / math.log2(1 + q), "reciprocal": lambda q: 1 / q, "none": lambda q: 1.0}[
            discount
        ]
        rows.append([weight(q) * (r - q) ** 2 for q, r in zip(wanted, ranks, strict=True)])
    return over_pairs(rows, over)


def teacher_units(rows, teacher_std):
    """What divides each row's scores; None where a row has no usable deviation."""
    scores = [[cell.teacher for cell in row] for row in rows]
    if teacher_std == "row":
        return [std(row) if len(row) >= 4 and not flat(row) else None for row in scores]
    every = [t for row in scores for t in row]
    return [batch_std(every) if teacher_std == "batch" else teacher_std] * len(rows)


def softmax_ce(scored, *, factor, teacher_temperature=1.0, teacher_std=1.0, target="teacher"):
    rows = [asked(row) for row in rows_of(scored)]
    values = []
    for row, unit in zip(rows, teacher_units(rows, teacher_std), strict=True):
        if len(row) < 2 or unit is None:
            continue
        log_q = log_softmax([factor * cell.student for cell in row])
        if target == "labels":
            picked = [q for q, cell in zip(log_q, row, strict=True) if cell.positive]
            values.append(-mean(picked) if picked else None)
        else:
            log_p = log_softmax([cell.teacher / unit / teacher_temperature for cell in row])
            values.append(-sum(math.exp(p) * q for p, q in zip(log_p, log_q, strict=True)))
    return mean(values)


def kl_in_units(scored, *, factor, teacher_std, teacher_temperature=1.0):
    rows = [asked(row) for row in rows_of(scored)]
    values = []
    for row, unit in zip(rows, teacher_units(rows, teacher_std), strict=True):
        if len(row) < 2 or unit is None:
            continue
        log_q = log_softmax([factor * cell.student for cell in row])
        log_p = log_softmax([cell.teacher / unit / teacher_temperature for cell in row])
        values.append(sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    return mean(values)


def pearson(scored, *, factor=1.0, of="scores", teacher_temperature=1.0):
    def one(row):
        s, t = [cell.student for cell in asked(row)], [cell.teacher for cell in asked(row)]
        if len(s) < 3 or flat(s) or flat(t):
            return None
        if of == "softmax":
            s = [math.exp(x) for x in log_softmax([factor * value for value in s])]
            t = [math.exp(x) for x in log_softmax([value / teacher_temperature for value in t])]
        both = sum((x - mean(s)) * (y - mean(t)) for x, y in zip(s, t, strict=True))
        own = math.sqrt(sum((x - mean(s)) ** 2 for x in s)) * math.sqrt(sum((y - mean(t)) ** 2 for y in t))
        return 1 - both / own

    return mean([one(row) for row in rows_of(scored)])


def logit_mse(scored, *, factor, teacher_std=1.0):
    rows = [asked(row) for row in rows_of(scored)]
    every = [cell.teacher for row in rows for cell in row]
    values = []
    for row, unit in zip(rows, teacher_units(rows, teacher_std), strict=True):
        if not row or unit is None:
            continue
        centre = {"row": mean([cell.teacher for cell in row]), "batch": mean(every)}.get(teacher_std, 0.0)
        values.append(mean([(factor * cell.student - (cell.teacher - centre) / unit) ** 2 for cell in row]))
    return mean(values)


def margin_mse(scored, *, factor, pairs="labelled", over="rows", teacher_std=1.0):
    rows = [asked(row) for row in rows_of(scored)]
    values = []
    for row, unit in zip(rows, teacher_units(rows, teacher_std), strict=True):
        found = [(a, b) for a in row for b in row if a.positive and not b.positive]
        if pairs == "all":
            found = told_apart(row)
        if unit is not None:
            values.append([(factor * (a.student - b.student) - (a.teacher - b.teacher) / unit) ** 2 for a, b in found])
    return over_pairs(values, over)


def m3se_row(scored, *, factor):
    rows = [asked(row) for row in rows_of(scored)]
    values = []
    for row, unit in zip(rows, teacher_units(rows, "row"), strict=True):
        pos, neg = [c for c in row if c.positive], [c for c in row if not c.positive]
        if not pos or not neg or unit is None:
            continue
        star = max(neg, key=lambda cell: cell.teacher)
        value = sum(((p.teacher - star.teacher) / unit - factor * (p.student - star.student)) ** 2 for p in pos)
        values.append(value + sum(max(0.0, factor * (n.student - star.student)) ** 2 for n in neg))
    return mean(values)


def in_scope(row, negatives):
    row = [cell for cell in row if cell.in_batch or negatives == "all"]
    return [cell for cell in row if cell.positive], [cell for cell in row if not cell.positive]


def siglip(scored, *, factor, bias=-10.0, negatives="in_batch"):
    def one(row):
        pos, neg = in_scope(row, negatives)
        if not pos or not neg:
            return None
        right = sum(softplus(-(factor * cell.student + bias)) for cell in pos)
        return right + sum(softplus(factor * cell.student + bias) for cell in neg)

    return mean([one(row) for row in rows_of(scored)])


def hinge(scored, *, margin=0.2, hardest=True, reduction="mean", negatives="in_batch"):
    values = []
    for row in rows_of(scored):
        pos, neg = in_scope(row, negatives)
        if pos and neg:
            costs = [[max(0.0, margin - p.student + n.student) for n in neg] for p in pos]
            values.append(mean([max(cost) if hardest else sum(cost) for cost in costs]))
    return sum(values) if reduction == "sum" else mean(values)
