"""BridgeTower as a teacher against the library's forward, one pair at a time."""

from __future__ import annotations

import pytest
import torch

from distill.protocols import TeachableTeacher, Teacher
from teachers import BridgeTowerOptions, BridgeTowerTeacher
from tests.teachers.tiny_teachers import (
    TEXTS,
    bridgetower,
    bridgetower_model,
    every_pair,
    memories,
    pictures,
    save_checkpoint,
    tokenizer,
)


def library(teacher, image_rows, text_rows):
    """Logits (P, 2) of the library's forward on each pair alone, without padding."""
    found = []
    for image, text in zip(image_rows.tolist(), text_rows.tolist(), strict=True):
        inputs = {**teacher.prepare_images([pictures(3)[image]]), **teacher.prepare_texts([TEXTS[text]])}
        with torch.no_grad():
            found.append(teacher.model(**inputs).logits)
    return torch.cat(found)


def test_is_a_teacher_that_cannot_be_taught():
    assert isinstance(bridgetower(), Teacher)
    assert not isinstance(bridgetower(), TeachableTeacher)
    assert not bridgetower().train().training


@pytest.mark.parametrize("kind", ["log_odds", "logit"])
def test_scores_equal_the_library_s_forward_of_each_pair(kind):
    teacher, pairs = bridgetower(score_kind=kind), every_pair()
    logits = library(teacher, *pairs)
    expected = logits[:, 1] - logits[:, 0] if kind == "log_odds" else logits[:, 1]
    assert expected.std() > 0.02
    torch.testing.assert_close(teacher.score(*memories(teacher), *pairs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"link_tower_type": "scaled_add"},
        {"link_tower_type": "interpolate"},
        {"share_cross_modal_transformer_layers": False},
    ],
)
def test_every_published_design_of_the_bridges(config):
    fine = bridgetower()
    teacher = BridgeTowerTeacher(bridgetower_model(**config), fine.image_processor, fine.tokenizer)
    logits = library(teacher, *every_pair())
    got = teacher.score(*memories(teacher), *every_pair())
    torch.testing.assert_close(got, logits[:, 1] - logits[:, 0], atol=1e-5, rtol=1e-5)


def test_both_towers_run_once_an_item():
    teacher, seen = bridgetower(), {"image": 0, "text": 0}
    tower = teacher.model.bridgetower
    tower.vision_model.visual.embeddings.register_forward_hook(
        lambda *call: seen.__setitem__("image", seen["image"] + len(call[2]))
    )
    tower.text_model.encoder.layer[-1].attention.self.query.register_forward_hook(
        lambda *call: seen.__setitem__("text", seen["text"] + len(call[2]))
    )
    images, texts = memories(teacher)
    teacher.score(images, texts, *every_pair())
    assert seen == {"image": 3, "text": len(TEXTS)}
    assert images["states"].shape == (3, 2, 10, 32)
    assert texts["states"].shape == (len(TEXTS), 9, 2, 32)
    assert teacher.encode_images(images) is images
    assert teacher.encode_texts(texts) is texts


def test_a_saved_checkpoint_gives_the_same_scores(tmp_path):
    teacher, pairs = bridgetower(prompt="w3 "), every_pair()
    save_checkpoint(teacher, tmp_path)
    again = BridgeTowerTeacher.from_pretrained(tmp_path, options=teacher.options)
    assert again.identity == teacher.identity
    got, expected = (one.score(*memories(one), *pairs) for one in (again, teacher))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    half = BridgeTowerTeacher.from_pretrained(tmp_path, options=teacher.options, dtype=torch.bfloat16)
    assert half.identity != teacher.identity


def test_a_checkpoint_without_the_matching_head_is_refused(tmp_path):
    teacher = bridgetower()
    save_checkpoint(teacher, tmp_path)
    teacher.model.bridgetower.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 2 weights of BridgeTowerForImageAndTextRetrieval \(itm_score"):
        BridgeTowerTeacher.from_pretrained(tmp_path)


def test_parts_that_do_not_fit_are_refused():
    fine = bridgetower()
    other = type(fine.image_processor)(size={"shortest_edge": 24}, do_center_crop=False, size_divisor=8)
    with pytest.raises(ValueError, match="from wide and of .* from tall pictures"):
        BridgeTowerTeacher(bridgetower_model(), other, tokenizer())
    with pytest.raises(ValueError, match="tokenizer has 56 tokens, the model embeds only 46"):
        BridgeTowerTeacher(bridgetower_model(), fine.image_processor, tokenizer(words=50))
    with pytest.raises(ValueError, match="max_text_length is 60; the model has 59 text positions"):
        bridgetower(max_text_length=60)
    with pytest.raises(ValueError, match="score_kind is 'cosine'; this teacher gives log_odds or logit"):
        BridgeTowerOptions(score_kind="cosine")


def test_the_longest_text_has_positions():
    teacher = bridgetower(max_text_length=59)
    images, texts = memories(teacher, 1, (" ".join(["w1"] * 80), "w2"))
    assert texts["attention_mask"].shape == (2, 59)
    assert teacher.score(images, texts, *every_pair(1, 2)).isfinite().all()
