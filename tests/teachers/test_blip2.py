"""BLIP-2 as a teacher against the library's forward, one pair at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2Processor

from distill.embed import NoContrastiveHeadError, embed_with_teacher
from distill.protocols import Freezable, TeachableTeacher, Teacher
from teachers import Blip2Options, Blip2Teacher
from tests.teachers.tiny_teachers import (
    TEXTS,
    blip2,
    blip2_model,
    every_pair,
    memories,
    pictures,
    save_checkpoint,
    tokenizer,
    vilt,
)


def library(teacher, image_rows, text_rows, *, matching: bool, placeholders: int = 0):
    """What the library's forward gives for each pair alone, without padding: (P, 2) logits or (P, 1) cosines."""
    found = []
    for image, text in zip(image_rows.tolist(), text_rows.tolist(), strict=True):
        inputs = teacher.prepare_texts([TEXTS[text]])
        ids, mask = (torch.nn.functional.pad(value, (placeholders, 0), value=1) for value in inputs.values())
        pixels = teacher.prepare_images([pictures(3)[image]])["pixel_values"]
        with torch.no_grad():
            output = teacher.model(
                pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=matching
            )
        found.append(output.logits_per_image)
    return torch.cat(found)


def test_is_a_teacher_that_cannot_be_taught():
    teacher = blip2()
    assert isinstance(teacher, Teacher)
    assert not isinstance(teacher, TeachableTeacher)
    assert not isinstance(teacher, Freezable)
    assert not teacher.train().training


@pytest.mark.parametrize("kind", ["log_odds", "logit", "logit+cosine", "cosine"])
def test_scores_equal_the_library_s_forward_of_each_pair(kind):
    teacher = blip2(score_kind=kind, cosine_weight=1.5)
    pairs = every_pair()
    logits, cosine = library(teacher, *pairs, matching=True), library(teacher, *pairs, matching=False)[:, 0]
    expected = {
        "log_odds": logits[:, 1] - logits[:, 0],
        "logit": logits[:, 1],
        "logit+cosine": logits[:, 1] + 1.5 * cosine,
        "cosine": cosine,
    }[kind]
    assert expected.std() > 0.02  # scores that are all alike would prove nothing
    got = teacher.score(*memories(teacher), *pairs)
    assert teacher.score_kind == kind
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_library_s_default_is_the_other_head():
    teacher = blip2(score_kind="cosine")
    inputs = {**teacher.prepare_images(pictures(1)), **teacher.prepare_texts(TEXTS[:1])}
    with torch.no_grad():
        default = teacher.model(**inputs).logits_per_image
    images, texts = memories(teacher, 1, TEXTS[:1])
    torch.testing.assert_close(default[0], teacher.score(images, texts, *every_pair(1, 1)), atol=1e-6, rtol=1e-5)


def test_placeholders_before_the_text_change_nothing():
    """Newer checkpoints have them in the ids and cut them off again; their mask is that of the queries."""
    teacher = blip2()
    expected = teacher.score(*memories(teacher), *every_pair())
    teacher.model.config.image_token_index = 45
    logits = library(teacher, *every_pair(), matching=True, placeholders=4)
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_what_no_text_can_change_is_computed_once_an_image():
    teacher, seen = blip2(), {"tower": 0, "keys": 0}

    def count(name):
        return lambda _module, _inputs, out: seen.__setitem__(name, seen[name] + len(out))

    teacher.model.vision_model.embeddings.register_forward_hook(count("tower"))
    fused = [layer for layer in teacher.model.qformer.encoder.layer if layer.has_cross_attention]
    for layer in fused:
        layer.crossattention.attention.key.register_forward_hook(count("keys"))
    teacher.score(*memories(teacher), *every_pair())
    assert len(fused) == 2
    assert seen == {"tower": 3, "keys": 3 * 2}


def test_memory_holds_what_the_score_kind_reads():
    for kind, image, text in (
        ("log_odds", {"keys", "values"}, {"states", "attention_mask"}),
        ("cosine", {"queries"}, {"states", "attention_mask", "vector"}),
        ("logit+cosine", {"keys", "values", "queries"}, {"states", "attention_mask", "vector"}),
    ):
        teacher = blip2(score_kind=kind)
        images, texts = memories(teacher)
        assert (set(images), set(texts)) == (image, text)
        assert teacher.encode_images(images) is images
        assert teacher.encode_texts(texts) is texts


