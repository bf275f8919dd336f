"""The check-up of a teacher: its statistics against loops, its findings on teachers of known faults, the command."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import typer
from typer.testing import CliRunner

from distill import cli
from distill.checkup import separation
from distill.checkup.advice import arm_findings, loss_advice, training_warnings
from distill.checkup.anatomy import Anatomy, anatomy
from distill.checkup.figures import ALL_HARD, measure
from distill.checkup.findings import Finding, findings
from distill.checkup.sample import DoctorError, draw_sample, hard_kind, hard_negatives, random_pairs
from distill.doctor_commands import doctor_app
from distill.doctor_teacher import TEACHERS_OWN, ask, examine
from distill.pipeline import DONE, taught_teacher
from distill.protocols import Embeddings
from distill.recipe.load import load_recipe
from distill.recipe.losses import Cprd, Kl, MarginMse
from distill.recipe.variants import variants
from distill.report.teacher_page import plot, show
from tests.toys import ToyTeacher, toy_corpus, toy_tokens

# --- statistics against slow loops ------------------------------------------------------------------------------------


def some_lists(rows: int = 12, width: int = 6, seed: int = 0) -> np.ndarray:
    """Scores in halves, so that ties are frequent."""
    return (np.random.default_rng(seed).integers(-6, 6, (rows, width)) / 2).astype(np.float32)


def test_auc_hits_firsts_and_ties_as_counted_by_hand():
    lists = some_lists()
    positive, negative = lists[:, 0], lists[:, 1:].ravel()
    won = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert separation.auc(positive, negative) == pytest.approx(won / (len(positive) * len(negative)))
    hits, firsts, equal, seen = [], [], 0, 0
    for true, *others in lists.tolist():
        hits.append(sum((true > other) + 0.5 * (true == other) for other in others) / len(others))
        firsts.append(float(true > max(others)))
        for left in range(len(others) + 1):
            for right in range(left):
                row = [true, *others]
                equal, seen = equal + (row[left] == row[right]), seen + 1
    assert separation.hits(lists).tolist() == pytest.approx(hits)
    assert separation.firsts(lists).tolist() == firsts
    assert 0 < equal < seen
    assert separation.tied(lists) == pytest.approx(equal / seen)
    both = separation.per_image(separation.hits(lists))
    assert both.tolist() == pytest.approx([(hits[row] + hits[row + 6]) / 2 for row in range(6)])


def bfloat16(value: float) -> float:
    """Round to nearest even by the bits, as hardware does."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits += 0x7FFF + ((bits >> 16) & 1)
    return struct.unpack("<f", struct.pack("<I", (bits >> 16 << 16) & 0xFFFFFFFF))[0]


def test_rounding_and_saturation_against_bits_and_loops():
    scores = np.random.default_rng(1).normal(0, 9, 500).astype(np.float32)
    assert separation.rounded(scores, "bfloat16").tolist() == [bfloat16(float(score)) for score in scores]
    halves = [struct.unpack("<e", struct.pack("<e", float(score)))[0] for score in scores]
    assert separation.rounded(scores, "float16").tolist() == halves
    near = lost = half = 0
    for score in scores.astype(np.float64):
        p = 1 / (1 + math.exp(-score))
        near += min(p, 1 - p) < 1e-3
        lost += bfloat16(p) in (0.0, 1.0)
        half += struct.unpack("<e", struct.pack("<e", p))[0] in (0.0, 1.0)
    found = separation.saturation(scores)
    assert 0 < near < 500
    assert 0 < lost < half + lost
    assert (found.near, found.bfloat16, found.float16) == (near / 500, lost / 500, half / 500)


def test_ties_appear_when_scores_are_rounded():
    lists = np.array([[1.0, 1.001, 5.0], [2.0, 2.0, 3.0]], np.float32)
    found = separation.ties(lists)
    assert found.float32 == pytest.approx(1 / 6)
    assert found.bfloat16 == pytest.approx(2 / 6)  # 1.001 is 1 in bfloat16, and not in float16
    assert found.float16 == pytest.approx(1 / 6)


