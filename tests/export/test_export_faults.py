"""Exported folders that are spoiled, in the way, or cannot be written: what is caught, and what is never lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from onnx import numpy_helper

from distill import exporting
from distill.experiment import Experiment
from distill.export import towers
from distill.export.before import check_room
from distill.export.layout import NotAnExportError, onnx_file, read_report
from distill.export.proof import GATES, Gate
from distill.export.runtime import OnnxStudent
from distill.export.write import NothingPassedError
from distill.export_commands import _gates
from distill.exporting import ExportError, ExportSettings, check_export, export, judged_by

LENIENT = {**GATES, "fp16": Gate(0.999, 10.0)}  # random weights: near-ties turn over
QUICK = ExportSettings(frozenset({"transformers", "onnx"}), seconds=0)


# --- spoiled artefacts ------------------------------------------------------------------------------------------------


_MADE: dict[str, Path] = {}


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Experiment:
    """Of the kind that the test names, a CLIP where it names none."""
    kind = getattr(request, "param", "clip")
    found: Experiment = (
        request.getfixturevalue("flickr") if kind == "flickr" else request.getfixturevalue("scenes")(kind)
    )
    return found


@pytest.fixture
def copy(run, tmp_path, tmp_path_factory):
    """A folder of the run that may be spoiled; it is exported once."""
    name = run.recipe.name
    if name not in _MADE:
        to = tmp_path_factory.mktemp("sound") / name
        stock = frozenset({"transformers", "sentence-transformers", "onnx"})
        export(run, "plain", to, ExportSettings(stock, images=30, seconds=0))
        _MADE[name] = to
    return shutil.copytree(_MADE[name], tmp_path / "copy")


def failed(x: Experiment, folder: Path) -> set[tuple[str, str | None]]:
    found = check_export(x, "plain", folder, ExportSettings(gates=GATES, images=30))
    return {(one.name, one.side) for one in found if one.faults}


def test_a_folder_is_checked_by_the_gates_and_the_sample_it_was_exported_with(run, copy):
    assert judged_by(copy) == (GATES, 30)
    report = read_report(copy)
    report["gates"]["fp32"]["recall"] = 0.5
    (copy / "export_report.json").write_text(json.dumps(report))
    gates, _ = judged_by(copy)
    assert gates == {**GATES, "fp32": Gate(0.9999, 0.5)}
    assert _gates(["fp32.cosine=0.5"], gates)["fp32"] == Gate(0.5, 0.5)


@pytest.mark.parametrize("run", ["clip", pytest.param("flickr", marks=pytest.mark.slow)], indirect=True)
def test_a_sound_folder_passes(run, copy):
    assert failed(run, copy) == set()


def change_weight(folder: Path) -> None:
    path = onnx_file(folder, "text", "fp32")
    model = onnx.load(path)
    weight = max((one for one in model.graph.initializer if len(one.dims) == 1), key=lambda one: one.dims[0])
    values = numpy_helper.to_array(weight).copy()
    values[0] += 3.0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)


def change_json(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        change(told)
        (folder / name).write_text(json.dumps(told))

    return spoil


def change_index(folder: Path) -> None:
    import faiss

    path = folder / "index" / "image" / "index.faiss"
    index = faiss.read_index(str(path))
    vectors = index.reconstruct_n(0, index.ntotal)
    vectors[[0, 1]] = vectors[[1, 0]]
    other = faiss.IndexFlatIP(index.d)
    other.add(vectors)
    faiss.write_index(other, str(path))


def shift_ids(folder: Path) -> None:
    path = folder / "index" / "image" / "ids.npy"
    np.save(path, np.load(path) + 1)


def reverse_captions(folder: Path) -> None:
    path = folder / "embeddings" / "texts.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("text")
    pq.write_table(table.set_column(place, "text", [table["text"].to_pylist()[::-1]]), path)


def change_tokens(told: dict) -> None:
    vocabulary = told["model"]["vocab"]
    words = [word for word in vocabulary if word.isalpha() and len(word) > 1]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    for word in words[2:-1:2]:
        vocabulary[word] = vocabulary[words[0]]


ONNX_IMAGE, STOCK_IMAGE = {("onnx fp32", "image")}, {("transformers", "image"), ("sentence-transformers", "image")}
TEXTS = {("onnx fp32", "text"), ("transformers", "text"), ("sentence-transformers", "text")}


@pytest.mark.parametrize(
    ("run", "spoil", "caught"),
    [
        pytest.param("clip", change_weight, {("onnx fp32", "text")}, id="weight"),
        pytest.param(
            "clip",
            change_json("preprocessor_config.json", lambda told: told.update(resample=0)),
            ONNX_IMAGE,
            id="filter",
        ),
        pytest.param(
            "clip",
            change_json("preprocessor_config.json", lambda told: told.update(image_mean=[0.4, 0.5, 0.5])),
            ONNX_IMAGE,
            id="mean",
        ),
        pytest.param(
            "clip",
            change_json("processor_config.json", lambda told: told["image_processor"].update(resample=0)),
            STOCK_IMAGE,
            id="filter of the processor",
        ),
        pytest.param("clip", change_json("tokenizer.json", change_tokens), TEXTS, id="tokens"),
        pytest.param(
            "clip",
            change_json("tokenizer_config.json", lambda told: told.update(model_max_length=5)),
            TEXTS,
            id="limit",
        ),
        pytest.param("clip", change_index, {("index", "image")}, id="index"),
        pytest.param(
            "clip",
            lambda folder: (folder / "modules.json").write_text("["),
            {("sentence-transformers", None)},
            id="json",
        ),
        pytest.param("clip", shift_ids, {("index", "image")}, id="ids"),
        pytest.param("clip", reverse_captions, {("index", "text")}, id="captions"),
        pytest.param(
            "clip", lambda folder: shutil.rmtree(folder / "onnx"), {("files", None)}, id="files that are gone"
        ),
        pytest.param(
            "flickr", change_weight, {("onnx fp32", "text")}, id="weight, real towers", marks=pytest.mark.slow
        ),
        pytest.param(
            "flickr",
            change_json("preprocessor_config.json", lambda told: told.update(resample=0)),
            ONNX_IMAGE,
            id="filter, real towers",
            marks=pytest.mark.slow,
        ),
    ],
    indirect=["run"],
)
def test_what_was_spoiled_is_caught(run, copy, spoil, caught):
    spoil(copy)
    assert failed(run, copy) == caught


def test_a_spoiled_artefact_is_not_left_in_the_folder(scenes, tmp_path, monkeypatch):
    x, whole = scenes("clip"), towers.write_fp16

    def spoiled(source: Path, target: Path) -> None:
        whole(source, target)
        if "vision" in target.name:
            model = onnx.load(target)
            for weight in model.graph.initializer:
                if weight.data_type == onnx.TensorProto.FLOAT16 and len(weight.dims) == 2:
                    weight.CopyFrom(
                        numpy_helper.from_array(numpy_helper.to_array(weight) * np.float16(1.5), weight.name)
                    )
            onnx.save(model, target)

    monkeypatch.setattr(towers, "write_fp16", spoiled)
    settings = replace(QUICK, artefacts=QUICK.artefacts | {"fp16"}, gates=LENIENT)
    report = export(x, "plain", tmp_path / "out", settings)
    assert not onnx_file(tmp_path / "out", "image", "fp16").exists()
    assert onnx_file(tmp_path / "out", "text", "fp16").exists()
    assert [one["side"] for one in report["artefacts"] if one["faults"]] == ["image"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "onnx fp16, image: left out, least cosine" in card
    with pytest.raises(ValueError, match="has no int8 tower; it has fp32, fp16"):
        OnnxStudent(tmp_path / "out", precision="int8")
    assert OnnxStudent(tmp_path / "out", precision="fp16").precisions == {"text": "fp16", "image": "fp32"}


def test_where_nothing_passes_nothing_is_left(scenes, tmp_path):
    gates = {**GATES, "fp32": Gate(1.5, 0.1)}  # no cosine reaches it
    with pytest.raises(NothingPassedError, match=r"so nothing is exported:\n  transformers, texts: least cosine"):
        export(scenes("clip"), "plain", tmp_path / "out", replace(QUICK, gates=gates))
    assert list(tmp_path.iterdir()) == []


# --- folders that are in the way, and full disks ----------------------------------------------------------------------


def test_what_is_there_already_is_not_lost(scenes, tmp_path):
    x, to = scenes("clip"), tmp_path / "out"
    export(x, "plain", to, QUICK)
    before = {path: path.read_bytes() for path in to.rglob("*") if path.is_file()}
    with pytest.raises(ExportError, match=r"out holds an exported student already: give another --to, or --replace"):
        export(x, "plain", to, QUICK)
    with pytest.raises(NothingPassedError):
        export(x, "plain", to, replace(QUICK, gates={**GATES, "fp32": Gate(1.5, 0.1)}), replace=True)
    assert {path: path.read_bytes() for path in to.rglob("*") if path.is_file()} == before
    export(x, "plain", to, replace(QUICK, artefacts=frozenset({"onnx"}), index="none"), replace=True)
    assert not (to / "model.safetensors").exists()
    assert not (to / "index").exists()
    assert read_report(to)["index"] is None


@pytest.mark.parametrize("there", ["a file", "a folder of someone's"])
def test_what_is_not_an_export_is_never_replaced(scenes, tmp_path, there):
    to = tmp_path / "out"
    if there == "a file":
        to.write_text("mine")
    else:
        to.mkdir()
        (to / "mine").write_text("mine")
    with pytest.raises(ExportError, match="is no exported student, so it is left alone: give another --to"):
        export(scenes("clip"), "plain", to, QUICK, replace=True)
    assert (to if there == "a file" else to / "mine").read_text() == "mine"


def test_no_room_is_known_before_the_work(scenes, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(exporting, "Sample", None)  # the work
    with pytest.raises(
        ExportError, match=r"out needs about .* MB and .* has 1.0 kB free: make room, choose another --to"
    ):
        export(scenes("clip"), "plain", tmp_path / "out", QUICK)
    x = scenes("clip")
    student = x.saved_student(x.folder / "arms" / "plain" / "student")
    usage = usage._replace(free=1 << 30)
    check_room(student, tmp_path / "out", QUICK.artefacts, vectors=1000)
    with pytest.raises(ExportError, match=r"needs about .* GB .*vectors with --index none"):
        check_room(student, tmp_path / "out", QUICK.artefacts, vectors=10_000_000)


@pytest.mark.parametrize(
    ("settings", "arm", "message"),
    [(QUICK, "other", "no arm 'other' in this run; it has plain, distilled"), (QUICK, "distilled", "not trained yet")],
)
def test_what_cannot_begin_says_why(scenes, tmp_path, settings, arm, message):
    with pytest.raises(ExportError, match=message):
        export(scenes("clip"), arm, tmp_path / "out", settings)


def test_a_folder_of_another_student_is_not_checked(scenes, tmp_path):
    export(scenes("clip"), "plain", tmp_path / "out", QUICK)
    other = scenes("other", "student.projection_dim=32")
    with pytest.raises(ExportError, match="made of another student than other's arm plain: of run clip, arm plain"):
        check_export(other, "plain", tmp_path / "out", QUICK)
    with pytest.raises(NotAnExportError, match="holds no export_report.json"):
        check_export(other, "plain", tmp_path, QUICK)


def test_a_missing_library_is_named_before_the_work(scenes, tmp_path, monkeypatch):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    monkeypatch.setattr(exporting, "Sample", None)
    with pytest.raises(ExportError, match=r'onnx needs onnxscript.*pip install "cross2dual\[onnx\]".*--without onnx'):
        export(scenes("clip"), "plain", tmp_path / "out", QUICK)


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str, folder: Path, room: str = "") -> subprocess.CompletedProcess[str]:
    limit = f"ulimit -f {room}; " if room else ""
    return subprocess.run(
        ["bash", "-c", f'{limit}exec "$@"', "bash", sys.executable, "-m", "distill", "export", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )


def test_the_command_writes_checks_and_fails(scenes, tmp_path):
    x = scenes("clip")
    few = ["--without", "fp16", "--without", "int8", "--without", "sentence-transformers", "--seconds", "0"]
    done = command(str(x.folder), "--arm", "plain", *few, "--to", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "onnx fp32, image" in done.stdout
    assert "exported: out, report: out/report.html" in done.stdout
    change_json("preprocessor_config.json", lambda told: told.update(image_mean=[0.3, 0.5, 0.5]))(tmp_path / "out")
    again = command(str(x.folder), "--arm", "plain", "--to", "out", "--check", folder=tmp_path)
    assert again.returncode == 1
    assert "out/preprocessor_config.json is changed since it was exported" in again.stderr
    assert re.search(r"onnx fp32, image: .*least cosine", again.stdout)


def test_a_disk_that_fills_up_leaves_nothing_and_says_so(scenes, tmp_path):
    done = command(
        str(scenes("clip").folder), "--arm", "plain", "--seconds", "0", "--to", "out", folder=tmp_path, room="500"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"error: \S*/out could not be written: it is larger than this process may write", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "int8.speed=1"], "'int8.speed=1' is no gate; give one of fp32.cosine, fp32.recall"),
        (["--gate", "fp32.cosine=nan"], "'fp32.cosine=nan' is no gate"),
        (["--gate", "int8.recall=inf"], "'int8.recall=inf' is no gate"),
        (["--with", "coreml"], "'coreml' is none of transformers, sentence-transformers, onnx"),
        (["--index", "nowhere"], "there is no split 'nowhere' to index; --index takes train, val, test"),
    ],
)
def test_a_wrong_option_is_refused(scenes, tmp_path, arguments, message):
    done = command(str(scenes("clip").folder), "--arm", "plain", *arguments, "--to", "out", folder=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
