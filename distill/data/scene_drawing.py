"""Scenes as small pictures, drawn with Pillow at four times the size and reduced, so that edges are smooth."""

from __future__ import annotations

import math
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from distill.data.scene_words import GRID

if TYPE_CHECKING:
    from PIL import ImageDraw

    from distill.data.scene_words import Scene, Thing
    from distill.protocols import Image

FINER = 4
"""How much larger than the picture it is drawn."""
RGB = {
    "red": (214, 32, 38),
    "green": (34, 150, 60),
    "blue": (38, 76, 214),
    "yellow": (240, 212, 16),
    "purple": (140, 44, 172),
    "orange": (246, 112, 6),
    "cyan": (22, 190, 205),
    "black": (26, 26, 30),
}
_RADIUS = {"small": 0.29, "large": 0.48}  # of a cell
_JITTER = {"small": 0.14, "large": 0.02}  # of a cell, either way
_NOISE = 4.0  # standard deviation, of 255


def draw_scene(scene: Scene, rng: np.random.Generator, *, size: int) -> Image:
    """An RGB picture of ``size`` x ``size`` pixels; jitter, background shade and noise come from ``rng``."""
    import PIL.Image
    import PIL.ImageDraw

    background = tuple(int(value) for value in rng.integers(232, 250, 3))
    canvas = PIL.Image.new("RGB", (size * FINER, size * FINER), background)
    pencil = PIL.ImageDraw.Draw(canvas)
    cell = size * FINER / GRID
    for thing in scene.things:
        shift = rng.uniform(-1.0, 1.0, 2) * _JITTER[thing.size] * cell
        centre = ((thing.column + 0.5) * cell + float(shift[0]), (thing.row + 0.5) * cell + float(shift[1]))
        _draw_thing(pencil, thing, centre, _RADIUS[thing.size] * cell, background)
    pixels = np.asarray(canvas.reduce(FINER), np.float32)  # (size, size, 3)
    noisy = pixels + _NOISE * rng.standard_normal(pixels.shape, np.float32)
    return PIL.Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def png(image: Image) -> bytes:
    """The picture as PNG, packed fast: noise does not compress anyway."""
    target = BytesIO()
    image.save(target, format="PNG", compress_level=1)
    return target.getvalue()


def _draw_thing(
    pencil: ImageDraw.ImageDraw, thing: Thing, centre: tuple[float, float], radius: float, background: tuple[int, ...]
) -> None:
    colour, (x, y) = RGB[thing.colour], centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape in ("circle", "ring"):
        pencil.ellipse(box, fill=colour)
        if thing.shape == "ring":
            hole = radius * 0.56
            pencil.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    elif thing.shape == "square":
        side = radius * 0.86
        pencil.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif thing.shape == "cross":
        arm = radius * 0.32
        pencil.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pencil.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    elif thing.shape == "triangle":
        pencil.polygon(_corners(centre, [radius * 1.06] * 3, lower=radius * 0.2), fill=colour)
    else:
        pencil.polygon(_corners(centre, [radius * 1.06, radius * 0.42] * 5, lower=0.0), fill=colour)


def _corners(centre: tuple[float, float], radii: list[float], *, lower: float) -> list[tuple[float, float]]:
    """Corners of a polygon around a centre, from the top clockwise, moved down by ``lower`` pixels."""
    step = 2 * math.pi / len(radii)
    return [
        (centre[0] + radius * math.sin(number * step), centre[1] + lower - radius * math.cos(number * step))
        for number, radius in enumerate(radii)
    ]
