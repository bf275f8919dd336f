"""Fonts for contact sheets: Pillow's own for plain text, one of the system's where a text needs more letters."""

from __future__ import annotations

import importlib.util
import unicodedata
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from PIL import ImageFont

if TYPE_CHECKING:
    from collections.abc import Iterator

Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"

_WIDE = (  # file names that Pillow looks up in the font folders of the system
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "Arial Unicode.ttf",
    "arialuni.ttf",
    "msyh.ttc",
)
_DASHES_AND_QUOTES = {"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'}
_ABSENT = "\uffff"  # never a letter: every font draws its sign for "I have no such letter"


def font_for(text: str, size: int) -> tuple[Font, str]:
    """The first font at hand that has every letter of ``text``, and the text to draw with it.

    Pillow's built-in font has little beyond ASCII. Where no font has all the letters, the one with most of them is
    taken, accents that it lacks are dropped (ğ → g), and what is still unknown shows as the font's sign for that.
    """
    text = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text)
    best: Font = _builtin(size)
    fewest = len(text) + 1
    for font in _fonts(size):
        missing = sum(not _has(font, letter) for letter in text)
        if missing < fewest:
            best, fewest = font, missing
        if not missing:
            return font, text
    return best, "".join(letter if _has(best, letter) else _plainer(letter) for letter in text)


def _plainer(letter: str) -> str:
    parts = unicodedata.normalize("NFKD", _DASHES_AND_QUOTES.get(letter, letter))
    return "".join(part for part in parts if not unicodedata.combining(part))


def _fonts(size: int) -> Iterator[Font]:
    yield _builtin(size)
    for name in _WIDE:
        font = _system(name, size)
        if font is not None:
            yield font


@cache
def _builtin(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _system(name: str, size: int) -> Font | None:
    for place in (name, *_beside_matplotlib(name)):
        try:
            return ImageFont.truetype(place, size)
        except OSError:  # not on this machine
            continue
    return None


def _beside_matplotlib(name: str) -> list[str]:
    """Matplotlib, where installed, brings DejaVu Sans; found without importing it."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        return []
    return [str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / name)]


@cache
def _has(font: Font, letter: str) -> bool:
    return letter.isspace() or _drawing(font, letter) != _drawing(font, _ABSENT)


def _drawing(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
