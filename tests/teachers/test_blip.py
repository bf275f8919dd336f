import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BlipForImageTextRetrieval

from distill.protocols import Freezable, MapsTeacher, TeachableTeacher, Teacher
from teachers import BlipOptions, BlipTeacher
from teachers.blip_options import check_heads, resolve_enc_token
from teachers.crossattention import plan_pairs
from tests.teachers.tiny_teachers import LAYER, TEXTS, blip, every_pair, memories, pictures, tokenizer


def plain_inputs(teacher, image_rows, text_rows):
    pixels = teacher.prepare_images(pictures(3))["pixel_values"]
    texts = teacher.prepare_texts(TEXTS)
    return pixels[image_rows], texts["input_ids"][text_rows].clone(), texts["attention_mask"][text_rows]


def library_logits(teacher, image_rows, text_rows, *, enc=None):
    """Two logits a pair by transformers' own forward, which re-runs the image tower for every pair."""
    pixels, ids, mask = plain_inputs(teacher, image_rows, text_rows)
    if enc is not None:
        ids[:, 0] = enc
    with torch.no_grad():
        return teacher.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).itm_score


def library_cosine(teacher, image_rows, text_rows):
    pixels, ids, mask = plain_inputs(teacher, torch.arange(3), torch.arange(len(TEXTS)))
    images, texts = pixels[image_rows], (ids[text_rows], mask[text_rows])
    with torch.no_grad():
        matrix = teacher.model(input_ids=texts[0], attention_mask=texts[1], pixel_values=images, use_itm_head=False)
    return matrix.itm_score.diagonal()


def test_is_what_the_protocols_ask_for():
    teacher = blip()
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, TeachableTeacher)
    assert isinstance(teacher, MapsTeacher)
    assert not isinstance(teacher, Freezable)
    assert not teacher.training


def test_cls_scores_equal_the_library_forward():
    teacher = blip(enc_token="cls")
    pairs = every_pair()
    expected = library_logits(teacher, *pairs)
    assert expected.std(dim=0).min() > 0.05  # scores that are all alike would prove nothing
    with torch.no_grad():
        got = teacher.score(*memories(teacher), *pairs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected[:, 1] - expected[:, 0], atol=2e-6, rtol=1e-5)


def test_enc_scores_equal_the_library_forward_with_the_first_token_overwritten():
    teacher = blip()
    assert teacher.enc_token_id == teacher.tokenizer.convert_tokens_to_ids("[ENC]") == len(teacher.tokenizer) - 1
    pairs = every_pair()
    expected = library_logits(teacher, *pairs, enc=teacher.enc_token_id)
    with torch.no_grad():
        got = teacher.score(*memories(teacher), *pairs)
    torch.testing.assert_close(got, expected[:, 1] - expected[:, 0], atol=2e-6, rtol=1e-5)
    untouched = library_logits(teacher, *pairs)
    assert (got - (untouched[:, 1] - untouched[:, 0])).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["log_odds", "logit", "logit+cosine", "cosine"])
def test_score_kinds(kind):
    teacher = blip(score_kind=kind)
    assert teacher.score_kind == kind
    pairs = every_pair()
    logits = library_logits(teacher, *pairs, enc=teacher.enc_token_id)
    cosine = library_cosine(teacher, *pairs)
    expected = {
        "log_odds": logits[:, 1] - logits[:, 0],
        "logit": logits[:, 1],
        "logit+cosine": logits[:, 1] + cosine,
        "cosine": cosine,
    }[kind]
    with torch.no_grad():
        got = teacher.score(*memories(teacher), *pairs)
        odds = teacher.pair_logits(*memories(teacher), *pairs)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(odds, logits[:, 1] - logits[:, 0], atol=2e-6, rtol=1e-5)  # whatever the kind


