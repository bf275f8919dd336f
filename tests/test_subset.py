"""Which pairs a part is, with what probability, and that nothing but the pair and the seed decides it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.asking import asked_of
from distill.mined import Round, kept
from distill.pipeline import first_candidates, first_scores, trained_arm
from distill.preflight import PreflightError, check, claim
from distill.protocols import DIRECTIONS, Candidates
from distill.recipe.load import RecipeError, load_recipe
from distill.sampler import CandidateSampler
from distill.subset import Subset, chance_of_pairs, drawn_cells, in_proportion, only
from tests.test_groups import RUN, experiment

N_TEXTS = 500
WAYS = [(by, unit) for by in ("uniform", "hardness") for unit in ("pair", "query")]


def made(direction: str = "i2t", *, queries: int = 60, k: int = 9, seed: int = 0, holes: float = 0.1) -> Candidates:
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(N_TEXTS)[:k] for _ in range(queries)])
    similarity = np.sort(rng.normal(0.3, 0.1, ids.shape), axis=1)[:, ::-1].astype(np.float32)
    gone = np.zeros(ids.shape, bool)
    gone[:, -1] = rng.random(queries) < holes
    ids[gone], similarity[gone] = -1, -np.inf
    labelled = rng.normal(0.4, 0.1, queries).astype(np.float32)
    return Candidates(direction, np.arange(queries) * 3, ids, similarity, np.zeros(ids.shape, bool), labelled)


def shuffled(found: Candidates, seed: int) -> Candidates:
    """The same candidates with rows and columns in another order."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(found.query_ids))
    columns = rng.permuted(np.tile(np.arange(found.item_ids.shape[1]), (len(rows), 1)), axis=1)
    arrays = (np.take_along_axis(each[rows], columns, 1) for each in (found.item_ids, found.similarity, found.positive))
    return Candidates(found.direction, found.query_ids[rows], *arrays, found.labelled[rows])


def pairs_of(found: dict[str, Candidates], cells: dict[str, np.ndarray]) -> set[tuple[int, int]]:
    drawn = [only(those, cells[direction]).pairs() for direction, those in found.items()]
    return {pair for images, texts in drawn for pair in zip(images.tolist(), texts.tolist(), strict=True)}


@pytest.mark.parametrize(("by", "unit"), WAYS)
def test_a_draw_depends_on_seed_and_pair_alone(by: str, unit: str) -> None:
    found = {"i2t": made("i2t"), "t2i": made("t2i", seed=1)}
    subset = Subset(0.3, by=by, unit=unit)
    drawn = pairs_of(found, drawn_cells(subset, found, N_TEXTS))
    other = {direction: shuffled(those, 5) for direction, those in reversed(found.items())}
    assert pairs_of(other, drawn_cells(subset, other, N_TEXTS)) == drawn
    again = Subset(0.3, by=by, unit=unit, seed=1)
    assert pairs_of(found, drawn_cells(again, found, N_TEXTS)) != drawn
    more = Subset(0.6, by=by, unit=unit)
    assert pairs_of(found, drawn_cells(more, found, N_TEXTS)) > drawn  # what was paid for is not thrown away
    whole = pairs_of(found, drawn_cells(Subset(1.0, by=by, unit=unit), found, N_TEXTS))
    assert whole == pairs_of(found, {direction: those.item_ids >= 0 for direction, those in found.items()})


