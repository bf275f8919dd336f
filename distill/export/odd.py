"""Pictures and sentences that loaders disagree on: modes, depth, orientation, sizes, lengths. Made here."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

ODD_TEXTS = ("", "a", "A DOG", "naïve café, 犬 🐕", "one two three four five six seven eight nine ten " * 40)
"""From two tokens to more than any tower reads."""


@cache
def odd_pictures() -> Mapping[str, bytes]:
    """Image files by what is odd about them; made once."""
    import PIL.Image

    rng = np.random.default_rng(0)
    steps = np.linspace(0, 255, 90)[None, :, None] * np.linspace(0.2, 1, 60)[:, None, None]  # (60, 90, 1)
    colours = np.clip(steps * np.array([1.0, 0.6, 0.3]) + rng.normal(0, 12, (60, 90, 3)), 0, 255).astype(np.uint8)
    plain = PIL.Image.fromarray(colours)
    alpha = PIL.Image.fromarray((np.linspace(0, 255, 90)[None] * np.ones((60, 1))).astype(np.uint8))
    see_through = plain.copy()
    see_through.putalpha(alpha)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    deep = PIL.Image.fromarray((steps[..., 0] / 255 * 65535).astype(np.uint16))
    return {
        "plain": _file(plain, "PNG"),
        "grey": _file(plain.convert("L"), "JPEG"),
        "RGBA": _file(see_through, "PNG"),
        "palette": _file(plain.convert("P", palette=PIL.Image.Palette.ADAPTIVE), "PNG"),
        "16-bit grey": _file(deep, "PNG"),
        "CMYK": _file(plain.convert("CMYK"), "JPEG"),
        "EXIF-rotated": _file(plain, "JPEG", exif=turned),
        "1 x 1": _file(plain.resize((1, 1)), "PNG"),
        "700 x 3": _file(plain.resize((700, 3)), "PNG"),
        "3 x 700": _file(plain.resize((3, 700)), "PNG"),
        "1025 x 769": _file(plain.resize((1025, 769)), "JPEG"),
    }


def _file(image: Any, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()
