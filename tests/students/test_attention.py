"""The text→image map against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch

from students.pooling import grid_of, masked_mean
from students.reading import projection_of
from tests.students.small_texts import TEXTS

BOTH = frozenset({"image", "text"})
PAIRS = torch.tensor([0, 2, 2, 1]), torch.tensor([2, 0, 1, 1])


def places(student, side):
    """From one token state to the joint space, as its pooled vector would go."""

    def place(state):
        if side == "text" and student.options.train_pooler:
            pooler = student.model.text_model.pooler
            state = torch.tanh(pooler.dense.weight @ state + pooler.dense.bias)
        if side in student.heads:
            return student.heads[side](state[None])[0]
        projection = projection_of(student.model, side)
        return state if projection is None else projection(state[None])[0]

    return place


@torch.no_grad()
def slow_maps(student, pictures):
    """Cell by cell, from the towers' own last states."""
    images, texts = student.prepare_images(pictures), student.prepare_texts(TEXTS)
    hidden = student.model.vision_model(**images).last_hidden_state
    states = student.model.text_model(**{k: texts[k] for k in student.text_inputs.names}).last_hidden_state
    query, key = student.attention_heads.query.weight, student.attention_heads.key.weight
    place_image, place_text = (places(student, side) for side in ("image", "text"))
    maps = []
    for image, text in zip(*(rows.tolist() for rows in PAIRS), strict=True):
        if hidden.dim() == 4:
            cells = [hidden[image, :, r, c] for r in range(hidden.shape[2]) for c in range(hidden.shape[3])]
        elif student.model.config.model_type == "siglip":
            cells = list(hidden[image])  # no class token
        else:
            cells = list(hidden[image])[1:]
        rows = []
        for state in states[text]:
            logits = [
                float((query @ place_text(state)) @ (key @ place_image(cell))) / math.sqrt(len(query)) for cell in cells
            ]
            total = math.log(sum(math.exp(value) for value in logits))
            rows.append([value - total for value in logits])
        maps.append(rows)
    return torch.tensor(maps)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "mobilenet"])
def test_maps_equal_the_loop(make, pictures, family, frozen, head):
    student = make(family, freeze=BOTH if frozen else frozenset(), tokens=frozen, image_head=head, text_head=head)
    student.enable_attention(8)
    images, texts = student.prepare_images(pictures), student.prepare_texts(TEXTS)
    got = student(images, texts, attention_pairs=PAIRS)
    rows, columns = student.grid
    assert got.attention.shape[2] == rows * columns
    torch.testing.assert_close(got.attention, slow_maps(student, pictures), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.attention.exp().sum(-1), torch.ones(got.attention.shape[:2]))
    if frozen:
        kept = student(student.freeze("image", images), student.freeze("text", texts), attention_pairs=PAIRS)
        assert torch.equal(kept.attention, got.attention)
    got.attention.mean().backward()
    assert student.attention_heads.query.weight.grad.abs().max() > 0
    assert student(images, texts).attention is None


@pytest.mark.parametrize("train_pooler", [False, True])
def test_maps_train_what_places_embeddings_though_towers_are_frozen(make_towers, pictures, train_pooler):
    student = make_towers(freeze=BOTH, tokens=True, train_pooler=train_pooler)
    student.enable_attention(8)
    images, texts = student.prepare_images(pictures), student.prepare_texts(TEXTS)
    got = student(images, texts, attention_pairs=PAIRS).attention
    torch.testing.assert_close(got, slow_maps(student, pictures), rtol=1e-4, atol=1e-5)
    got[..., 0].sum().backward()
    assert student.model.visual_projection.weight.grad.abs().max() > 0
    assert student.model.text_projection.weight.grad.abs().max() > 0
    if train_pooler:
        assert student.model.text_model.pooler.dense.weight.grad.abs().max() > 0


def test_attention_heads_are_thrown_away(make_config, tmp_path):
    student = make_config("clip")
    identity = student.identity
    student.enable_attention(8)
    assert student.identity == identity
    student.save_pretrained(tmp_path)
    loaded = type(student).load(tmp_path)
    assert loaded.attention_heads is None
    assert loaded.identity == identity


def test_maps_that_cannot_be_had(make_config, make_towers, pictures):
    student = make_config("clip")
    images, texts = student.prepare_images(pictures), student.prepare_texts(TEXTS)
    with pytest.raises(ValueError, match="enable_attention"):
        student(images, texts, attention_pairs=PAIRS)
    student.enable_attention(8)
    with pytest.raises(ValueError, match="same call"):
        student(None, texts, attention_pairs=PAIRS)
    with pytest.raises(ValueError, match="tokens=True"):
        make_towers(freeze=BOTH).enable_attention(8)
    kept = make_config("clip", freeze=BOTH, tokens=True)
    kept.enable_attention(8)
    poor = {"pooled": kept.freeze("image", images)["pooled"]}
    with pytest.raises(ValueError, match="no token states"):
        kept(poor, texts, attention_pairs=PAIRS)


def test_a_tower_without_a_grid_is_refused(make_config, monkeypatch):
    monkeypatch.setattr("students.layout.grid_of", lambda *_: None)
    student = make_config("clip")
    with pytest.raises(ValueError, match="no grid"):
        student.enable_attention(8)
    for change, words in (({"image_pooling": "mean"}, "to average"), ({"freeze": BOTH, "tokens": True}, "no tokens")):
        with pytest.raises(ValueError, match=words):
            make_config("clip", **change)


@pytest.mark.parametrize(
    ("shape", "pixels", "patch", "expected"),
    [
        ((1, 7, 3, 5), (96, 160), None, ((3, 5), 0)),  # a map of a convolution
        ((1, 17, 8), (32, 32), 8, ((4, 4), 1)),  # ViT with a class token
        ((1, 18, 8), (32, 32), 8, ((4, 4), 2)),  # and a distillation token
        ((1, 8, 8), (16, 32), 8, ((2, 4), 0)),  # SigLIP, not square
        ((1, 49, 8), (224, 224), 4, ((7, 7), 0)),  # Swin: merged patches
        ((1, 50, 8), (224, 224), None, ((7, 7), 1)),
        ((1, 48, 8), (224, 224), None, None),
        ((1, 49, 8), (224, 112), None, None),
    ],
)
def test_grids(shape, pixels, patch, expected):
    assert grid_of(torch.zeros(shape), torch.zeros(1, 3, *pixels), patch) == expected


def test_masked_mean_reads_no_padding():
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    tokens[0, 2] = float("nan")
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert masked_mean(tokens, mask).tolist() == [[1.0, 2.0], [8.0, 9.0]]
    assert masked_mean(tokens, torch.zeros_like(mask)).tolist() == [[0.0, 0.0]] * 2
