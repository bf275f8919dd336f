"""``distill false-negatives RUN``: a run's suspected false negatives as a table, a page and files to act on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.detection import Detection, detections, holds, round_margins
from distill.durable import staged_folder
from distill.false_negatives import KINDS, Suspects
from distill.protocols import DIRECTIONS
from distill.report.false_negatives_page import Entry, Item, Page, picture_item, render, scored, share
from distill.report.table import plain_lines
from distill.suspecting import Found, find

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from distill.batches import PairScores
    from distill.data.corpus import Corpus
    from distill.experiment import Experiment
    from distill.protocols import Direction, Ids, Side

SHOWN = 3  # labelled matches of one item on the page
_PICTURES = 64  # decoded together
_POINTS = 120  # of a curve


def review(x: Experiment, *, margin: float | None, top: int) -> tuple[list[str], Path]:
    """Find the suspects among the first round's candidates and write ``false-negatives/`` into the run's folder.

    Args:
        x: The experiment; its first round must have been mined. Scores that the store lacks are asked for.
        margin: Instead of the recipe's.
        top: Most entries on the page, shared out among directions and kinds.

    Returns:
        Lines of a table, and the folder with ``index.html``, ``pairs.csv``, ``pairs.parquet`` and ``summary.json``.

    Raises:
        FileNotFoundError: nothing has been mined yet.
    """
    from distill.asking import asked_of, scores_of
    from distill.pipeline import mined_before

    mined = mined_before(x)
    known = scores_of(x, x.corpus.split_pairs("train"), mined)
    own = x.recipe.false_negatives.margin if margin is None else margin
    found = find(x, asked_of(x, mined), known, margin=own)
    truth = _against_truth(x.corpus, found, own)
    folder = x.folder / "false-negatives"
    page = _page(x, found, known, own=own, top=top, truth=truth)
    with staged_folder(folder) as staged:
        (staged / "index.html").write_text(render(page), encoding="utf-8")
        _write_pairs(x, found, staged)
        text = json.dumps(_summary(x, found, own, truth), indent=2, allow_nan=False)
        (staged / "summary.json").write_text(text + "\n", encoding="utf-8")
    return _lines(found, own, truth), folder


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Truth:
    """How well suspicion does, a direction each, where the corpus knows."""

    own: Mapping[Direction, Detection]
    kinds: Mapping[Direction, Mapping[str, int]]  # suspects of each kind that hold
    table: Mapping[Direction, list[Detection]]
    curves: Mapping[Direction, list[Detection]]


def _against_truth(corpus: Corpus, found: Found, own: float) -> _Truth | None:
    if corpus.truth is None:
        return None
    margins = round_margins(found.judged.values(), own)
    dense = np.linspace(margins[0], margins[-1], _POINTS).tolist() if len(margins) > 1 else margins
    true = {direction: holds(those, direction, corpus.truth) for direction, those in found.judged.items()}
    at = {
        name: {d: detections(those, true[d], chosen) for d, those in found.judged.items()}
        for name, chosen in (("own", [own]), ("table", margins), ("curves", dense))
    }
    kinds: dict[Direction, dict[str, int]] = {}
    for direction, suspected in found.suspects.items():
        right = suspected.kinds[corpus.truth.is_match(suspected.image_ids, suspected.text_ids)]
        kinds[direction] = dict(zip(KINDS, np.bincount(right, minlength=len(KINDS)).tolist(), strict=True))
    return _Truth({d: one for d, (one,) in at["own"].items()}, kinds, at["table"], at["curves"])


def _summary(x: Experiment, found: Found, own: float, truth: _Truth | None) -> dict[str, Any]:
    recipe = x.recipe.false_negatives
    directions: dict[str, Any] = {}
    for direction, those in found.suspects.items():
        directions[direction] = {"candidates": those.candidates, "suspects": len(those.kinds), **those.counts()}
        if truth is not None:
            directions[direction] |= {
                "detection": truth.own[direction].as_dict(),
                "that_hold": truth.kinds[direction],
                "over_margins": [one.as_dict() for one in truth.table[direction]],
            }
    return {
        "run": x.recipe.name,
        "corpus": {"name": x.corpus.name, "fingerprint": x.corpus.fingerprint},
        "teacher": {"identity": x.scorer.identity, "score_kind": x.scorer.score_kind},
        "margin": own,
        "hash_distance": recipe.hash_distance,
        "embedding_cosine": recipe.embedding_cosine,
        "pictures": found.pictures,
        "pictures_too_flat_to_hash": found.flat,
        "directions": directions,
    }


def _count_rows(found: Found, truth: _Truth | None) -> list[list[str]]:
    heads = ["", *(f"{direction} {what}" for direction in found.suspects for what in ("suspects", "share"))]
    heads += [] if truth is None else [f"{direction} that hold" for direction in found.suspects]
    rows = [heads]
    for kind in KINDS:
        cells = [kind.replace("_", " ")]
        for those in found.suspects.values():
            cells += [f"{those.counts()[kind]:,}", share(those.counts()[kind] / max(1, those.candidates))]
        rows.append(cells + ([] if truth is None else [f"{truth.kinds[d][kind]:,}" for d in found.suspects]))
    total = ["all"]
    for those in found.suspects.values():
        total += [f"{len(those.kinds):,}", share(len(those.kinds) / max(1, those.candidates))]
    rows.append(total + ([] if truth is None else [f"{truth.own[d].both:,}" for d in found.suspects]))
    return rows


def _lines(found: Found, own: float, truth: _Truth | None) -> list[str]:
    looked = ", ".join(f"{those.candidates:,} {direction}" for direction, those in found.suspects.items())
    lines = [f"candidates that the teacher puts more than {own:g} above the best labelled match, of {looked}"]
    lines += plain_lines(_count_rows(found, truth))
    lines += [_flat_line(found)] if found.flat else []
    for direction, one in ({} if truth is None else truth.own).items():
        lines.append(
            f"{direction}: precision {share(one.precision)}, recall {share(one.recall)} of the {one.true:,} candidates "
            f"that hold ({share(one.true / max(1, one.candidates))} of all)"
        )
    return lines


def _flat_line(found: Found) -> str:
    return f"{found.flat:,} of {found.pictures:,} pictures are too flat for a hash: near nobody by it"


def _write_pairs(x: Experiment, found: Found, folder: Path) -> None:
    """Every suspect, the furthest above first, as CSV and as Parquet."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    corpus, treatments = x.corpus, np.array(x.recipe.false_negatives.treatments)
    tables = []
    for direction, those in found.suspects.items():
        columns = {
            "direction": np.repeat(direction, len(those.kinds)),
            "image_id": those.image_ids,
            "text_id": those.text_ids,
            "image": [corpus.image_names[row] for row in those.image_ids.tolist()],
            "text": [corpus.texts[row] for row in those.text_ids.tolist()],
            "class": np.array(KINDS)[those.kinds],
            "teacher_score": those.scores,
            "labelled_score": those.labelled,
            "above": those.leads,
            "treatment": treatments[those.kinds],
        }
        if corpus.truth is not None:
            columns["holds"] = corpus.truth.is_match(those.image_ids, those.text_ids)
        order = np.argsort(-those.leads, kind="stable")
        tables.append(pa.table({name: pa.array(values) for name, values in columns.items()}).take(order))
    table = pa.concat_tables(tables, promote_options="permissive")  # an empty column has no type of its own
    pq.write_table(table, folder / "pairs.parquet")
    pyarrow.csv.write_csv(table, folder / "pairs.csv")


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(x: Experiment, found: Found, known: PairScores, *, own: float, top: int, truth: _Truth | None) -> Page:
    chosen = shown(found.suspects, top)
    return Page(
        title=f"{x.recipe.name}: suspected false negatives",
        lead=_introduction(x, found, own),
        kinds=KINDS,
        counts=_count_rows(found, truth),
        entries=_Shelf(x, known).entries(found.suspects, chosen),
        total=sum(len(those.kinds) for those in found.suspects.values()),
        margin=own,
        detection=None if truth is None else truth.table,
        curves=None if truth is None else truth.curves,
    )


