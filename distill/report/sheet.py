"""Contact sheets: what a caption finds with each student, and what one query finds.

A sheet is built from blocks that are pictures themselves, put beside and below one another, so nothing can overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageOps

from distill.durable import write_atomically
from distill.report.fonts import font_for

if TYPE_CHECKING:
    from pathlib import Path

    from distill.protocols import Ids, Image

THUMB = 120  # pixels a side of a picture on a sheet, without its frame
RIGHT, WRONG, PLAIN = (22, 138, 62), (172, 172, 172), (205, 205, 205)  # frames; right ones are thicker too
_FRAME = 6
_GAP, _MARGIN = 10, 24
_INK, _FAINT, _PAPER, _RULE = (25, 25, 25), (105, 105, 105), (255, 255, 255), (225, 225, 225)
_CAPTION, _LABEL, _SMALL = 19, 15, 14  # font sizes


@dataclass(frozen=True)
class Strip:
    """What one model finds for a caption: pictures, best first, their similarities and whether each is a true one."""

    label: str
    images: Sequence[Image]
    similarity: Sequence[float]
    correct: Sequence[bool]
    note: str = ""

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.similarity) == len(self.correct):
            raise ValueError(
                f"strip {self.label!r}: one similarity and one mark a picture are needed, got {len(self.images)} "
                f"pictures, {len(self.similarity)} similarities and {len(self.correct)} marks"
            )


@dataclass(frozen=True)
class Row:
    """One caption, the pictures it is true of, and what each model finds."""

    caption: str
    truth: Sequence[Image]
    strips: Sequence[Strip]


def pick_sample(groups: Ids, *, count: int, seed: int) -> Ids:
    """Which queries to show: positions drawn at random from a fixed seed, at most one a group, ascending.

    The choice sees neither ranks nor scores: a sheet is a fair sample, not a choice of successes.

    Args:
        groups: (N,) for each query what it shares with others, for example the image its caption was written for.
        count: How many, at most; fewer where there are fewer groups.
        seed: Of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(groups))
    _, first = np.unique(np.asarray(groups)[order], return_index=True)
    return np.sort(order[np.sort(first)[:count]])


def retrieval_sheet(rows: Sequence[Row], path: str | Path, *, title: str = "") -> None:
    """Write a PNG: for each caption its true pictures on the left and one strip of found pictures a model.

    True pictures have a thick green frame, others a thin grey one; the similarity stands beneath.

    Raises:
        ValueError: There is no row, or a row without a true picture or without a strip.
    """
    if not rows:
        raise ValueError("a sheet needs at least one row")
    for row in rows:
        if not row.truth or not row.strips:
            raise ValueError(f"caption {row.caption!r}: a row needs at least one true picture and one strip")
    columns = max((len(strip.images) for row in rows for strip in row.strips), default=0)
    width = (columns + 1) * (_cell() + _GAP) + 2 * _GAP
    blocks = [_text(title, width, _CAPTION, _INK)] if title else []
    for row in rows:
        blocks += [PIL.Image.new("RGB", (width, 2), _RULE), _retrieval_row(row, width)]
    legend = "Thick green frame: the caption is true of the picture. Thin grey frame: it is not. Below: similarity."
    blocks += [PIL.Image.new("RGB", (width, 2), _RULE), _text(legend, width, _SMALL, _FAINT)]
    _write(_below(blocks, 14), path)


def hits_sheet(
    query: str | Image, images: Sequence[Image], *, labels: Sequence[str], path: str | Path, columns: int = 5
) -> None:
    """Write a PNG: one query, a text or a picture, and what it finds, best first.

    Args:
        query: The text or the picture that was asked.
        images: The pictures found; empty where texts were found, which ``labels`` then holds.
        labels: One a hit, for example "0.31  beach.jpg".
        path: Where to write.
        columns: Pictures a line.

    Raises:
        ValueError: Not one label a picture.
    """
    if images and len(images) != len(labels):
        raise ValueError(f"one label a picture is needed, got {len(images)} pictures and {len(labels)} labels")
    width = columns * (_cell() + _GAP) - _GAP
    asked = _text(query, width, _CAPTION, _INK) if isinstance(query, str) else _framed(query, PLAIN, 2, side=2 * THUMB)
    blocks = [_text("query", width, _SMALL, _FAINT), asked, PIL.Image.new("RGB", (width, 2), _RULE)]
    places = [f"{place}." for place in range(1, len(labels) + 1)]
    if not labels:
        blocks.append(_text("nothing found", width, _LABEL, _FAINT))
    elif images:
        cells = [
            _below([_framed(image, PLAIN, 2), _text(f"{place} {label}", _cell(), _SMALL, _INK)], 4)
            for image, place, label in zip(images, places, labels, strict=True)
        ]
        blocks += [_beside(cells[start : start + columns], _GAP) for start in range(0, len(cells), columns)]
    else:
        lines = zip(places, labels, strict=True)
        blocks += [
            _beside([_text(n, 40, _LABEL, _FAINT), _text(label, width - 50, _LABEL, _INK)], 10) for n, label in lines
        ]
    _write(_below(blocks, 12), path)