def test_embeddings_are_unit_vectors_and_keep_cls():
    teacher = blip()
    with torch.no_grad():
        images = teacher.embed("image", teacher.prepare_images(pictures(3)))
        texts = teacher.embed("text", teacher.prepare_texts(TEXTS))
    for vectors in (images, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    pairs = every_pair()
    got = (images[pairs[0]] * texts[pairs[1]]).sum(dim=1)
    torch.testing.assert_close(got, library_cosine(teacher, *pairs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 128])
@pytest.mark.parametrize("training", [False, True])
def test_order_grouping_and_chunks_change_nothing(size, training):
    """Any order, any company, with and without gradient: a pair's score is its own."""
    teacher = blip(pairs_per_chunk=size)
    images, texts = memories(teacher)
    image_rows, text_rows = every_pair()
    with torch.no_grad():
        alone = torch.cat(
            [teacher.score(images, texts, i[None], t[None]) for i, t in zip(image_rows, text_rows, strict=True)]
        )
    order = torch.randperm(len(image_rows), generator=torch.Generator().manual_seed(0))
    lopsided = torch.cat([order, order[image_rows[order] == 0].repeat(9)])  # one image far more often than the others
    lengths = texts["attention_mask"].sum(dim=1)[text_rows]
    assert len(plan_pairs(image_rows[order], lengths[order]).buckets) == 1  # every image has the same texts
    assert len(plan_pairs(image_rows[lopsided], lengths[lopsided]).buckets) > 1  # too uneven for one call
    with torch.set_grad_enabled(training):
        for rows in (order, lopsided):
            got = teacher.score(images, texts, image_rows[rows], text_rows[rows])
            torch.testing.assert_close(got, alone[rows], atol=1e-5, rtol=0)


def test_no_pairs_give_no_scores():
    teacher = blip()
    none = torch.zeros(0, dtype=torch.long)
    with torch.no_grad():
        assert teacher.score(*memories(teacher), none, none).shape == (0,)


def test_longer_companions_do_not_change_a_text():
    teacher = blip()
    with torch.no_grad():
        images = teacher.encode_images(teacher.prepare_images(pictures(3)))
        rows = torch.arange(3), torch.zeros(3, dtype=torch.long)
        short = teacher.encode_texts(teacher.prepare_texts(TEXTS[:1]))
        padded = teacher.encode_texts(teacher.prepare_texts(TEXTS))
        assert padded["states"].shape[1] > short["states"].shape[1]
        got, expected = teacher.score(images, padded, *rows), teacher.score(images, short, *rows)
        alone, together = (teacher.embed("text", teacher.prepare_texts(texts)) for texts in (TEXTS[:1], TEXTS))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_the_contrastive_pass_over_texts_runs_only_where_it_is_read():
    seen = {}
    for kind in ("log_odds", "logit", "logit+cosine", "cosine"):
        teacher = blip(score_kind=kind)
        seen[kind] = "embedding" in memories(teacher)[1]
        assert "embedding" in teacher.encode_texts(teacher.prepare_texts(TEXTS))  # with gradient: teaching reads it
    assert seen == {"log_odds": False, "logit": False, "logit+cosine": True, "cosine": True}


def test_an_image_is_encoded_once_and_its_keys_once_a_layer():
    teacher = blip()
    seen = {"tower": 0, "keys": 0}
    teacher.model.vision_model.embeddings.register_forward_hook(
        lambda _module, _inputs, out: seen.__setitem__("tower", seen["tower"] + len(out))
    )
    for layer in teacher.model.text_encoder.encoder.layer:
        layer.crossattention.self.key.register_forward_hook(
            lambda _module, _inputs, out: seen.__setitem__("keys", seen["keys"] + len(out))
        )
    images, texts = memories(teacher)
    with torch.no_grad():
        teacher.score(images, texts, *every_pair())
    assert seen == {"tower": 3, "keys": 3 * 3}  # images; images x layers, for 15 pairs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_once_and_scores_alike(tmp_path, dtype):
    whole = blip()
    whole.save_pretrained(tmp_path)
    half = BlipTeacher.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for name, p in half.named_parameters() if name != "logit_scale"} == {dtype}
    assert half.identity != whole.identity
    with torch.no_grad():
        got = half.score(*memories(half), *every_pair())
        expected = whole.score(*memories(whole), *every_pair())
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.1 * expected.std()
    assert not torch.equal(got, expected)


def test_memory_is_taken_back_as_it_is():
    teacher = blip()
    images, texts = memories(teacher)
    assert teacher.encode_images(images) is images
    assert teacher.encode_texts(texts) is texts


def test_gradient_reaches_every_weight():
    teacher = blip().train()
    images = teacher.encode_images(teacher.prepare_images(pictures(3)))
    texts = teacher.encode_texts(teacher.prepare_texts(TEXTS))
    cosine = images["embedding"] @ texts["embedding"].T
    loss = teacher.pair_logits(images, texts, *every_pair()).square().sum() + (cosine * teacher.scale).square().sum()
    loss.backward()
    without = [
        name
        for name, p in teacher.named_parameters()
        # A key's bias moves all logits of a row alike and softmax forgets it: its gradient is zero but for rounding.
        if (p.grad is None or not p.grad.abs().sum() > 0) and not name.endswith("key.bias")
    ]
    assert without == []


def test_logistic_loss_of_pair_logits_is_the_cross_entropy_of_the_two_way_head():
    teacher = blip()
    pairs = every_pair()
    labels = torch.arange(len(pairs[0])) % 2
    logits = library_logits(teacher, *pairs, enc=teacher.enc_token_id)
    with torch.no_grad():
        odds = teacher.pair_logits(*memories(teacher), *pairs)
    one = torch.nn.functional.binary_cross_entropy_with_logits(odds, labels.float())
    torch.testing.assert_close(one, torch.nn.functional.cross_entropy(logits, labels), atol=1e-6, rtol=1e-5)