def _introduction(x: Experiment, found: Found, own: float) -> list[str]:
    recipe = x.recipe.false_negatives
    near = [] if recipe.hash_distance is None else [f"at most {recipe.hash_distance} of 64 hash bits differ"]
    near += [] if recipe.embedding_cosine is None else [f"a cosine of at least {recipe.embedding_cosine:g}"]
    told = " or ".join(near) or "not looked for"
    lines = [
        f"Mined candidates of the first round that the teacher puts more than {own:g} above the query's best labelled "
        f"match. Scores are raw ({x.scorer.score_kind}).",
        "Same image: the same picture and caption are a labelled pair in other rows. Near duplicate: the picture is "
        f"nearly one that the caption is labelled with ({told}; a hash sees no colour). Disagreement: the teacher "
        "alone says so, and may be wrong.",
        f"In training: same image {recipe.same_image}, near duplicate {recipe.near_duplicate}, disagreement "
        f"{recipe.disagreement}. All suspects are in pairs.csv and pairs.parquet beside this page.",
    ]
    return [*lines, _flat_line(found) + "."] if found.flat else lines


def shown(found: Mapping[Direction, Suspects], top: int) -> list[tuple[Direction, int]]:
    """(direction, place) of at most ``top`` suspects, the furthest above first.

    Directions and kinds take turns, each with its furthest, so that a kind of few is not crowded out.
    """
    listed = []
    for direction, those in found.items():
        for kind in range(len(KINDS)):
            places = np.flatnonzero(those.kinds == kind)
            places = places[np.argsort(-those.leads[places], kind="stable")][:top]
            listed += [
                (turn, -float(those.leads[place]), direction, place) for turn, place in enumerate(places.tolist())
            ]
    taken = sorted(sorted(listed)[:top], key=lambda one: (one[1], one[2], one[3]))
    return [(direction, place) for _, _, direction, place in taken]


