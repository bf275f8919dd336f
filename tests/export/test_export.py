"""Exported folders: what every loader makes of them, what is caught, and what is never lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

from distill.data.pictures import decode_image
from distill.experiment import Experiment
from distill.export.layout import onnx_file, read_report
from distill.export.odd import ODD_TEXTS, odd_pictures
from distill.export.proof import GATES, Gate
from distill.export.runtime import OnnxStudent
from distill.export.write import ARTEFACTS
from distill.exporting import ExportSettings, export
from tests.export.conftest import SHARED

ALL = frozenset(ARTEFACTS)
QUICK = ExportSettings(frozenset({"transformers", "onnx"}), seconds=0)
# Made from random weights: a few of the sample's near-ties turn over in reduced precision.
LENIENT = {**GATES, "fp16": Gate(0.999, 10.0), "int8": Gate(None, 20.0)}
KINDS = ["clip", "flickr"]


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest) -> Experiment:
    if request.param == "flickr":
        return request.getfixturevalue("flickr")
    return request.getfixturevalue("scenes")("clip")


@pytest.fixture(scope="module")
def folder(run: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything there is, of a CLIP and of a VisionTextDualEncoder."""
    to = tmp_path_factory.mktemp("exported") / "student"
    seconds = 0.01 if run.recipe.name == "clip" else 0.0  # towers of a real size take their time
    export(run, "plain", to, ExportSettings(ALL, LENIENT, images=24, seconds=seconds))
    return to


def student_of(x: Experiment):
    return x.builders.saved_student(x.folder / "arms" / "plain" / "student").eval()


def reference(x: Experiment, images=(), texts=()):
    """The student's own vectors, one item at a time."""
    student = student_of(x)
    with torch.no_grad():
        of_images = [student(student.prepare_images([one]), None).images for one in images]
        of_texts = [student(None, student.prepare_texts([one])).texts for one in texts]
    return tuple(torch.cat(some).numpy() if some else None for some in (of_images, of_texts))


def card_blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


