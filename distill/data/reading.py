"""From rows of a source to a corpus: one set of checks, messages and skips for every file format.

A source yields ``Row`` (an image with captions) or ``BadItem`` (an entry it could not make sense of). Rows of the same
image are put together, captions and splits checked, every image decoded once, and then either all problems are shown
together or, where the options allow it, bad items are left out, counted and listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from distill.data.corpus import SPLITS, BadItem, Corpus, DataError, build_corpus
from distill.data.rows import Caption as Caption
from distill.data.rows import ImageSource
from distill.data.rows import ReadOptions as ReadOptions
from distill.data.rows import Row as Row

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distill.data.verify import Progress

SHOWN = 20
"""Problems shown together in one message."""
_LEFT_OUT = ""  # stands for a split whose items the options leave out


@dataclass
class _Entry:
    """An image put together from its rows."""

    where: str
    name: str
    split: str | None
    captions: list[Caption] = field(default_factory=list)
    sha256: str = ""


def read_corpus(
    name: str,
    rows: Iterable[Row | BadItem],
    *,
    images: ImageSource,
    options: ReadOptions,
    progress: Progress | None = None,
) -> Corpus:
    """Checks the rows of a source and builds its corpus.

    Args:
        name: Name of the corpus.
        rows: What the source holds.
        images: Where its images lie.
        options: What to do about bad items, splits and copies.
        progress: Told how many images are checked.

    Raises:
        DataError: Problems (up to ``SHOWN`` of them together), or more skips than allowed.
    """
    gathering = _Gathering(name, images, options)
    for row in rows:
        gathering.add(row)
    gathering.finish_rows()
    gathering.check_images(progress)
    return gathering.corpus()


class _Gathering:
    """The state of one reading: entries by image key, and the problems found so far."""

    def __init__(self, name: str, images: ImageSource, options: ReadOptions) -> None:
        self.name, self.images, self.options = name, images, options
        self.entries: dict[str, _Entry] = {}
        self.problems: list[BadItem] = []
        self._key_of_id: dict[str, str] = {}
        self._id_of_key: dict[str, str] = {}
        self._caption_texts: dict[str, str] = {}
        self._n_captions = 0

    def add(self, row: Row | BadItem) -> None:
        """Takes in one row: finds its image, checks it against earlier rows of the same image and its captions."""
        if isinstance(row, BadItem):
            self.problems.append(row)
            self._n_captions += row.what == "caption"
            return
        try:
            key = self.images.locate(row.image)
            self._check_identity(row, key)
            split = self._split(row.split)
        except DataError as error:
            self._problem(row.where, str(error))
            return
        if split == _LEFT_OUT:
            return
        entry = self.entries.setdefault(key, _Entry(row.where, row.image_id or key, split))
        if split is not None and entry.split not in (None, split):
            self._problem(
                row.where, f"image {key!r} is in split {split!r} here and in {entry.split!r} at {entry.where}"
            )
            return
        entry.split = entry.split or split
        for caption in row.captions:
            self._add_caption(entry, caption)

    def finish_rows(self) -> None:
        """What can be said only when all rows are in: images without captions, missing splits."""
        some_split = any(entry.split for entry in self.entries.values())
        for key, entry in list(self.entries.items()):
            if not entry.captions:
                self._problem(entry.where, f"image {entry.name!r} has no caption; every image needs at least one")
                del self.entries[key]
            elif some_split and entry.split is None:
                self._problem(entry.where, f"no split, while other rows have one; give one of {', '.join(SPLITS)}")
                del self.entries[key]
        if self.options.on_bad_item == "fail" and self.problems:
            raise DataError(self._message())
        if not self.entries and not self.problems:
            raise DataError(f"{self.name}: there is nothing in it")

    def check_images(self, progress: Progress | None) -> None:
        """Decodes every image that is left; drops those that cannot be."""
        keys = list(self.entries)
        verdicts = self.images.verdicts(keys)
        for done, (key, verdict) in enumerate(zip(keys, verdicts, strict=True), start=1):
            entry = self.entries[key]
            entry.sha256 = verdict.sha256
            if verdict.reason is not None:
                self._problem(entry.where, f"image {key!r}: {verdict.reason}")
                del self.entries[key]
            if progress is not None:
                progress(done, len(keys))
            if self.options.on_bad_item == "fail" and len(self.problems) >= SHOWN:
                break
        verdicts.close()
        self._judge_problems()

    def corpus(self) -> Corpus:
        """The corpus of what is left."""
        texts: list[str] = []
        row_of_caption: dict[str, int] = {}
        pairs: list[tuple[int, int]] = []
        for image, entry in enumerate(self.entries.values()):
            for caption in entry.captions:
                row = row_of_caption.get(caption.id) if caption.id is not None else None
                if row is None:
                    row = len(texts)
                    texts.append(str(caption.text))
                    if caption.id is not None:
                        row_of_caption[caption.id] = row
                pairs.append((image, row))
        entries = list(self.entries.values())
        corpus = build_corpus(
            self.name,
            self.images.pictures(
                list(self.entries), [entry.name for entry in entries], [entry.sha256 for entry in entries]
            ),
            texts=texts,
            pairs=np.asarray(pairs, np.int64),
            image_splits=[entry.split or self._drawn_split(entry.sha256) for entry in entries],
            copies_match=self.options.copies_match,
        )
        return replace(corpus, skipped=tuple(self.problems))

    def _check_identity(self, row: Row, key: str) -> None:
        if row.image_id is None:
            return
        known_key = self._key_of_id.setdefault(row.image_id, key)
        if known_key != key:
            raise DataError(
                f"duplicate id: image_id {row.image_id!r} is {key!r} here and {known_key!r} in an earlier row"
            )
        known_id = self._id_of_key.setdefault(key, row.image_id)
        if known_id != row.image_id:
            raise DataError(f"duplicate id: image {key!r} has image_id {row.image_id!r} here and {known_id!r} before")

    def _split(self, given: object) -> str | None:
        if given is None or given == "":
            return None
        name = self.options.split_names.get(str(given), str(given))
        if name is None:
            return _LEFT_OUT
        if name not in SPLITS:
            raise DataError(
                f"unknown split {name!r}; known: {', '.join(SPLITS)}. Map it with split_names, "
                f"such as {{{name!r}: 'train'}}, or to null to leave it out"
            )
        return name

    def _add_caption(self, entry: _Entry, caption: Caption) -> None:
        self._n_captions += 1
        text = caption.text
        if not isinstance(text, str):
            self._problem(caption.where, f"the caption is no text but {type(text).__name__}: {text!r}", "caption")
        elif not text.strip():
            self._problem(caption.where, f"empty caption of image {entry.name!r}", "caption")
        elif caption.id is not None and self._caption_texts.setdefault(caption.id, text.strip()) != text.strip():
            self._problem(caption.where, f"duplicate id: caption_id {caption.id!r} has two different texts", "caption")
        elif caption.id is not None and any(other.id == caption.id for other in entry.captions):
            self._problem(caption.where, f"caption {caption.id!r} is given twice for image {entry.name!r}", "caption")
        else:
            entry.captions.append(replace(caption, text=text.strip()))

    def _drawn_split(self, sha256: str) -> str:
        draw, passed = int(sha256[:13], 16) / 16**13, 0.0
        for name, share in sorted((self.options.split_shares or {}).items()):
            passed += share
            if name != "train" and draw < passed:
                return name
        return "train"

    def _problem(self, where: str, reason: str, what: Literal["image", "caption"] = "image") -> None:
        self.problems.append(BadItem(where, reason, what))

    def _judge_problems(self) -> None:
        """Stops unless bad items may be skipped and are few enough."""
        if not self.problems:
            return
        if self.options.on_bad_item == "fail":
            raise DataError(self._message())
        bad_images = sum(problem.what == "image" for problem in self.problems)
        bad_captions = len(self.problems) - bad_images
        n_images = len(self.entries) + bad_images
        for what, bad, count in (("images", bad_images, n_images), ("captions", bad_captions, self._n_captions)):
            if bad > self.options.max_skip_rate * count:
                raise DataError(
                    f"{bad} of {count} {what} would be skipped, more than max_skip_rate {self.options.max_skip_rate:g} "
                    f"allows. {self._message()}"
                )

    def _message(self) -> str:
        shown = "\n".join(f"  {problem}" for problem in self.problems[:SHOWN])
        more = len(self.problems) - SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        advice = "Correct them" if self.options.on_bad_item == "skip" else "Correct them, or set on_bad_item to 'skip'"
        return f"{self.name}: {len(self.problems)} problem(s) found:\n{shown}{rest}\n{advice}."
