"""Teaching: the negatives it draws, what it learns on a world that can be learnt, and that a killed run goes on.

Each teacher is taught by what it offers: a matching head, or similarities of fragments.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from distill.batches import Batches
from distill.data.scenes import make_scenes
from distill.data.vocabulary import learn_tokenizer
from distill.embed import live_source
from distill.sampler import BatchSampler
from distill.teach import TeachingError, TeachSettings, _draw, hinge, teach
from teachers import BlipTeacher
from teachers.fragment import FragmentTeacher
from teachers.fragment_options import FragmentDesign

SETTINGS = TeachSettings(
    steps=8,
    batch_size=12,
    itm_queries=None,
    lr=1e-3,
    pretrained_lr=None,
    weight_decay=0.01,
    warmup=0.1,
    grad_clip=1.0,
    random_negatives=0.5,
    itm_weight=1.0,
    seed=0,
    log_every=2,
    checkpoint_every=3,
)
CORPUS = make_scenes(images=40, val=4, test=4)


def tiny(seed: int = 0) -> BlipTeacher:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    spread = {"initializer_range": 0.15}
    text = {**shape, **spread, "encoder_hidden_size": 16, "max_position_embeddings": 40}
    return BlipTeacher.from_config(
        vision={**shape, **spread, "patch_size": 16},
        text=text,
        embed_dim=8,
        image_size=48,
        tokenizer=learn_tokenizer(list(CORPUS.texts), size=200),
    )


def tiny_fragment(seed: int = 0) -> FragmentTeacher:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    words = learn_tokenizer(list(CORPUS.texts), size=200)
    text = BertConfig(**shape, vocab_size=len(words), max_position_embeddings=40, initializer_range=0.15)
    return FragmentTeacher(
        ViTModel(ViTConfig(**shape, image_size=48, patch_size=16, initializer_range=0.15)),
        BertModel(text),
        ViTImageProcessorPil(size={"height": 48, "width": 48}),
        words,
        FragmentDesign(fragment_dim=32, embed_dim=16, freeze_vision=False, freeze_text=False, dropout=0.0),
    )


def taught(folder: Path, teacher: nn.Module | None = None, **changes) -> nn.Module:
    teacher = teacher or tiny()
    settings = replace(SETTINGS, **changes)
    sources = [live_source(CORPUS, side, teacher) for side in ("image", "text")]
    batches = Batches(BatchSampler(CORPUS.split_pairs("train"), settings.batch_size, 0), *sources, CORPUS.matches)
    folder.mkdir(parents=True, exist_ok=True)
    teach(teacher, batches, settings, folder=folder, accelerator=Accelerator(cpu=True), meaning="m")
    return teacher


def test_negatives_are_drawn_by_softmax_and_never_match() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, 9.0], [0.0, 0.0, 0.0, 0.0]]).repeat(4000, 1)
    positive = torch.tensor([[False, False, False, True], [True, False, False, True]]).repeat(4000, 1)
    drawn = _draw(logits, positive, torch.Generator().manual_seed(0)).reshape(4000, 2)
    assert not positive.reshape(4000, 2, 4).gather(2, drawn.unsqueeze(-1)).any()
    shares = torch.bincount(drawn[:, 0], minlength=4) / 4000
    expected = torch.tensor([2.0, 0.0, 1.0]).softmax(0)
    torch.testing.assert_close(shares[:3], expected, atol=0.03, rtol=0)
    assert torch.bincount(drawn[:, 1], minlength=4)[1:3].min() > 1850


def test_a_batch_in_which_everything_matches_is_refused() -> None:
    with pytest.raises(TeachingError, match="batch_size"):
        _draw(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.Generator())


@pytest.mark.parametrize("make", [tiny, tiny_fragment])
def test_a_teaching_that_died_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., nn.Module]
) -> None:
    whole = taught(tmp_path / "whole", make())
    original = Batches.__getitem__

    def dying(self: Batches, step: int):
        if step == 5:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Batches, "__getitem__", dying)
    with pytest.raises(KeyboardInterrupt):
        taught(tmp_path / "cut", make())
    monkeypatch.undo()
    resumed = taught(tmp_path / "cut", make(seed=9))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_both_heads_learn(tmp_path: Path) -> None:
    teacher = tiny()
    pairs = torch.from_numpy(CORPUS.split_pairs("train")[:24])

    def losses() -> tuple[float, float]:
        teacher.eval()
        with torch.no_grad():
            images = teacher.encode_images(live_source(CORPUS, "image", teacher)(pairs[:, 0].numpy()))
            texts = teacher.encode_texts(live_source(CORPUS, "text", teacher)(pairs[:, 1].numpy()))
            rows = torch.arange(24)
            right = teacher.pair_logits(images, texts, rows, rows)
            wrong = teacher.pair_logits(images, texts, rows, rows.roll(7))
            vectors = [
                teacher.embed(side, live_source(CORPUS, side, teacher)(pairs[:, at].numpy()))
                for at, side in enumerate(("image", "text"))
            ]
            cosine = vectors[0] @ vectors[1].T
        itm = torch.nn.functional.softplus(torch.cat([-right, wrong])).mean()
        return itm.item(), (cosine.diagonal().mean() - cosine.mean()).item()

    itm_before, gap_before = losses()
    taught(tmp_path, teacher, steps=400, lr=4e-3, random_negatives=1.0, checkpoint_every=400)
    itm_after, gap_after = losses()
    assert itm_after < 0.75 * itm_before
    assert gap_after > gap_before + 0.1


def test_a_loss_that_is_not_finite_stops_with_both_parts(tmp_path: Path) -> None:
    teacher = tiny()
    with torch.no_grad():
        teacher.model.itm_head.bias.fill_(float("nan"))
    with pytest.raises(TeachingError, match=r"step 0: contrastive loss .* pair loss nan"):
        taught(tmp_path, teacher)


def ranks_of_own_texts(teacher: FragmentTeacher) -> torch.Tensor:
    """Place (40,) of the best own caption among all training captions, for each training image."""
    split = CORPUS.split("train")
    with torch.no_grad():
        images = teacher.encode_images(live_source(CORPUS, "image", teacher)(split.images))
        texts = teacher.encode_texts(live_source(CORPUS, "text", teacher)(split.texts))
        similarity = teacher.pair_matrix(images, texts)
    match = torch.from_numpy(CORPUS.matches.is_match(split.images[:, None], split.texts[None]))
    best = similarity.masked_fill(~match, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + (similarity.masked_fill(match, -torch.inf) >= best).sum(dim=1)


def test_a_fragment_teacher_learns_from_contrast(tmp_path: Path) -> None:
    teacher = tiny_fragment()
    before = ranks_of_own_texts(teacher).float()
    taught(tmp_path, teacher, steps=150, lr=2e-3, checkpoint_every=150, log_every=10)
    after = ranks_of_own_texts(teacher).float()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["pair"] for line in lines]
    assert len(losses) == 15
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert lines[-1]["accuracy"] > 0.8
    # By chance the best of an image's two captions among 80 lies at rank 27 on average.
    assert before.mean() > 15
    assert after.mean() < 8


@pytest.mark.parametrize("hardest", [True, False])
def test_hinge_equals_loops(hardest: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    similarity = torch.rand(4, 5, generator=draw)
    positive = torch.rand(4, 5, generator=draw) < 0.3
    assert positive.sum() > 2
    expected = 0.0
    for values, match in ((similarity, positive), (similarity.T, positive.T)):
        terms = []
        for i, row in enumerate(values.tolist()):
            negatives = [other for t, other in enumerate(row) if not match[i, t]]
            for t, own in enumerate(row):
                if match[i, t]:
                    costs = [max(0.0, 0.2 - own + other) for other in negatives]
                    terms.append(max(costs) if hardest else sum(costs) / len(costs))
        expected += sum(terms) / len(terms)
    assert expected > 0.1
    assert hinge(similarity, positive, margin=0.2, hardest=hardest).item() == pytest.approx(expected, rel=1e-6)
    alone = torch.ones(1, 2, dtype=torch.bool)  # nothing to be better than
    assert hinge(similarity[:1, :2], alone, margin=0.2, hardest=hardest) == 0


def test_the_hinge_parts_matches_from_the_rest_by_its_margin() -> None:
    similarity = torch.nn.Parameter(torch.zeros(5, 7))
    positive = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    for step in range(400):
        similarity.grad = None
        hinge(similarity, positive, margin=0.2, hardest=step >= 50).backward()
        similarity.data -= 0.1 * similarity.grad
    for values, match in ((similarity.detach(), positive), (similarity.detach().T, positive.T)):
        for row, own in zip(values, match, strict=True):
            if own.any() and not own.all():
                assert row[own].min() - row[~own].max() > 0.19


def test_a_fragment_teacher_can_be_taught_by_a_hinge(tmp_path: Path) -> None:
    before, teacher = tiny_fragment(), taught(tmp_path, tiny_fragment(), hinge_margin=0.2)
    moved = [name for name, value in teacher.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    assert any(name.startswith("text.project") for name in moved)
    assert "log_pair_scale" not in moved, "a hinge knows no scale"
