"""A teacher's check-up for people: tables and findings as text, and a picture of its scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from distill.checkup.sample import RANDOM_PAIRS, TRUE
from distill.checkup.separation import NEAR, margins
from distill.durable import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from distill.checkup.advice import LossAdvice
    from distill.checkup.anatomy import Anatomy
    from distill.checkup.figures import Figures, Separation
    from distill.checkup.findings import Finding
    from distill.checkup.sample import Answers
    from distill.doctor_teacher import Examination

WIDTH = 118  # of lines where there is no terminal
BINS = 36
_STYLES = {"OK": "green", "NOTE": "cyan", "WARN": "yellow", "FAULT": "bold red"}
# Told apart by most colour-blind people (Okabe and Ito): true pairs, random ones, then hard ones by finder.
_TRUE, _RANDOM, _HARD = "#0072b2", "#8a8a8a", ("#d55e00", "#cc79a7", "#e69f00")


# --- text -------------------------------------------------------------------------------------------------------------


def show(
    e: Examination,
    figures: Figures,
    *,
    body: Anatomy,
    found: Sequence[Finding],
    advised: Sequence[LossAdvice],
    title: str,
    console: Console | None = None,
) -> None:
    """Print the page: what was looked at, the figures, what suits them, and last the findings."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, soft_wrap=False, color_system=None)
    for line in [title, *_looked_at(e, body)]:
        console.print(line, markup=False, highlight=False)
    spreads = ["scores", "pairs", "mean", "std", "least", "5 %", "median", "95 %", "most"]
    _table(console, "Where the scores lie", spreads, list(_spread_rows(figures)))
    if any(scorer.against for scorer in figures.scorers.values()):
        heads = ["true pairs against", "AUC", "d'", "above a hard one", "above all of its list"]
        _table(console, "How well they tell (95 % intervals)", heads, list(_separation_rows(figures)))
    if any(scorer.saturation for scorer in figures.scorers.values()):
        heads = ["as a probability", f"within {NEAR:g} of 0 or 1", "0 or 1 in bfloat16", "0 or 1 in float16"]
        _table(console, "What a sigmoid would lose", heads, list(_saturation_rows(figures)))
    if figures.doubts:
        heads = ["score", "picture", "caption", "true pair", "instead of"]
        title = "Hard negatives furthest above their true pair: are the labels wrong, or the teacher?"
        _table(console, title, heads, list(_doubt_rows(figures)), wrap=True)
    if advised:
        rows = [[advice.loss, advice.measured, advice.line] for advice in advised]
        _table(console, "Losses for these scores", ["loss", "measured", "line of an arm"], rows, wrap=True)
    _findings(console, found)


def _looked_at(e: Examination, body: Anatomy) -> Iterator[str]:
    pictures, captions = len(e.sample.true), len(e.sample.texts)
    yield (
        f"{body.kind}, {e.score_kind}; {pictures} pictures of {e.sample.split} with {captions} captions, "
        f"{len(e.answers.pairs)} pairs"
    )
    k = next(iter(e.questions.hard.values())).shape[1]
    yield (
        f"hard negatives: the {k} most similar non-matching captions of each picture, and pictures of one of its "
        f"captions, found by the {' and by the '.join(e.questions.hard)}"
    )
    if body.image_size is not None:
        yield f"pictures are read at {body.image_size[0]} x {body.image_size[1]}"
    if body.special_tokens:
        yield f"special tokens: {' '.join(body.special_tokens)}"


def _spread_rows(figures: Figures) -> Iterator[list[str]]:
    for label, scorer in figures.scorers.items():
        for kind, spread in scorer.spreads.items():
            bad = f" ({spread.not_finite} not finite)" if spread.not_finite else ""
            quantiles = [spread.quantiles.get(at) for at in ("0", "0.05", "0.5", "0.95", "1")]
            numbers = [spread.mean, spread.std, *quantiles]
            yield [f"{label}: {kind}", f"{spread.count}{bad}", *map(_number, numbers)]


def _separation_rows(figures: Figures) -> Iterator[list[str]]:
    for label, scorer in figures.scorers.items():
        for kind, found in scorer.against.items():
            yield [f"{label}: {kind}", found.auc.plain(), _number(found.d_prime), *_lists(found)]


def _lists(found: Separation) -> list[str]:
    return ["–" if share is None else share.percent() for share in (found.hits, found.firsts)]


def _saturation_rows(figures: Figures) -> Iterator[list[str]]:
    for label, scorer in figures.scorers.items():
        for kind, found in scorer.saturation.items():
            yield [f"{label}: {kind}", *(f"{share:.1%}" for share in (found.near, found.bfloat16, found.float16))]


def _doubt_rows(figures: Figures) -> Iterator[list[str]]:
    for doubt in figures.doubts:
        yield [f"{doubt.score:.3g}", doubt.image, doubt.text, f"{doubt.true_score:.3g}", doubt.true]


