"""Training pictures seen a little differently in each epoch: another crop, sometimes mirrored.

What becomes of a picture is a function of (seed, epoch, picture): whatever the workers, the processes and the kills. In
mining and evaluation pictures are as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import ImageOps

from distill.sampler import hash_uniform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeAlias

    import numpy as np

    from distill.protocols import Ids, Image, Inputs

    Draws: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_DRAW = 3  # sets these draws apart from others of the same seed
_RATIO = math.log(4 / 3)  # a crop's shape is the picture's own times 3/4 to 4/3


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop (Szegedy et al., CVPR 2015) and mirroring; the model's own preparation resizes what is left.

    Attributes:
        crop: least and most share of a picture's area that is kept.
        flip: share of pictures that are mirrored left to right; 0 where captions say left and right.
        seed: of the draws.
    """

    crop: tuple[float, float]
    flip: float
    seed: int

    def __call__(self, image: Image, draws: Draws) -> Image:
        """One picture by its uniform numbers (5,)."""
        area, shape, across, down, mirrored = draws.tolist()
        kept = self.crop[0] + area * (self.crop[1] - self.crop[0])
        room = min(_RATIO, -math.log(kept)) / 2  # so that no side is longer than the picture's
        stretch = math.exp((2 * shape - 1) * room)  # of the width; the height shrinks by as much
        width = max(1, round(image.width * math.sqrt(kept) * stretch))
        height = max(1, round(image.height * math.sqrt(kept) / stretch))
        left, top = int(across * (image.width - width + 1)), int(down * (image.height - height + 1))
        seen = image.crop((left, top, left + width, top + height))
        return ImageOps.mirror(seen) if mirrored < self.flip else seen

    def draws(self, epoch: int, rows: Ids) -> Draws:
        """Uniform numbers (N, 5) of pictures by their rows."""
        return hash_uniform((self.seed, epoch, _DRAW), rows, 5)


@dataclass(frozen=True)
class AugmentedSource:
    """Inputs of training pictures, decoded and changed anew in each epoch."""

    load: Callable[[Ids], Sequence[Image]]  # pictures of rows of the corpus
    prepare: Callable[[Sequence[Image]], Inputs]  # the model's own
    augmentation: Augmentation

    def at(self, epoch: int, rows: Ids) -> Inputs:
        """Of these rows in an epoch."""
        draws = self.augmentation.draws(epoch, rows)
        return self.prepare([self.augmentation(image, of) for image, of in zip(self.load(rows), draws, strict=True)])

    def __call__(self, rows: Ids) -> Inputs:
        """As they are."""
        return self.prepare(self.load(rows))
