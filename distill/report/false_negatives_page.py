"""The page on which a person reviews suspected false negatives: one file, no script, nothing from elsewhere."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distill.detection import Detection
    from distill.protocols import Direction, Image

THUMBNAIL = 224  # pixels of the longer side, at most
SMALL = 96  # below this a picture is shown pixel by pixel
_COLOURS = {"i2t": "#1d6fa5", "t2i": "#b4541a"}


@dataclass(frozen=True)
class Item:
    """A picture or a caption as the page shows it."""

    name: str
    text: str = ""
    picture: str | None = None  # data URI
    small: bool = False
    score: float | None = None  # the teacher's, with the entry's query


@dataclass(frozen=True)
class Entry:
    """One suspect."""

    direction: Direction
    kind: str
    lead: float
    query: Item
    labelled: tuple[Item, ...]  # the query's labelled matches, the best by the teacher first
    more: int  # labelled matches that are not shown
    candidate: Item
    own: tuple[Item, ...]  # what the candidate is labelled with
    holds: bool | None  # whether it is really true; None where nobody knows


@dataclass(frozen=True)
class Page:
    """All that the page shows; rows of tables are cells, their heads first."""

    title: str
    lead: Sequence[str]
    kinds: Sequence[str]
    counts: Sequence[Sequence[str]]
    entries: Sequence[Entry]
    total: int
    margin: float
    detection: Mapping[Direction, Sequence[Detection]] | None = None  # a margin each, the same in both directions
    curves: Mapping[Direction, Sequence[Detection]] | None = None  # the same, closer together, for the plot


def render(page: Page) -> str:
    """The HTML. Everything that comes from data is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distill.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("false_negatives.html").render(
        title=page.title,
        lead=page.lead,
        kinds=list(page.kinds),
        counts=page.counts,
        entries=page.entries,
        total=page.total,
        detection=None if page.detection is None else _detection_rows(page.detection, page.margin),
        plot=None if not page.curves else _plot(page.curves, page.margin),
    )


def picture_item(image: Image, name: str) -> Item:
    """A picture, made small; tiny ones stay as they are, without loss."""
    small = max(image.size) <= SMALL
    file = BytesIO()
    if small:
        image.save(file, format="PNG")
    else:
        made = image.convert("RGB")
        made.thumbnail((THUMBNAIL, THUMBNAIL))
        made.save(file, format="JPEG", quality=82)
    return Item(name, picture=_uri(file.getvalue(), "image/png" if small else "image/jpeg"), small=small)


def scored(item: Item, score: float) -> Item:
    """The item with the teacher's score, where there is one."""
    return item if np.isnan(score) else replace(item, score=float(score))


def share(value: float | None) -> str:
    """A share in percent, or a dash."""
    return "–" if value is None else f"{value:.1%}"


def _detection_rows(found: Mapping[Direction, Sequence[Detection]], own: float) -> list[Any]:
    heads = ["margin"]
    for direction in found:
        heads += [f"{direction} suspects", "that hold", "precision", "recall"]
    rows = []
    for several in zip(*found.values(), strict=True):
        cells = [f"{several[0].margin:+.4g}"]
        for one in several:
            cells += [f"{one.suspected:,}", f"{one.both:,}", share(one.precision), share(one.recall)]
        rows.append({"own": several[0].margin == own, "cells": cells})
    return [heads, *rows]


def _plot(curves: Mapping[Direction, Sequence[Detection]], own: float) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    for direction, line in curves.items():
        margins = [one.margin for one in line]
        for name, style in (("precision", "-"), ("recall", "--")):
            values = [getattr(one, name) for one in line]
            heights = [np.nan if value is None else value for value in values]
            axis.plot(margins, heights, style, color=_COLOURS[direction], label=f"{direction} {name}")
    axis.axvline(own, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("this margin", (own, 1.01), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    axis.set(ylim=(0, 1.02), xlabel="margin above the labelled match (raw score)", ylabel="share")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return _uri(file.getvalue(), "image/svg+xml")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
