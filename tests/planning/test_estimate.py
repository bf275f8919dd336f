"""From a measurement to costs: by hand where numbers are round, by properties where they are drawn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.pipeline import cut_into_rounds
from distill.planning.budget import fit
from distill.planning.estimate import Assumed, Estimator, whole
from distill.planning.loads import (
    CROWDING,
    DISTINCT,
    Load,
    asked_first,
    asked_later,
    asked_share,
    drawn,
    own_load,
    step_load,
)
from distill.planning.meaning import OtherRecipeError, check_same
from distill.planning.measured import Measured
from distill.planning.plan import Wish, make_plan
from distill.planning.probe_student import fitted
from distill.planning.ranges import Range, total
from distill.planning.ways import runs
from tests.planning.made import SHAPE, exactly, measured, recipe, source, teacher

NUMBERS = st.floats(0, 1e6)
RANGES = st.lists(NUMBERS, min_size=3, max_size=3).map(lambda ends: Range(*sorted(ends)))


def stages(of, **changes):
    return {stage.name: stage for stage in Estimator(of, SHAPE, measured(of, **changes)).stages()}


# --- ranges -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(RANGES, RANGES)
def test_ends_stay_in_order_through_sums_products_and_differences(one, other):
    for found in (one + other, one * other, one.less(other), one.at_least(other)):
        assert 0 <= found.low <= found.mid <= found.high
    assert (one + other).ends == pytest.approx([a + b for a, b in zip(one.ends, other.ends, strict=True)])


@settings(deadline=None)
@given(RANGES, RANGES.filter(lambda each: each.low > 1e-3))
def test_dividing_takes_the_other_end(one, other):
    found = one / other
    assert found.low == pytest.approx(one.low / other.high)
    assert found.high == pytest.approx(one.high / other.low)


def test_a_range_of_samples_is_their_middle_half():
    assert Range.of([1, 2, 3, 4, 100]).ends == (2, 3, 4)
    with pytest.raises(ValueError, match="nothing"):
        Range.of([])
    with pytest.raises(ValueError, match="low <= mid"):
        Range(2, 1, 3)


# --- loads ------------------------------------------------------------------------------------------------------------


def test_distinct_draws_are_those_of_a_real_draw():
    rng = np.random.default_rng(0)
    real = np.mean([len(np.unique(rng.integers(0, 500, 800))) for _ in range(200)])
    assert drawn(800, 500) == pytest.approx(real, rel=0.01)


def test_a_batchs_own_items_are_those_of_a_real_batch():
    rng, pairs = np.random.default_rng(0), np.stack([np.repeat(np.arange(1000), 2), np.arange(2000)], axis=1)
    batches = [pairs[rng.permutation(2000)[:300]] for _ in range(100)]
    found = own_load(SHAPE, 300)
    assert found.images == pytest.approx(np.mean([len(np.unique(batch[:, 0])) for batch in batches]), rel=0.01)
    assert found.texts == pytest.approx(300)


def test_a_step_encodes_what_a_real_draw_of_candidates_finds():
    of = recipe("train.batch_size=100", "train.candidates_per_query=4")
    rng, images, texts = np.random.default_rng(0), [], []
    for _ in range(100):
        own = rng.permutation(2000)[:100]
        asking = np.unique(own // 2)
        images.append(len(np.union1d(asking, rng.integers(0, 1000, 4 * 100))))
        texts.append(len(np.union1d(own, rng.integers(0, 2000, 4 * len(asking)))))
    found = step_load(of, SHAPE, crowding=1.0)
    assert found.images == pytest.approx(np.mean(images), rel=0.02)
    assert found.texts == pytest.approx(np.mean(texts), rel=0.02)


@settings(deadline=None)
@given(st.integers(100, 10**9), st.floats(0.05, 1.0))
def test_a_step_never_encodes_more_than_it_draws_or_than_there_is(images, crowding):
    of, shape = recipe(), SHAPE.with_images(images)
    found, own = step_load(of, shape, crowding=crowding), own_load(shape, of.train.batch_size)
    most = Load(own.images + own.texts * 4, own.texts + own.images * 4)
    assert own.images <= found.images <= min(most.images, shape.images) + 1e-6
    assert own.texts <= found.texts <= min(most.texts, shape.texts) + 1e-6


@pytest.mark.parametrize("kind", ["memory", "in_batch"])
def test_candidates_that_are_not_encoded_add_nothing_to_a_step(kind):
    of = recipe(f"train.candidates={kind}", "train.group=8")
    assert step_load(of, SHAPE, crowding=1.0) == own_load(SHAPE, of.train.batch_size)


def test_both_directions_ask_the_same_pair_once_and_labelled_pairs_come_on_top():
    of = recipe("mine.k=8")
    most = 8 * (SHAPE.images + SHAPE.texts) + SHAPE.pairs
    asked = asked_first(of, SHAPE)
    assert asked.high == most
    assert SHAPE.pairs < asked.low < asked.mid < most
    later = asked_later(of, SHAPE, Range.exactly(0.5))
    assert later.mid == pytest.approx((asked.mid - SHAPE.pairs) / 2)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_every_stage_by_hand():
    of = recipe("teach.steps=10", "train.steps=100", "train.shared=0.2", "mine.k=8", "evaluate.rerank=4")
    found = stages(of)
    assert found["prepare"].wall.ends == pytest.approx(3 * [0.002 * (1200 + 2400)])
    assert found["teach"].wall.ends == pytest.approx((0.9 * 10 + 0.5, 1.0 * 10 + 0.5, 1.2 * 10 + 0.5))
    assert found["mine"].wall.mid == pytest.approx(3000 * (1e-6 + 1e-4) + 2 * 1000 * 2000 * 1e-7)
    # the student mines once; embedding_match in the quickstart's arm reads the teacher's vectors
    assert found["embed"].wall.mid == pytest.approx(1000 * (0.01 + 0.05) + 2000 * (0.001 + 0.01))
    asked = asked_first(of, SHAPE)
    units = asked.mid / of.score.pairs_per_unit
    assert found["score"].calls == asked
    assert found["score"].wall.mid == pytest.approx(asked.mid * 0.001 + (1000 + units) * 0.05 + 2000 * 0.01)
    own = own_load(SHAPE, 96)
    step = 0.1 + own.images * 0.001 + own.texts * 0.0005
    assert found["train shared"].wall.mid == pytest.approx(20 * step + 0.5 + 1)
    assert found["train plain"].wall.mid == pytest.approx(80 * step + 0.5 + 1)
    load = step_load(of, SHAPE, crowding=CROWDING.mid)
    step = 0.1 + load.images * 0.001 + load.texts * 0.0005 + 0.2 * load.items / 400
    assert found["train kl"].wall.mid == pytest.approx(80 * step + 0.5 + 1)
    listed = 300 * 4 * 0.85
    reranked = listed * 0.001 + (100 + listed / of.score.pairs_per_unit) * 0.05 + 200 * 0.01
    vectors = 100 * 0.05 + 200 * 0.01 + 3 * (100 * 0.01 + 200 * 0.001)
    assert found["evaluate"].wall.mid == pytest.approx(reranked + vectors + 4 * 0.1 + 3 * 0.5)


def test_rounds_are_those_of_the_pipeline_and_later_ones_ask_what_is_new():
    of = recipe("train.steps=100", "train.shared=0.2", "train.rounds=4")
    stretches = cut_into_rounds(of.train, of.mine, SHAPE.pairs)
    assert [(each.start, each.stop) for each in stretches] == [(0, 20), (20, 40), (40, 60), (60, 80), (80, 100)]
    known = Estimator(of, SHAPE, measured(of), Assumed(fresh=Range.exactly(0.25)))
    assert known.minings == 1 + 3
    new = asked_first(of, SHAPE).less(SHAPE.pairs) * 0.25
    assert known.asked.mid == pytest.approx(asked_first(of, SHAPE).mid + 3 * new.mid)


def test_an_arm_that_asks_nothing_costs_no_teacher_calls():
    of = recipe("arms.kl={losses: [{name: contrastive}]}")
    found = stages(of)
    assert "score" not in found
    assert "mine" not in found
    assert found["evaluate"].calls.mid > 0


def test_inputs_that_are_not_kept_cost_at_every_use():
    of = recipe()
    live = (source("image", users=("teacher", "student"), kind="live", each=0.4), source("text"))
    kept, unkept = stages(of), stages(of, sources=live)
    assert unkept["prepare"].wall.mid < kept["prepare"].wall.mid
    assert unkept["score"].wall.mid - kept["score"].wall.mid == pytest.approx(
        0.1 * (1000 + kept["score"].calls.mid / of.score.pairs_per_unit)  # four threads decode
    )
    assert unkept["train kl"].wall.mid > kept["train kl"].wall.mid + 80 * 0.1 * 96


def test_inputs_that_outgrow_the_budget_of_a_plan_are_not_kept_though_they_were_when_it_was_measured():
    of = recipe("prepared_gib=0.002")  # 2.1 MB: 1,200 images of 1,000 bytes fit, 2,400 texts do not
    known = measured(of, sources=(source("image"), source("text", each=0.4)))
    unkept = measured(of, sources=(source("image"), source("text", kind="live", each=0.4)))
    assert Estimator(of, SHAPE, known).stages() == Estimator(of, SHAPE, unkept).stages()
    assert dict(make_plan(of, known, Wish()).amounts.disk)["prepared inputs and frozen outputs"].mid == 1000 * 1200
    frozen = source("text").model_copy(update={"kind": "frozen"})  # outputs of a tower know no budget
    found = make_plan(of, measured(of, sources=(source("image"), frozen)), Wish())
    assert dict(found.amounts.disk)["prepared inputs and frozen outputs"].mid == 1000 * (1200 + 2400)


@pytest.mark.parametrize("unit", ["pair", "query"])
@pytest.mark.parametrize("kind", ["encode", "in_batch"])
def test_a_subset_asks_as_many_pairs_as_a_real_draw_of_it(kind, unit):
    """Lists of both directions that share the pairs which ``DISTINCT`` says, or all of them."""
    of = recipe(f"mine.subset={{share: 0.25, unit: {unit}}}", f"train.candidates={kind}")
    k, queries = 8, 4000
    both = 2 * (1 - DISTINCT.mid) if kind == "encode" else 1.0  # of a direction's own pairs
    ids = np.arange(queries)[:, None] * k + np.arange(k)
    other = np.where(np.random.default_rng(0).random(ids.shape) < both, ids, ids + queries * k)
    # keys of pairs stand for items: a list's owner is its query, in another order in each direction
    draw = np.random.default_rng(1)
    if unit == "query":
        own = [np.broadcast_to(draw.random((queries, 1)) < 0.25, ids.shape) for _ in range(2)]
        chosen = np.union1d(ids[own[0]], other.reshape(k, queries)[own[1].reshape(k, queries)])
    else:
        number = draw.random(2 * queries * k)
        chosen = np.union1d(ids[number[ids] < 0.25], other[number[other] < 0.25])
    distinct = len(np.union1d(ids, other))
    assert asked_share(of) == pytest.approx(len(chosen) / distinct, abs=0.01)


def test_texts_that_do_not_fit_into_memory_are_encoded_unit_by_unit():
    of = recipe()
    fits, not_so = stages(of), stages(of, teachers=(teacher(text_bytes=2**30),))
    more = not_so["score"].wall.mid - fits["score"].wall.mid
    assert more == pytest.approx(0.01 * (0.9 * fits["score"].calls.mid - 2000))


GROWTH = {"constant": 0, "steps": 0, "items": 1, "pairs": 1, "queries x items": 2}


def test_stages_grow_as_they_say():
    of = recipe()
    known = measured(of, once=measured(of).once.model_copy(update={"start": 0, "check": exactly(0)}))
    small, large = (
        {stage.name: stage for stage in Estimator(of, SHAPE.with_images(count), known).stages()}
        for count in (10**8, 10**9)
    )
    for name, stage in small.items():
        grown = large[name].wall.mid / stage.wall.mid
        assert grown == pytest.approx(10 ** GROWTH[stage.grows], rel=0.02), name


@settings(deadline=None)
@given(st.integers(10, 10**9), st.integers(10, 10**9))
def test_more_images_never_cost_less(one, other):
    of = recipe("prepared_gib=1000000")
    few, many = (
        whole(Estimator(of, SHAPE.with_images(count), measured(of)).stages()) for count in sorted((one, other))
    )
    assert few.wall.mid <= many.wall.mid * (1 + 1e-9)


def test_a_faster_device_shortens_models_alone_and_never_below_a_call():
    of = recipe("teach.steps=100")
    known = measured(of)
    plain, fast, instant = (
        {stage.name: stage for stage in Estimator(of, SHAPE, known, Assumed(speedup=x)).stages()}
        for x in (1.0, 4.0, 1e12)
    )
    assert fast["teach"].device.mid == pytest.approx(plain["teach"].device.mid / 4)
    assert fast["teach"].host == plain["teach"].host
    assert instant["teach"].device.mid == pytest.approx(100 * 0.01)
    assert instant["mine"].wall == plain["mine"].wall
    assert instant["score"].device.mid > 0


# --- ways, budget, plan -----------------------------------------------------------------------------------------------


def test_ways_share_what_they_can_and_no_more_than_the_processors_there_are():
    of = recipe()
    known = measured(of)
    found = Estimator(of, SHAPE, known).stages()
    by_name = {run.way.name: run for run in runs(of, known, found, workers=16, on_gpu=False, rate=2.0)}
    alone = by_name["one process"]
    assert alone.wall.mid == pytest.approx(total(stage.wall for stage in found).mid)
    assert alone.money.mid == pytest.approx(alone.wall.mid / 3600 * 2)
    for run in by_name.values():
        assert run.seconds["teach"] == alone.seconds["teach"]
        assert run.held.mid == pytest.approx(run.workers * run.wall.mid / 3600)
    # 4 cores here, 16 machines there; a worker begins by loading, and ends half a unit apart
    score = alone.seconds["score"].mid
    unit = score * of.score.pairs_per_unit / asked_first(of, SHAPE).mid / 2
    assert by_name["local processes"].seconds["score"].mid == pytest.approx(score / 4 + unit + 2)
    assert by_name["Slurm array"].seconds["score"].mid == pytest.approx(score / 16 + unit + 2)
    assert by_name["Slurm array"].seconds["train kl"] == alone.seconds["train kl"]
    assert by_name["Slurm array"].seconds["embed"] == alone.seconds["embed"]  # what a run mines it embeds by itself
    assert by_name["ranks"].seconds["embed"].mid == pytest.approx(alone.seconds["embed"].mid / 4)
    assert by_name["ranks"].seconds["train kl"].mid < alone.seconds["train kl"].mid / 2
    assert by_name["Ray"].wall.mid > by_name["Slurm array"].wall.mid


def test_what_fits_a_budget_fits_and_no_more_would():
    of = recipe()
    known = measured(of)
    needed = whole(Estimator(of, SHAPE, known).stages()).wall.mid / 3600
    found = fit(of, SHAPE, known, Assumed(), hours=needed * 0.995)
    assert not found.fits
    assert 0 < found.share < 1

    def hours(images=SHAPE.images, subset=1.0, k=of.mine.k):
        changed = recipe(f"mine.k={k}", f"train.candidates_per_query={min(k, of.train.candidates_per_query)}")
        stages = Estimator(changed, SHAPE.with_images(images), known, Assumed(subset=subset)).stages()
        return whole(stages).wall.mid / 3600

    assert hours(subset=found.share) <= found.hours < hours(subset=found.share + 0.001)
    assert hours(images=found.images) <= found.hours < hours(images=found.images + 1)
    assert hours(k=found.k) <= found.hours < hours(k=found.k + 1)
    assert fit(of, SHAPE, known, Assumed(), hours=needed * 1.01).fits
    nothing = fit(of, SHAPE, known, Assumed(), hours=1e-9)
    assert (nothing.share, nothing.k, nothing.images) == (None, None, None)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish(images=0), "--images is 0: give at least 1"),
        (Wish(workers=0), "--workers is 0"),
        (Wish(gpu="h900"), "which has t4, v100, .*h200"),
        (Wish(budget=10.0), "takes --rate"),
        (Wish(budget=10.0, rate=1.0, hours=3.0), "two budgets"),
        (Wish(rate=-1.0), "--rate is -1.0: give a number above 0"),
        (Wish(speedup=math.inf), "--speedup"),
        (Wish(fresh=1.5), "--fresh is 1.5: give a share"),
    ],
)
def test_what_cannot_be_planned_is_refused(wish, words):
    of = recipe()
    with pytest.raises(ValueError, match=words):
        make_plan(of, measured(of), wish)


def test_a_gpu_that_is_not_there_is_planned_and_one_that_is_was_measured():
    of = recipe()
    away = make_plan(of, measured(of), Wish(gpu="h200"))
    assert not away.is_measured
    assert "planned, not measured: there is no H200 SXM here" in away.notes[0]
    assert "402 times as fast there (201 to 670" in away.notes[0]  # 67 TFLOP/s over 0.1, times 0.3, 0.6 and 1
    given_by_hand = make_plan(of, measured(of), Wish(gpu="none such", speedup=50))
    assert "taken to be 50 times as fast" in given_by_hand.notes[0]
    there = measured(of).machine.model_copy(update={"device": "cuda", "gpu": "NVIDIA H200"})
    known = make_plan(of, measured(of, machine=there), Wish(gpu="H200"))
    assert known.is_measured
    assert known.stages == make_plan(of, measured(of), Wish()).stages
    other = make_plan(of, measured(of, machine=there), Wish(gpu="a100"))
    assert "TFLOP/s (float32), NVIDIA H200 reaches 67" in other.notes[0]


def test_a_plan_for_a_hundred_million_images_says_shards_and_bytes():
    of = recipe("prepared_gib=1000000")
    found = make_plan(of, measured(of), Wish(images=10**8, memory_gib=64, rate=3.5, hours=1000))
    assert found.shape.texts == 2 * 10**8
    assert found.amounts.index_bytes == 2 * 10**8 * 64 * 4
    assert found.amounts.shards == math.ceil((5 * 10**8 * 64 * 4) / (0.7 * 64 * 2**30))
    assert found.amounts.shard_items == math.ceil(2 * 10**8 / found.amounts.shards)
    disk = dict(found.amounts.disk)
    asked = sum(stage.calls.mid for stage in found.stages)
    assert disk["scores, unit files"].mid == pytest.approx(6 * asked)
    assert disk["prepared inputs and frozen outputs"].mid == 1000 * (10**8 + 200 + 2 * 10**8 + 400)
    assert dict(found.amounts.memory)["scores of a round's pairs"].mid == pytest.approx(
        52 * found.stages[[stage.name for stage in found.stages].index("score")].calls.mid
    )
    assert any("more than half of all is mining" in note for note in found.notes)
    assert not any("more than half" in note for note in make_plan(of, measured(of), Wish()).notes)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["all"]["wall"][1] == pytest.approx(whole(list(found.stages)).wall.mid)
    assert plain["ways"][1]["way"] == "local processes"


def test_texts_by_themselves():
    of = recipe()
    found = make_plan(of, measured(of), Wish(images=500, texts=5000))
    assert (found.shape.images, found.shape.texts, found.shape.pairs) == (500, 5000, 5000)
    assert found.shape.all_texts == 5400


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_measurement_comes_back_from_its_file_and_another_recipes_is_refused(tmp_path):
    of = recipe()
    known, path = measured(of), tmp_path / "measured.json"
    known.save(path)
    assert Measured.load(path) == known
    check_same(known, recipe("mine.k=4", "train.steps=7", "teach.steps=9"), "it")  # only how often
    with pytest.raises(OtherRecipeError, match=r"train\.batch_size: was 96, now 32"):
        check_same(known, recipe("train.batch_size=32"), "it")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 2}'])
def test_a_file_that_is_no_measurement_is_refused(tmp_path, text):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no measurement of this version"):
        Measured.load(path)


def test_an_altered_measurement_is_refused(tmp_path):
    of, path = recipe(), tmp_path / "measured.json"
    measured(of).save(path)
    for place, value in ((("teachers", 0, "pair", "low"), 1e9), (("shape", "images"), 0), (("once", "start"), -1)):
        found = json.loads(path.read_text())
        inner = found
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        other = tmp_path / "altered.json"
        other.write_text(json.dumps(found))
        with pytest.raises(ValueError, match="no measurement"):
            Measured.load(other)


# --- fitting ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(0, 5), st.floats(0, 0.1), st.floats(0, 0.1))
def test_a_steps_cost_is_found_from_three_loads(base, image, text):
    loads = [(90.0, 96.0), (400.0, 96.0), (400.0, 450.0)]
    found = fitted([(load, base + image * load[0] + text * load[1]) for load in loads])
    for load in [*loads, (2000.0, 300.0)]:
        assert found[0] + found[1] * load[0] + found[2] * load[1] == pytest.approx(
            base + image * load[0] + text * load[1], abs=1e-6, rel=1e-6
        )


def test_with_one_load_all_is_in_the_step():
    assert fitted([((90.0, 96.0), 2.0)]) == (2.0, 0.0, 0.0)