@pytest.mark.parametrize(("by", "unit"), WAYS)
def test_over_seeds_pairs_come_as_often_as_is_said(by: str, unit: str) -> None:
    found = {"i2t": made("i2t", queries=12), "t2i": made("t2i", queries=12, seed=1)}
    # a pair that both directions hold
    found["t2i"].item_ids[2, 0] = found["i2t"].query_ids[1]
    found["i2t"].item_ids[1, 0] = found["t2i"].query_ids[2]
    seeds, counts = 1000, {}
    for seed in range(seeds):
        subset = Subset(0.25, by=by, unit=unit, seed=seed)
        for pair in pairs_of(found, drawn_cells(subset, found, N_TEXTS)):
            counts[pair] = counts.get(pair, 0) + 1
    keys, chance = chance_of_pairs(Subset(0.25, by=by, unit=unit), found, N_TEXTS)
    seen = np.array([counts.get(divmod(key, N_TEXTS), 0) / seeds for key in keys.tolist()])
    assert np.abs(seen - chance).max() < 5 * np.sqrt(0.25 / seeds)
    assert chance.min() >= 0.2 * 0.25 - 1e-12
    assert set(counts) <= {divmod(key, N_TEXTS) for key in keys.tolist()}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_probabilities_are_in_proportion_within_bounds_and_their_mean_is_the_share(data: st.DataObject) -> None:
    share, floor = data.draw(st.floats(0.01, 1)), data.draw(st.floats(0.01, 1))
    values = st.floats(1e-30, 1e3) | st.sampled_from([0.0, 1.0])
    weight = np.array(data.draw(st.lists(values, min_size=1, max_size=40)))
    counts = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(weight), max_size=len(weight))))
    chance = in_proportion(weight, share, least=floor * share, counts=counts)
    assert ((chance >= floor * share - 1e-12) & (chance <= 1)).all()
    if (weight > 0).all():
        assert (chance * counts).sum() == pytest.approx(share * counts.sum(), rel=1e-6)
    between = (chance > floor * share * (1 + 1e-9)) & (chance < 1)
    if between.any():
        assert np.allclose(chance[between] / weight[between], chance[between][0] / weight[between][0], rtol=1e-6)
    assert (np.diff(chance[np.argsort(weight)]) >= -1e-12).all()


def test_harder_candidates_are_likelier_and_whole_queries_go_together() -> None:
    found = made(holes=0)
    gap = found.similarity - found.labelled[:, None]
    chance = Subset(0.25, by="hardness").probabilities(found)
    order = np.argsort(gap.reshape(-1))
    assert (np.diff(chance.reshape(-1)[order]) >= 0).all()
    assert chance.max() > 2 * chance.min()
    cells = drawn_cells(Subset(0.25, by="hardness", unit="query"), {"i2t": found}, N_TEXTS)["i2t"]
    assert set(cells.sum(axis=1).tolist()) == {0, found.item_ids.shape[1]}


def test_hardness_without_the_labelled_match_is_refused() -> None:
    old = made()
    old = Candidates(old.direction, old.query_ids, old.item_ids, old.similarity, old.positive)
    with pytest.raises(ValueError, match=r"mined by an older version; .* set mine\.subset\.by to uniform"):
        Subset(0.5, by="hardness").probabilities(old)
    assert Subset(0.5).probabilities(old).max() == 0.5


def test_no_candidates_are_no_pairs() -> None:
    empty = made(queries=3, k=2)
    empty = Candidates(
        "i2t",
        empty.query_ids,
        np.full((3, 2), -1),
        np.full((3, 2), -np.inf, np.float32),
        empty.positive,
        empty.labelled,
    )
    for by, unit in WAYS:
        assert not drawn_cells(Subset(0.5, by=by, unit=unit), {"i2t": empty}, N_TEXTS)["i2t"].any()
    assert drawn_cells(Subset(0.5), {}, N_TEXTS) == {}


