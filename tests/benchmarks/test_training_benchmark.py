"""The benchmark of training: both sides have the same student, rows and loss, ways run, a wrong batch stops it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import training as bench
from distill.losses import MarginMSE
from distill.protocols import DIRECTIONS, SIDES, Scored, sides_of

SIZES = replace(bench.QUICK, images=60, shared=3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return folder, bench.prepare(folder, SIZES)


@pytest.mark.slow
def test_the_whole_run_prints_tables_and_writes_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("encode", "memory", "in_batch", "theirs, halves")
    monkeypatch.setattr(bench, "WAYS", {name: bench.WAYS[name] for name in few})
    app = typer.Typer()
    app.command()(bench.main)
    asked = ["--quick", "--images", "100", "--steps", "2", "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, asked, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "100 pictures x 2 captions" in result.output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert set(figures["ways"]) == set(figures["ratios"]) == set(few)
    assert figures["ratios"]["theirs, halves"] == 1
    for way in figures["ways"].values():
        assert way["queries_per_second"] > way["steps_per_second"] > 0
        assert 0 <= way["waiting_share"] < 1
        assert way["bytes"] > way["bytes_above"]
    encoded = [figures["ways"][name]["items_per_query"] for name in few]
    assert encoded[1] == encoded[2] == 1 < encoded[0] < encoded[3] == 10
    assert figures["bare"]["loop_bare_ms"] > 0
    assert figures["bare"]["loop_overhead_wall"] > -1


def test_the_best_round_counts_and_the_fastest_of_theirs_is_what_all_are_compared_with() -> None:
    def runs(*rates: tuple[float, float]) -> list[dict[str, float]]:
        return [{"queries_per_second": wall, "queries_per_cpu_second": cpu} for wall, cpu in rates]

    found = {
        "encode": runs((30, 90), (60, 80)),
        "theirs, whole": runs((10, 45), (15, 40)),
        "theirs, whole, 2 workers": runs((20, 1000), (8, 900)),
    }
    figures = bench.summary(found, [{"threads": 1, "x": value} for value in (1.0, 9.0, 2.0)])
    assert figures["sentence_transformers"] == "theirs, whole, 2 workers"
    assert figures["ratios"] == {"encode": 3, "theirs, whole": 0.75, "theirs, whole, 2 workers": 1}
    assert figures["cpu_ratios"] == {"encode": 2, "theirs, whole": 1}  # workers' time is not in that of their process
    assert figures["bare"] == {"x": 2.0}


@pytest.mark.parametrize("name", ["theirs, whole, 2 workers", "theirs_live, halves", "encode_live, 2 workers"])
def test_ways_with_workers_and_without_a_cache_run(prepared, name, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    way = bench.WAYS[name]
    figures = way.work(*prepared, replace(SIZES, steps=2), *way.arguments)
    assert figures["queries_per_second"] > figures["steps_per_second"] > 0
    assert 0 <= figures["waiting_share"] < 1


def test_both_sides_give_an_item_the_same_vector(prepared) -> None:
    folder, corpus = prepared
    student, batches = bench.our_parts(folder, corpus, SIZES)
    rows = np.arange(5)
    with torch.no_grad():
        out = student(batches.images(rows), batches.texts(rows))
    theirs = bench.their_model(folder)
    for ours, items in ((out.images, corpus.load_images(rows)), (out.texts, [corpus.texts[row] for row in rows])):
        np.testing.assert_allclose(theirs.encode(items), ours.numpy(), atol=1e-6)
    assert type(theirs[0].model) is type(student.model)
    weights = dict(theirs[0].model.named_parameters())
    for name, value in student.model.named_parameters():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_both_sides_have_the_same_rows_and_the_same_loss(prepared, direction) -> None:
    """Theirs by their collator and loss, ours by vectors looked up by id and the scores that our batches read."""
    folder, corpus = prepared
    model, rows = bench.their_model(folder), bench.their_rows(folder, corpus)
    trainer = bench.their_trainer(model, rows, SIZES, bench.Clock(), home=folder / "trainer", options=(0, True))
    picked = [0, 3, 17]
    collated = trainer.data_collator([rows[direction][row] for row in picked])
    features, labels = trainer.collect_features(collated)
    with torch.no_grad():
        theirs = trainer.loss(features, labels)

    student, batches = bench.our_parts(folder, corpus, SIZES)
    columns = bench.their_columns(folder, corpus, direction)
    queries = columns["query_id"][picked]
    items = np.concatenate([columns["positive_id"][:, None], columns["negative_ids"]], axis=1)[picked]
    image_ids, text_ids = (queries[:, None], items) if direction == "i2t" else (items, queries[:, None])
    first = torch.zeros(items.shape, dtype=torch.bool)
    first[:, 0] = True
    sources = dict(zip(SIDES, (batches.images, batches.texts), strict=True))

    def vectors(side, ids):
        inputs = sources[side](ids.ravel())
        found = student(inputs, None).images if side == "image" else student(None, inputs).texts
        return found.reshape(*ids.shape, -1)

    asking, answering = sides_of(direction)
    with torch.no_grad():
        cosines = (vectors(asking, queries)[:, None] * vectors(answering, items)).sum(dim=-1)
    teacher = torch.from_numpy(batches.scores.lookup(image_ids, text_ids))
    scored = Scored(cosines, teacher, first, torch.ones_like(first), torch.ones(()))
    ours = MarginMSE(convention="sentence_transformers")(scored)
    assert not teacher.isnan().any()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert corpus.matches.is_match(image_ids, text_ids)[:, 0].all()
    assert not corpus.matches.is_match(image_ids, text_ids)[:, 1:].any()


def test_rows_by_id_and_rows_from_memory_are_the_same(prepared) -> None:
    folder, corpus = prepared
    held, live = bench.their_rows(folder, corpus), bench.their_rows(folder, corpus, live=True)
    for direction in DIRECTIONS:
        one, other = held[direction][7], live[direction][7]
        assert list(one) == list(other)
        for name, value in one.items():
            if hasattr(value, "tobytes"):
                assert value.tobytes() == other[name].tobytes()
            else:
                assert value == other[name]


def test_a_query_that_lacks_its_positive_or_a_negative_stops_it(prepared) -> None:
    folder, corpus = prepared
    _, batches = bench.our_parts(folder, corpus, SIZES)
    step = batches[0]
    bench.check(step, SIZES.negatives)
    grid = step.grids["t2i"]
    for lost, said in ((grid.positive, "lacks its positive"), (~grid.positive, "negatives, not 8")):
        teacher = grid.teacher.clone()
        teacher[0, lost[0]] = torch.nan
        broken = replace(step, grids={**step.grids, "t2i": replace(grid, teacher=teacher)})
        with pytest.raises(AssertionError, match=f"step 0, t2i: a query .*{said}"):
            bench.check(broken, SIZES.negatives)
