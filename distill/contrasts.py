"""Queries on which arms of a comparison differ most, with the pictures that show how."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from distill.asking import labelled_match
from distill.compare import Example, Found, Item, disagreements
from distill.protocols import DIRECTIONS, sides_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.data.corpus import Split
    from distill.evaluate import Evaluation
    from distill.experiment import Experiment
    from distill.protocols import Direction, Ids, Side

SHOWN = 4
"""Queries of each direction."""
TRUE_SHOWN = 5
THUMB = 160  # pixels, of the longer side


def contrasts(
    x: Experiment,
    split: Split,
    arms: Mapping[str, tuple[Evaluation, Mapping[Direction, Ids]]],
    *,
    seed: int,
) -> list[Example]:
    """Examples of both directions; none where there is but one arm.

    Args:
        x: Gives captions and pictures.
        split: What the arms were evaluated on.
        arms: By name, the evaluation, and the first answer (B,) to every query of each direction.
        seed: Of these cells.
    """
    if len(arms) < 2:
        return []
    pairs = x.corpus.split_pairs(split.name)
    groups = {"i2t": split.images, "t2i": labelled_match(pairs, "t2i", split.texts)}
    found = []
    for direction in reversed(DIRECTIONS):
        ranks = {arm: evaluation.queries(direction)[1] for arm, (evaluation, _) in arms.items()}
        for row in disagreements(ranks, groups=groups[direction], count=SHOWN).tolist():
            answers = {arm: (int(tops[direction][row]), int(ranks[arm][row])) for arm, (_, tops) in arms.items()}
            found.append(_example(x, split, answers, direction=direction, row=row, seed=seed))
    return found


def _example(
    x: Experiment,
    split: Split,
    answers: Mapping[str, tuple[int, int]],
    *,
    direction: Direction,
    row: int,
    seed: int,
) -> Example:
    """``answers``: by arm, the item that comes first and the rank of the first true one."""
    query_side, item_side = sides_of(direction)
    queries, items = (split.images, split.texts) if direction == "i2t" else (split.texts, split.images)
    query, matches = int(queries[row]), x.corpus.matches
    true = np.intersect1d(matches.texts_of(query) if direction == "i2t" else matches.images_of(query), items)
    labelled = labelled_match(x.corpus.split_pairs(split.name), direction, np.asarray([query]))
    true = np.concatenate([labelled, true[true != labelled[0]]])[:TRUE_SHOWN]
    return Example(
        direction,
        _item(x, query_side, query),
        [_item(x, item_side, one) for one in true.tolist()],
        {arm: Found(_item(x, item_side, best), rank == 1, rank) for arm, (best, rank) in answers.items()},
        seed=seed,
    )


def _item(x: Experiment, side: Side, row: int) -> Item:
    if side == "text":
        return Item(row, x.corpus.texts[row])
    (picture,) = x.corpus.load_images(np.asarray([row]))
    picture.thumbnail((THUMB, THUMB))
    file = BytesIO()
    picture.save(file, format="JPEG", quality=80)
    return Item(row, x.corpus.image_names[row], file.getvalue())
