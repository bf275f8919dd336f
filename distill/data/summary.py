"""What a corpus holds, in numbers that a person can read before any work starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.data.corpus import BadItem, Corpus

_LISTED = 20


@dataclass(frozen=True)
class Spread:
    """Least, mean and most of a count."""

    least: int
    mean: float
    most: int

    def __str__(self) -> str:
        return f"{self.least} to {self.most}, mean {self.mean:.2f}"


@dataclass(frozen=True)
class Copies:
    """Exact copies among items.

    Attributes:
        surplus: Items that are a copy of an earlier one.
        across: Contents that stand in more than one split.
        examples: A few of those that stand in more than one split, else of any; the names of their items.
    """

    surplus: int
    across: int
    examples: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Summary:
    """Counts of a corpus; ``rows`` and ``render`` show them.

    Attributes:
        name: Name of the corpus.
        fingerprint: Fingerprint of the corpus.
        images: Number of images.
        captions: Number of captions.
        pairs: Labelled pairs.
        matches: True pairs, labelled or not.
        splits: (images, captions) of each split.
        captions_per_image: Labelled captions of an image.
        images_per_caption: Labelled images of a caption.
        copied_images: Exact copies among image files.
        copied_captions: Exact copies among captions.
        skipped: What was left out, and why.
    """

    name: str
    fingerprint: str
    images: int
    captions: int
    pairs: int
    matches: int
    splits: dict[str, tuple[int, int]]
    captions_per_image: Spread
    images_per_caption: Spread
    copied_images: Copies
    copied_captions: Copies
    skipped: tuple[BadItem, ...]

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) of everything but the skipped items."""
        rows = [("corpus", self.name), ("fingerprint", self.fingerprint)]
        rows += [("images", f"{self.images:,}"), ("captions", f"{self.captions:,}")]
        rows += [(name, f"{images:,} images, {texts:,} captions") for name, (images, texts) in self.splits.items()]
        rows += [("captions per image", str(self.captions_per_image))]
        rows += [("images per caption", str(self.images_per_caption))]
        rows += [("pairs", f"{self.pairs:,} labelled, {self.matches:,} true")]
        for what, copies in (("image", self.copied_images), ("caption", self.copied_captions)):
            rows.append((f"{what} copies", f"{copies.surplus:,}, {copies.across:,} of them across splits"))
            rows += [(f"  such as {what}", " = ".join(example)) for example in copies.examples if copies.across]
        reasons = Counter(item.what for item in self.skipped)
        rows.append(("skipped", f"{reasons['image']:,} images, {reasons['caption']:,} captions"))
        return rows

    def render(self) -> str:
        """All of it as plain text, skipped items last."""
        rows = self.rows()
        width = max(len(what) for what, _ in rows)
        lines = [f"{what:<{width}}  {value}" for what, value in rows]
        lines += [f"  {item}" for item in self.skipped[:_LISTED]]
        if len(self.skipped) > _LISTED:
            lines.append(f"  and {len(self.skipped) - _LISTED:,} more")
        return "\n".join(lines)


def describe(corpus: Corpus) -> Summary:
    """Counts a corpus."""
    splits = corpus.splits.values()
    image_splits = [(split.name, split.images) for split in splits]
    text_splits = [(split.name, split.texts) for split in splits]
    return Summary(
        name=corpus.name,
        fingerprint=corpus.fingerprint,
        images=corpus.n_images,
        captions=corpus.n_texts,
        pairs=len(corpus.pairs),
        matches=len(corpus.matches),
        splits={split.name: (len(split.images), len(split.texts)) for split in splits},
        captions_per_image=_spread(corpus.pairs[:, 0]),
        images_per_caption=_spread(corpus.pairs[:, 1]),
        copied_images=_copies(corpus.image_fingerprints, corpus.image_names, image_splits),
        copied_captions=_copies(corpus.text_fingerprints, corpus.texts, text_splits),
        skipped=corpus.skipped,
    )


def _spread(rows: np.ndarray[Any, np.dtype[np.int64]]) -> Spread:
    counts = np.bincount(rows)
    return Spread(int(counts.min()), float(counts.mean()), int(counts.max()))


def _copies(
    contents: Sequence[str], names: Sequence[str], splits: list[tuple[str, np.ndarray[Any, np.dtype[np.int64]]]]
) -> Copies:
    rows_of: dict[str, list[int]] = {}
    for row, content in enumerate(contents):
        rows_of.setdefault(content, []).append(row)
    copied = [rows for rows in rows_of.values() if len(rows) > 1]
    splits_of: dict[int, set[str]] = {}
    for name, members in splits:
        for row in members.tolist():
            splits_of.setdefault(row, set()).add(name)
    # one caption that is labelled for images of two splits crosses without a copy; only copies are counted here
    across = [rows for rows in copied if len(set().union(*(splits_of.get(row, set()) for row in rows))) > 1]
    examples = tuple(
        tuple(f"{names[row]} ({'/'.join(sorted(splits_of.get(row, set())))})" for row in rows[:3])
        for rows in (across or copied)[:3]
    )
    return Copies(sum(len(rows) - 1 for rows in copied), len(across), examples)