class _Shelf:
    """Makes entries; each picture is decoded once."""

    def __init__(self, x: Experiment, known: PairScores) -> None:
        self._corpus, self._known = x.corpus, known
        self._pictures: dict[int, Item] = {}

    def entries(self, found: Mapping[Direction, Suspects], chosen: list[tuple[Direction, int]]) -> list[Entry]:
        """One an item of ``chosen``, in that order."""
        made = [partial(self._entry, found[direction], place) for direction, place in chosen]
        wanted = set[int]()
        for direction, place in chosen:
            wanted |= self._pictures_of(found[direction], place)
        rows = np.array(sorted(wanted), np.int64)
        for start in range(0, len(rows), _PICTURES):
            part = rows[start : start + _PICTURES]
            for row, image in zip(part.tolist(), self._corpus.load_images(part), strict=True):
                self._pictures[row] = picture_item(image, self._corpus.image_names[row])
        return [make() for make in made]

    def _pictures_of(self, those: Suspects, place: int) -> set[int]:
        image, text = int(those.image_ids[place]), int(those.text_ids[place])
        return {image, *self._labelled("t2i", text)[0].tolist()}

    def _labelled(self, direction: Direction, query: int) -> tuple[Ids, int]:
        """The labelled matches of an item to show, the best by the teacher first, and how many more there are."""
        _, items = self._corpus.matches.of(direction, np.array([query]))
        scores = self._scores(direction, query, items)
        order = np.lexsort((items, np.where(np.isnan(scores), np.inf, -scores)))
        return items[order][:SHOWN], max(0, len(items) - SHOWN)

    def _scores(self, direction: Direction, query: int, items: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        queries = np.full(len(items), query, np.int64)
        return self._known.lookup(queries, items) if direction == "i2t" else self._known.lookup(items, queries)

    def _item(self, side: Side, row: int) -> Item:
        if side == "image":
            return self._pictures[row]
        return Item(f"caption {row}", text=self._corpus.texts[row])

    def _entry(self, those: Suspects, place: int) -> Entry:
        direction = those.direction
        other: Direction = DIRECTIONS[1 - DIRECTIONS.index(direction)]
        query_side: Side = "image" if direction == "i2t" else "text"
        item_side: Side = "text" if direction == "i2t" else "image"
        query, item = int(those.query_ids[place]), int(those.item_ids[place])
        labelled, more = self._labelled(direction, query)
        scores = self._scores(direction, query, labelled).tolist()
        truth = self._corpus.truth
        return Entry(
            direction=direction,
            kind=KINDS[those.kinds[place]],
            lead=float(those.leads[place]),
            query=self._item(query_side, query),
            labelled=tuple(
                scored(self._item(item_side, row), score) for row, score in zip(labelled.tolist(), scores, strict=True)
            ),
            more=more,
            candidate=scored(self._item(item_side, item), float(those.scores[place])),
            own=tuple(self._item(query_side, row) for row in self._labelled(other, item)[0].tolist()),
            holds=None
            if truth is None
            else bool(truth.is_match(those.image_ids[place : place + 1], those.text_ids[place : place + 1])[0]),
        )
