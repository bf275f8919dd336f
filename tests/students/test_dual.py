"""Students against the stock classes they hold, and what of them trains."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from distill.protocols import Freezable
from students import DualEncoder, DualOptions
from students.reading import Reading, by_length
from tests.students.small_texts import TEXTS, TOWER

FAMILIES = ["clip", "siglip", "vit", "mobilenet"]
BOTH = frozenset({"image", "text"})


def stock_forward(student, pictures):
    """What transformers' own forward gives for the same inputs."""
    texts = {k: v for k, v in student.prepare_texts(TEXTS).items() if k in student.text_inputs.names}
    with torch.no_grad():
        return student.model(**student.prepare_images(pictures), **texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_stock_forward(make, embed, pictures, family):
    student = make(family)
    got, expected = embed(student), stock_forward(student, pictures)
    torch.testing.assert_close(got.images, expected.image_embeds, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.texts, expected.text_embeds, rtol=1e-6, atol=1e-6)
    cosine = got.scale * got.images @ got.texts.T
    bias = student.model.logit_bias if family == "siglip" else 0
    torch.testing.assert_close(cosine + bias, expected.logits_per_image, rtol=1e-5, atol=1e-5)
    assert student.stock
    assert student.why_not_stock is None


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_unit_float32_and_differ(make, embed, family):
    student = make(family)
    got = embed(student)
    for side in (got.images, got.texts):
        assert side.dtype == torch.float32
        assert side.shape == (3, student.dim)
        torch.testing.assert_close(side.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
        assert (side[0] - side[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_does_not_depend_on_the_others_of_its_batch(make, family):
    student = make(family)
    with torch.no_grad():
        alone = torch.cat([student(None, student.prepare_texts([text])).texts for text in TEXTS])
        together = student(None, student.prepare_texts(TEXTS)).texts
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_clip_reads_a_text_at_its_end_token(make_config):
    student = make_config("clip")
    inputs = student.prepare_texts(TEXTS)
    hidden = student.model.text_model(**inputs).last_hidden_state
    ends = [[int(i) for i in row].index(3) for row in inputs["input_ids"]]
    by_hand = torch.stack([hidden[row, end] for row, end in enumerate(ends)])
    expected = normalize(student.model.text_projection(by_hand), dim=-1)
    torch.testing.assert_close(student(None, inputs).texts, expected)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_pooling_by_hand(make_towers, pooling):
    student = make_towers(text_pooling=pooling)
    rows = []
    for text in TEXTS:  # one at a time, so that there is no padding at all
        ids = torch.tensor([student.tokenizer(text)["input_ids"]])
        hidden = student.model.text_model(input_ids=ids).last_hidden_state[0]
        rows.append(hidden[0] if pooling == "cls" else sum(hidden) / len(hidden))
    expected = normalize(student.model.text_projection(torch.stack(rows)), dim=-1)
    got = student(None, student.prepare_texts(TEXTS)).texts
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert pooling in (student.why_not_stock or "")


@pytest.mark.parametrize("family", ["clip", "vit", "mobilenet"])
def test_image_mean_is_over_grid_cells_only(make, pictures, family):
    student = make(family, image_pooling="mean", image_head="mlp", head_width=8)
    inputs = student.prepare_images(pictures)
    hidden = student.model.vision_model(**inputs).last_hidden_state
    cells = hidden.permute(0, 2, 3, 1).reshape(3, -1, hidden.shape[1]) if family == "mobilenet" else hidden[:, 1:]
    rows, columns = student.grid
    assert cells.shape[1] == rows * columns
    expected = normalize(student.heads["image"](torch.stack([sum(row) / len(row) for row in cells])), dim=-1)
    torch.testing.assert_close(student(inputs, None).images, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tower_outputs_give_the_same_embeddings(make, embed, pictures, family, pooling, tokens):
    student = make(family, freeze=BOTH, text_pooling=pooling, tokens=tokens)
    assert isinstance(student, Freezable)
    kept_images = student.freeze("image", student.prepare_images(pictures))
    kept_texts = student.freeze("text", student.prepare_texts(TEXTS))
    expected, got = embed(student), student(kept_images, kept_texts)
    assert torch.equal(got.images, expected.images)
    assert torch.equal(got.texts, expected.texts)
    assert set(kept_images) == ({"pooled", "tokens"} if tokens else {"pooled"})
    assert set(kept_texts) == ({"pooled", "tokens", "attention_mask"} if tokens else {"pooled"})
    if tokens:
        assert kept_images["tokens"].shape[1] == student.grid[0] * student.grid[1]
        assert kept_texts["attention_mask"].tolist() == [
            [int(i < len(student.tokenizer(text)["input_ids"])) for i in range(kept_texts["tokens"].shape[1])]
            for text in TEXTS
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_towers_stay_as_they_are(make, pictures, family):
    student = make(family, freeze=BOTH).train()
    before = copy.deepcopy(student.state_dict())
    assert not any(module.training for module in student.model.vision_model.modules())
    assert not any(module.training for module in student.model.text_model.modules())
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    target = torch.randn(3, student.dim)
    out = student(student.prepare_images(pictures), student.prepare_texts(TEXTS))
    (((out.texts - target) ** 2).sum() + ((out.images - target) ** 2).sum() + out.scale).backward()
    optimizer.step()
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"model.logit_scale", "model.text_projection.weight", "model.visual_projection.weight"}
    if family == "siglip":
        expected = {"model.logit_scale", "model.text_model.head.weight", "model.text_model.head.bias"}
    assert changed == expected


def test_train_pooler_trains_the_pooler_alone_and_stays_stock(make_towers, embed, pictures):
    student = make_towers(freeze=frozenset({"text"}), train_pooler=True)
    assert student.stock
    trained = {name for name, p in student.named_parameters() if p.requires_grad and "text_model" in name}
    assert trained == {"model.text_model.pooler.dense.weight", "model.text_model.pooler.dense.bias"}
    expected = stock_forward(student, pictures).text_embeds
    torch.testing.assert_close(embed(student).texts, expected, rtol=1e-6, atol=1e-6)
    kept = student.freeze("text", student.prepare_texts(TEXTS))
    identity = student.frozen_identity("text")
    with torch.no_grad():
        student.model.text_model.pooler.dense.weight.mul_(2)
    assert student.frozen_identity("text") == identity  # what is kept on disk does not pass through the pooler
    assert torch.equal(student(None, kept).texts, embed(student).texts)


OPTIONS = [
    {},
    {"freeze": BOTH},
    {"image_pooling": "mean", "text_pooling": "mean"},
    {"image_head": "mlp", "text_head": "mlp"},
    {"image_head": "mlp", "text_pooling": "cls", "freeze": frozenset({"text"})},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "stock")
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_what_needs_gradient_gets_one(make, pictures, family, options):
    """A parameter that waits for a gradient in vain stops distributed training."""
    student = make(family, **options).train()
    out = student(student.prepare_images(pictures), student.prepare_texts(TEXTS))
    (out.images.sum() + out.texts.sum() + out.scale).backward()
    named = dict(student.named_parameters())
    assert named
    assert {n for n, p in named.items() if p.requires_grad} == {n for n, p in named.items() if p.grad is not None}
    assert named["model.logit_scale"].grad is not None


def test_scale_starts_where_asked_and_stops_at_100(make_config):
    student = make_config("clip", init_scale=20.0)
    texts = student.prepare_texts(TEXTS)
    assert student(None, texts).scale.item() == pytest.approx(20, rel=1e-6)
    assert make_config("siglip")(None, texts).scale.shape == ()
    with torch.no_grad():
        student.model.logit_scale.fill_(9.0)
    assert student(None, texts).scale.item() == pytest.approx(100)


def test_input_dropout_is_for_training_only(make_towers, pictures):
    student = make_towers(freeze=BOTH, text_input_dropout=0.5)
    kept = student.freeze("text", student.prepare_texts(TEXTS))
    images = student.freeze("image", student.prepare_images(pictures))
    still = student(None, kept).texts
    assert torch.equal(still, student(None, kept).texts)
    assert student.stock
    student.train()
    assert not torch.equal(student(None, kept).texts, student(None, kept).texts)
    assert torch.equal(student(images, None).images, student(images, None).images)  # the other side has none


def test_texts_are_cut_and_padded(make_config):
    clip, siglip = make_config("clip", max_text_length=6), make_config("siglip")
    cut = clip.prepare_texts(TEXTS)
    assert cut["input_ids"].shape == (3, 6)
    assert cut["input_ids"][2].tolist()[-1] == 3  # still ends in its end token, where CLIP reads it
    assert clip.prepare_texts(["dog"])["input_ids"].shape == (1, 3)
    assert siglip.prepare_texts(["dog"])["input_ids"].shape == (1, 16)
    assert not any(name.endswith("_mask") for name in siglip.prepare_texts(["dog"]))


def test_identity_follows_what_an_embedding_depends_on(make_towers):
    student = make_towers(freeze=BOTH)
    seen = {student.identity}
    frozen = {student.frozen_identity("image"), student.frozen_identity("text")}
    assert len(frozen) == 2
    assert make_towers(freeze=frozenset({"image"}), tokens=True).identity == student.identity
    assert make_towers().frozen_identity("text") is None
    changed = [
        make_towers(seed=1),
        make_towers(text_pooling="mean", freeze=BOTH),
        make_towers(max_text_length=5, freeze=BOTH),
    ]
    student.image_processor.size = {"height": 40, "width": 40}
    changed.append(student)
    seen |= {other.identity for other in changed}
    assert len(seen) == 5
    assert make_towers(freeze=BOTH, seed=1).frozen_identity("text") in frozen  # a new projection is not the tower
    assert changed[1].frozen_identity("text") not in frozen
    assert changed[2].frozen_identity("text") not in frozen
    assert student.frozen_identity("image") not in frozen
    flipped = make_towers(freeze=BOTH)
    with torch.no_grad():
        next(flipped.model.text_model.parameters()).view(-1)[0] += 1e-3
    assert flipped.frozen_identity("text") not in frozen
    assert flipped.frozen_identity("image") in frozen


def test_a_twin_has_the_same_weights_by_state_dict(make_config, embed):
    one, other = make_config("clip", seed=0), make_config("clip", seed=1)
    other.load_state_dict(one.state_dict())
    assert torch.equal(embed(one).images, embed(other).images)
    assert one.identity == other.identity


def test_importing_the_package_loads_no_torch():
    code = "import sys, students; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cutting_kind_ignores_added_tokens_but_not_the_vocabulary(make_config, tokenizer):
    student = make_config("clip")
    kind = student.token_ids_kind
    student.prepare_texts(TEXTS)
    assert student.token_ids_kind == kind
    student.tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    assert student.token_ids_kind == kind
    student.tokenizer.backend_tokenizer.pre_tokenizer = None
    assert student.token_ids_kind != kind


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_pooling": "max"}, "'pooler' or 'mean' or 'cls'"),
        ({"freeze": frozenset({"images"})}, "'image' and 'text'"),
        ({"train_pooler": True}, "'text' in freeze"),
        ({"dropout": 1.0}, "below 1"),
        ({"init_scale": 0.0}, "above 0"),
        ({"max_text_length": 2}, "at least 3"),
        ({"head_width": 0}, "at least 1"),
        ({"max_text_length": 99}, "at most 16 tokens"),
        ({"freeze": frozenset({"text"}), "train_pooler": True}, "no pooler over its first token"),
    ],
)
def test_wrong_options_are_refused_with_what_to_do(make_config, change, words):
    with pytest.raises(ValueError, match=words):
        make_config("clip", **change)


def test_configs_that_do_not_fit_are_refused(make_config, tokenizer):
    def build(**change):
        given = {
            "vision": {**TOWER, "patch_size": 8},
            "text": {**TOWER, "max_position_embeddings": 16},
            "projection_dim": 24,
            "tokenizer": tokenizer,
            "image_size": 32,
        }
        return DualEncoder.from_config(**{**given, **change})

    with pytest.raises(ValueError, match="no field hiden_size"):
        build(vision={"hiden_size": 3})
    with pytest.raises(ValueError, match="not a multiple"):
        build(image_size=33)
    with pytest.raises(ValueError, match="'clip' or 'siglip'"):
        build(family="blip")
    with pytest.raises(ValueError, match="must be the vision tower's hidden_size 32"):
        build(family="siglip")
    endless = copy.deepcopy(tokenizer)
    endless.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="post-processor"):
        build(tokenizer=endless)
    old = copy.deepcopy(tokenizer)
    old.eos_token = "[CLS]"  # id 2
    with pytest.raises(ValueError, match="another id"):
        build(tokenizer=old)


def test_a_random_pooler_is_not_read_through_when_frozen(tower_folders, tokenizer, tmp_path):
    from transformers import BertModel

    BertModel.from_pretrained(tower_folders["bert"], add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def build(**options):
        return DualEncoder.from_towers(tower_folders["vit"], tmp_path, projection_dim=8, options=DualOptions(**options))

    with pytest.raises(ValueError, match="no pooler weights"):
        build(freeze=BOTH)
    assert build(freeze=BOTH, train_pooler=True).stock
    assert build(freeze=frozenset({"image"})).stock


def test_a_checkpoint_with_holes_is_refused(tower_folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tower_folders["bert"], tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of BertModel: encoder.layer.1.output.dense.weight"):
        DualEncoder.from_towers(tower_folders["vit"], tmp_path / "bert")


def test_halves_of_a_clip_checkpoint_can_be_joined_to_others(make_config, tower_folders, embed, tmp_path):
    clip = make_config("clip")
    clip.save_pretrained(tmp_path)
    eye = DualEncoder.from_towers(tmp_path, tower_folders["bert"], projection_dim=8)
    expected = clip.model.vision_model.state_dict()
    assert expected
    assert all(torch.equal(value, eye.model.vision_model.state_dict()[name]) for name, value in expected.items())
    reader = DualEncoder.from_towers(tower_folders["vit"], tmp_path, projection_dim=8)
    assert "token_type_ids" not in reader.text_inputs.names
    reader.save_pretrained(tmp_path / "joined")
    assert torch.equal(embed(DualEncoder.load(tmp_path / "joined")).texts, embed(reader).texts)


def test_autocast_gives_float32_unit_vectors(make_towers, pictures):
    student = make_towers(text_pooling="mean", image_head="mlp")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = student(student.prepare_images(pictures), student.prepare_texts(TEXTS))
    for side in (out.images, out.texts):
        assert side.dtype == torch.float32
        torch.testing.assert_close(side.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)


def test_calls_that_cannot_be_served(make_config, pictures):
    student = make_config("clip", freeze=frozenset({"image"}))
    texts = student.prepare_texts(TEXTS)
    with pytest.raises(ValueError, match="text tower trains"):
        student.freeze("text", texts)
    kept = student.freeze("image", student.prepare_images(pictures))
    with pytest.raises(ValueError, match="that tower trains"):
        student(None, kept)
    with pytest.raises(ValueError, match="no image"):
        student.prepare_images([])
    with pytest.raises(ValueError, match="no text"):
        student.prepare_texts([])
    assert student.options == replace(student.options)


def test_frozen_texts_read_in_parts_by_length_are_those_read_at_once():
    words = ["a", "b c d e", "f g", "h i j k l m", "n o", "p q r"]

    def read(inputs):
        hidden = inputs["input_ids"].unsqueeze(-1).float() * torch.tensor([1.0, 10.0])
        mask = inputs["attention_mask"]
        return Reading((hidden * mask.unsqueeze(-1)).sum(dim=1), hidden * mask.unsqueeze(-1), mask)

    longest = max(len(word.split()) for word in words)
    rows = [[ord(letter) for letter in word.split()] for word in words]
    inputs = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
    whole, parts = read(inputs), by_length(read, inputs, part=2)
    assert torch.equal(parts.pooled, whole.pooled)
    assert torch.equal(parts.tokens, whole.tokens)
    assert torch.equal(parts.mask, whole.mask)


@pytest.mark.parametrize("family", ["clip", "vit"])
def test_a_batch_of_texts_that_would_be_mostly_padding_is_read_in_parts(
    make, family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("students.dual._LEAST_PART", 8)
    student = make(family)
    texts = student.prepare_texts([TEXTS[0]] * 30 + [" ".join([*TEXTS] * 4)] * 2)
    seen: list[torch.Size] = []
    student.model.text_model.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["input_ids"].shape), with_kwargs=True
    )

    def gradients() -> dict[str, torch.Tensor]:
        student.zero_grad()
        vectors = student(None, texts).texts
        (vectors * torch.arange(vectors.numel()).reshape(vectors.shape).cos()).sum().backward()
        return {name: weight.grad.clone() for name, weight in student.named_parameters() if weight.grad is not None}

    in_parts = gradients()
    assert [rows for rows, _ in seen] == [8] * 4
    assert sum(rows * length for rows, length in seen) < 0.6 * texts["input_ids"].numel()
    monkeypatch.setattr("students.dual._PADDED", 1e9)
    whole = gradients()
    assert len(seen) == 5
    assert in_parts.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(in_parts[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_texts_of_like_length_are_read_at_once(make) -> None:
    student = make("clip")
    seen: list[int] = []
    student.model.text_model.register_forward_pre_hook(lambda *_: seen.append(1))
    student(None, student.prepare_texts([TEXTS[0]] * 200))
    assert len(seen) == 1
