"""Statistics of a comparison against slow loops, hand-made cases and simulated data whose truth is known."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from distill.analysis import analyse, spread
from distill.compare import Cell, FailedCell, disagreements
from distill.evaluate import Evaluation
from distill.significance import Clusters, Resampling, holm, intervals, rsum, sign_flip_p
from distill.verdicts import Interval, bounds, difference, number, p_value
from tests.comparisons import made_comparison, ranks_summary

QUICK = Resampling(resamples=999)


def ragged(draws, images=7):
    """Images with 1 to 4 captions each, in an order that mixes them."""
    text_images = draws.permutation(np.repeat(np.arange(images), draws.integers(1, 5, images)))
    return np.arange(images, dtype=np.int64) * 10, text_images.astype(np.int64) * 10


def random_evaluation(draws, image_ids, text_images, most=14):
    texts = np.arange(len(text_images), dtype=np.int64)
    return Evaluation(
        image_ids, draws.integers(1, most, len(image_ids)), texts, draws.integers(1, most, len(text_images))
    )


# --- the statistic ----------------------------------------------------------------------------------------------------


def test_points_give_rsum_and_resampled_clusters_give_that_of_their_queries():
    draws = np.random.default_rng(0)
    for _ in range(30):
        image_ids, text_images = ragged(draws)
        clusters = Clusters.of(image_ids, text_images)
        found = random_evaluation(draws, image_ids, text_images)
        points = clusters.points(found)
        assert float(rsum(points, clusters)) == pytest.approx(found.retrieval.rsum, abs=1e-9)
        drawn = draws.integers(0, len(clusters), len(clusters))  # brute force: the queries of the clusters drawn
        i2t = [
            found.i2t_ranks[row] for cluster in drawn for row in range(len(image_ids)) if image_ids[row] == cluster * 10
        ]
        t2i = [
            found.t2i_ranks[row]
            for cluster in drawn
            for row in range(len(text_images))
            if text_images[row] == cluster * 10
        ]
        again = replace(clusters, images=clusters.images[drawn], texts=clusters.texts[drawn])
        assert float(rsum(points[drawn], again)) == pytest.approx(ranks_summary(i2t, t2i), abs=1e-9)


def test_intervals_are_the_percentiles_of_brute_force_resamples():
    draws = np.random.default_rng(1)
    image_ids, text_images = ragged(draws, images=30)
    clusters = Clusters.of(image_ids, text_images)
    one, two = (random_evaluation(draws, image_ids, text_images) for _ in range(2))
    points = np.stack([clusters.points(one), clusters.points(one) - clusters.points(two)])
    found = intervals(points, clusters, Resampling(resamples=4000, seed=3))
    brute = []
    for _ in range(4000):
        drawn = draws.integers(0, 30, 30)
        texts = np.concatenate([np.flatnonzero(text_images == cluster * 10) for cluster in drawn])
        brute.append([ranks_summary(e.i2t_ranks[drawn], e.t2i_ranks[texts]) for e in (one, two)])
    first, second = np.array(brute).T
    np.testing.assert_allclose(found[0], np.percentile(first, [2.5, 97.5]), atol=3)
    np.testing.assert_allclose(found[1], np.percentile(first - second, [2.5, 97.5]), atol=4)
    assert found == intervals(points, clusters, Resampling(resamples=4000, seed=3))
    assert found != intervals(points, clusters, Resampling(resamples=4000, seed=4))
    narrow = intervals(points, clusters, Resampling(resamples=4000, seed=3, confidence=0.5))
    assert found[0][0] < narrow[0][0] < narrow[0][1] < found[0][1]


def test_clustered_intervals_are_wider_than_those_of_captions_drawn_one_by_one():
    """Five captions that do well or badly together are one observation, not five."""
    draws = np.random.default_rng(2)
    text_images = np.repeat(np.arange(200), 5)
    together = np.repeat(draws.choice([1, 20], 200), 5)
    found = Evaluation(np.arange(200), np.ones(200, np.int64), np.arange(1000), together)
    by_image = Clusters.of(np.arange(200), text_images)
    ((low, high),) = intervals(by_image.points(found)[None], by_image, QUICK)
    alone = Clusters.of(np.arange(1000), np.arange(1000))
    hits = np.stack([np.zeros(1000), (together == 1) * 3.0], axis=-1)
    ((low_alone, high_alone),) = intervals(hits[None], alone, QUICK)
    assert (high - low) / (high_alone - low_alone) == pytest.approx(np.sqrt(5), rel=0.15)


def test_a_batch_of_any_size_gives_the_same_intervals(monkeypatch):
    draws = np.random.default_rng(3)
    clusters = Clusters.of(*ragged(draws))
    points = draws.integers(0, 4, (3, len(clusters), 2)).astype(float)
    whole = intervals(points, clusters, QUICK)
    monkeypatch.setattr("distill.significance._BLOCK", 1)
    assert intervals(points, clusters, QUICK) == whole


# --- the test ---------------------------------------------------------------------------------------------------------


def enumerated_p(points, clusters):
    """Every way to exchange the two arms on each image, exactly."""
    share = [int(a * clusters.texts.sum() + b * clusters.images.sum()) for a, b in points]
    sums = [
        sum(sign * one for sign, one in zip(signs, share, strict=True))
        for signs in itertools.product([1, -1], repeat=len(share))
    ]
    observed = sum(share)
    tails = [np.mean([one >= observed for one in sums]), np.mean([one <= observed for one in sums])]
    return min(1.0, 2 * min(tails))


def test_p_values_are_those_of_exhaustive_enumeration():
    draws = np.random.default_rng(4)
    seen = []
    for _ in range(25):
        image_ids, text_images = ragged(draws, images=9)
        clusters = Clusters.of(image_ids, text_images)
        one, two = (random_evaluation(draws, image_ids, text_images, most) for most in (12, 20))
        points = clusters.points(one) - clusters.points(two)
        seen.append(sign_flip_p(points, clusters, Resampling(resamples=2000)))
        assert seen[-1] == pytest.approx(enumerated_p(points, clusters), abs=1e-12)
    assert min(seen) < 0.05 < 0.5 < max(seen)


def test_random_sign_patterns_come_close_and_are_fixed_by_the_seed():
    draws = np.random.default_rng(5)
    clusters = Clusters.of(np.arange(14), np.repeat(np.arange(14), 2))
    points = draws.integers(-3, 6, (14, 2)).astype(float)
    exact = sign_flip_p(points, clusters, Resampling(resamples=20_000))
    drawn = sign_flip_p(points, clusters, Resampling(resamples=5_000))
    assert exact == pytest.approx(enumerated_p(points, clusters), abs=1e-12)
    assert drawn == pytest.approx(exact, abs=0.02)
    assert drawn != exact
    assert drawn == sign_flip_p(points, clusters, Resampling(resamples=5_000))


def test_no_difference_has_p_one():
    clusters = Clusters.of(np.arange(3), np.arange(3))
    assert sign_flip_p(np.zeros((3, 2)), clusters, QUICK) == 1
    one_image = np.array([[3.0, 3.0], [0, 0], [0, 0]])
    assert sign_flip_p(one_image, clusters, QUICK) == 1 == enumerated_p(one_image, clusters)
    balanced = np.array([[1.0, 0.0], [-1.0, 0.0], [0, 0]])
    assert sign_flip_p(balanced, clusters, QUICK) == 1 == enumerated_p(balanced, clusters)


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])
    assert holm([]) == []


def test_equal_arms_are_rarely_different_and_clearly_better_ones_are():
    """Of 60 simulated pairs of equals 3 are called different by chance, and 57 intervals hold 0; 9 would be a fault."""
    how, false, held, found = Resampling(resamples=399), 0, 0, []
    for world in range(60):
        made = made_comparison({"plain": 0.0, "a": 0.0, "better": 1.0}, images=80, seeds=(0,), world=world)
        clusters = Clusters.of(made.image_ids, made.text_images)
        plain, equal, better = (clusters.points(cell.evaluation) for cell in made.cells)
        false += sign_flip_p(equal - plain, clusters, how) < 0.05
        ((low, high),) = intervals((equal - plain)[None], clusters, how)
        held += low <= 0 <= high
        found.append(sign_flip_p(better - plain, clusters, how))
    assert false <= 8
    assert held >= 52
    assert max(found) < 0.05


# --- the analysis -----------------------------------------------------------------------------------------------------


def test_means_deviations_and_gap_closed_are_those_of_the_cells():
    comparison = made_comparison({"plain": 0.0, "kl": 0.4})
    found = analyse(comparison, QUICK)
    assert [figures.arm for figures in found.arms] == ["kl", "plain"]
    rsums = {
        arm: [cell.evaluation.retrieval.rsum for cell in comparison.cells_of(arm).values()] for arm in comparison.arms
    }
    kl = found.arm("kl")
    assert kl.metrics["rsum"].mean == pytest.approx(np.mean(rsums["kl"]))
    assert kl.metrics["rsum"].std == pytest.approx(np.std(rsums["kl"], ddof=1))
    assert kl.rsum.value == pytest.approx(np.mean(rsums["kl"]))
    assert kl.rsum.low < kl.rsum.value < kl.rsum.high
    top = comparison.teacher.metrics["rsum"]
    shares = [100 * (b - a) / (top - a) for a, b in zip(rsums["plain"], rsums["kl"], strict=True)]
    assert list(kl.gap_closed.by_seed.values()) == pytest.approx(shares)
    assert kl.gap_closed.mean == pytest.approx(np.mean(shares))
    assert found.arm("plain").gap_closed is None
    (lead,) = found.against_plain
    assert lead.rsum.value == pytest.approx(np.mean(rsums["kl"]) - np.mean(rsums["plain"]))
    assert list(lead.seeds.by_seed.values()) == pytest.approx(np.subtract(rsums["kl"], rsums["plain"]))
    assert (lead.verdict, lead.agreeing) == ("ahead", 3)
    assert lead.words.startswith(f"ahead of plain by {lead.rsum.value:.1f} RSUM [")
    assert lead.words.endswith("(Holm), in 3 of 3 seeds")
    (lag,) = found.against_best
    assert (lag.arm, lag.against, lag.verdict, lag.agreeing) == ("plain", "kl", "behind", 3)
    assert lag.rsum.value == pytest.approx(-lead.rsum.value)
    assert lag.words.startswith(f"behind kl by {lead.rsum.value:.1f} RSUM [")
    assert kl.cost.asked == 24_000
    assert kl.cost.served == 72_000 + 2 * 96_000
    assert kl.agreement["t2i"]["kendall"].mean == pytest.approx(
        np.mean([cell.agreement["t2i"].kendall for cell in comparison.cells_of("kl").values()])
    )


def test_identical_arms_differ_in_nothing():
    comparison = made_comparison({"plain": 0.0, "copy": 0.0})
    own = comparison.cells_of("plain")
    cells = [*own.values(), *(replace(cell, arm="copy") for cell in own.values())]
    found = analyse(replace(comparison, cells=cells), QUICK)
    (same,) = found.against_plain
    assert (same.rsum.value, same.rsum.low, same.rsum.high, same.p, same.p_holm) == (0, 0, 0, 1, 1)
    assert same.verdict == "none"
    assert (
        same.words
        == "no significant difference from plain: 0.0 RSUM [0.0, 0.0], p = 1.00 (Holm), equal in 3 of 3 seeds"
    )
    assert found.best == "plain"
    assert any("both families of tests are the same one" in note for note in found.notes)


def test_corrections_are_within_each_family():
    found = analyse(made_comparison({"plain": 0.0, "a": 0.2, "b": 0.1, "c": 0.6}, images=60), QUICK)
    for family in (found.against_plain, found.against_best):
        assert len(family) == 3
        assert [one.p_holm for one in family] == pytest.approx(holm([one.p for one in family]))
        assert all(
            one.verdict == ("none" if one.p_holm >= 0.05 else "ahead" if one.rsum.value > 0 else "behind")
            for one in family
        )
    assert {one.against for one in found.against_best} == {"c"}


def test_paired_tests_use_the_seeds_that_both_have_and_say_so():
    whole = made_comparison({"plain": 0.0, "kl": 0.4, "gone": 0.2, "apart": 0.1})
    left_out = {("kl", 1), ("plain", 2), ("apart", 0), ("apart", 1)} | {("gone", seed) for seed in (0, 1, 2)}
    cells = [cell for cell in whole.cells if (cell.arm, cell.seed) not in left_out]
    failed = [FailedCell("gone", seed, "out of memory") for seed in (0, 1, 2)]
    found = analyse(replace(whole, cells=cells, failed=failed), QUICK)
    by_arm = {one.arm: one for one in found.against_plain}
    assert list(by_arm) == ["kl"]  # 'apart' shares no seed with plain
    assert list(by_arm["kl"].seeds.by_seed) == [0]
    plain, kl = (whole.cells_of(arm)[0].evaluation.retrieval.rsum for arm in ("plain", "kl"))
    assert by_arm["kl"].rsum.value == pytest.approx(kl - plain)
    assert by_arm["kl"].words.endswith("in 1 of 1 seed")
    assert found.arms[-1].arm == "gone"
    assert (found.arms[-1].metrics, found.arms[-1].rsum) == ({}, None)
    text = "\n".join(found.notes)
    assert "kl has 2 of 3 seeds (without 1)" in text
    assert "gone has no finished seed" in text
    assert "apart and plain share no seed" in text
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("plain_there", [True, False])
def test_one_arm_one_seed_one_image(plain_there):
    comparison = made_comparison({"plain": 0.0, "kl": 0.1}, images=1, captions=1, seeds=(7,))
    arm = "plain" if plain_there else "kl"
    found = analyse(replace(comparison, cells=[cell for cell in comparison.cells if cell.arm == arm]), QUICK)
    assert found.best == arm
    assert (found.against_plain, found.against_best) == ((), ())
    assert found.arm(arm).rsum.low is None
    assert found.arm(arm).metrics["rsum"].std is None
    text = "\n".join(found.notes)
    assert "Only 1 image to draw from" in text
    assert "nothing to compare" in text
    assert "there is no spread" in text
    assert ("undistilled arm plain has no finished seed" in text) is not plain_there


def test_nothing_trained_and_no_teacher():
    comparison = made_comparison({"plain": 0.0, "kl": 0.1}, teacher=None)
    found = analyse(comparison, QUICK)
    assert found.arm("kl").gap_closed is None
    assert any("No arm has a teacher" in note for note in found.notes)
    empty = analyse(replace(comparison, cells=[]), QUICK)
    assert (empty.best, empty.against_plain, empty.against_best) == (None, (), ())


def test_a_teacher_that_is_behind_leaves_no_gap():
    found = analyse(made_comparison({"plain": 0.5, "kl": 0.6}, teacher=0.0), QUICK)
    assert found.arm("kl").gap_closed is None
    assert any("The teacher is not ahead of plain with seeds 0, 1, 2" in note for note in found.notes)


def test_too_few_resamples_are_said():
    comparison = made_comparison({"plain": 0.0, "kl": 0.1}, images=20)
    assert any("ask for more resamples" in note for note in analyse(comparison, Resampling(resamples=19)).notes)
    assert not any("resamples" in note for note in analyse(comparison, QUICK).notes)
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        Resampling(resamples=0)


def test_what_cannot_be_compared_is_refused():
    good = made_comparison({"plain": 0.0, "kl": 0.1}, images=4)
    with pytest.raises(ValueError, match="the undistilled arm 'x' is not among the arms plain, kl"):
        replace(good, plain="x")
    with pytest.raises(ValueError, match="cell 'kl' seed 9 is not of the comparison"):
        replace(good, cells=[replace(good.cells[-1], seed=9)])
    with pytest.raises(ValueError, match="cell 'plain' seed 0 is there 2 times"):
        replace(good, failed=[FailedCell("plain", 0, "why")])
    with pytest.raises(ValueError, match="gap report or example of 'x'"):
        replace(good, gap={"x": []})
    other = made_comparison({"plain": 0.0}, images=5).cells[0]
    with pytest.raises(ValueError, match="cell 'plain' seed 0 is evaluated on 5 images, the comparison is over 4"):
        replace(good, cells=[other])
    shuffled = replace(good.cells[0].evaluation, text_ids=good.text_ids[::-1])
    with pytest.raises(ValueError, match="evaluated on 8 texts"):
        replace(good, cells=[Cell("plain", 0, shuffled)])
    with pytest.raises(ValueError, match="one labelled image a text"):
        replace(good, text_images=good.text_images[:3])
    with pytest.raises(ValueError, match="at least one image"):
        replace(good, cells=[], text_ids=good.text_ids[:0], text_images=good.text_images[:0])


# --- words ------------------------------------------------------------------------------------------------------------


def test_sentences():
    def words(value, low, high, p_holm, by_seed):
        interval = Interval(value, low, high)
        return difference(
            "kl", "plain", interval=interval, by_seed=dict(enumerate(by_seed)), p=p_holm, p_holm=p_holm, alpha=0.05
        ).words

    assert (
        words(4.14, 1.2, 7.0, 0.004, [1, 2, 3])
        == "ahead of plain by 4.1 RSUM [1.2, 7.0], p = 0.004 (Holm), in 3 of 3 seeds"
    )
    assert (
        words(-4.14, -7, -1.2, 0.004, [-1, 2])
        == "behind plain by 4.1 RSUM [1.2, 7.0], p = 0.004 (Holm), in 1 of 2 seeds"
    )
    assert words(0.4, -1, 2, 0.52, [1, -1, 0]) == (
        "no significant difference from plain: +0.4 RSUM [-1.0, +2.0], p = 0.52 (Holm), ahead in 1 of 3 seeds"
    )
    assert words(2.0, None, None, 0.05, [2.0]) == (
        "no significant difference from plain: +2.0 RSUM, p = 0.05 (Holm), ahead in 1 of 1 seed"
    )


def test_numbers():
    assert [number(one, sign="+") for one in (0.04, -0.04, 0.06, -1)] == ["0.0", "0.0", "+0.1", "-1.0"]
    assert [p_value(p) for p in (1.0, 0.52, 0.0996, 0.05, 0.0014, 0.0002)] == [
        "1.00",
        "0.52",
        "0.1",
        "0.05",
        "0.0014",
        "0.0002",
    ]
    assert bounds(Interval(1, 0, 2), unit="") == "1.0 [0.0, 2.0]"


def test_spreads():
    assert spread({0: 1.0, 1: float("nan"), 2: 3.0}).mean == 2
    assert spread({0: 1.0, 2: 3.0}).std == pytest.approx(np.sqrt(2))
    assert spread({0: 5.0}).std is None
    assert spread({0: float("nan")}) is None


def test_disagreements_are_the_widest_contrasts_one_a_group():
    ranks = {"a": np.array([1, 1, 5, 1, 2, 1, 1]), "b": np.array([1, 9, 1, 90, 80, 40, 3])}
    groups = np.array([0, 1, 2, 3, 4, 3, 6])
    found = disagreements(ranks, groups=groups, count=9)
    assert found.tolist() == [3, 1, 2, 6]  # 0: both right, 4: both wrong, 5: of the same group as 3
    assert disagreements(ranks, groups=groups, count=2).tolist() == [3, 1]
    assert disagreements({"a": ranks["a"]}, groups=groups, count=2).tolist() == []