def test_attention_maps_equal_the_library_cross_attentions():
    teacher = blip()
    image_rows, text_rows = every_pair()
    pixels, ids, mask = plain_inputs(teacher, image_rows, text_rows)
    ids[:, 0] = teacher.enc_token_id
    with torch.no_grad():
        hidden = teacher.model.vision_model(pixel_values=pixels).last_hidden_state
        output = teacher.model.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=hidden,
            encoder_attention_mask=torch.ones(hidden.shape[:2], dtype=torch.long),
            output_attentions=True,
        )
        maps = teacher.attention_maps(*memories(teacher), image_rows, text_rows)
    last = output.cross_attentions[-1].mean(dim=1)[..., 1:]  # (P, L, G) without the class token's column
    expected = last / last.sum(dim=-1, keepdim=True)
    rows, columns = teacher.grid
    assert (rows, columns) == (3, 3)
    assert maps.shape == (len(image_rows), ids.shape[1], rows * columns)
    assert maps.isfinite().all()
    real = mask.bool()
    assert expected[real].std(dim=-1).max() > 0.01
    torch.testing.assert_close(maps.exp()[real], expected[real], atol=1e-6, rtol=1e-5)


def test_save_and_load_give_the_same_bits(tmp_path):
    teacher = blip(score_kind="logit", max_text_length=9, prompt="w3 ")
    with torch.no_grad():
        teacher.logit_scale.fill_(3.25)
    teacher.save_pretrained(tmp_path)
    again = BlipTeacher.from_pretrained(tmp_path)
    assert again.options == teacher.options
    assert again.identity == teacher.identity
    assert not again.training
    assert again.scale == teacher.scale != blip().scale
    pairs = every_pair()
    with torch.no_grad():
        assert torch.equal(again.score(*memories(again), *pairs), teacher.score(*memories(teacher), *pairs))
    other = BlipTeacher.from_pretrained(tmp_path, options=BlipOptions(enc_token="cls"))
    assert other.score_kind == "log_odds"
    assert other.enc_token_id is None


