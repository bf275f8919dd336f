"""Pictures for people: what the students find for a fair sample of captions, and answers to one query."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.index import VectorIndex
from distill.report.sheet import Row, Strip, hits_sheet, pick_sample, retrieval_sheet
from distill.search import Hit, answer, embed_query, hit_lines

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.data.corpus import Split
    from distill.experiment import Experiment
    from distill.protocols import Image, Side

CAPTIONS = 6  # on the sheet
FOUND = 5  # pictures a student
ARMS = 3  # students on the sheet: the first, then the next
Vectors = np.ndarray[Any, np.dtype[np.float32]]


def write_retrieval_sheet(
    x: Experiment, split: Split, vectors: Mapping[str, Mapping[Side, Vectors]], ranks: Mapping[str, Any], path: Path
) -> None:
    """For a random sample of captions the true pictures and each student's top five.

    Args:
        x: The experiment.
        split: Whose captions and pictures.
        vectors: Of the split's items, by arm.
        ranks: (M,) rank of the first true picture of every caption, by arm.
        path: PNG to write.
    """
    matches = x.corpus.matches
    first_true = np.array([matches.images_of(int(text))[0] for text in split.texts])
    rows = []
    for place in pick_sample(first_true, count=CAPTIONS, seed=x.recipe.seed).tolist():
        text = int(split.texts[place])
        true = np.intersect1d(matches.images_of(text), split.images)
        strips = []
        for arm in list(vectors)[:ARMS]:
            index = VectorIndex.build(vectors[arm]["image"], split.images)
            hits = answer(index, vectors[arm]["text"][place], FOUND)
            ids = np.array([hit.item_id for hit in hits], np.int64)
            strips.append(
                Strip(
                    arm,
                    x.corpus.load_images(ids),
                    [hit.similarity for hit in hits],
                    [bool(mark) for mark in np.isin(ids, true)],
                    note=f"true picture at rank {int(ranks[arm][place])} of {len(split.images)}",
                )
            )
        rows.append(Row(x.corpus.texts[text], x.corpus.load_images(true), strips))
    title = f"{x.recipe.name}: a random sample of {split.name} captions"
    retrieval_sheet(rows, path, title=title)


def search(x: Experiment, query: str, *, arm: str, top: int, out: Path | None) -> tuple[list[str], Path]:
    """Answer a sentence with pictures, or a picture with captions, from a student's index of the evaluated split.

    Args:
        x: The experiment; its students must be trained and evaluated.
        query: A sentence, or the path of a picture.
        arm: Whose student; the last arm's when empty.
        top: How many results.
        out: PNG to write; ``search.png`` in the run's folder when None.

    Returns:
        One line a hit, and the PNG's path.

    Raises:
        ValueError: no such arm, an empty query, or a picture that cannot be read.
        FileNotFoundError: the arm has no student or index yet, or the query looks like a file that is not there.
    """
    folder = x.folder / "arms" / x.arm_named(arm)
    if not (folder / "index" / "image").is_dir():
        raise FileNotFoundError(f"{folder} has no index yet: finish the run first (distill run RECIPE --resume)")
    student = x.saved_student(folder / "student")
    picture = _picture_of(query)
    asked: str | Image = query if picture is None else picture
    side: Side = "image" if picture is None else "text"
    index = VectorIndex.load(folder / "index" / side)
    hits = answer(index, embed_query(student, asked, device=x.accelerator.device), min(top, len(index)))
    labels = x.corpus.image_names if side == "image" else x.corpus.texts
    path = out or x.folder / "search.png"
    _write_hits(x, asked, hits, side, path)
    return hit_lines(hits, labels), path


def _write_hits(x: Experiment, asked: str | Image, hits: tuple[Hit, ...], side: Side, path: Path) -> None:
    """Pictures found; or captions found, each with the picture it was written for."""
    ids = np.array([hit.item_id for hit in hits], np.int64)
    if side == "image":
        pictures, labels = ids, [f"{hit.similarity:.3f}  {x.corpus.image_names[hit.item_id]}" for hit in hits]
    else:
        pictures = np.array([x.corpus.matches.images_of(int(text))[0] for text in ids], np.int64)
        labels = [f"{hit.similarity:.3f}  {x.corpus.texts[hit.item_id]}" for hit in hits]
    hits_sheet(asked, x.corpus.load_images(pictures), labels=labels, path=path)


_PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


def _picture_of(query: str) -> Image | None:
    """The picture that the query names; None where it is a sentence."""
    from distill.data.pictures import decode_image

    if not query.strip():
        raise ValueError("the query is empty: give a sentence or the path of a picture")
    path = Path(query)
    if path.suffix.lower() not in _PICTURE_ENDINGS:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"{query} looks like a picture, but there is no such file")
    return decode_image(path.read_bytes())
