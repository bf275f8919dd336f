"""Exported folders for tests of what reads one, made of the export's own parts without its proof."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import yaml

from distill.data.corpus import Corpus
from distill.durable import exclusively
from distill.experiment import Experiment
from distill.export import towers
from distill.export.items import write_items
from distill.export.layout import STEMS, onnx_file
from distill.inference import batches_of
from distill.pipeline import taught_teacher
from distill.protocols import SIDES
from distill.recipe.build import builders
from distill.recipe.load import load_recipe
from students.dual import DualEncoder

TINY = [
    "name=made",
    "device=cpu",
    "data.train=8",
    "data.val=4",
    "data.test=30",
    "teacher.vision.layers=1",
    "teacher.text.layers=1",
    "student.vision.layers=1",
    "student.text.layers=1",
    "evaluate.rerank=8",
]
WORDS = ["a red ring left of a big cube", "blue", "two dogs run over grass"]


def export_student(student_folder: Path, to: Path) -> Path:
    """Tokenizer, image processor, towers in fp32 and int8 and for OpenVINO, and a report; the folder."""
    student = DualEncoder.load(student_folder).eval()
    student.save_pretrained(to)
    pictures = [PIL.Image.new("RGB", (80, 60), colour) for colour in ("red", "green", "blue")]
    _write_towers(student, to, pictures, openvino=True)
    for side in SIDES:
        towers.write_int8(onnx_file(to, side, "fp32"), onnx_file(to, side, "int8"), way="dynamic")
    report = {"format": 1, "student": {"dim": student.dim, "identity": student.identity}}
    (to / "export_report.json").write_text(json.dumps(report))
    return to


def export(student: DualEncoder, corpus: Corpus, folder: Path, *, split: str = "test", index: bool = True) -> Path:
    """Towers in fp32, and the index and embeddings of a split."""
    student = student.eval()
    student.save_pretrained(folder)
    _write_towers(student, folder, corpus.load_images(corpus.split(split).images[:3]))
    about = {"dim": student.dim, "identity": student.identity, "class": type(student.model).__name__}
    told = {"name": corpus.name, "fingerprint": corpus.fingerprint, "split": split}
    student_of = about | {"run": "made", "arm": "plain"}
    (folder / "export_report.json").write_text(json.dumps({"format": 1, "student": student_of, "corpus": told}))
    if index:
        ids = corpus.split(split).ids
        write_items(folder, corpus, ids, vectors_of(student, corpus, ids))
    return folder


@torch.no_grad()
def vectors_of(student: DualEncoder, corpus: Corpus, ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unit vectors of rows of a corpus by side."""
    pictures = [corpus.load_images(rows) for rows in batches_of(ids["image"], 64)]
    words = [[corpus.texts[row] for row in rows.tolist()] for rows in batches_of(ids["text"], 64)]
    return {
        "image": np.concatenate([student(student.prepare_images(some), None).images.numpy() for some in pictures]),
        "text": np.concatenate([student(None, student.prepare_texts(some)).texts.numpy() for some in words]),
    }


def made_export(temporary: Path) -> Path:
    """``run/recipe.yaml``, ``student`` (as exported) and ``bare`` (without an index), made once for all test files.

    Student and teacher are small and were never trained.
    """
    place = temporary.parent / "made-export" if "popen-" in temporary.name else temporary / "made-export"
    with exclusively(place):
        if not (place / "run" / "recipe.yaml").is_file():
            _make(place)
    return place


def opened(place: Path, *changes: str) -> Experiment:
    """The experiment of ``made_export``."""
    recipe = load_recipe(str(place / "run" / "recipe.yaml"), changes)
    return Experiment(recipe, builders(recipe), taught=taught_teacher)


def _make(place: Path) -> None:
    torch.manual_seed(0)
    fresh = [*TINY, f"runs={place}", f"cache={place / 'cache'}"]
    recipe = load_recipe("quickstart", fresh)
    x = Experiment(recipe, builders(recipe), taught=taught_teacher)
    x.untaught_teacher().save_pretrained(place / "teacher")
    student = x.builders.student(x.corpus)
    export(student, x.corpus, place / "student")
    export(student, x.corpus, place / "bare", index=False)
    kept = load_recipe("quickstart", [*fresh, "teach=null", f"teacher.checkpoint={place / 'teacher'}"]).model_dump(
        mode="json"
    )
    (place / "run").mkdir()
    (place / "run" / "recipe.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))


def _write_towers(student: DualEncoder, folder: Path, pictures: list, *, openvino: bool = False) -> None:
    examples = {"image": student.prepare_images(pictures), "text": student.prepare_texts(WORDS)}
    for side in SIDES:
        path = onnx_file(folder, side, "fp32")
        names = student.standalone(side).input_names
        towers.write_onnx(towers.traced(student, side, examples[side]), path, side=side, input_names=names)
        if openvino:
            towers.write_openvino(path, folder / "openvino" / f"{STEMS[side]}.xml")
