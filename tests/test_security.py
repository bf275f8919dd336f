"""What ``docs/security.md`` promises of files that are read, and that the tests it names are there."""

from __future__ import annotations

import ast
import configparser
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn
from transformers import BertConfig, BertModel

from distill.checkpoint import load_checkpoint, save_checkpoint
from students.towers import _tower
from teachers.backbones import load_text
from teachers.pretrained import load_model

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for package in ("distill", "teachers", "students") for path in (ROOT / package).rglob("*.py")]
DOC = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of every call in the packages: where, of what, and the keywords that are constants."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                words = {
                    one.arg: one.value.value
                    for one in node.keywords
                    if one.arg is not None and isinstance(one.value, ast.Constant)
                }
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), words


CALLS = list(calls())


def of(*ends: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [call for call in CALLS if call[1] in ends or call[1].endswith(tuple(f".{end}" for end in ends))]


def test_no_pickle_is_read_and_nothing_is_evaluated() -> None:
    assert len(CALLS) > 5000
    arrays, states = of("np.load", "numpy.load"), of("torch.load")
    assert len(arrays) >= 8
    assert all(words.get("allow_pickle") is False for _, _, words in arrays), arrays
    assert len(states) >= 1
    assert all(words.get("weights_only") is True for _, _, words in states), states
    bare = [call for call in CALLS if call[1] in ("eval", "exec", "compile", "__import__")]
    forbidden = of(
        "pickle.load", "pickle.loads", "Unpickler", "yaml.load", "os.system", "joblib.load", "cloudpickle.load"
    )
    assert bare + forbidden == []
    assert [where for where, _, words in CALLS if words.get("shell") is True] == []


def test_weights_come_from_safetensors_and_code_of_model_repositories_is_never_asked_for() -> None:
    models = [
        call for call in of("from_pretrained") if re.search(r"(Model|ForImageTextRetrieval|model_class)\.", call[1])
    ]
    assert len(models) >= 4
    assert [where for where, _, words in models if words.get("use_safetensors") is not True] == []
    assert [where for where, _, words in CALLS if "trust_remote_code" in words] == []


class Bomb:
    """Runs something where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def pickled(path: Path, mark: Path) -> None:
    torch.save({"optimizer": Bomb(mark)}, path)


def test_the_bomb_of_these_tests_goes_off_where_pickles_are_read(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))  # noqa: S301
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_model(BertModel, folder, dtype=torch.float32),
        lambda folder: load_text(folder, torch.float32),
        lambda folder: _tower(folder, {}),
    ],
    ids=["teacher", "backbone", "student"],
)
def test_a_checkpoint_without_safetensors_is_refused_unread(tmp_path: Path, load: Any) -> None:
    BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    ).save_pretrained(tmp_path)
    pickled(tmp_path / "pytorch_model.bin", tmp_path / "mark")
    with pytest.raises(OSError, match="safetensors"):
        load(str(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_a_training_checkpoint_with_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, meaning="m")
    pickled(checkpoint / "trainer.pt", tmp_path / "mark")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        load_checkpoint(checkpoint, model=model, optimizer=optimizer, meaning="m")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(("package", "too_old"), [("torch", "2.9.1"), ("transformers", "5.4.9"), ("pillow", "10.4")])
def test_floors_leave_out_versions_with_known_holes(package: str, too_old: str) -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    needed = [Requirement(line) for line in settings["options"]["install_requires"].split("\n") if line.strip()]
    [found] = [one for one in needed if one.name == package]
    assert not found.specifier.contains(too_old)


def named() -> list[tuple[str, list[str]]]:
    """Files and words of tests that the document names; a file without a folder is in tests/teacher_service."""
    found = []
    for file, quoted, word in re.findall(r'`(?:tests/)?([\w/]+\.py)(?: -k (?:"([^"]+)"|(\w+)))?`', DOC):
        if Path(file).name.startswith("test_"):
            found.append((file, [one for one in (quoted or word).split(" or ") if one]))
    return found


@pytest.mark.parametrize(("file", "words"), named(), ids=str)
def test_tests_that_the_document_names_are_there(file: str, words: list[str]) -> None:
    places = [ROOT / "tests" / file, ROOT / "tests" / "teacher_service" / file]
    [path] = [place for place in places if place.is_file()]
    names = re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    for word in words:
        assert [name for name in names if word in name], f"{word} is in no test of {path.name}"


def test_files_that_the_document_names_are_there() -> None:
    files = {name for name in re.findall(r"`([\w/.]+(?:\.py|\.cfg|\.txt|/))`", DOC) if not name.startswith("test_")}
    assert len(files) > 15
    beside = ROOT / "distill" / "serving"
    assert [name for name in files if not (ROOT / name).exists() and not (beside / name).exists()] == []
    assert len(named()) > 30
