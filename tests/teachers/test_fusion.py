import os
from pathlib import Path

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from distill.protocols import Freezable, MapsTeacher, TeachableTeacher, Teacher
from teachers import FusionDesign, FusionOptions, FusionTeacher
from teachers.backbones import most_text_tokens
from teachers.crossattention import PackedPairs, plan_pairs
from teachers.layers import Packing, text_only
from tests.teachers.tiny_teachers import TEXTS, blip, cnn, every_pair, fusion, memories, pictures, text_model, tokenizer

FAMILIES = ("bert", "electra", "roberta")
FROZEN = FusionDesign(embed_dim=16, frozen_text_layers=2)
OPEN = FusionDesign(embed_dim=16, freeze_vision=False)


def slow_score(teacher, image, text):
    """Log-odds of one pair with loops over layers, heads, tokens and cells; nothing kept, grouped or padded."""
    with torch.no_grad():
        features = teacher.image.features(teacher.prepare_images([image]))[0]
        tokens = teacher.image.tokens(features[None])[0]  # (T, H)
        ids = teacher.prepare_texts([text])["input_ids"]
        encoder = teacher.text.encoder
        # The library runs the layers before the first cross-attention.
        states = encoder(input_ids=ids, output_hidden_states=True).hidden_states[teacher.text._split][0]  # (L, H)
        for layer, block in zip(teacher.text.fused_layers, teacher.cross, strict=True):
            states = layer.attention(states[None])[0][0]
            normed, width = block.norm(states), states.shape[1] // block.heads
            query, key, value = block.query(normed), block.key(tokens), block.value(tokens)
            context = torch.zeros_like(states)
            for head in range(block.heads):
                part = slice(head * width, (head + 1) * width)
                for at in range(len(states)):
                    logits = torch.stack([query[at, part] @ cell / width**0.5 for cell in key[:, part]])
                    context[at, part] = logits.softmax(dim=0) @ value[:, part]
            states = states + block.output(context)
            states = layer.output(layer.intermediate(states), states)
        logits = teacher.itm_head.layers(torch.cat([states[0], states.mean(dim=0)]))
        return logits[1] - logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eye", ["cnn", "vit"])
def test_scores_equal_a_slow_reference(family, eye):
    teacher = fusion(family=family, eye=eye)
    images, texts = pictures(2), TEXTS[:3]
    pairs = every_pair(2, 3)
    expected = torch.stack([slow_score(teacher, images[i], texts[t]) for i, t in zip(*pairs, strict=True)])
    assert expected.std() > 0.01
    with torch.no_grad():
        got = teacher.score(*memories(teacher, 2, texts), *pairs)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_is_what_the_protocols_ask_for():
    teacher = fusion()
    for protocol in (Teacher, TeachableTeacher, MapsTeacher, Freezable):
        assert isinstance(teacher, protocol)
    assert not teacher.training


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_pretrained_text_encoder(family):
    """Before training cross-attention adds nothing: fused states are the library's own, whatever the image."""
    teacher = fusion(family=family, shaken=False)
    images, texts = memories(teacher)
    seen = []
    teacher.itm_head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    with torch.no_grad():
        expected = text_model(family)(**teacher.prepare_texts(TEXTS)).last_hidden_state[every_pair()[1]]
        teacher.score(images, texts, *every_pair())
    ((fused, mask),) = seen
    order = PackedPairs.of(images, texts, *every_pair()).plan.order
    torch.testing.assert_close(fused[mask.bool()], expected[order][mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "layer"), [("deep", 4), ("shallow", 3)])
def test_text_vector_is_read_where_the_design_says(kind, layer):
    design = FusionDesign(embed_dim=16, fusion_layers=1, contrastive_text=kind)
    teacher = fusion(design)
    inputs = teacher.prepare_texts(TEXTS)
    with torch.no_grad():
        states = teacher.text.encoder(**inputs, output_hidden_states=True).hidden_states[layer]
        expected = teacher.text.head(states, inputs["attention_mask"])
        got = teacher.encode_texts(inputs)["embedding"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(len(TEXTS)))