def test_entropy_and_the_temperature_that_halves_it():
    lists = np.random.default_rng(2).normal(0, 7, (20, 9)).astype(np.float32)
    for temperature in (0.5, 3.0):
        slow = []
        for row in lists.astype(np.float64):
            weights = [math.exp((score - row.max()) / temperature) for score in row]
            shares = [weight / sum(weights) for weight in weights]
            slow.append(-sum(p * math.log(p) for p in shares if p > 0) / math.log(9))
        assert separation.entropy(lists, temperature).tolist() == pytest.approx(slow)
    found = separation.medium_temperature(lists)
    assert found is not None
    assert separation.entropy(lists, found).mean() == pytest.approx(0.5, abs=1e-6)
    assert separation.medium_temperature(1000 * lists) == pytest.approx(1000 * found, rel=1e-3)
    assert separation.medium_temperature(np.ones((3, 4), np.float32)) is None
    tied_at_the_top = np.tile(np.array([5, 5, 5, 0], np.float32), (3, 1))
    assert separation.medium_temperature(tied_at_the_top) is None


def test_d_prime_and_spread_by_hand():
    positive, negative = np.array([1, 2, 3], np.float32), np.array([0, 1, 5], np.float32)
    wanted = (2 - 2) / math.sqrt((1 + 7) / 2)
    assert separation.d_prime(positive, negative) == pytest.approx(wanted)
    assert separation.d_prime(positive + 4, negative) == pytest.approx(4 / math.sqrt((1 + 7) / 2))
    assert separation.d_prime(np.ones(3, np.float32), np.ones(4, np.float32)) is None
    found = separation.spread(np.array([1, 2, np.nan, np.inf, 6], np.float32))
    assert (found.count, found.not_finite, found.mean) == (5, 2, 3.0)
    assert found.std == pytest.approx(math.sqrt(7))
    assert found.quantiles["0.5"] == 2
    assert separation.spread(np.array([np.nan], np.float32)).mean is None


def test_the_interval_draws_whole_pictures():
    generator = np.random.default_rng(3)
    positive = generator.normal(1, 1, 40).astype(np.float32)
    offsets = generator.normal(0, 1, 40)
    few = (offsets[:, None] + generator.normal(0, 0.01, (40, 2))).astype(np.float32)
    found = separation.auc_interval(positive, few.ravel(), np.repeat(np.arange(40), 2), seed=0)
    # the same negatives many times over say nothing new, so the interval must not shrink
    many = np.repeat(few, 20, axis=1)
    again = separation.auc_interval(positive, many.ravel(), np.repeat(np.arange(40), 40), seed=0)
    assert found.value == pytest.approx(separation.auc(positive, few.ravel()))
    assert again.high - again.low == pytest.approx(found.high - found.low, rel=1e-6)
    slow = []
    for _ in range(600):
        drawn = generator.integers(0, 40, 40)
        slow.append(separation.auc(positive[drawn], few[drawn].ravel()))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    assert found.low < found.value < found.high
    tied = separation.auc_interval(np.ones(9, np.float32), np.ones(9, np.float32), np.arange(9), seed=0)
    assert tied == separation.Interval(0.5, 0.5, 0.5)


def test_the_interval_of_a_mean_is_that_of_pictures():
    values = np.random.default_rng(4).normal(0.5, 0.2, 100)
    found = separation.mean_interval(values, seed=0)
    half = 1.96 * values.std(ddof=1) / 10
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert separation.mean_interval(np.full(5, 0.25), seed=0) == separation.Interval(0.25, 0.25, 0.25)


# --- the sample -------------------------------------------------------------------------------------------------------


def unit(numbers: np.ndarray) -> np.ndarray:
    return (numbers / np.linalg.norm(numbers, axis=1, keepdims=True)).astype(np.float32)