def run_alone(code: str, folder: Path) -> dict[str, list]:
    """Code in a process that cannot import anything of ours, in the exported folder; what it prints last, as JSON."""
    guard = (
        "import sys\n"
        "class Guard:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('distill', 'teachers', 'students'):\n"
        "            raise ImportError(name + ' is not for users of the folder')\n"
        "sys.meta_path.insert(0, Guard())\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", guard + code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- what there is, and that every loader gives the student's vectors ------------------------------------------------


def test_everything_is_there_and_said(run, folder):
    report = read_report(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {"export_report.json"} == set(report["files"])
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
        "modules.json", "config_sentence_transformers.json", "1_Normalize/config.json", "README.md", "report.html",
        "index/image/index.faiss", "index/text/ids.npy", "embeddings/images.parquet", "embeddings/texts.npy",
        "torch_export/text_model.pt2", "openvino/vision_model.xml", "openvino/vision_model.bin",
        *(f"onnx/{stem}_model{kind}.onnx" for stem in ("text", "vision") for kind in ("", "_fp16", "_int8")),
    } <= files  # fmt: skip
    assert {one["name"] for one in report["artefacts"]} == {
        "transformers", "sentence-transformers", "onnx fp32", "onnx fp16", "onnx int8", "torch.export", "openvino",
    }  # fmt: skip
    fp32 = [one for one in report["artefacts"] if one["precision"] == "fp32"]
    assert len(fp32) == 10
    assert all(one["passed"] and one["least_cosine"] > 0.99999 and one["top1"] == 1 for one in fp32)
    assert report["student"]["identity"] == student_of(run).identity
    timed = {"torch", "onnx fp32", "onnx fp16", "onnx int8"} if run.recipe.name == "clip" else set()
    assert {row["name"] for row in report["speed"]} == timed
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config


def test_no_file_names_this_machine_or_is_for_its_user_alone(run, folder):
    places = [run.folder.parent.parent, folder.parent, Path.home(), Path(__file__).parents[2], SHARED]
    told = [str(place).encode() + b"/" for place in places]
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
            content = path.read_bytes()
            assert not [one for one in told if one in content], path


def test_the_cards_own_code_gives_the_students_vectors(run, folder):
    """Each way of loading, in a process that knows nothing of this project; pictures of every odd kind."""
    pictures, texts = odd_pictures(), [text for text in ODD_TEXTS if text]
    for number, content in enumerate(pictures.values()):
        (folder / f"photo-{number}.img").write_bytes(content)
    (folder / "photo.jpg").write_bytes(pictures["plain"])
    try:
        opening, transformers, sentence_transformers, onnx_runtime, by_hand, faiss = card_blocks(folder)
        names = [f"photo-{number}.img" for number in range(len(pictures))]
        begin = (
            f"{opening}\npictures = [upright_rgb(PIL.Image.open(name)) for name in {names!r}]\nsentences = {texts!r}\n"
        )
        unit = "torch.nn.functional.normalize({}).tolist()"
        tell = "import json; print(json.dumps({'images': %s, 'texts': %s}))"
        found = {
            "transformers": run_alone(
                begin + transformers + tell % (unit.format("images"), unit.format("texts")), folder
            ),
            "sentence-transformers": run_alone(
                begin
                + sentence_transformers
                + tell % ("model.encode(pictures).tolist()", "model.encode(sentences).tolist()"),
                folder,
            ),
            "onnx": run_alone(begin + onnx_runtime + tell % ("images.tolist()", "texts.tolist()"), folder),
            "by hand": run_alone(begin + by_hand + tell % ("images.tolist()", "texts.tolist()"), folder),
        }
        told = run_alone(faiss + "import json; print(json.dumps({'found': found.tolist()}))", folder)
    finally:
        for path in folder.glob("photo*"):
            path.unlink()
    images, words = reference(run, [decode_image(content) for content in pictures.values()], texts)
    for name, vectors in found.items():
        np.testing.assert_allclose(np.array(vectors["images"]), images, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(np.array(vectors["texts"]), words, atol=2e-5, err_msg=name)
    assert len(told["found"]) == 5
    assert set(told["found"]) <= set(run.corpus.split("test").images.tolist())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_any_batch_and_length(run, folder, precision, batch):
    corpus, rows = run.corpus, run.corpus.split("test").images[:batch]
    texts = [[text, "a", ODD_TEXTS[-1]][number % 3] for number, text in enumerate(corpus.texts[:batch])]
    loaded = OnnxStudent(folder, precision=precision)
    assert loaded.precisions == {"text": precision, "image": precision}
    images, words = reference(run, corpus.load_images(rows), texts)
    least = {"fp32": 0.999999, "fp16": 0.9999, "int8": 0.9}[precision]
    for got, wanted in ((loaded.embed_images(corpus.load_images(rows)), images), (loaded.embed_texts(texts), words)):
        assert got.shape == wanted.shape == (batch, loaded.dim)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-3)
        assert ((got * wanted).sum(axis=1) / np.linalg.norm(got, axis=1)).min() > least


def test_a_text_of_two_tokens_and_one_that_is_cut(run, folder):
    loaded, student = OnnxStudent(folder), student_of(run)
    assert student.prepare_texts([""])["input_ids"].shape[1] == 2
    longest = student.prepare_texts([ODD_TEXTS[-1]])["input_ids"].shape[1]
    assert longest == student.text_inputs.limit
    assert loaded.prepare_texts([ODD_TEXTS[-1]])["input_ids"].shape[1] == longest
    _, words = reference(run, texts=["", ODD_TEXTS[-1]])
    np.testing.assert_allclose(loaded.embed_texts(["", ODD_TEXTS[-1]]), words, atol=2e-6)


def test_index_and_embeddings_are_those_of_the_split(run, folder):
    import faiss

    split = run.corpus.split("test")
    for side, rows in split.ids.items():
        index = faiss.read_index(str(folder / "index" / side / "index.faiss"))
        table = pq.read_table(folder / "embeddings" / f"{side}s.parquet")
        assert table["id"].to_pylist() == rows.tolist() == np.load(folder / "index" / side / "ids.npy").tolist()
        kept = np.load(folder / "embeddings" / f"{side}s.npy")
        assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), kept)
        assert np.array_equal(index.reconstruct_n(0, index.ntotal), kept)
        items = run.corpus.load_images(rows[:5]) if side == "image" else [run.corpus.texts[row] for row in rows[:5]]
        wanted = reference(run, **{f"{side}s": items})[side == "text"]
        np.testing.assert_allclose(kept[:5], wanted, atol=1e-5)
    texts = pq.read_table(folder / "embeddings" / "texts.parquet").to_pylist()
    labelled = {(image, row["id"]) for row in texts for image in row["images"]}
    assert labelled == set(map(tuple, run.corpus.split_pairs("test").tolist()))
    assert texts[0]["text"] == run.corpus.texts[texts[0]["id"]]
    names = pq.read_table(folder / "embeddings" / "images.parquet")["name"].to_pylist()
    assert names == [run.corpus.image_names[row] for row in split.images]


