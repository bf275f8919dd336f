"""Any pair classifier as a teacher: what its output means, how it is loaded, what makes its identity."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BridgeTowerForImageAndTextRetrieval
from transformers.modeling_outputs import SequenceClassifierOutput

from distill.protocols import TeachableTeacher, Teacher
from teachers import BridgeTowerTeacher, ClassifierOptions, PairClassifierTeacher
from tests.teachers.tiny_teachers import (
    TEXTS,
    TinyClassifier,
    bridgetower,
    classifier,
    every_pair,
    memories,
    pictures,
    save_checkpoint,
    vilt,
)


class Wrapped(TinyClassifier):
    """Gives its logits in one of the usual wrappings."""

    def __init__(self, form: str, outputs: int) -> None:
        super().__init__(outputs)
        self.form = form

    def forward(self, pixel_values, input_ids, attention_mask=None):
        logits = super().forward(pixel_values, input_ids, attention_mask)
        return {
            "tensor": lambda: logits,
            "flat": lambda: logits[:, 0],
            "mapping": lambda: {"other": logits * 0, "logits": logits},
            "library": lambda: SequenceClassifierOutput(logits=logits),
        }[self.form]()


class Contrastive(TinyClassifier):
    """Every picture with every text: no pair classifier."""

    def forward(self, pixel_values, input_ids, attention_mask=None):
        one = super().forward(pixel_values, input_ids, attention_mask)[:, :1]
        return one @ one.T


def plain_logits(teacher, image_rows, text_rows):
    """The module's own logits of each pair alone, without padding."""
    found = []
    for image, text in zip(image_rows.tolist(), text_rows.tolist(), strict=True):
        inputs = {**teacher.prepare_images([pictures(3)[image]]), **teacher.prepare_texts([TEXTS[text]])}
        with torch.no_grad():
            found.append(TinyClassifier.forward(teacher.model, **inputs))
    return torch.cat(found)


def save_plain(teacher, folder) -> None:
    save_file(teacher.model.state_dict(), folder / "model.safetensors")
    teacher.image_processor.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)


def test_is_a_teacher_that_cannot_be_taught():
    assert isinstance(classifier(), Teacher)
    assert not isinstance(classifier(), TeachableTeacher)
    assert not classifier().train().model.dropout.training