def test_the_sample_is_labelled_of_its_split_and_the_same_every_time():
    corpus = toy_corpus(96, captions=3)
    sample = draw_sample(corpus, "val", images=10, seed=5)
    assert len(sample.true) == 10
    assert np.all(np.diff(sample.images) > 0)
    assert corpus.matches.is_match(sample.true[:, 0], sample.true[:, 1]).all()
    assert set(sample.images) <= set(corpus.split("val").images)
    assert len(sample.texts) == 30
    assert set(sample.true[:, 1]) <= set(sample.texts)
    again = draw_sample(corpus, "val", images=10, seed=5)
    assert np.array_equal(sample.true, again.true)
    assert not np.array_equal(sample.true, draw_sample(corpus, "val", images=10, seed=6).true)
    assert len(draw_sample(corpus, "val", images=1000, seed=0).true) == 24
    random = random_pairs(corpus, sample, seed=5)
    assert len(random) == 40
    assert len(np.unique(random, axis=0)) == 40
    assert not corpus.matches.is_match(random[:, 0], random[:, 1]).any()


def test_hard_negatives_are_the_most_similar_that_do_not_match():
    corpus = toy_corpus(64, captions=2)
    sample = draw_sample(corpus, "val", images=12, seed=0)
    generator = np.random.default_rng(0)
    vectors = {"image": unit(generator.normal(size=(12, 5))), "text": unit(generator.normal(size=(24, 5)))}
    found = hard_negatives(corpus, sample, vectors, k=4)
    assert found.shape == (24, 4, 2)
    similarity = vectors["image"].astype(np.float64) @ vectors["text"].T.astype(np.float64)
    for row, (image, text) in enumerate(sample.true.tolist()):
        others = [t for t in range(24) if not corpus.matches.is_match(image, sample.texts[t])]
        best = sorted(others, key=lambda t: -similarity[row, t])[:4]
        assert found[row].tolist() == [[image, sample.texts[t]] for t in best]
        column = int(np.searchsorted(sample.texts, text))
        others = [i for i in range(12) if not corpus.matches.is_match(sample.images[i], text)]
        best = sorted(others, key=lambda i: -similarity[i, column])[:4]
        assert found[12 + row].tolist() == [[sample.images[i], text] for i in best]


def test_a_sample_without_negatives_is_refused():
    corpus = toy_corpus(12, captions=1)
    sample = draw_sample(corpus, "val", images=1, seed=0)
    with pytest.raises(DoctorError, match="raise --images"):
        random_pairs(corpus, sample, seed=0)
    with pytest.raises(DoctorError, match="no negative"):
        hard_negatives(corpus, sample, {"image": unit(np.ones((1, 2))), "text": unit(np.ones((1, 2)))}, k=4)


# --- findings on teachers of known faults -----------------------------------------------------------------------------


class Scripted(ToyTeacher):
    """A toy teacher whose scores are a function of (image, text) rows."""

    def __init__(self, script, *, kind: str = "log_odds"):
        super().__init__()
        self.script, self.score_kind = script, kind

    def score(self, images, texts, image_rows, text_rows):
        i, t = images["number"][image_rows].numpy(), texts["input_ids"][text_rows, 0].numpy()
        return torch.from_numpy(np.asarray(self.script(i, t), np.float32))


class Headless(Scripted):
    """Without a contrastive head."""

    def encode_images(self, inputs):
        return {name: tensor for name, tensor in super().encode_images(inputs).items() if name != "embedding"}

    def encode_texts(self, inputs):
        return {name: tensor for name, tensor in super().encode_texts(inputs).items() if name != "embedding"}


