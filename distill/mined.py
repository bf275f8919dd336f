"""What a round's mining leaves in the run's folder: candidates of both directions, and what goes with them.

Of round N: ``candidates-N-i2t.npz`` and ``candidates-N-t2i.npz``, and ``mined-N.json`` with what mining found out.
Where the training reads mined items' vectors in place of encoding them (``train.candidates: memory``),
``vectors-N-image`` and ``vectors-N-text`` lie beside them; where its batches are made of neighbours (``in_batch``),
``groups-N.npz`` holds them, ``near-N-*.npz`` the neighbours they were made from, and the candidates are what the groups
hold.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import exact, mined_vectors
from distill.asking import labelled_match, unasked, wanted
from distill.durable import write_atomically
from distill.groups import GroupedSampler, dense_candidates, grouped
from distill.protocols import DIRECTIONS, SIDES, Candidates, Direction, sides_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.experiment import Experiment
    from distill.mined_vectors import SomeVectors
    from distill.protocols import Ids, Side
    from distill.ranks import Ranks
    from distill.searched import Searched

log = logging.getLogger(__name__)
Both = dict[Direction, Candidates]
_AT_ONCE = 1 << 14  # vectors looked up together
_SAMPLED = 512  # queries that an approximate index is tried with


@dataclass(frozen=True)
class Round:
    """A round of mine -> score -> train, and where what it mined is kept."""

    number: int
    home: Path

    def candidates(self, direction: Direction, kind: str = "candidates") -> Path:
        """File of one direction; ``near``: of the neighbours that groups were made from."""
        return self.home / f"{kind}-{self.number}-{direction}.npz"

    @property
    def groups(self) -> Path:
        """File of the groupings."""
        return self.home / f"groups-{self.number}.npz"

    @property
    def about(self) -> Path:
        """File of what mining found out."""
        return self.home / f"mined-{self.number}.json"

    def vectors(self, side: Side) -> Path:
        """Folder of the vectors that items were found by."""
        return self.home / f"vectors-{self.number}-{side}"

    def shards(self, side: Side) -> Path:
        """Folder of a side's vectors while they are mined, where they are not held in memory."""
        return self.home / f"shards-{self.number}-{side}"


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept(of: Round, kind: str = "candidates") -> Both | None:
    """What a round trains on, where both directions are there."""
    paths = {direction: of.candidates(direction, kind) for direction in DIRECTIONS}
    if not all(path.is_file() for path in paths.values()):
        return None
    return {direction: _load(path, direction) for direction, path in paths.items()}


def about(of: Round) -> dict[str, float]:
    """What a round's mining found out, for its line in the metrics; see ``candidates``."""
    return dict(json.loads(of.about.read_text("utf-8"))) if of.about.is_file() else {}


def note(of: Round, values: Mapping[str, float]) -> None:
    """Add to what is noted of a round."""
    written = json.dumps({**about(of), **values}).encode()
    write_atomically(of.about, lambda file: file.write(written))


def groups(x: Experiment, of: Round) -> GroupedSampler:
    """Batches of neighbours, as a round has put them together."""
    train = x.recipe.train
    with np.load(of.groups, allow_pickle=False) as arrays:
        groupings = arrays["groupings"]
    return GroupedSampler(x.corpus.split_pairs("train"), groupings, train.group, train.batch_size, x.recipe.seed)


# --- mining a round ---------------------------------------------------------------------------------------------------


def candidates(x: Experiment, of: Round, *, student: Any, before: Round | None = None) -> Both:
    """Hard candidates of a round in both directions: as its folder holds them, else mined by the student.

    Where the recipe says so (``mine.overlap_below``) and freshly mined ones are much the same as those of the round
    ``before``, these stay. Noted beside them, of the freshly mined by direction: ``candidates/above_match``, the part
    that the student puts above the query's labelled match; ``candidates/similarity``, their mean;
    ``candidates/fresh_share``, the part that the round before had not. Then ``candidates/taken``, 0 where those of
    before stay, and ``teacher/saved``, the pairs that are therefore not asked of the teacher. Of an index that is not
    exact ``candidates/index_recall``.

    Raises:
        ValueError: such an index finds less of the true candidates than ``mine.recall_floor``.
    """
    found = kept(of)
    if found is None:
        with x.timings.stage("mine"):
            found = _mined_anew(x, of, student, before)
    x.ranks.work_alone(lambda: mined_vectors.forget_shards(of))
    return found