def _findings(console: Console, found: Sequence[Finding]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console.print()
    for finding in found:
        level = (f"{finding.level:<5} ", _STYLES[finding.level])
        console.print(Text.assemble(level, (f"{finding.topic}: ", "bold"), finding.text), highlight=False)
        if finding.advice:
            console.print(Padding(Text(f"-> {finding.advice}"), (0, 0, 0, 6)), highlight=False)
    warned = sum(finding.level == "WARN" for finding in found)
    faults = sum(finding.level == "FAULT" for finding in found)
    console.print(f"{faults} fault(s), {warned} warning(s)", highlight=False)


def _table(console: Console, title: str, heads: list[str], rows: list[list[str]], *, wrap: bool = False) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False
    )
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number and not wrap else "left", no_wrap=number > 0 and not wrap)
    for cells in rows:
        table.add_row(*map(escape, cells))
    console.print()
    console.print(table, highlight=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


# --- picture ----------------------------------------------------------------------------------------------------------


def plot(e: Examination, figures: Figures, path: Path, *, title: str) -> None:
    """Write a PNG: a column a scorer, above how its scores of each kind lie, below by how much true pairs lead."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(e.scorers)
    figure = Figure(figsize=(1 + 5.2 * columns, 7.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns, squeeze=False)
    for (above, below), (label, answers) in zip(axes.T, e.scorers.items(), strict=True):
        teacher = label != e.student.label
        unit = e.score_kind.replace("_", "-") if teacher else "cosine"
        _histograms(above, answers, shade=teacher and e.score_kind == "log_odds")
        above.set(title=_headline(label, figures), xlabel=f"score ({unit})", ylabel="share of the pairs, root scale")
        _lead(below, answers)
        below.set(xlabel=f"true pair minus hard negative of its list ({unit})", ylabel="share of the hard negatives")
    named = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles, wide = list(named.values()), 2 * columns
    figure.legend(handles, list(named), loc="outside lower center", ncols=wide, frameon=False)
    figure.suptitle(title)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _headline(label: str, figures: Figures) -> str:
    against = figures.scorers[label].against
    hard = [found.auc.value for kind, found in against.items() if kind != RANDOM_PAIRS]
    if not hard:
        return label
    return f"{label}: AUC {hard[-1]:.3f} over hard, {against[RANDOM_PAIRS].auc.value:.3f} over random"


def _colours(answers: Answers) -> dict[str, str]:
    hard = [kind for kind in answers.kinds() if kind not in (TRUE, RANDOM_PAIRS)]
    return {TRUE: _TRUE, **dict(zip(hard, _HARD, strict=False)), RANDOM_PAIRS: _RANDOM}


def _histograms(axis: Any, answers: Answers, *, shade: bool) -> None:
    finite = answers.pairs[np.isfinite(answers.pairs)]
    if not len(finite):
        axis.text(0.5, 0.5, "no finite score", ha="center", va="center", transform=axis.transAxes)
        return
    low, high = float(finite.min()), float(finite.max())
    edges = np.linspace(low, high, BINS + 1) if high > low else np.linspace(low - 0.5, high + 0.5, BINS + 1)
    colours = _colours(answers)
    for kind, scores in answers.kinds().items():
        inside = scores[np.isfinite(scores)]
        if not len(inside):
            continue
        heights = np.histogram(inside, edges)[0] / len(inside)
        line = "--" if kind == RANDOM_PAIRS else "-"
        axis.stairs(heights, edges, fill=True, color=colours[kind], alpha=0.12)
        axis.stairs(heights, edges, color=colours[kind], linewidth=1.6, linestyle=line, label=kind)
    axis.set_yscale("function", functions=(_root, np.square))  # a peak must not hide the few that matter
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
    if shade:
        certain = float(np.log((1 - NEAR) / NEAR))
        for side in (-certain, certain):
            axis.axvline(side, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(edges[0], edges[-1])


def _root(heights: Any) -> Any:
    return np.sqrt(np.maximum(heights, 0))


def _lead(axis: Any, answers: Answers) -> None:
    colours = list(_colours(answers).values())[1:]
    wrong = []
    for colour, (finder, lists) in zip(colours, answers.lists.items(), strict=False):
        led = np.sort(margins(lists).ravel())
        led = led[np.isfinite(led)]
        if not len(led):
            continue
        wrong.append(f"{np.mean(led <= 0):.1%} of those by {finder}")
        axis.step(led, np.arange(1, len(led) + 1) / len(led), where="post", color=colour, linewidth=1.6)
    axis.margins(x=0)
    left, right = axis.get_xlim()
    axis.axvspan(min(left, 0), 0, color="black", alpha=0.07, linewidth=0)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlim=(min(left, 0), max(right, 0)), ylim=(0, 1))
    axis.set_title("not below the true pair (shaded): " + ",\n".join(wrong), fontsize=9)