def test_the_library_loads_a_saved_folder_alone(tmp_path):
    teacher = blip(enc_token="cls")
    teacher.save_pretrained(tmp_path)
    model = BlipForImageTextRetrieval.from_pretrained(tmp_path).eval()
    texts = AutoTokenizer.from_pretrained(tmp_path)(list(TEXTS), padding=True, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(pictures(3), return_tensors="pt")
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "BlipProcessor"
    image_rows, text_rows = every_pair()
    with torch.no_grad():
        logits = model(
            input_ids=texts["input_ids"][text_rows],
            attention_mask=texts["attention_mask"][text_rows],
            pixel_values=pixels["pixel_values"][image_rows],
        ).itm_score
        got = teacher.score(*memories(teacher), image_rows, text_rows)
    torch.testing.assert_close(got, logits[:, 1] - logits[:, 0], atol=2e-6, rtol=1e-5)


def test_identity_changes_with_whatever_could_change_a_score():
    base = blip()
    assert base.identity == blip().identity
    others = {
        "enc": blip(enc_token="cls").identity,
        "another id": blip(enc_token=7).identity,
        "prompt": blip(prompt="w1 ").identity,
        "length": blip(max_text_length=8).identity,
        "kind": blip(score_kind="logit").identity,
        "dtype": blip().to(torch.float64).identity,
    }
    flipped = blip()
    weight = flipped.model.itm_head.weight.data.view(torch.uint8)
    weight[0, 0] ^= 1
    others["weight"] = flipped.identity
    words = blip()
    words.tokenizer = tokenizer(words=39, special=("extra", "[DEC]", "[ENC]"))
    others["tokenizer"] = words.identity
    pixels = blip()
    pixels.image_processor.image_mean = (0.5, 0.5, 0.5)
    others["processor"] = pixels.identity
    assert len({base.identity, *others.values()}) == len(others) + 1, others


def test_identity_stays_with_whatever_cannot_change_a_score():
    base = blip()
    assert blip(pairs_per_chunk=3).identity == base.identity
    assert blip(enc_token=base.enc_token_id).identity == base.identity
    used = blip()
    memories(used)  # the tokenizer remembers its last padding and truncation
    assert used.identity == base.identity


def test_a_fixed_identity_holds_until_training():
    teacher = blip()
    fixed = teacher.fix_identity()
    assert fixed == teacher.identity
    teacher.model.itm_head.weight.data += 1
    assert teacher.identity == fixed
    assert teacher.train().identity != fixed


def test_scale_is_clamped_and_its_gradient_passes():
    teacher = blip()
    assert teacher.scale.item() == pytest.approx(1 / 0.07)
    for log_scale, expected in ((-3.0, 2.0), (9.0, 1000.0)):
        teacher.logit_scale.data.fill_(log_scale)
        assert teacher.scale.item() == pytest.approx(expected)
        teacher.logit_scale.grad = None
        teacher.scale.backward()
        assert teacher.logit_scale.grad > 0


def test_grey_and_palette_pictures_are_read():
    teacher = blip()
    teacher.image_processor.do_convert_rgb = False  # not every checkpoint's processor converts
    made = teacher.prepare_images([Image.new("L", (30, 20), 90), Image.new("P", (24, 24)), Image.new("RGBA", (9, 9))])
    assert made["pixel_values"].shape == (3, 3, 24, 24)


def test_texts_are_cut_and_padded_on_the_right():
    made = blip(max_text_length=5, prompt="w1 ").prepare_texts(["w2 w3 w4 w5 w6", "w2"])
    known = tokenizer().get_vocab()
    assert made["input_ids"].tolist()[0] == [2, known["w1"], known["w2"], known["w3"], 3]
    assert made["input_ids"].tolist()[1] == [2, known["w1"], known["w2"], 3, 0]
    assert made["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]


@pytest.mark.parametrize("what", ["images", "texts"])
def test_nothing_to_prepare_is_an_error(what):
    with pytest.raises(ValueError, match="was given no"):
        getattr(blip(), f"prepare_{what}")([])


def test_original_enc_token():
    class Names:
        def __init__(self, vocabulary):
            self.vocabulary = vocabulary

        def get_vocab(self):
            return self.vocabulary

    assert resolve_enc_token("original", Names({"[ENC]": 41}), 42) == 41
    assert resolve_enc_token("original", Names({}), 30_524) == 30_523  # published checkpoints: the last row
    assert resolve_enc_token("cls", Names({}), 42) is None
    with pytest.raises(ValueError, match="vocabulary has 30522 rows"):
        resolve_enc_token("original", Names({}), 30_522)
    with pytest.raises(ValueError, match=r"0\.\.41"):
        resolve_enc_token(42, Names({}), 42)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_kind": "log_likelihood"}, "log_odds"),
        ({"enc_token": "enc"}, "original"),
        ({"enc_token": 46}, r"0\.\.45"),
        ({"max_text_length": 1}, "max_text_length is 1"),
        ({"max_text_length": 41}, "40 positions"),
        ({"pairs_per_chunk": 0}, "pairs_per_chunk is 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        blip(**options)


def test_rows_that_make_no_pairs_are_refused():
    teacher = blip()
    images, texts = memories(teacher)
    with pytest.raises(ValueError, match="share one"):
        teacher.score(images, texts, torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"0\.\.2"):
        teacher.score(images, texts, torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"text_rows must lie"):
        teacher.score(images, texts, torch.tensor([0]), torch.tensor([-1]))


def test_shapes_that_do_not_fit_are_refused():
    layers = {**LAYER, "num_hidden_layers": 1}
    made = {"embed_dim": 8, "image_size": 24, "tokenizer": tokenizer()}
    with pytest.raises(ValueError, match="vision has no field patches"):
        BlipTeacher.from_config(vision={**layers, "patches": 8}, text=layers, **made)
    made["tokenizer"] = tokenizer(special=("[ENC]",))
    with pytest.raises(ValueError, match="bos_token_id"):
        BlipTeacher.from_config(vision={**layers, "patch_size": 8}, text=layers, **made)
    teacher = blip()
    with pytest.raises(ValueError, match="only 46"):
        BlipTeacher(teacher.model, teacher.image_processor, tokenizer(words=60))
    teacher.image_processor.size = {"height": 32, "width": 32}
    with pytest.raises(ValueError, match=r"\(32, 32\)"):
        BlipTeacher(teacher.model, teacher.image_processor, teacher.tokenizer)


def test_base_with_other_than_twelve_heads_is_refused():
    config = blip().model.config.text_config
    check_heads(config, "small")  # only the published width is known to have twelve
    config.hidden_size, config.num_attention_heads = 768, 8
    with pytest.raises(ValueError, match='"num_attention_heads": 12'):
        check_heads(config, "base")
    config.num_attention_heads = 12
    check_heads(config, "base")


def test_a_checkpoint_without_heads_is_refused(tmp_path):
    blip().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(("itm_head", "text_proj"))}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="captioning"):
        BlipTeacher.from_pretrained(tmp_path)


def test_unknown_saved_options_are_refused(tmp_path):
    blip().save_pretrained(tmp_path)
    file = tmp_path / "blip_teacher.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 2}))
    with pytest.raises(ValueError, match="temperature"):
        BlipTeacher.from_pretrained(tmp_path)
    assert "temperature" not in {field.name for field in dataclasses.fields(BlipOptions)}