def test_the_sentence_vector_stays_that_of_the_pretrained_encoder():
    design = FusionDesign(embed_dim=16, fusion_layers=1, frozen_text_layers=3, contrastive_text="sentence")
    teacher = fusion(design, shaken=False)
    inputs = teacher.prepare_texts(TEXTS)
    with torch.no_grad():
        states = teacher.text.encoder(**inputs).last_hidden_state
        real = inputs["attention_mask"].unsqueeze(-1)
        expected = teacher.text.head(((states * real).sum(1) / real.sum(1))[:, None])
        before = teacher.encode_texts(inputs)["embedding"]
        torch.testing.assert_close(before, expected, atol=1e-5, rtol=1e-5)
        for parameter in teacher.text.encoder.encoder.layer[3].parameters():
            parameter.add_(0.1)  # as teaching does
        kept = teacher.freeze("text", inputs)
        assert torch.equal(teacher.encode_texts(inputs)["embedding"], before)
        assert torch.equal(teacher.encode_texts(kept)["embedding"], before)


def test_the_sentence_vector_needs_everything_before_it_frozen():
    with pytest.raises(ValueError, match="set it to 3"):
        fusion(FusionDesign(embed_dim=16, fusion_layers=1, frozen_text_layers=1, contrastive_text="sentence"))


def test_pooled_head_starts_as_a_mean_over_real_tokens():
    teacher = fusion(shaken=False)
    tokens, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    means = torch.stack([tokens[0].mean(dim=0), tokens[1, :2].mean(dim=0)])
    head = teacher.text.head
    with torch.no_grad():
        torch.testing.assert_close(head(tokens, mask), head(means[:, None]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 256])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("eye", ["cnn", "vit"])
def test_order_grouping_and_chunks_change_nothing(size, training, eye):
    teacher = fusion(eye=eye, pairs_per_chunk=size)
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
    teacher = fusion()
    none = torch.zeros(0, dtype=torch.long)
    with torch.no_grad():
        assert teacher.score(*memories(teacher), none, none).shape == (0,)


@pytest.mark.parametrize("kind", ["log_odds", "logit", "logit+cosine", "cosine"])
def test_score_kinds(kind):
    teacher, plain = fusion(score_kind=kind), fusion(score_kind="logit")
    images, texts = memories(teacher)
    pairs = every_pair()
    with torch.no_grad():
        got, odds = teacher.score(images, texts, *pairs), teacher.pair_logits(images, texts, *pairs)
        logit = plain.score(images, texts, *pairs)
    cosine = (images["embedding"][pairs[0]] * texts["embedding"][pairs[1]]).sum(dim=1)
    expected = {"log_odds": odds, "logit": logit, "logit+cosine": logit + cosine, "cosine": cosine}[kind]
    torch.testing.assert_close(got, expected)
    assert (odds - logit).abs().max() > 0.01


def test_each_item_is_encoded_once_and_scoring_projects_no_image():
    teacher = fusion(eye="vit")
    seen = {"backbone": 0, "text": 0, "keys": 0}

    def count(name):
        return lambda _module, _inputs, out: seen.__setitem__(name, seen[name] + len(out))

    teacher.image.backbone.embeddings.register_forward_hook(count("backbone"))
    teacher.text.encoder.embeddings.register_forward_hook(count("text"))
    for block in teacher.cross:
        block.key.register_forward_hook(count("keys"))
    images, texts = memories(teacher)
    with torch.no_grad():
        teacher.score(images, texts, *every_pair())
    assert seen == {"backbone": 3, "text": len(TEXTS), "keys": 3 * 2}
    assert teacher.encode_images(images) is images
    assert teacher.encode_texts(texts) is texts


