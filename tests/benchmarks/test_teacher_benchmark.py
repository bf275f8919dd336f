"""The benchmark of the teacher runs, compares what it says it compares, and adds up."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import teacher as bench


def test_quick_run_writes_every_ratio(tmp_path):
    app = bench.typer.Typer()
    app.command()(bench.run)
    result = CliRunner().invoke(app, ["--quick", "--rounds", "1", "--json", str(tmp_path / "figures.json")])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name in ("ratio_per_pair", "ratio_batched", "ratio_loop", "ratio_loop_warm", "ratio_bfloat16"):
        assert figures[name] > 0
    assert figures["agreement"]["largest_difference"] < 1e-4
    assert figures["agreement"]["spread"] > 1e-3  # scores that are all alike would agree with anything
    assert figures["agreement"]["ranking_identical"] is True
    assert set(figures["by_captions"]) == {"1", "4"}


def test_every_way_gives_the_same_scores():
    shape = bench.Shape(layers=2, width=64, heads=4, image_size=64, vocabulary=400)
    with torch.inference_mode():
        model = bench.make_teacher(shape, torch.device("cpu"))
        ways = bench.Ways(model, *bench.make_inputs(shape, 6, model))
        ours = ways.ours()
        memory, features = model.encode_images(ways.image), ways.tower()
        for other in (
            ways.forward_per_pair(6),
            ways.forward_batched(6),
            ways.loop(features),
            ways.scored(memory),
            ways.scored(ways.keys_values(features)),
            ways.paired(memory, model.encode_texts(ways.texts)),
        ):
            torch.testing.assert_close(other, ours, atol=2e-5, rtol=1e-4)


def test_arithmetic_of_blip_base():
    shape = bench.Shape()
    assert shape.image_tokens == 577
    assert shape.tower_gflop() == pytest.approx(110, rel=0.02)
    assert shape.keys_values_gflop() == pytest.approx(16.3, rel=0.01)
    assert shape.pair_gflop(12) == pytest.approx(2.6, rel=0.02)