def test_a_maximum_over_queries_is_no_embedding():
    teacher = blip2(score_kind="cosine")
    rows = np.arange(3)
    with pytest.raises(NoContrastiveHeadError, match="queries"):
        embed_with_teacher(teacher, lambda at: teacher.prepare_images(pictures(3)[: len(at)]), rows, "image")


def test_a_saved_checkpoint_gives_the_same_scores(tmp_path):
    teacher = blip2(prompt="w3 ", max_text_length=9)
    save_checkpoint(teacher, tmp_path)
    again = Blip2Teacher.from_pretrained(tmp_path, options=Blip2Options(prompt="w3 ", max_text_length=9))
    assert again.identity == teacher.identity
    assert not again.training
    pairs = every_pair()
    got, expected = (one.score(*memories(one), *pairs) for one in (again, teacher))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_a_folder_of_the_library_s_processor_is_read(tmp_path):
    teacher = blip2()
    expected = teacher.score(*memories(teacher), *every_pair())
    teacher.model.save_pretrained(tmp_path)
    Blip2Processor(teacher.image_processor, tokenizer(), num_query_tokens=4).save_pretrained(tmp_path)
    again = Blip2Teacher.from_pretrained(tmp_path)
    torch.testing.assert_close(again.score(*memories(again), *every_pair()), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="'w1 <image>' holds a token that the Q-Former lacks"):
        again.prepare_texts(["w2", "w1 <image>"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_an_identity_of_its_own(tmp_path, dtype):
    teacher = blip2(score_kind="logit+cosine")
    save_checkpoint(teacher, tmp_path)
    half = Blip2Teacher.from_pretrained(tmp_path, options=teacher.options, dtype=dtype)
    assert half.model.vision_model.dtype == dtype
    assert half.model.query_tokens.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert half.identity != teacher.identity
    got, expected = (one.score(*memories(one), *every_pair()) for one in (half, teacher))
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.1 * expected.std()


def test_a_checkpoint_without_the_matching_head_is_refused(tmp_path):
    teacher = blip2()
    save_checkpoint(teacher, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("itm_head")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 weights of Blip2ForImageTextRetrieval"):
        Blip2Teacher.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    save_checkpoint(vilt(), tmp_path)
    with pytest.raises(ValueError, match="is of type 'vilt'; expected 'blip-2'"):
        Blip2Teacher.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(OSError, match="/no/such/folder"):
        Blip2Teacher.from_pretrained("/no/such/folder")


def test_a_q_former_that_reads_no_text_is_refused(tmp_path):
    save_checkpoint(blip2(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["qformer_config"]["use_qformer_text_input"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="use_qformer_text_input is false"):
        Blip2Teacher.from_pretrained(tmp_path)


def test_parts_that_do_not_fit_are_refused():
    fine = blip2()
    other = type(fine.image_processor)(size={"height": 24, "width": 32})
    with pytest.raises(ValueError, match=r"makes images of \(24, 32\), the image tower reads \(24, 24\)"):
        Blip2Teacher(blip2_model(), other, tokenizer())
    with pytest.raises(ValueError, match="tokenizer has 56 tokens, the model embeds only 46"):
        Blip2Teacher(blip2_model(), fine.image_processor, tokenizer(words=50))
    with pytest.raises(ValueError, match="max_text_length is 41; the model has 40 text positions"):
        blip2(max_text_length=41)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_kind": "log_likelihood"}, "this teacher gives log_odds or logit or logit\\+cosine or cosine"),
        ({"max_text_length": 1}, "special tokens alone need 2"),
        ({"pairs_per_chunk": 0}, "expected at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Blip2Options(**options)


def test_rows_outside_the_memories_are_refused():
    teacher = blip2()
    images, texts = memories(teacher)
    with pytest.raises(ValueError, match=r"image_rows must lie in 0\.\.2"):
        teacher.score(images, texts, torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(ValueError, match="must share one"):
        teacher.score(images, texts, torch.tensor([0, 1]), torch.tensor([0]))