def _mined_anew(x: Experiment, of: Round, student: Any, before: Round | None) -> Both:
    vectors = mined_vectors.embedded(x, of, student)
    if x.recipe.train.candidates == "memory":
        x.ranks.work_alone(lambda: mined_vectors.remember(x, of, vectors))
    fresh, noted = _mine(x, vectors)
    fresh = {direction: _with_labelled(x, those, vectors) for direction, those in fresh.items()}
    for those in fresh.values():
        noted |= _hardness(those)
    stay = False
    if before is not None:
        earlier = kept(before, "near") or kept(before) or {}
        shares = {direction: fresh_share(earlier[direction], those) for direction, those in fresh.items()}
        limit, overlap = x.recipe.mine.overlap_below, 1 - float(np.mean(list(shares.values())))
        stay = limit is not None and overlap >= limit
        noted |= {f"candidates/fresh_share/{direction}": share for direction, share in shares.items()}
        noted |= {"candidates/taken": float(not stay), "teacher/saved": _saved(x, of, fresh, vectors) if stay else 0}
        log.info(
            "round %d: %.0f %% of the freshly mined candidates are new: %s",
            of.number,
            100 * (1 - overlap),
            "those in use stay" if stay else "they replace those in use",
        )
    x.ranks.work_alone(lambda: note(of, noted))
    if stay:
        assert before is not None
        x.ranks.work_alone(lambda: _carry_on(before, of))
    elif x.recipe.train.candidates == "in_batch":
        _keep_groups(x, of, fresh, *_grouped(x, of, fresh, vectors))
    else:
        x.ranks.work_alone(lambda: _keep(of, fresh))
    found = kept(of)
    assert found is not None
    return found


def fresh_share(old: Candidates, new: Candidates) -> float:
    """Part of the new candidates (B, K) that the old ones of the same queries do not hold; 0 where there are none."""
    before = old.item_ids[np.searchsorted(old.query_ids, new.query_ids)]  # (B, K')
    width = 1 + max(int(before.max(initial=0)), int(new.item_ids.max(initial=0)))
    row = np.arange(len(before))[:, None] * width
    there = new.item_ids >= 0
    known = np.isin((row + new.item_ids)[there], (row + before)[before >= 0])
    return float(1 - known.mean()) if known.size else 0.0


def _with_labelled(x: Experiment, found: Candidates, vectors: Mapping[Side, SomeVectors]) -> Candidates:
    """With the similarity of each query's labelled match."""
    rows = x.corpus.split("train").ids
    query, item = sides_of(found.direction)
    match = labelled_match(x.corpus.split_pairs("train"), found.direction, found.query_ids)
    own = np.empty(len(found.query_ids), np.float32)
    for part in exact.blocks(len(own), _AT_ONCE):
        asking = vectors[query][np.searchsorted(rows[query], found.query_ids[part])]
        matching = vectors[item][np.searchsorted(rows[item], match[part])]
        own[part] = exact.similarity_rows(asking, matching[:, None])[:, 0]
    return replace(found, labelled=own)


def _hardness(found: Candidates) -> dict[str, float]:
    """How hard candidates are to the student that mined them, see ``candidates``."""
    there = found.item_ids >= 0
    if not there.any() or found.labelled is None:
        return {}
    return {
        f"candidates/above_match/{found.direction}": float((found.similarity > found.labelled[:, None])[there].mean()),
        f"candidates/similarity/{found.direction}": float(found.similarity[there].mean()),
    }


def _saved(x: Experiment, of: Round, fresh: Both, vectors: Mapping[Side, SomeVectors]) -> int:
    """Distinct pairs that the teacher would have to be asked for, were the fresh candidates trained on."""
    if not any(arm.reads_scores for arm in x.recipe.arms.values()):
        return 0
    trained_on = _grouped(x, of, fresh, vectors)[1] if x.recipe.train.candidates == "in_batch" else fresh
    return unasked(x, *wanted(x, x.corpus.split_pairs("train"), trained_on))[0]


def _carry_on(before: Round, of: Round) -> None:
    """A round goes on with all that the one before trained on."""
    if before.groups.is_file():
        write_atomically(of.groups, lambda file: file.write(before.groups.read_bytes()))
    for kind in ("near", "candidates"):
        found = kept(before, kind)
        if found is not None:
            _keep(of, found, kind)


