"""What every source yields (rows of images with captions), where images lie, and how a source is read."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from distill.data.corpus import SPLITS, DataError
from distill.data.pictures import MAX_PIXELS

if TYPE_CHECKING:
    from pathlib import Path

    from distill.data.pictures import Pictures
    from distill.data.verify import Verdict


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read.

    Attributes:
        on_bad_item: ``fail`` shows the problems and stops; ``skip`` leaves bad items out up to ``max_skip_rate``.
        max_skip_rate: Largest share of images, and of captions, that may be left out.
        max_pixels: Largest width * height of an image.
        split_names: The source's split name -> train, val or test, or None to leave those items out.
        split_shares: For a source without splits: share of images per split, such as ``{"val": 0.1, "test": 0.1}``; the
            rest is train. Drawn from each image's content, so order and number of rows do not matter. None: all train.
        copies_match: Exact copies of a caption (or an image) match whatever the other copies match.
        cache: Folder that keeps which images are readable; None checks them every time.
        workers: Threads that decode; None is one a core, at most 8.
    """

    on_bad_item: Literal["fail", "skip"] = "fail"
    max_skip_rate: float = 0.01
    max_pixels: int = MAX_PIXELS
    split_names: Mapping[str, str | None] = field(default_factory=dict)
    split_shares: Mapping[str, float] | None = None
    copies_match: bool = True
    cache: Path | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.on_bad_item not in ("fail", "skip"):
            raise DataError(f"on_bad_item must be 'fail' or 'skip', got {self.on_bad_item!r}")
        if not 0.0 <= self.max_skip_rate < 1.0:
            raise DataError(f"max_skip_rate is a share from 0 to below 1, got {self.max_skip_rate}")
        if self.max_pixels < 1:
            raise DataError(f"max_pixels must be at least 1, got {self.max_pixels}")
        for given, name in self.split_names.items():
            if name is not None and name not in SPLITS:
                raise DataError(f"split_names maps {given!r} to unknown split {name!r}; known: {', '.join(SPLITS)}")
        shares = self.split_shares or {}
        if set(shares) - set(SPLITS) or any(share < 0 for share in shares.values()) or sum(shares.values()) > 1:
            raise DataError(
                f"split_shares must give {', '.join(SPLITS)} shares that sum to at most 1, got {dict(shares)}"
            )


@dataclass(frozen=True)
class Caption:
    """A caption as it stands in the source; one ``id`` on several images makes them share one caption."""

    where: str
    text: object
    id: str | None = None


@dataclass(frozen=True)
class Row:
    """An image as it stands in the source.

    Attributes:
        where: File and row or entry, for messages.
        image: What ``ImageSource.locate`` understands.
        split: As given; None or "" is none.
        captions: As given.
        image_id: Rows with one id are one image; None takes the located image as its own id.
    """

    where: str
    image: object
    split: object
    captions: Sequence[Caption]
    image_id: str | None = None


class ImageSource(Protocol):
    """Where the images of a source lie."""

    def locate(self, image: object) -> str:
        """Key of an image.

        Raises:
            DataError: It is not named, or lies outside the allowed folder.
        """

    def verdicts(self, keys: Sequence[str]) -> Generator[Verdict, None, None]:
        """Whether each image can be decoded, in order."""

    def pictures(self, keys: Sequence[str], names: Sequence[str], fingerprints: Sequence[str]) -> Pictures:
        """The images to keep."""
