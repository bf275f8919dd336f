"""ViLT as a teacher against the library's forward, one pair at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViltForImageAndTextRetrieval

from distill.features import write_features
from distill.protocols import TeachableTeacher, Teacher
from teachers import ViltOptions, ViltTeacher
from tests.teachers.tiny_teachers import (
    TEXTS,
    every_pair,
    save_checkpoint,
    tokenizer,
    unlike_pictures,
    vilt,
    vilt_model,
)

PAIRS = every_pair(4, len(TEXTS))


def library(teacher, image_rows, text_rows):
    """Rank logits (P,) of the library's forward on each pair alone, without padding."""
    found = []
    for image, text in zip(image_rows.tolist(), text_rows.tolist(), strict=True):
        pixels = teacher.image_processor(images=[unlike_pictures()[image]], return_tensors="pt")
        with torch.no_grad():
            found.append(teacher.model(**pixels, **teacher.prepare_texts([TEXTS[text]])).logits[0])
    return torch.cat(found)


def memories(teacher):
    images = teacher.encode_images(teacher.prepare_images(unlike_pictures()))
    return images, teacher.encode_texts(teacher.prepare_texts(TEXTS))


def test_is_a_teacher_that_cannot_be_taught():
    assert isinstance(vilt(), Teacher)
    assert not isinstance(vilt(), TeachableTeacher)
    assert not vilt().train().training


def test_scores_equal_the_library_s_forward_of_each_pair():
    teacher = vilt()
    expected = library(teacher, *PAIRS)
    assert expected.std() > 0.02
    images, texts = memories(teacher)
    counts = images["states_mask"].sum(dim=1).tolist()
    assert len(set(counts)) > 1, "pictures of unlike shapes have unlike numbers of patches"
    got = teacher.score(images, texts, *PAIRS)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_scores_equal_the_library_s_padded_batch():
    teacher = vilt()
    pixels = teacher.image_processor(images=unlike_pictures(), return_tensors="pt")
    assert pixels["pixel_mask"].float().mean() < 1, "nothing was padded"
    texts = teacher.prepare_texts(TEXTS)
    image_rows, text_rows = PAIRS
    with torch.no_grad():
        expected = teacher.model(
            **{name: tensor[image_rows] for name, tensor in pixels.items()},
            **{name: tensor[text_rows] for name, tensor in texts.items()},
        ).logits[:, 0]
    torch.testing.assert_close(teacher.score(*memories(teacher), *PAIRS), expected, atol=1e-5, rtol=1e-5)


def test_patches_are_never_drawn_at_random():
    teacher = vilt()
    whole = teacher.score(*memories(teacher), *PAIRS)
    teacher.model.config.max_image_length = 4  # the library then draws four patches of the nine or more
    first, second = library(teacher, *PAIRS), library(teacher, *PAIRS)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(teacher.score(*memories(teacher), *PAIRS), whole)


def test_an_image_is_embedded_once():
    teacher, seen = vilt(), []
    teacher.model.vilt.embeddings.text_embeddings.register_forward_hook(lambda *call: seen.append(len(call[2])))
    images, texts = memories(teacher)
    teacher.score(images, texts, *PAIRS)
    assert seen == [len(TEXTS)]
    assert teacher.encode_images(images) is images
    assert teacher.encode_texts(texts) is texts


def test_prepared_pictures_of_unlike_shapes_are_kept_on_disk(tmp_path):
    teacher = vilt()
    rows = np.arange(4)
    kept = write_features(
        tmp_path / "features",
        "mark",
        rows,
        lambda at: teacher.prepare_images([unlike_pictures()[row] for row in at.tolist()]),
        batch_size=1,
    )
    images, texts = memories(teacher)
    again = teacher.encode_images(kept(rows))
    for name in images:
        torch.testing.assert_close(again[name], images[name], atol=1e-6, rtol=1e-6)


def test_a_saved_checkpoint_gives_the_same_scores(tmp_path):
    teacher = vilt(prompt="w3 ")
    save_checkpoint(teacher, tmp_path)
    again = ViltTeacher.from_pretrained(tmp_path, options=teacher.options)
    assert again.identity == teacher.identity
    got, expected = (one.score(*memories(one), *PAIRS) for one in (again, teacher))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    half = ViltTeacher.from_pretrained(tmp_path, options=teacher.options, dtype=torch.bfloat16)
    assert half.identity != teacher.identity


def test_a_checkpoint_without_the_rank_output_is_refused(tmp_path):
    teacher = vilt()
    save_checkpoint(teacher, tmp_path)
    teacher.model.vilt.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 2 weights of ViltForImageAndTextRetrieval \(rank_output.bias"):
        ViltTeacher.from_pretrained(tmp_path)


def test_a_picture_that_is_too_thin_is_named():
    with pytest.raises(ValueError, match="a picture of 2000 x 10 cannot be prepared"):
        vilt().prepare_images([Image.new("RGB", (2000, 10))])


def test_parts_that_do_not_fit_are_refused():
    fine = vilt()
    with pytest.raises(ValueError, match="tokenizer has 56 tokens, the model embeds only 46"):
        ViltTeacher(vilt_model(), fine.image_processor, tokenizer(words=50))
    with pytest.raises(ValueError, match="max_text_length is 41; the model has 40 text positions"):
        vilt(max_text_length=41)
    with pytest.raises(ValueError, match="score_kind is 'log_odds'; this teacher gives logit"):
        ViltOptions(score_kind="log_odds")
    for nothing in ("images", "texts"):
        with pytest.raises(ValueError, match="was given no"):
            getattr(fine, f"prepare_{nothing}")([])


def test_the_prepared_form_is_part_of_the_identity_of_prepared_images():
    base, other = vilt(), vilt()
    assert base.prepare_identity("image") == other.prepare_identity("image")
    other.model.config.patch_size = 4
    assert base.prepare_identity("image") != other.prepare_identity("image")
    assert isinstance(base.model, ViltForImageAndTextRetrieval)