def _retrieval_row(row: Row, width: int) -> Image:
    strips = [_strip(strip, width - _cell() - 3 * _GAP) for strip in row.strips]
    shown = max(1, len(strips))  # as many true pictures as there are strips beside them
    truth = [
        _text("true picture" if len(row.truth) == 1 else f"{len(row.truth)} true pictures", _cell(), _LABEL, _FAINT)
    ]
    truth += [_framed(image, RIGHT, _FRAME) for image in row.truth[:shown]]
    if len(row.truth) > shown:
        truth.append(_text(f"and {len(row.truth) - shown} more", _cell(), _SMALL, _FAINT))
    pictures = _beside([_below(truth, 6), _below(strips, _GAP)], 3 * _GAP)
    return _below([_text(f"“{row.caption}”", width, _CAPTION, _INK), pictures], 10)


def _strip(strip: Strip, width: int) -> Image:
    label = f"{strip.label}: {strip.note}" if strip.note else strip.label
    cells = [
        _below(
            [
                _framed(image, RIGHT if correct else WRONG, _FRAME if correct else 2),
                _text(f"{similarity:.3f}", _cell(), _SMALL, _FAINT, centred=True),
            ],
            2,
        )
        for image, similarity, correct in zip(strip.images, strip.similarity, strip.correct, strict=True)
    ]
    pictures = _beside(cells, _GAP) if cells else _text("nothing found", width, _LABEL, _FAINT)
    return _below([_text(label, width, _LABEL, _INK), pictures], 6)


def _cell() -> int:
    return THUMB + 2 * _FRAME


def _framed(image: Image, colour: tuple[int, int, int], thickness: int, *, side: int = THUMB) -> Image:
    """The whole picture, scaled into a square, in a frame; the outer size does not depend on the frame's thickness."""
    cell = side + 2 * _FRAME
    framed = PIL.Image.new("RGB", (cell, cell), _PAPER)
    inset = _FRAME - thickness
    ImageDraw.Draw(framed).rectangle((inset, inset, cell - 1 - inset, cell - 1 - inset), fill=colour)
    small = max(image.size) * 2 <= side  # a made picture: keep its pixels sharp
    fitted = ImageOps.pad(
        image.convert("RGB"),
        (side, side),
        method=PIL.Image.Resampling.NEAREST if small else PIL.Image.Resampling.LANCZOS,
        color=(240, 240, 240),
    )
    framed.paste(fitted, (_FRAME, _FRAME))
    return framed


def _text(text: str, width: int, size: int, colour: tuple[int, int, int], *, centred: bool = False) -> Image:
    """A block of text as wide as ``width``, as many lines as it takes."""
    font, text = font_for(text, size)
    lines = _wrapped(text, lambda part: font.getlength(part) <= width)
    height = round(1.35 * size)
    block = PIL.Image.new("RGB", (width, height * len(lines)), _PAPER)
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        left = (width - font.getlength(line)) / 2 if centred else 0
        draw.text((left, number * height), line, fill=colour, font=font)
    return block


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Lines that fit; a word too long for a line is broken inside."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if fits(longer):
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and not fits(lines[-1] + letter):
                lines.append("")
            lines[-1] += letter
    return lines


def _beside(blocks: Sequence[Image], gap: int) -> Image:
    width = sum(block.width for block in blocks) + gap * (len(blocks) - 1)
    whole = PIL.Image.new("RGB", (width, max(block.height for block in blocks)), _PAPER)
    left = 0
    for block in blocks:
        whole.paste(block, (left, 0))
        left += block.width + gap
    return whole


def _below(blocks: Sequence[Image], gap: int) -> Image:
    height = sum(block.height for block in blocks) + gap * (len(blocks) - 1)
    whole = PIL.Image.new("RGB", (max(block.width for block in blocks), height), _PAPER)
    top = 0
    for block in blocks:
        whole.paste(block, (0, top))
        top += block.height + gap
    return whole


def _write(sheet: Image, path: str | Path) -> None:
    with_margin = ImageOps.expand(sheet, border=_MARGIN, fill=_PAPER)
    write_atomically(path, lambda file: with_margin.save(file, format="PNG"))
