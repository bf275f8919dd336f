"""Teaching: the negatives it draws, what it learns on a world that can be learnt, and that a killed run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.batches import Batches
from distill.data.scenes import make_scenes
from distill.data.vocabulary import learn_tokenizer
from distill.embed import live_source
from distill.sampler import BatchSampler
from distill.teach import TeachingError, TeachSettings, _draw, teach
from teachers import BlipTeacher

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


def taught(folder: Path, teacher: BlipTeacher | None = None, **changes) -> BlipTeacher:
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


def test_a_teaching_that_died_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = taught(tmp_path / "whole")
    original = Batches.__getitem__

    def dying(self: Batches, step: int):
        if step == 5:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Batches, "__getitem__", dying)
    with pytest.raises(KeyboardInterrupt):
        taught(tmp_path / "cut")
    monkeypatch.undo()
    resumed = taught(tmp_path / "cut", tiny(seed=9))
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
            cosine = images["embedding"] @ texts["embedding"].T
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
    with pytest.raises(TeachingError, match=r"step 0: contrastive loss .* matching loss nan"):
        taught(tmp_path, teacher)