@pytest.mark.parametrize("form", ["tensor", "flat", "mapping", "library"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_scores_are_those_of_the_module_in_any_wrapping(form, outputs):
    if form == "flat" and outputs == 2:
        outputs = 1
    teacher, pairs = classifier(Wrapped(form, outputs)), every_pair()
    logits = plain_logits(teacher, *pairs)
    expected = logits[:, 0] if outputs == 1 else logits[:, 1] - logits[:, 0]
    assert expected.std() > 0.02
    torch.testing.assert_close(teacher.score(*memories(teacher), *pairs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "sign"),
    [
        ({"match": 1}, (-1, 1)),
        ({"match": 0}, (1, -1)),
        ({"match": 1, "score_kind": "logit"}, (0, 1)),
        ({"match": 0, "score_kind": "logit"}, (1, 0)),
    ],
)
def test_which_logit_means_a_match(options, sign):
    teacher, pairs = classifier(**options), every_pair()
    expected = (plain_logits(teacher, *pairs) * torch.tensor(sign)).sum(dim=1)
    torch.testing.assert_close(teacher.score(*memories(teacher), *pairs), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_is_told_of_no_padding_gets_the_same_in_every_batch():
    teacher = classifier(text_inputs=("input_ids",), max_text_length=12)
    short, beside = teacher.prepare_texts(TEXTS[:1]), teacher.prepare_texts(TEXTS)
    assert short.keys() == {"input_ids"}
    assert short["input_ids"].shape == (1, 12)
    assert torch.equal(short["input_ids"], beside["input_ids"][:1])
    assert teacher.score(*memories(teacher), *every_pair()).isfinite().all()


def test_a_class_of_the_library_scores_as_its_own_teacher(tmp_path):
    known = bridgetower()
    save_checkpoint(known, tmp_path)
    teacher = PairClassifierTeacher.from_pretrained(tmp_path, classifier=BridgeTowerForImageAndTextRetrieval)
    assert isinstance(known, BridgeTowerTeacher)
    got, expected = (one.score(*memories(one), *every_pair()) for one in (teacher, known))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"built from a config\.json; leave out width"):
        PairClassifierTeacher.from_pretrained(
            tmp_path, classifier=BridgeTowerForImageAndTextRetrieval, arguments={"width": 3}
        )


def test_a_module_is_built_with_its_arguments_and_given_its_weights(tmp_path):
    teacher = classifier(TinyClassifier(outputs=1, width=20))
    save_plain(teacher, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    arguments = {"outputs": 1, "width": 20}
    again = PairClassifierTeacher.from_pretrained(tmp_path, classifier=TinyClassifier, arguments=arguments)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere" / "weights.safetensors")
    file = PairClassifierTeacher.from_pretrained(
        tmp_path / "elsewhere" / "weights.safetensors",
        classifier=TinyClassifier,
        arguments=arguments,
        processor=tmp_path,
    )
    scores = [one.score(*memories(one), *every_pair()) for one in (teacher, again, file)]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-6, rtol=1e-6)
    assert again.identity == file.identity != teacher.identity  # whose arguments were not told
    half = PairClassifierTeacher.from_pretrained(
        tmp_path / "elsewhere" / "weights.safetensors",
        classifier=TinyClassifier,
        arguments=arguments,
        processor=tmp_path,
        dtype=torch.bfloat16,
    )
    assert half.identity != file.identity
    assert half.encode_images(half.prepare_images(pictures(1)))["pixel_values"].dtype == torch.bfloat16
    assert half.score(*memories(half), *every_pair()).dtype == torch.float32


def test_weights_that_do_not_fit_are_named(tmp_path):
    teacher = classifier()
    save_plain(teacher, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({"more": torch.ones(1), **weights}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit TinyClassifier: missing \[\], left over \['more'\]"):
        PairClassifierTeacher.from_pretrained(tmp_path, classifier=TinyClassifier)
    weights.pop("head.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['head.bias'\], left over \[\]"):
        PairClassifierTeacher.from_pretrained(tmp_path, classifier=TinyClassifier)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        PairClassifierTeacher.from_pretrained(tmp_path, classifier=TinyClassifier)


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_a_matrix_of_similarities_is_refused_even_for_two_pairs(pairs):
    teacher = classifier(Contrastive())
    images, texts = memories(teacher)
    with pytest.raises(ValueError, match="expected one or two logits a pair"):
        teacher.score(images, texts, torch.zeros(pairs, dtype=torch.long), torch.arange(pairs))


def test_logits_of_another_name_are_asked_for():
    teacher = classifier(Wrapped("mapping", 2), output="scores")
    with pytest.raises(ValueError, match="no tensor under 'scores'; name its logits in the option output"):
        teacher.score(*memories(teacher), *every_pair())


def test_images_of_unlike_sizes_are_refused():
    fine = classifier()
    with pytest.raises(ValueError, match='set its "size" to'):
        PairClassifierTeacher(TinyClassifier(), vilt().image_processor, fine.tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": 2}, "expected 0 or 1"),
        ({"score_kind": "cosine"}, "gives log_odds or logit"),
        ({"image_inputs": ()}, "must name at least one"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierOptions(**options)


def test_inputs_that_no_processor_gives_are_named():
    teacher = classifier(text_inputs=("input_ids", "regions"))
    with pytest.raises(ValueError, match="text_inputs names regions, but the tokenizer gives attention_mask"):
        teacher.prepare_texts(TEXTS)


def test_the_class_s_own_file_is_part_of_the_identity(tmp_path, monkeypatch):
    """The same weights in another forward give other scores."""
    source = "import tests.teachers.tiny_teachers as tiny\n\nclass Mine(tiny.TinyClassifier):\n    sharpness = {}\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for sharpness in (1, 2, 1):
        (tmp_path / "mine_of_this_test.py").write_text(source.format(sharpness))
        sys.modules.pop("mine_of_this_test", None)
        importlib.invalidate_caches()
        torch.manual_seed(0)
        found.append(classifier(importlib.import_module("mine_of_this_test").Mine()).identity)
    sys.modules.pop("mine_of_this_test")
    assert found[0] == found[2] != found[1]


def test_identity_follows_what_is_passed_to_the_model():
    base = classifier()
    others = [
        classifier(match=0),
        classifier(score_kind="logit"),
        classifier(text_inputs=("input_ids",)),
        PairClassifierTeacher(base.model, base.image_processor, base.tokenizer, base.options, {"depth": 3}),
    ]
    assert len({base.identity, *(other.identity for other in others)}) == 1 + len(others)
    assert classifier(pairs_per_chunk=3).identity == base.identity
    told = replace(base.options, text_inputs=("input_ids",))
    other = PairClassifierTeacher(base.model, base.image_processor, base.tokenizer, told)
    assert other.prepare_identity("image") == base.prepare_identity("image")
    assert other.prepare_identity("text") != base.prepare_identity("text")