def test_int8_leaves_convolutions_alone_when_it_is_dynamic(run, folder):
    told = {(one["side"], one["way"]) for one in read_report(folder)["artefacts"] if one["name"] == "onnx int8"}
    model = onnx.load(onnx_file(folder, "image", "int8"))
    kinds = {node.op_type for node in model.graph.node}
    assert "ConvInteger" not in kinds
    if ("image", "dynamic") in told:
        assert "Conv" in kinds
    assert ("text", "dynamic") in told
    assert "MatMulInteger" in {node.op_type for node in onnx.load(onnx_file(folder, "text", "int8")).graph.node}
    sizes = [onnx_file(folder, "text", kind).stat().st_size for kind in ("int8", "fp16", "fp32")]
    assert sizes == sorted(sizes)


def test_the_card_opens_pictures_as_training_does(folder):
    scope: dict = {}
    exec(card_blocks(folder)[0].split("pictures =")[0], scope)  # noqa: S102  (the card's own function)
    for kind, content in odd_pictures().items():
        with PIL.Image.open(BytesIO(content)) as image:
            assert np.array_equal(np.asarray(scope["upright_rgb"](image)), np.asarray(decode_image(content))), kind


# --- other students ---------------------------------------------------------------------------------------------------


def test_a_siglip_fills_all_its_places_by_every_way(scenes, tmp_path):
    x = scenes("siglip", "student.family=siglip", "student.projection_dim=64")
    settings = ExportSettings(frozenset({"transformers", "sentence-transformers", "onnx"}), seconds=0)
    report = export(x, "plain", tmp_path / "out", settings)
    assert report["student"]["class"] == "SiglipModel"
    passed = {(one["name"], one["side"]) for one in report["artefacts"] if one["passed"]}
    assert {("transformers", "text"), ("onnx fp32", "text"), ("onnx fp32", "image")} <= passed
    assert ("sentence-transformers", "text") in passed


def test_what_no_stock_class_holds_is_said_and_its_towers_are_exported(scenes, tmp_path):
    x = scenes("heads", "student.text_head=mlp", "student.image_pooling=mean", "student.text_pooling=mean")
    to = tmp_path / "out"
    report = export(x, "plain", to, ExportSettings(seconds=0, gates=LENIENT))
    assert not (to / "model.safetensors").exists()
    assert not list(to.glob("*student*"))
    assert {one["name"] for one in report["artefacts"] if one["passed"]} >= {"onnx fp32"}
    assert not {"transformers", "sentence-transformers"} & {one["name"] for one in report["artefacts"]}
    card = (to / "README.md").read_text()
    assert "No stock class of transformers can hold it: image vectors pooled by 'mean'" in card
    assert "AutoModel.from_pretrained" not in card
    texts = ["a small red ring", "blue", ODD_TEXTS[-1]]
    np.testing.assert_allclose(OnnxStudent(to).embed_texts(texts), reference(x, texts=texts)[1], atol=2e-6)