class Knowing(torch.nn.Module):
    """A student whose vectors are a noisy picture of the truth: captions 2 n and 2 n + 1 belong to image n."""

    def __init__(self, noise: float):
        super().__init__()
        generator = np.random.default_rng(7)
        truth = generator.normal(size=(256, 16))
        self.image_vectors = unit(truth + noise * generator.normal(size=truth.shape))
        self.text_vectors = unit(np.repeat(truth, 2, axis=0) + noise * generator.normal(size=(512, 16)))

    def prepare_images(self, images):
        return {"shade": torch.tensor([[image.convert("L").getpixel((0, 0))] for image in images])}

    def prepare_texts(self, texts):
        return toy_tokens(texts)

    def forward(self, images=None, texts=None):
        seen = None if images is None else torch.from_numpy(self.image_vectors[images["shade"][:, 0]])
        read = None if texts is None else torch.from_numpy(self.text_vectors[texts["input_ids"][:, 0]])
        return Embeddings(seen, read, torch.tensor(10.0))


def noise(i, t):
    """Fixed pseudo-random number of a pair, within -1 .. 1."""
    return np.sin(i * 12.9898 + t * 78.233 + i * t * 0.37)


def knows(i, t):
    """True pairs around 3, others around -3."""
    return np.where(t // 2 == i, 3.0, -3.0) + 2 * noise(i, t)


def experiment(folder: Path, teacher, student, *, trained: bool = True, kind: str = "config"):
    """What ``examine`` reads of an experiment."""
    if trained:
        home = folder / "arms" / "plain" / "student"
        home.mkdir(parents=True)
        (home / DONE).write_text("{}")
    recipe = SimpleNamespace(
        seed=0,
        arms={"plain": None},
        mine=SimpleNamespace(k=6),
        evaluate=SimpleNamespace(split="test"),
        student=SimpleNamespace(kind=kind),
    )
    return SimpleNamespace(
        recipe=recipe,
        folder=folder,
        corpus=toy_corpus(128, captions=2),
        teacher=teacher,
        builders=SimpleNamespace(ensemble=None),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        saved_student=lambda _: student,
        fresh_student=lambda: student,
    )


def looked_at(x, arms=None, *, others=None, label="teacher"):
    e = examine(x, others or {}, label=label, images=32)
    figures = measure(e, x.corpus, seed=0)
    found = findings(e, figures, Anatomy("toy"), x.corpus)
    if figures.losses is not None:
        found += training_warnings(e) + arm_findings(e, figures.losses, arms or {})
    return e, figures, found


def level(found: list[Finding], topic: str) -> str:
    (one,) = [finding.level for finding in found if finding.topic == topic]
    return one


@pytest.fixture
def student():
    return Knowing(noise=1.2)


def test_a_good_teacher_is_told_so(tmp_path, student):
    e, figures, found = looked_at(experiment(tmp_path, Scripted(knows), student))
    assert {finding.level for finding in found} == {"OK"}
    assert set(e.questions.hard) == {TEACHERS_OWN, "student plain"}
    assert e.mined_by == "student plain"
    assert figures.student.hits.low > 0
    assert figures.doubts == (), "it puts no negative above a true pair"
    pairs = e.questions.pairs()
    assert e.answers.pairs.tolist() == knows(pairs[:, 0], pairs[:, 1]).astype(np.float32).tolist()
    found = figures.scorers["teacher"].against[ALL_HARD]
    assert found.auc.value == separation.auc(e.answers.true, e.answers.together()[:, 1:].ravel())
    assert figures.scorers["student plain"].saturation == {}, "a cosine is no log-odds"
    for row, lists in enumerate(e.answers.lists["student plain"]):
        image, text = e.sample.true[row % 32].tolist()
        assert lists[0] == np.float32(knows(image, text))


def test_a_constant_teacher_is_a_fault(tmp_path, student):
    _, figures, found = looked_at(experiment(tmp_path, Scripted(lambda i, t: 0 * i - 1.5), student))
    assert level(found, "scores") == "FAULT"
    assert figures.constant
    assert figures.losses is None


def test_a_nan_is_a_fault_that_names_the_pair_and_stops_nothing(tmp_path, student):
    def broken(i, t):
        return np.where(t // 2 == i, np.nan, knows(i, t))

    x = experiment(tmp_path, Scripted(broken), student)
    e, figures, found = looked_at(x)
    assert level(found, "scores") == "FAULT"
    (text,) = [finding.text for finding in found if finding.topic == "scores"]
    image = int(e.sample.images[0])
    assert text.startswith("32 of ")
    assert f"square-{image}.png" in text
    assert figures.scorers["teacher"].spreads["true pairs"].not_finite == 32
    assert not figures.constant
    plot(e, figures, tmp_path / "page.png", title="broken")
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_a_saturated_teacher_is_warned_of(tmp_path, student):
    x = experiment(tmp_path, Scripted(lambda i, t: 8 * knows(i, t)), student)
    parts = {"a": (Kl(name="kl"), MarginMse(name="margin_mse"), Cprd(name="cprd"))}
    e, figures, found = looked_at(x, parts)
    assert level(found, "saturation") == "WARN"
    assert figures.scorers["teacher"].saturation[hard_kind("student plain")].near > 0.9
    assert level(found, "kl of arm a") == "WARN"
    assert level(found, "margin_mse of arm a") == "WARN"
    assert level(found, "cprd of arm a") == "WARN", "no negative has positive log-odds"
    advised = {advice.loss: advice.line for advice in loss_advice(e, figures.losses)}
    temperature = figures.losses.medium_temperature
    assert advised["kl"] == f"{{name: kl, teacher_temperature: {temperature:.2g}}}"
    fitting = (
        Kl(name="kl", teacher_temperature=temperature),
        MarginMse(
            name="margin_mse",
            teacher_std=figures.losses.margin_std,
            temperature=figures.losses.student_margin_std,
        ),
        Cprd(name="cprd", accept="top", top=3),
    )
    (fine,) = arm_findings(e, figures.losses, {"a": fitting})
    assert fine.level == "OK"


def test_a_teacher_that_only_repeats_the_student_is_warned_of(tmp_path, student):
    def repeats(i, t):
        return 20 * (student.image_vectors[i] * student.text_vectors[t]).sum(axis=-1)

    x = experiment(tmp_path, Scripted(repeats, kind="logit"), student)
    _, figures, found = looked_at(x)
    assert level(found, "against the student") == "WARN"
    assert figures.student.hits.value == pytest.approx(0, abs=0.01)
    assert figures.student.spearman == pytest.approx(1, abs=1e-4)
    assert figures.scorers["teacher"].saturation == {}, "scores that are no log-odds have no probability"
    (text,) = [finding.text for finding in found if finding.topic == "against the student"]
    assert "no better, as far as 32 pictures can tell" in text
    x.teacher = Scripted(lambda i, t: repeats(i, t) + noise(t, i), kind="logit")
    _, figures, found = looked_at(x)
    assert figures.student.hits.low <= 0 < figures.student.hits.high, "a gain that 32 pictures cannot show"
    assert level(found, "against the student") == "WARN"


def test_a_teacher_that_is_worse_than_the_student_and_than_a_coin(tmp_path):
    x = experiment(tmp_path, Scripted(lambda i, t: -knows(i, t)), Knowing(noise=0.3))
    _, _, found = looked_at(x)
    assert level(found, "separation") == "WARN"
    (text,) = [finding.text for finding in found if finding.topic == "against the student"]
    assert "the teacher is worse" in text


def test_the_doubts_are_the_negatives_furthest_above_their_true_pair(tmp_path, student):
    x = experiment(tmp_path, Scripted(lambda i, t: knows(i, t) / 3 + 2 * noise(t, i)), student)
    e, figures, _ = looked_at(x)
    leads = {}
    for row, pairs in enumerate(e.questions.hard["student plain"]):
        for column, pair in enumerate(pairs.tolist()):
            lead = e.training_lists[row, 0] - e.training_lists[row, 1 + column]
            leads[tuple(pair)] = min(lead, leads.get(tuple(pair), 0.0))
    worst = sorted(leads, key=leads.get)[:5]
    assert leads[worst[-1]] < 0
    assert [(f"square-{i}.png", x.corpus.texts[t]) for i, t in worst] == [(d.image, d.text) for d in figures.doubts]
    for (image, text), doubt in zip(worst, figures.doubts, strict=True):
        assert doubt.score - doubt.true_score == pytest.approx(-leads[image, text], abs=1e-5)
        true = (image, x.corpus.texts.index(doubt.true)) if doubt.query == "image" else (int(doubt.true[7:-4]), text)
        assert x.corpus.matches.is_match(*true)


def test_ties_are_warned_of(tmp_path, student):
    _, _, found = looked_at(experiment(tmp_path, Scripted(lambda i, t: np.sign(knows(i, t))), student))
    assert level(found, "ties") == "WARN"
    close = experiment(tmp_path / "b", Scripted(lambda i, t: 300 + knows(i, t) / 10), student)
    _, figures, found = looked_at(close)
    assert figures.scorers["teacher"].ties.float32 == 0
    assert level(found, "ties") == "WARN", "bfloat16 has steps of 2 at 300"


def test_scores_that_look_like_probabilities_are_warned_of(tmp_path, student):
    squashed = Scripted(lambda i, t: 1 / (1 + np.exp(-knows(i, t))))
    _, _, found = looked_at(experiment(tmp_path, squashed, student))
    (warning,) = [finding for finding in found if finding.topic == "training"]
    assert "look like probabilities" in warning.text


def test_the_other_way_to_ask_is_compared(tmp_path, student):
    x = experiment(tmp_path, Scripted(lambda i, t: knows(i, t) / 4 + 3 * noise(t, i)), student)
    e, figures, found = looked_at(x, others={"[CLS]": lambda: Scripted(knows)}, label="[ENC]")
    assert list(e.scorers) == ["[ENC]", "[CLS]", "student plain"]
    assert level(found, "[ENC] or [CLS]") == "WARN"
    assert figures.variants["[CLS]"].hits.high < 0
    x.teacher = Scripted(knows)
    _, _, found = looked_at(x, others={"[CLS]": lambda: Scripted(lambda i, t: 5 * noise(t, i))}, label="[ENC]")
    assert level(found, "[ENC] or [CLS]") == "OK"

    def impossible():
        raise ValueError("the tokenizer has no such token")

    _, figures, found = looked_at(x, others={"[CLS]": impossible}, label="[ENC]")
    assert figures.variants == {}
    assert any("no such token" in finding.text for finding in found if finding.level == "NOTE")


def test_without_a_contrastive_head_the_student_finds_the_hard_ones(tmp_path, student):
    e, _, found = looked_at(experiment(tmp_path, Headless(knows), student))
    assert set(e.questions.hard) == {"student plain"}
    assert any("no contrastive head" in finding.text for finding in found)
    (text,) = [finding.text for finding in found if finding.topic == "against the student"]
    assert "which is hard on it" in text


def test_an_untrained_student_is_compared_only_where_it_has_weights_of_its_own(tmp_path, student):
    e, figures, found = looked_at(experiment(tmp_path, Headless(knows), student, trained=False))
    assert figures.student is None
    assert figures.losses.student_scale is None
    assert list(e.scorers) == ["teacher"]
    assert sum(finding.level == "NOTE" for finding in found) == 2
    e, figures, _ = looked_at(experiment(tmp_path, Scripted(knows), student, trained=False, kind="checkpoint"))
    assert e.student.label == "untrained student"
    assert figures.student is not None
    assert set(e.questions.hard) == {TEACHERS_OWN}


def test_each_item_is_encoded_once_and_nothing_depends_on_the_order():
    corpus = toy_corpus(64, captions=2)
    teacher = ToyTeacher()
    generator = np.random.default_rng(0)
    images, texts = generator.integers(0, 64, 900), generator.integers(0, 128, 900)
    scores = ask(teacher, corpus, images, texts)
    assert sorted(teacher.images) == sorted(set(images.tolist()))
    assert sorted(teacher.texts) == sorted(set(texts.tolist()))
    order = generator.permutation(900)
    assert np.array_equal(ask(ToyTeacher(), corpus, images[order], texts[order]), scores[order])


def test_body_findings_name_what_is_wrong(tmp_path, student):
    x = experiment(tmp_path, Scripted(knows), student)
    e = examine(x, {}, label="teacher", images=32)
    figures = measure(e, x.corpus, seed=0)
    bad = Anatomy(
        "BlipTeacher", 768, 8, 12, embedding_rows=100, tokenizer_length=101, max_text_length=9, longest=40, cut=0.3
    )
    found = findings(e, figures, bad, x.corpus)
    assert (level(found, "heads"), level(found, "vocabulary")) == ("WARN", "FAULT")
    assert level(found, "caption length") == "WARN"
    good = Anatomy(
        "BlipTeacher", 768, 12, 12, embedding_rows=102, tokenizer_length=100, max_text_length=40, longest=40, cut=0.0
    )
    found = findings(e, figures, good, x.corpus)
    assert {level(found, topic) for topic in ("heads", "vocabulary", "caption length")} == {"OK"}


# --- the command ------------------------------------------------------------------------------------------------------

TINY = [
    "data.train=60",
    "data.val=24",
    "data.test=12",
    "teach.steps=3",
    "teach.batch_size=16",
    "teacher.vision.layers=1",
    "teacher.text.layers=1",
    "student.vision.layers=1",
    "student.text.layers=1",
]
PNG_HEIGHT = 836


def settings(folder: Path) -> list[str]:
    return [*TINY, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}", "device=cpu"]


def call(folder: Path, *arguments: str):
    app = typer.Typer()
    app.add_typer(doctor_app(cli._open), name="doctor")

    @app.command()
    def other() -> None: ...

    overrides = [f"--set={item}" for item in settings(folder)] if arguments else []
    return CliRunner().invoke(app, ["doctor", *arguments, *overrides])


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A tiny BLIP, taught for three steps, and a student of random weights in a trained one's place."""
    folder = tmp_path_factory.mktemp("doctor")
    x = cli._open("quickstart", settings(folder))
    taught_teacher(x)
    home = x.folder / "arms" / "plain" / "student"
    home.mkdir(parents=True)
    x.fresh_student().save_pretrained(home)
    (home / DONE).write_text("{}")
    return folder


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_the_command_prints_writes_and_leaves_everything_else_alone(taught):
    before = files(taught)
    done = call(taught, "teacher", "quickstart", "--images", "20")
    assert done.exit_code == 0, done.output
    home = taught / "runs" / "quickstart" / "doctor"
    assert files(taught) - before == {home / "teacher.png", home / "teacher.json"}
    for piece in ("Where the scores lie", "BlipTeacher, log_odds; 20 pictures of val", "[CLS]: true pairs"):
        assert piece in done.output
    for topic in ("scores:", "separation:", "against the student:", "[ENC] or [CLS]:", "heads:", "caption length:"):
        assert topic in done.output
    assert "\x1b" not in done.output
    numbers = json.loads((home / "teacher.json").read_text())
    assert numbers["sample"]["images"] == 20
    assert set(numbers["figures"]["scorers"]) == {"[ENC]", "[CLS]", "student plain"}
    assert numbers["teacher"]["text_heads"] == 4
    assert numbers["teacher"]["image_size"] == [48, 48]
    assert numbers["findings"]
    again = call(taught, "teacher", "quickstart", "--images", "20", "--out", str(taught / "elsewhere"))
    assert again.exit_code == 0
    assert json.loads((taught / "elsewhere" / "teacher.json").read_text()) == numbers


def test_the_picture_shows_every_kind_of_every_scorer(taught):
    call(taught, "teacher", "quickstart", "--images", "16", "--out", str(taught / "seen"))
    with PIL.Image.open(taught / "seen" / "teacher.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (round((1 + 5.2 * 3) * 110), PNG_HEIGHT)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    edge = pixels.shape[1] // 3
    for column in range(3):
        part = pixels[:, column * edge : (column + 1) * edge]
        for colour in ("#0072b2", "#d55e00", "#cc79a7", "#8a8a8a"):
            wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
            assert (np.abs(part - wanted).max(axis=-1) < 12).sum() > 40, (column, colour)


def test_an_untaught_teacher_is_refused_at_once(tmp_path):
    done = call(tmp_path, "teacher", "quickstart")
    assert isinstance(done.exception, DoctorError)
    assert "distill teach quickstart --set=data.train=60" in str(done.exception)
    assert not files(tmp_path)


def test_doctor_alone_still_looks_at_the_installation(tmp_path):
    done = call(tmp_path)
    assert done.output.startswith("python ")
    assert "torch" in done.output


def test_a_fault_is_a_failure(taught, monkeypatch):
    from teachers.blip import BlipTeacher

    monkeypatch.setattr(BlipTeacher, "score", lambda self, images, texts, rows, _: torch.zeros(len(rows)))
    done = call(taught, "teacher", "quickstart", "--images", "16", "--out", str(taught / "fault"))
    assert done.exit_code == 1
    assert "FAULT scores: all " in done.output


def test_variants_are_the_other_tokens_of_a_blip():
    recipe = load_recipe("quickstart")
    assert list(variants(recipe)) == ["[ENC]", "[CLS]"]
    assert variants(recipe)["[CLS]"].teacher.enc_token == "cls"
    assert variants(recipe)["[CLS]"].data == recipe.data
    assert list(variants(load_recipe("quickstart", ["teacher.enc_token=cls"]))) == ["[CLS]", "[ENC]"]
    assert list(variants(load_recipe("quickstart", ["teacher.enc_token=7"]))) == ["token 7", "[ENC]", "[CLS]"]
    assert variants(load_recipe("quickstart", ["teacher.score_kind=cosine"])) == {}
    assert variants(load_recipe("quickstart", ["teacher={kind: fusion, vision: a, text: b}"])) == {}


def test_anatomy_of_a_blip_and_of_a_stranger(taught):
    x = cli._open("quickstart", [*settings(taught), "teacher.max_text_length=7"])
    teacher = x.untaught_teacher()
    captions = ["a red ring", "a small red ring left", "a small red ring left of a large blue square", "zebra"]
    found = anatomy(teacher, captions)
    assert (found.text_width, found.text_heads, found.text_layers) == (96, 4, 1)
    assert found.tokenizer_length == found.embedding_rows == len(teacher.tokenizer)
    lengths = [len(teacher.tokenizer(caption)["input_ids"]) for caption in captions]
    assert found.longest == max(lengths)
    assert 7 in lengths
    assert found.cut == sum(length > 7 for length in lengths) / 4
    assert 0 < found.cut < 1
    assert "[ENC]" in found.special_tokens or "[CLS]" in found.special_tokens
    stranger = anatomy(ToyTeacher(), ["1 word"])
    assert (stranger.text_heads, stranger.tokenizer_length, stranger.image_size) == (None, None, None)


def test_the_page_for_a_terminal_has_colour(tmp_path, student):
    from io import StringIO

    from rich.console import Console

    e, figures, found = looked_at(experiment(tmp_path, Scripted(knows), student))
    stream = StringIO()
    show(
        e,
        figures,
        body=Anatomy("toy"),
        found=found,
        advised=loss_advice(e, figures.losses),
        title="a title [not markup]",
        console=Console(file=stream, force_terminal=True, width=140, color_system="truecolor"),
    )
    assert "a title [not markup]" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("0 fault(s), 0 warning(s)")