def _grouped(x: Experiment, of: Round, found: Both, vectors: Mapping[Side, SomeVectors]) -> tuple[Ids, Both]:
    """The training pairs in groups of neighbours, and the candidates that the groups hold."""
    train, pairs, rows = x.recipe.train, x.corpus.split_pairs("train"), x.corpus.split("train").ids
    groupings = grouped(pairs, found, group=train.group, count=train.groupings, seed=[x.recipe.seed, of.number])
    known = {side: (rows[side], vectors[side]) for side in SIDES}
    dense = dense_candidates(pairs, groupings, train.group, x.corpus.matches, known)
    return groupings, {direction: _with_labelled(x, those, vectors) for direction, those in dense.items()}


def _keep_groups(x: Experiment, of: Round, found: Both, groupings: Ids, dense: Both) -> None:
    for direction, those in dense.items():
        log.info(
            "batches of neighbours, %s: %.1f candidates a query in %d groupings, mean similarity %.3f (mined: %.3f)",
            direction,
            (those.item_ids >= 0).sum(axis=1).mean(),
            len(groupings),
            *(each.similarity[each.item_ids >= 0].mean() for each in (those, found[direction])),
        )

    def keep() -> None:
        write_atomically(of.groups, partial(np.savez, groupings=groupings))
        _keep(of, found, "near")
        _keep(of, dense)

    x.ranks.work_alone(keep)


def _mine(x: Experiment, vectors: Mapping[Side, SomeVectors]) -> tuple[Both, dict[str, float]]:
    """Candidates of both directions, and of an index that is not exact what part of the true ones it finds."""
    from distill.filters import TeacherMargin
    from distill.mine import MineSettings, mine

    split, recipe = x.corpus.split("train"), x.recipe.mine
    ids = split.ids
    found: Both = {}
    noted: dict[str, float] = {}
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        index = mined_vectors.index_over(x, vectors[item], ids[item])
        if not index.exact:
            noted[f"candidates/index_recall/{direction}"] = _checked_recall(x, index, vectors[query], direction)
        margin, queries = recipe.drop_above_positive, len(ids[query])
        # dropping asks the teacher, which all processes do together: then each mines all
        share = x.ranks.share(queries) if margin is None else slice(None)
        own = mine(
            index,
            mined_vectors.Part(vectors[query], share),
            query_ids=ids[query][share],
            matches=x.corpus.matches,
            direction=direction,
            settings=MineSettings(recipe.k, skip_top=recipe.skip_top),
            drop=None if margin is None else TeacherMargin(margin, x.ask, x.corpus.matches, direction),
        )
        found[direction] = own if margin is not None else _joined(own, x.ranks, queries)
    return found, noted


def _checked_recall(x: Experiment, index: Searched, queries: SomeVectors, direction: Direction) -> float:
    """Of an approximate index, over a sample of the queries; it is refused under the recipe's floor.

    Raises:
        ValueError: it finds too few of the true candidates.
    """
    recipe = x.recipe.mine
    sample = queries[np.linspace(0, len(queries) - 1, min(_SAMPLED, len(queries))).astype(np.int64)]
    try:
        recall = index.recall_against_exact(sample, recipe.k, floor=recipe.recall_floor)
    except ValueError as error:
        raise ValueError(
            f"mine.factory, {direction}: {error}. A run that has begun keeps its index, but may go on with a lower "
            "mine.recall_floor"
        ) from None
    log.info(
        "index %s, %s: %.1f %% of the true %d candidates are found", index.factory, direction, 100 * recall, recipe.k
    )
    return recall


def _joined(own: Candidates, ranks: Ranks, queries: int) -> Candidates:
    """What all processes have mined, in the order of the queries."""
    arrays = (own.query_ids, own.item_ids, own.similarity, own.positive)
    return Candidates(own.direction, *(ranks.joined_array(array, queries) for array in arrays))


def _keep(of: Round, found: Mapping[Direction, Candidates], kind: str = "candidates") -> None:
    for direction, those in found.items():
        write_atomically(of.candidates(direction, kind), partial(_save, those))


def _save(found: Candidates, file: Any) -> None:
    arrays = {name: getattr(found, name) for name in ("query_ids", "item_ids", "similarity", "positive", "labelled")}
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def _load(path: Path, direction: Direction) -> Candidates:
    with np.load(path, allow_pickle=False) as arrays:
        return Candidates(
            direction,
            arrays["query_ids"],
            arrays["item_ids"],
            arrays["similarity"],
            arrays["positive"],
            arrays.get("labelled"),  # absent in runs of older versions
        )