@pytest.mark.parametrize("odd", [{"share": 0}, {"share": 1.1}, {"share": 0.5, "floor": 0}])
def test_pairs_that_could_never_be_drawn_are_refused(odd: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        Subset(**odd)


def test_a_step_draws_what_was_not_asked_only_where_nothing_else_is_left() -> None:
    found = made(queries=20, k=8, holes=0.5)
    asked = np.random.default_rng(0).random(found.item_ids.shape) < 0.3
    drawn = CandidateSampler(found, 3, 0, ~asked).draw(7, found.query_ids)
    for row, items in enumerate(drawn):
        first = set(found.item_ids[row][asked[row] & (found.item_ids[row] >= 0)].tolist())
        assert len(first & set(items.tolist())) == min(3, len(first))
        assert (items >= 0).all()
    assert np.array_equal(
        CandidateSampler(found, 3, 0, np.zeros_like(asked)).draw(7, found.query_ids),
        CandidateSampler(found, 3, 0).draw(7, found.query_ids),
    )


# --- in a run ---------------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "round" in line:
            found[line["round"]] = found.get(line["round"], {}) | line
    return [found[number] for number in sorted(found)]


PART = "mine.subset={share: 0.3, by: hardness}"


@pytest.mark.parametrize(
    "kind", ["encode", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("in_batch", "memory"))]
)
def test_a_run_asks_for_the_part_and_no_more_and_trains(tmp_path: Path, kind: str) -> None:
    own = [f"train.candidates={kind}", PART, "false_negatives.disagreement=mask"]
    x = experiment(tmp_path, *own)
    trained_arm(x, "distilled")
    rounds = lines(x.folder / "arms" / "distilled")
    labelled = len(np.unique(x.corpus.split_pairs("train"), axis=0))
    for number, line in enumerate(rounds, start=1):
        of = Round(number, x.folder / ("shared" if number == 1 else "arms/distilled"))
        mined = kept(of)
        asked = pairs_of(asked_of(x, mined), {d: those.item_ids >= 0 for d, those in asked_of(x, mined).items()})
        every = pairs_of(mined, {d: those.item_ids >= 0 for d, those in mined.items()})
        assert line["teacher/asked"] + line["teacher/served_from_store"] == len(asked) + labelled
        assert line["teacher/left_out"] == len(every - asked)
        assert 0.2 < len(asked) / len(every) < 0.6  # what either direction draws
        assert sum(line[f"candidates/{d}"] for d in DIRECTIONS) == sum(
            int((those.item_ids >= 0).sum()) for those in asked_of(x, mined).values()
        )
    images, texts = np.array(sorted(every - asked)).T
    known = x.scorer.lookup(images, texts)
    assert np.isnan(known).any()  # rounds before may have asked for some
    scores = first_scores(x)
    found = first_candidates(x)["i2t"]
    told = scores.lookup(found.query_ids[:, None], found.item_ids)
    assert 0 < np.isnan(told).sum() < told.size


def test_other_processes_and_a_second_arm_draw_the_same(tmp_path: Path) -> None:
    one, two = "[{name: contrastive}, {name: kl}]", "[{name: contrastive, negatives: all}, {name: cprd}]"
    arms = f"arms={{one: {{losses: {one}}}, two: {{losses: {two}}}}}"
    x = experiment(tmp_path, "train.candidates=encode", "train.rounds=1", arms, PART)
    for name in ("one", "two"):
        trained_arm(x, name)
    first, second = (lines(x.folder / "arms" / name)[0] for name in ("one", "two"))
    assert first["teacher/asked"] > 0
    assert second["teacher/asked"] == 0  # all of it is in the store
    assert second["teacher/left_out"] == first["teacher/left_out"]


def test_a_part_that_no_loss_reads_is_refused_before_any_work(tmp_path: Path) -> None:
    x = experiment(tmp_path, "arms={plain: {losses: [{name: contrastive}]}}", PART)
    with pytest.raises(PreflightError, match="no arm has a loss that reads its scores"):
        check(x)


def test_a_run_goes_on_with_the_part_that_it_was_begun_with(tmp_path: Path) -> None:
    claim(experiment(tmp_path, PART), resume=False)
    claim(experiment(tmp_path, PART), resume=True)
    with pytest.raises(PreflightError, match=r"mine\.subset\.share: was 0\.3, now 0\.4"):
        claim(experiment(tmp_path, PART.replace("0.3", "0.4")), resume=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([PART, "mine.drop_above_positive=1.0"], "asks the teacher about every candidate while mining"),
        (["mine.subset={share: 0}"], r"mine\.subset\.share"),
        (["mine.subset={share: 0.5, by: luck}"], r"mine\.subset\.by"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(keys: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [*RUN, "train.rounds=1", *keys])