@pytest.mark.parametrize("design", [OPEN, FROZEN], ids=["open", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_what_trains_and_nothing_else(design, family):
    teacher = fusion(design, family=family, eye="vit").train()
    images = teacher.encode_images(teacher.prepare_images(pictures(3)))
    texts = teacher.encode_texts(teacher.prepare_texts(TEXTS))
    cosine = images["embedding"] @ texts["embedding"].T
    loss = teacher.pair_logits(images, texts, *every_pair()).square().sum() + (cosine * teacher.scale).square().sum()
    loss.backward()
    trained = {name: p for name, p in teacher.named_parameters() if p.requires_grad}
    without = [
        name
        for name, p in trained.items()
        # Softmax forgets what moves all logits of a row alike: a key's bias and the bias of a pooling weight.
        if (p.grad is None or not p.grad.abs().sum() > 0) and not name.endswith(("key.bias", "weigh.bias"))
    ]
    assert without == []
    frozen = {name for name, p in teacher.named_parameters() if not p.requires_grad}
    if design is OPEN:
        assert frozen == set()
        return
    allowed = (
        "image.backbone.",
        "text.encoder.embeddings",
        "text.encoder.encoder.layer.0.",
        "text.encoder.encoder.layer.1.",
    )
    assert frozen == {name for name, _ in teacher.named_parameters() if name.startswith(allowed)}
    assert {id(p) for p in teacher.pretrained_parameters()} == {
        id(p) for name, p in trained.items() if name.startswith("text.encoder.encoder.layer.")
    }


def test_frozen_parts_stay_in_eval_mode():
    teacher = fusion(FROZEN).train()
    assert teacher.training
    assert teacher.cross.training
    training = [name for name, module in teacher.named_modules() if module.training]
    assert any(name.startswith("text.encoder.encoder.layer.2") for name in training)
    assert not [name for name in training if name.startswith(("image.backbone", "text.encoder.encoder.layer.1"))]
    before = {name: tensor.clone() for name, tensor in teacher.image.backbone.named_buffers()}
    assert before  # batch norm statistics
    teacher.encode_images(teacher.prepare_images(pictures(3)))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.image.backbone.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eye", ["cnn", "vit"])
def test_frozen_outputs_stand_in_for_prepared_inputs(family, eye):
    teacher = fusion(FROZEN, family=family, eye=eye)
    inputs = {"image": teacher.prepare_images(pictures(3)), "text": teacher.prepare_texts(TEXTS)}
    kept = {side: teacher.freeze(side, given) for side, given in inputs.items()}
    cells = teacher.grid[0] * teacher.grid[1]
    assert kept["image"]["grid"].shape == (3, cells, teacher.image.shape.channels)
    assert ("others" in kept["image"]) is (eye == "vit")
    length = inputs["text"]["input_ids"].shape[1]
    # Storage without padding gives zeros back in its place, and in another batch more of it.
    padded = {
        "hidden": torch.zeros(len(TEXTS), length + 3, 32),
        "attention_mask": torch.zeros(len(TEXTS), length + 3, dtype=torch.long),
    }
    real = kept["text"]["attention_mask"].bool()
    padded["hidden"][:, :length][real] = kept["text"]["hidden"][real]
    padded["attention_mask"][:, :length] = kept["text"]["attention_mask"]
    with torch.no_grad():
        live = teacher.encode_images(inputs["image"]), teacher.encode_texts(inputs["text"])
        stored = teacher.encode_images(kept["image"]), teacher.encode_texts(kept["text"])
        refilled = teacher.encode_texts(padded)
        pairs = every_pair()
        scores = teacher.score(*live, *pairs)
        assert torch.equal(teacher.score(*stored, *pairs), scores)
        torch.testing.assert_close(teacher.score(stored[0], refilled, *pairs), scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(refilled["embedding"], live[1]["embedding"], atol=1e-5, rtol=0)


def test_cells_of_a_grid_are_row_major():
    teacher = fusion()
    inputs = teacher.prepare_images(pictures(11))  # more than one part of those that run at a time
    with torch.no_grad():
        maps = teacher.image.backbone(**inputs).last_hidden_state  # (N, C, rows, columns)
    rows, columns = teacher.grid
    assert (rows, columns) == tuple(maps.shape[2:]) == (3, 4)
    cells = torch.stack([maps[:, :, row, column] for row in range(rows) for column in range(columns)], dim=1)
    assert cells.std(dim=1).max() > 1e-3
    torch.testing.assert_close(teacher.freeze("image", inputs)["grid"], cells, atol=1e-5, rtol=1e-5)


def test_what_is_not_frozen_cannot_be_kept():
    teacher = fusion(OPEN)
    for side in ("image", "text"):
        assert teacher.frozen_identity(side) is None
        with pytest.raises(ValueError, match=f"nothing of the {side} side is frozen"):
            teacher.freeze(side, {})


def test_frozen_identity_follows_the_frozen_part_alone():
    base = fusion(FROZEN)
    image, text = base.frozen_identity("image"), base.frozen_identity("text")
    assert image
    assert text
    assert image != text
    trained = fusion(FROZEN)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert (trained.frozen_identity("image"), trained.frozen_identity("text")) == (image, text)
    assert trained.identity != base.identity
    more = fusion(FROZEN, max_text_length=7)
    assert more.frozen_identity("image") == image
    assert more.frozen_identity("text") != text
    fewer = fusion(FusionDesign(embed_dim=16, frozen_text_layers=1))
    assert fewer.frozen_identity("text") != text
    moved = fusion(FROZEN)
    moved.text.encoder.encoder.layer[1].output.dense.weight.data[0, 0] += 1e-6
    moved.image.backbone.state_dict()["conv_stem.first_conv.normalization.running_var"][0] += 1e-6
    assert moved.frozen_identity("text") != text
    assert moved.frozen_identity("image") != image


def slow_rows(query, keys, heads):
    """Attention probabilities (A, L, T), head by head."""
    query, keys = query.unflatten(1, (heads, -1)), keys.unflatten(1, (heads, -1))
    return torch.stack([(query[:, h] @ keys[:, h].T / query.shape[2] ** 0.5).softmax(dim=1) for h in range(heads)])


def test_attention_maps_equal_a_slow_reference():
    teacher = fusion(eye="vit")
    images, texts = memories(teacher)
    image_rows, text_rows = every_pair()
    first, last = teacher.cross
    before, fused = teacher.text.fused_layers
    with torch.no_grad():
        maps = teacher.attention_maps(images, texts, image_rows, text_rows)
    assert teacher.grid == (3, 3)
    assert maps.shape == (len(image_rows), texts["attention_mask"].shape[1], 9)
    for pair, (image, text) in enumerate(zip(image_rows, text_rows, strict=True)):
        real = int(texts["attention_mask"][text].sum())
        with torch.no_grad():
            states = texts["states"][text, :real]  # past the first fused layer's self-attention
            query = first.query(first.norm(states))
            rows = slow_rows(query, images["keys"][image, 0], first.heads)  # (A, L, T)
            values = images["values"][image, 0].unflatten(1, (first.heads, -1))
            states = states + first.output(torch.cat([rows[h] @ values[:, h] for h in range(first.heads)], dim=1))
            states = fused.attention(before.output(before.intermediate(states), states)[None])[0][0]
            rows = slow_rows(last.query(last.norm(states)), images["keys"][image, 1], last.heads)
        cells = rows.mean(dim=0)[:, 1:]  # without the class token
        expected = cells / cells.sum(dim=1, keepdim=True)
        torch.testing.assert_close(maps[pair, :real].exp(), expected, atol=1e-6, rtol=1e-5)
    assert maps.isfinite().all()


@pytest.mark.parametrize("eye", ["cnn", "vit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_give_the_same_bits(tmp_path, family, eye):
    teacher = fusion(FROZEN, family=family, eye=eye, score_kind="logit+cosine", prompt="w3 ", max_text_length=9)
    with torch.no_grad():
        teacher.logit_scale.fill_(3.25)
    teacher.save_pretrained(tmp_path / "new" / "folder")
    again = FusionTeacher.from_pretrained(tmp_path / "new" / "folder")
    assert (again.design, again.options, again.grid) == (teacher.design, teacher.options, teacher.grid)
    assert again.identity == teacher.identity
    for side in ("image", "text"):
        assert again.frozen_identity(side) == teacher.frozen_identity(side)
    assert again.scale == teacher.scale
    assert not again.training
    pairs = every_pair()
    with torch.no_grad():
        assert torch.equal(again.score(*memories(again), *pairs), teacher.score(*memories(teacher), *pairs))
    other = FusionTeacher.from_pretrained(tmp_path / "new" / "folder", options=FusionOptions())
    assert other.score_kind == "log_odds"


def test_identity_changes_with_whatever_could_change_a_score():
    base = fusion()
    assert base.identity == fusion().identity
    others = {
        "prompt": fusion(prompt="w1 ").identity,
        "length": fusion(max_text_length=8).identity,
        "kind": fusion(score_kind="logit").identity,
        "dtype": fusion().to(torch.float64).identity,
        "layers": fusion(FusionDesign(embed_dim=16, fusion_layers=1)).identity,
        "depth": fusion(FusionDesign(embed_dim=16, contrastive_text="shallow")).identity,
    }
    for name in (
        "itm_head.layers.3.weight",
        "image.backbone.conv_stem.first_conv.convolution.weight",
        "cross.0.key.weight",
    ):
        flipped = fusion()
        flipped.state_dict()[name].view(torch.uint8).view(-1)[0] ^= 1
        others[name] = flipped.identity
    words = fusion()
    words.text.tokenizer = tokenizer(words=39, special=("extra", "[DEC]", "[ENC]"))
    others["tokenizer"] = words.identity
    pixels = fusion()
    pixels.image.processor.image_mean = (0.4, 0.5, 0.5)
    others["processor"] = pixels.identity
    assert len({base.identity, *others.values()}) == len(others) + 1, others


def test_identity_stays_with_whatever_cannot_change_a_score():
    base = fusion()
    assert fusion(pairs_per_chunk=3).identity == base.identity
    memories(used := fusion())
    used.logit_scale.data += 1
    assert used.identity == base.identity
    fixed = used.fix_identity()
    used.itm_head.layers[0].weight.data += 1
    assert used.identity == fixed
    assert used.train().identity != fixed


def test_wrong_designs_are_refused():
    for design, message in (
        (lambda: FusionDesign(fusion_layers=0), "fusion_layers is 0"),
        (lambda: FusionDesign(frozen_text_layers=-1), "frozen_text_layers is -1"),
        (lambda: FusionDesign(dropout=1.0), "dropout is 1.0"),
        (lambda: FusionDesign(embed_dim=0), "embed_dim is 0"),
        (lambda: FusionOptions(score_kind="log_likelihood"), "log_odds"),
        (lambda: FusionOptions(max_text_length=1), "max_text_length is 1"),
        (lambda: FusionOptions(pairs_per_chunk=0), "pairs_per_chunk is 0"),
        (lambda: fusion(FusionDesign(fusion_layers=5)), "has 4 layers"),
        (lambda: fusion(FusionDesign(fusion_layers=2, frozen_text_layers=3)), "only the 2 layers before"),
        (lambda: fusion(max_text_length=41), "40 positions"),
        (lambda: fusion(family="roberta", max_text_length=40), "39 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            design()


def test_other_text_families_are_refused():
    vision, processor = cnn()
    text = DistilBertModel(DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=46))
    with pytest.raises(ValueError, match="type 'distilbert'"):
        FusionTeacher(vision, text, processor, tokenizer())


def test_a_vocabulary_too_small_is_refused():
    vision, processor = cnn()
    with pytest.raises(ValueError, match="only 46"):
        FusionTeacher(vision, text_model(), processor, tokenizer(words=60))


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="fusion_teacher.json"):
        FusionTeacher.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_as_the_library_runs_them(family):
    model = text_model(family)
    inputs = fusion().prepare_texts(TEXTS)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        packing = Packing.of(inputs["attention_mask"])
        got = text_only(model.encoder.layer, packing.pack(output.hidden_states[0]), packing)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got, output.last_hidden_state[real], atol=1e-5, rtol=1e-5)


def test_positions_of_the_longest_text_exist():
    model = text_model("roberta")
    ids = torch.full((1, most_text_tokens(model.config)), 5)
    assert model(input_ids=ids).last_hidden_state.shape[1] == 39
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, 40), 5))


def shared_models() -> Path:
    folder = Path(os.environ.get("CROSS2DUAL_SHARED", Path(__file__).parents[3] / "shared")) / "models"
    if not (folder / "all-MiniLM-L6-v2").is_dir():
        pytest.skip(f"no pretrained models in {folder} (set CROSS2DUAL_SHARED)")
    return folder


def test_pretrained_backbones(tmp_path):
    models = shared_models()
    design = FusionDesign(fusion_layers=3, frozen_text_layers=3)
    teacher = FusionTeacher.from_backbones(models / "mobilenet-v2-imagenet", models / "all-MiniLM-L6-v2", design=design)
    assert teacher.grid == (5, 5)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    made = teacher.prepare_texts(["a dog", "two dogs play in the snow"])
    assert made["input_ids"].shape == (2, 8)  # the tokenizer file's own fixed length of 128 is not used
    teacher.save_pretrained(tmp_path)
    again = FusionTeacher.from_pretrained(tmp_path)
    assert again.identity == teacher.identity
    with torch.no_grad():
        images = teacher.encode_images(teacher.prepare_images(pictures(2, size=160)))
        texts = teacher.encode_texts(made)
        scores = teacher.score(images, texts, *every_pair(2, 2))
        same = again.score(
            again.encode_images(again.prepare_images(pictures(2, size=160))),
            again.encode_texts(made),
            *every_pair(2, 2),
        )
    assert scores.isfinite().all()
    assert torch.equal(scores, same)


@pytest.mark.parametrize("make", [fusion, blip])
def test_identity_of_prepared_inputs_follows_what_prepares_them(make):
    base = make()
    image, text = base.prepare_identity("image"), base.prepare_identity("text")
    assert image != text
    memories(base)
    trained = make(score_kind="logit", pairs_per_chunk=3)
    assert (trained.prepare_identity("image"), trained.prepare_identity("text")) == (image, text)
    for other in (make(prompt="w1 "), make(max_text_length=9)):
        assert other.prepare_identity("image") == image
        assert other.prepare_identity("text") != text
    processor = base.image.processor if make is fusion else base.image_processor
    processor.image_std = (0.4, 0.5, 0.5)
    assert base.prepare_identity("image") != image
