"""Stacked cross attention against loops written from its formulas, and the teacher built around it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.protocols import ContrastiveTeachable, Freezable, MapsTeacher, TeachableTeacher, Teacher
from teachers import fragment_pairs
from teachers.fragment import FragmentTeacher
from teachers.fragment_options import FragmentDesign, FragmentOptions
from teachers.fragment_pairs import all_pairs, given_pairs
from teachers.fragment_pipeline import DirectionDesign, ScanDesign
from tests.teachers.tiny_teachers import TEXTS, cnn, fusion, pictures, text_model, tokenizer, vit

SMALL = FragmentDesign(fragment_dim=12, embed_dim=8)


def fragment(design: FragmentDesign = SMALL, *, eye: str = "cnn", family: str = "bert", **options) -> FragmentTeacher:
    vision, processor = cnn() if eye == "cnn" else vit()
    text = text_model(family)
    torch.manual_seed(3)
    return FragmentTeacher(vision, text, processor, tokenizer(), design, FragmentOptions(**options))


def memories(teacher: FragmentTeacher, images: int = 3, texts: tuple[str, ...] = TEXTS):
    with torch.no_grad():
        return (
            teacher.encode_images(teacher.prepare_images(pictures(images))),
            teacher.encode_texts(teacher.prepare_texts(texts)),
        )


def every_pair(images: int, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.cartesian_prod(torch.arange(images), torch.arange(texts))
    return grid[:, 0], grid[:, 1]


# --- the formulas -----------------------------------------------------------------------------------------------------


def slow_direction(query, context, design: DirectionDesign) -> float:
    """Lee et al., ECCV 2018, section 3.2: loops over lists of vectors, every attended vector made."""
    cosine = [[float(torch.cosine_similarity(q, c, dim=0)) for c in context] for q in query]
    clip = {"relu": lambda s: max(s, 0.0), "leaky": lambda s: s if s > 0 else 0.1 * s}[design.clip]
    clipped = [[clip(s) for s in row] for row in cosine]
    relevances = []
    for i, q in enumerate(query):
        weights = []
        for j in range(len(context)):
            length = math.sqrt(sum(clipped[other][j] ** 2 for other in range(len(query))))
            weights.append(math.exp(design.attention_scale * (clipped[i][j] / length if length else 0.0)))
        attended = sum(w / sum(weights) * c for w, c in zip(weights, context, strict=True))
        relevances.append(float(torch.cosine_similarity(q, attended, dim=0)))
    if design.pooling == "avg":
        return sum(relevances) / len(relevances)
    return math.log(sum(math.exp(design.pooling_scale * r) for r in relevances)) / design.pooling_scale


def slow_scan(cells, words, design: ScanDesign) -> float:
    share = design.i2t_share
    return share * slow_direction(cells, words, design.i2t) + (1 - share) * slow_direction(words, cells, design.t2i)


DESIGNS = [
    ScanDesign(
        i2t=DirectionDesign(clip, first, pooling, second),
        t2i=DirectionDesign(clip, second, pooling, first),
        i2t_share=share,
    )
    for clip, pooling, (first, second), share in itertools.product(
        ("leaky", "relu"), ("avg", "lse"), ((4.0, 6.0), (9.0, 20.0)), (0.0, 0.3, 1.0)
    )
]


def ragged(seed: int, images: int = 3, cells: int = 5, lengths: tuple[int, ...] = (4, 1, 6, 2), width: int = 7):
    """Memories of random unit vectors whose padding is loud: a word that counts by mistake shows."""
    draw = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    lengths_ = torch.tensor(lengths)
    mask = torch.arange(max(lengths) + 2) < lengths_[:, None]
    words = unit(torch.randn(len(lengths), max(lengths) + 2, width, generator=draw), dim=-1)
    words[~mask] = 50.0
    here = {"cells": unit(torch.randn(images, cells, width, generator=draw), dim=-1)}
    return here, {"words": words, "word_mask": mask}


@pytest.mark.parametrize("design", DESIGNS, ids=repr)
def test_equals_loops_over_the_formulas(design: ScanDesign) -> None:
    images, texts = ragged(0)
    expected = torch.tensor(
        [
            [slow_scan(cells, words[mask], design) for words, mask in zip(*texts.values(), strict=True)]
            for cells in images["cells"]
        ]
    )
    assert expected.std() > 0.01
    torch.testing.assert_close(all_pairs(images, texts, design, pairs_per_chunk=100), expected, atol=2e-6, rtol=2e-6)
    rows = every_pair(3, 4)
    found = given_pairs(images, texts, rows, design, pairs_per_chunk=100)
    torch.testing.assert_close(found, expected.flatten(), atol=2e-6, rtol=2e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from(DESIGNS))
def test_order_chunks_and_company_change_no_score(seed: int, chunk: int, design: ScanDesign) -> None:
    images, texts = ragged(seed)
    whole = all_pairs(images, texts, design, pairs_per_chunk=1000)
    torch.testing.assert_close(all_pairs(images, texts, design, pairs_per_chunk=chunk), whole, atol=2e-6, rtol=0)
    draw = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 40, (1,), generator=draw))
    rows = torch.randint(0, 3, (count,), generator=draw), torch.randint(0, 4, (count,), generator=draw)
    if seed % 2:  # one image far more often than the others: slots would be mostly empty
        rows[0][:-2] = 0
    found = given_pairs(images, texts, rows, design, pairs_per_chunk=chunk)
    torch.testing.assert_close(found, whole[rows], atol=2e-6, rtol=0)


def test_padding_has_no_part_in_score_or_gradient() -> None:
    for design in DESIGNS[:6]:
        images, texts = ragged(1)
        texts["words"].requires_grad_(True)
        all_pairs(images, texts, design, pairs_per_chunk=7).sum().backward()
        gradient = texts["words"].grad
        assert gradient[~texts["word_mask"]].abs().max() == 0
        assert gradient[texts["word_mask"]].abs().sum(dim=-1).min() > 0


def test_what_is_computed_again_in_the_backward_pass_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        images, texts = ragged(2)
        given_ = images["cells"].requires_grad_(True), texts["words"].requires_grad_(True)
        all_pairs(images, texts, DESIGNS[1], pairs_per_chunk=4).square().sum().backward()
        return given_[0].grad, given_[1].grad

    kept = gradients()
    calls = []
    original = fragment_pairs._compare
    monkeypatch.setattr(fragment_pairs, "_MOST_KEPT", 0)
    monkeypatch.setattr(fragment_pairs, "_compare", lambda *a: calls.append(1) or original(*a))
    again = gradients()
    assert len(calls) == 2 * 4  # one text at a time, forward and once more
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_equal_finite_differences() -> None:
    for design in (DESIGNS[1], DESIGNS[4], DESIGNS[-2]):
        images, texts = ragged(3, images=2, cells=3, lengths=(2, 3), width=4)
        cells, words = images["cells"].double(), texts["words"].double()

        def similarity(cells: torch.Tensor, words: torch.Tensor, design: ScanDesign = design) -> torch.Tensor:
            found = fragment_pairs.Fragments.of(cells, words, texts["word_mask"])  # noqa: B023 - called in this turn
            return fragment_pairs.scan(found, design)

        assert torch.autograd.gradcheck(similarity, (cells.requires_grad_(True), words.requires_grad_(True)))


@pytest.mark.parametrize("clip", ["leaky", "relu"])
def test_words_that_nothing_is_like_give_finite_scores_and_gradients(clip: str) -> None:
    design = ScanDesign(i2t=DirectionDesign(clip), t2i=DirectionDesign(clip))
    cells, words = torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)
    cells[:, :, 0], words[:, 0, 1], words[:, 1, 0] = 1.0, 1.0, -1.0  # at a right angle to all cells, and opposed
    images, texts = {"cells": cells}, {"words": words, "word_mask": torch.ones(1, 2, dtype=torch.bool)}
    words.requires_grad_(True)
    score = all_pairs(images, texts, design, pairs_per_chunk=8)
    score.sum().backward()
    assert score.isfinite().all()
    assert words.grad.isfinite().all()


# --- the teacher ------------------------------------------------------------------------------------------------------


def test_is_what_the_protocols_ask_for() -> None:
    teacher = fragment()
    for protocol in (Teacher, ContrastiveTeachable, Freezable):
        assert isinstance(teacher, protocol)
    for protocol in (TeachableTeacher, MapsTeacher):
        assert not isinstance(teacher, protocol)
    assert not teacher.training


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("eye", ["cnn", "vit"])
@pytest.mark.parametrize("family", ["bert", "electra", "roberta"])
def test_scores_equal_loops_from_the_backbones_up(family: str, eye: str, special: bool) -> None:
    teacher = fragment(replace(SMALL, special_words=special), eye=eye, family=family)
    image, texts = pictures(2), TEXTS[:3]
    rows = every_pair(2, 3)
    with torch.no_grad():
        seen = teacher.image.backbone(**teacher.prepare_images(image)).last_hidden_state
        features = seen.flatten(2).transpose(1, 2) if seen.ndim == 4 else seen
        cells = teacher.image.tokens(features)[:, seen.ndim == 3 :]  # a ViT's class token is no cell
        expected = []
        for i, t in zip(*rows, strict=True):
            inputs = teacher.prepare_texts([texts[t]])  # alone: no padding
            states = teacher.text.encoder(**inputs).last_hidden_state[0]
            words = teacher.text.norm(teacher.text.project(states if special else states[1:-1]))
            unit = [list(torch.nn.functional.normalize(found, dim=-1)) for found in (cells[i], words)]
            expected.append(slow_scan(*unit, teacher.design.scan))
        assert cells.shape[1] == 9 + 3 * (eye == "cnn")
        got = teacher.score(*memories(teacher, 2, texts), *rows)
    assert torch.tensor(expected).std() > 1e-3
    torch.testing.assert_close(got, teacher.pair_scale.detach() * torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["logit", "logit+cosine", "cosine"])
def test_score_kinds(kind: str) -> None:
    teacher = fragment(score_kind=kind, cosine_weight=3.0)
    images, texts = memories(teacher)
    rows = every_pair(3, len(TEXTS))
    with torch.no_grad():
        got = teacher.score(images, texts, *rows)
        logit = (teacher.pair_scale * teacher.pair_matrix(images, texts))[rows]
    cosine = (images["embedding"][rows[0]] * texts["embedding"][rows[1]]).sum(dim=1)
    expected = {"logit": logit, "logit+cosine": logit + 3 * cosine, "cosine": cosine}[kind]
    torch.testing.assert_close(got, expected)
    assert got.dtype == torch.float32
    assert logit.std() > 0.01
    assert cosine.std() > 0.01


def test_vectors_alone_are_those_of_the_memories() -> None:
    teacher = fragment()
    images, texts = memories(teacher)
    with torch.no_grad():
        assert torch.equal(teacher.embed("image", teacher.prepare_images(pictures(3))), images["embedding"])
        assert torch.equal(teacher.embed("text", teacher.prepare_texts(TEXTS)), texts["embedding"])


def test_no_pairs_give_no_scores() -> None:
    teacher, none = fragment(), torch.zeros(0, dtype=torch.long)
    assert teacher.score(*memories(teacher), none, none).shape == (0,)


@pytest.mark.parametrize("size", [1, 5, 1024])
def test_the_teacher_keeps_chunks_and_batches_out_of_its_scores(size: int) -> None:
    teacher = fragment(pairs_per_chunk=size)
    rows = every_pair(3, len(TEXTS))
    with torch.no_grad():
        together = teacher.score(*memories(teacher), *rows)
        alone = []
        for i, t in zip(*rows, strict=True):
            image = teacher.encode_images(teacher.prepare_images(pictures(3)[int(i) : int(i) + 1]))
            text = teacher.encode_texts(teacher.prepare_texts([TEXTS[int(t)]]))
            zero = torch.zeros(1, dtype=torch.long)
            alone.append(teacher.score(image, text, zero, zero))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_special_tokens_are_no_words_unless_asked_or_alone() -> None:
    ids = torch.tensor([[2, 7, 1, 3, 0], [2, 3, 0, 0, 0]])  # [CLS] w3 [UNK] [SEP], then a text without any word
    attention = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    assert fragment().text.word_mask(ids, attention).tolist() == [
        [False, True, True, False, False],
        [True, True, False, False, False],
    ]
    both = fragment(replace(SMALL, special_words=True))
    assert torch.equal(both.text.word_mask(ids, attention), attention.bool())


@pytest.mark.parametrize("family", ["bert", "electra", "roberta"])
@pytest.mark.parametrize("eye", ["cnn", "vit"])
def test_frozen_outputs_stand_in_for_prepared_inputs(family: str, eye: str) -> None:
    teacher = fragment(family=family, eye=eye)
    inputs = {"image": teacher.prepare_images(pictures(3)), "text": teacher.prepare_texts(TEXTS)}
    kept = {side: teacher.freeze(side, given_) for side, given_ in inputs.items()}
    length = inputs["text"]["input_ids"].shape[1]
    # Storage without padding gives zeros back in its place, and in another batch more of it.
    refilled = {
        name: torch.zeros(len(TEXTS), length + 3, *tensor.shape[2:], dtype=tensor.dtype)
        for name, tensor in kept["text"].items()
    }
    real = kept["text"]["attention_mask"].bool()
    for name, tensor in kept["text"].items():
        refilled[name][:, :length][real] = tensor[real]
    with torch.no_grad():
        live = teacher.encode_images(inputs["image"]), teacher.encode_texts(inputs["text"])
        stored = teacher.encode_images(kept["image"]), teacher.encode_texts(kept["text"])
        again = teacher.encode_texts(refilled)
        rows = every_pair(3, len(TEXTS))
        scores = teacher.score(*live, *rows)
        assert torch.equal(teacher.score(*stored, *rows), scores)
        torch.testing.assert_close(teacher.score(stored[0], again, *rows), scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(again["embedding"], live[1]["embedding"], atol=1e-6, rtol=0)
    expected = teacher.text.encoder(**inputs["text"]).last_hidden_state
    torch.testing.assert_close(kept["text"]["hidden"][real], expected[real], atol=1e-5, rtol=1e-5)


def test_the_frozen_image_side_is_a_fusion_teachers_own() -> None:
    ours, theirs = fragment(), fusion()
    assert ours.frozen_identity("image") == theirs.frozen_identity("image")
    inputs = ours.prepare_images(pictures(2))
    for name, tensor in theirs.freeze("image", inputs).items():
        assert torch.equal(ours.freeze("image", inputs)[name], tensor)
    assert ours.prepare_identity("image") == theirs.prepare_identity("image")


def test_frozen_identity_follows_the_frozen_part_alone() -> None:
    base = fragment()
    trained = fragment()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    sides = ("image", "text")
    assert [trained.frozen_identity(side) for side in sides] == [base.frozen_identity(side) for side in sides]
    assert trained.identity != base.identity
    moved = fragment()
    moved.text.encoder.encoder.layer[3].output.dense.weight.data[0, 0] += 1e-6
    assert moved.frozen_identity("text") != base.frozen_identity("text")
    assert fragment(max_text_length=7).frozen_identity("text") != base.frozen_identity("text")
    open_ = fragment(replace(SMALL, freeze_vision=False, freeze_text=False))
    for side in sides:
        assert open_.frozen_identity(side) is None
        with pytest.raises(ValueError, match=f"the {side} backbone is not frozen"):
            open_.freeze(side, {})


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_reaches_what_trains_and_nothing_else(frozen: bool) -> None:
    teacher = fragment(replace(SMALL, freeze_vision=frozen, freeze_text=frozen), eye="vit").train()
    images = teacher.encode_images(teacher.prepare_images(pictures(3)))
    texts = teacher.encode_texts(teacher.prepare_texts(TEXTS))
    cosine = images["embedding"] @ texts["embedding"].T
    (teacher.pair_scale * teacher.pair_matrix(images, texts) + teacher.scale * cosine).square().sum().backward()
    trained = {name: p for name, p in teacher.named_parameters() if p.requires_grad}
    without = [
        name
        for name, p in trained.items()
        if (p.grad is None or not p.grad.abs().sum() > 0) and not name.endswith(("key.bias", "weigh.bias"))
    ]
    assert without == []
    backbones = ("image.backbone.", "text.encoder.")
    assert {name for name, p in teacher.named_parameters() if not p.requires_grad} == (
        {name for name, _ in teacher.named_parameters() if name.startswith(backbones)} if frozen else set()
    )
    assert len(list(teacher.pretrained_parameters())) == sum(name.startswith(backbones) for name in trained)
    training = [name for name, module in teacher.named_modules() if module.training]
    assert any(name.startswith(backbones) for name in training) is not frozen


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    scan = ScanDesign(t2i=DirectionDesign("relu", 5.0, "lse", 7.0), i2t_share=0.25)
    teacher = fragment(replace(SMALL, scan=scan, special_words=True), score_kind="logit+cosine", cosine_weight=2.0)
    teacher.save_pretrained(tmp_path)
    again = FragmentTeacher.from_pretrained(tmp_path)
    assert (again.design, again.options) == (teacher.design, teacher.options)
    assert again.identity == teacher.identity
    rows = every_pair(3, len(TEXTS))
    with torch.no_grad():
        assert torch.equal(again.score(*memories(again), *rows), teacher.score(*memories(teacher), *rows))
    assert FragmentTeacher.from_pretrained(tmp_path, options=FragmentOptions("cosine")).score_kind == "cosine"
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        FragmentTeacher.from_pretrained(tmp_path / "nowhere")


def test_identity_follows_what_can_change_a_score_and_nothing_else() -> None:
    base = fragment().identity
    assert fragment().identity == base
    assert fragment(pairs_per_chunk=3).identity == base
    other_scale = fragment()
    other_scale.logit_scale.data += 1
    assert other_scale.identity == base
    changed = [
        fragment(score_kind="cosine"),
        fragment(score_kind="logit+cosine"),
        fragment(score_kind="logit+cosine", cosine_weight=2.0),
        fragment(max_text_length=9),
        fragment(replace(SMALL, special_words=True)),
        fragment(replace(SMALL, scan=ScanDesign(i2t_share=0.4))),
        fragment(replace(SMALL, scan=ScanDesign(t2i=DirectionDesign(attention_scale=8.0)))),
        fragment(eye="vit"),
    ]
    for name in ("log_pair_scale", "text.project.weight", "image.tokens.row", "text.head.linear.bias"):
        moved = fragment()
        moved.get_parameter(name).data += 1e-4
        changed.append(moved)
    identities = [teacher.identity for teacher in changed]
    assert len({base, *identities}) == len(identities) + 1
    fixed = fragment()
    kept = fixed.fix_identity()
    fixed.log_pair_scale.data += 1
    assert fixed.identity == kept
    assert fixed.train().identity != kept


def test_half_precision_scores_stay_near() -> None:
    teacher, rows = fragment(), every_pair(3, len(TEXTS))
    with torch.no_grad():
        exact = teacher.score(*memories(teacher), *rows)
        half = fragment().to(torch.bfloat16)
        near = half.score(*memories(half), *rows)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, atol=0.3, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FragmentOptions("log_odds"), "has no matching head and gives one of logit, "),
        (lambda: FragmentOptions(max_text_length=2), "need 3"),
        (lambda: FragmentOptions(pairs_per_chunk=0), "at least 1"),
        (lambda: FragmentDesign(dropout=1.0), "below 1"),
        (lambda: FragmentDesign(fragment_dim=0), "at least 1"),
        (lambda: ScanDesign(i2t_share=1.5), "expected 0"),
        (lambda: DirectionDesign(clip="tanh"), "expected one of leaky, relu"),
        (lambda: DirectionDesign(attention_scale=0.0), "more than 0"),
        (lambda: fragment(max_text_length=99), "has 40 positions"),
    ],
)
def test_wrong_choices_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
