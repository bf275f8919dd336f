"""A saved student is the same student, here and in plain transformers."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from students import DualEncoder, DualOptions
from tests.students.small_texts import TEXTS

BOTH = frozenset({"image", "text"})
KINDS = [
    ("clip", {}),
    ("siglip", {}),
    ("vit", {"max_text_length": 7}),
    ("mobilenet", {"freeze": BOTH, "train_pooler": True, "init_scale": 20.0}),
    ("mobilenet", {"text_pooling": "mean", "image_head": "mlp", "text_head": "mlp", "head_width": 8, "dropout": 0.2}),
    ("clip", {"text_pooling": "cls", "text_head": "mlp"}),
]


def plain_embeddings(folder, pictures):
    """By transformers alone, as a server would."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if model.config.model_type == "siglip" else "longest"
    texts = tokenizer(TEXTS, padding=padding, truncation=True, return_tensors="pt")
    images = processor.image_processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        of_images = model.get_image_features(**images).pooler_output
        of_texts = model.get_text_features(**texts).pooler_output
    return normalize(of_images, dim=-1), normalize(of_texts, dim=-1)


@pytest.mark.parametrize(("family", "options"), KINDS)
def test_loaded_is_bit_equal(make, embed, pictures, tmp_path, family, options):
    student = make(family, **options)
    with torch.no_grad():
        for weight in student.parameters():  # so that nothing can pass by being initialised alike
            weight.add_(torch.randn_like(weight) * 0.02)
    expected = embed(student)
    student.save_pretrained(tmp_path / "saved")
    loaded = DualEncoder.load(tmp_path / "saved")
    got = embed(loaded)
    assert torch.equal(got.images, expected.images)
    assert torch.equal(got.texts, expected.texts)
    assert torch.equal(got.scale, expected.scale)
    assert loaded.identity == student.identity
    for side in ("image", "text"):
        assert loaded.frozen_identity(side) == student.frozen_identity(side)
    assert loaded.token_ids_kind == student.token_ids_kind
    trains = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (student, loaded)]
    assert trains[0] == trains[1]
    note = json.loads((tmp_path / "saved" / "student.json").read_text())
    assert note["stock"] is student.stock
    if student.stock:
        images, texts = plain_embeddings(tmp_path / "saved", pictures)
        torch.testing.assert_close(images, expected.images, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(texts, expected.texts, rtol=1e-6, atol=1e-6)
    else:
        assert "head" in note["why_not_stock"]


def test_saving_over_another_student_leaves_none_of_its_heads(make_config, tmp_path):
    make_config("clip", text_head="mlp").save_pretrained(tmp_path)
    assert (tmp_path / "student_heads.safetensors").is_file()
    make_config("clip").save_pretrained(tmp_path)
    assert not (tmp_path / "student_heads.safetensors").exists()
    assert DualEncoder.from_pretrained(tmp_path).stock


def test_saved_tokenizer_carries_no_padding_or_cut_of_the_last_call(make_config, tmp_path):
    student = make_config("siglip")
    student.prepare_texts(TEXTS)
    student.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    assert state["truncation"] is None
    assert state["padding"] is None
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 16
    assert (tmp_path / "preprocessor_config.json").is_file()  # servers other than transformers look for it
    assert torch.equal(student.prepare_texts(["dog"])["lengths"], torch.tensor([3]))


def test_a_plain_checkpoint_becomes_a_student(make_config, embed, tmp_path):
    student = make_config("clip")
    student.save_pretrained(tmp_path)
    (tmp_path / "student.json").unlink()
    again = DualEncoder.from_pretrained(tmp_path, options=DualOptions(init_scale=5.0))
    assert torch.equal(embed(again).images, embed(student).images)
    assert embed(again).scale.item() == pytest.approx(5)
    with pytest.raises(FileNotFoundError, match="from_pretrained"):
        DualEncoder.load(tmp_path)


def test_load_may_change_what_trains_but_not_what_it_is(make_towers, embed, tmp_path):
    student = make_towers(text_head="mlp", head_width=8)
    student.save_pretrained(tmp_path / "saved")
    options = DualOptions(text_head="mlp", head_width=8, freeze=BOTH, tokens=True)
    loaded = DualEncoder.load(tmp_path / "saved", options=options)
    assert torch.equal(embed(loaded).texts, embed(student).texts)
    assert loaded.frozen_identity("text") is not None
    with pytest.raises(ValueError, match="'text_head': 'mlp'"):
        DualEncoder.load(tmp_path / "saved", options=DualOptions())


def test_folders_that_cannot_be_read(make_config, tower_folders, tmp_path):
    with pytest.raises(ValueError, match="of type 'bert'; a student can be clip, siglip, vision-text-dual-encoder"):
        DualEncoder.from_pretrained(tower_folders["bert"])
    make_config("clip", image_head="mlp").save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "student_heads.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="student_heads"):
        DualEncoder.load(tmp_path / "saved")
    note = tmp_path / "saved" / "student.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        DualEncoder.load(tmp_path / "saved")


def test_joined_towers_keep_their_weights(make_towers, tower_folders):
    model = make_towers("mobilenet").model
    for name, tower in (("mobilenet", model.vision_model), ("bert", model.text_model)):
        expected = AutoModel.from_pretrained(tower_folders[name]).state_dict()
        assert expected
        assert all(torch.equal(value, tower.state_dict()[key]) for key, value in expected.items())
    assert model.config.vision_config.hidden_size == model.visual_projection.in_features


def test_real_towers_survive_saving(shared, embed, pictures, tmp_path):
    models = shared / "models"
    options = DualOptions(freeze=BOTH, train_pooler=True)
    student = DualEncoder.from_towers(
        models / "mobilenet-v2-imagenet", models / "all-MiniLM-L6-v2", projection_dim=64, options=options
    )
    assert student.grid == (5, 5)
    expected = embed(student)
    student.save_pretrained(tmp_path / "saved")
    loaded = embed(DualEncoder.load(tmp_path / "saved"))
    assert torch.equal(loaded.images, expected.images)
    assert torch.equal(loaded.texts, expected.texts)
    images, texts = plain_embeddings(tmp_path / "saved", pictures)
    torch.testing.assert_close(images, expected.images, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(texts, expected.texts, rtol=1e-6, atol=1e-6)
