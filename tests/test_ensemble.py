"""Ensembles against arithmetic by hand: what a score is, what it depends on, and who is in memory when."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from distill.embed import NoContrastiveHeadError, live_source
from distill.ensemble import Calibrated, Ensemble, EnsembleError, EnsembleSettings, Member, calibration_pairs
from distill.ranks import Ranks
from distill.score import ScoreOptions
from distill.scorer import TeacherScorer
from distill.store import ScoreStore
from distill.student_teacher import StudentTeacher
from tests.toys import FrozenToyStudent, ToyTeacher, expected_scores, toy_corpus

CORPUS = toy_corpus(24)
SETTINGS = EnsembleSettings(pairs=8)
WEIGHTS = (1.0, -2.0, 0.5)  # what each toy member multiplies the toy score by
RANKS = Ranks(Accelerator(cpu=True))


class Stretched(ToyTeacher):
    """A toy teacher whose scores are the toy's times a number of its own, plus it."""

    def __init__(self, factor: float) -> None:
        super().__init__(name=f"toy {factor}")
        self.factor = factor

    def score(self, images, texts, image_rows, text_rows) -> torch.Tensor:
        return super().score(images, texts, image_rows, text_rows) * self.factor + self.factor


class Counted:
    """Loads members, and knows which of them are alive and how many pairs each was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loads = folder, 0
        self.alive: list[weakref.ref[Any]] = []
        self.asked: dict[str, list[tuple[int, int]]] = {}

    def scorer(self, teacher: Any) -> TeacherScorer:
        self.loads += 1
        assert [ref for ref in self.alive if ref() is not None] == [], "two members are in memory"
        self.alive.append(weakref.ref(teacher))
        if hasattr(teacher, "pairs"):
            self.asked.setdefault(teacher.identity, [])
            teacher.pairs = self.asked[teacher.identity]  # outlives the teacher
        store = ScoreStore(
            self.folder,
            teacher_identity=teacher.identity,
            corpus_fingerprint=CORPUS.fingerprint,
            score_kind=teacher.score_kind,
            n_images=CORPUS.n_images,
            n_texts=CORPUS.n_texts,
        )
        options = ScoreOptions(show_progress=False)
        return TeacherScorer(
            teacher,
            store,
            lambda side: live_source(CORPUS, side, teacher),
            options,
            16,
            torch.device("cpu"),
            RANKS,
        )

    def member(self, make: Callable[[], Any], name: str = "member") -> Member:
        return Member(name, lambda: self.scorer(make()), RANKS)

    def ensemble(self, settings: EnsembleSettings = SETTINGS, factors: tuple[float, ...] = WEIGHTS) -> Ensemble:
        members = [self.member(lambda factor=factor: Stretched(factor), f"m{factor}") for factor in factors]
        return Ensemble(members, settings, CORPUS)


def member_scores(factor: float, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    return expected_scores(images, texts).astype(np.float64) * factor + factor


def some_pairs(count: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.integers(0, CORPUS.n_images, count), draw.integers(0, CORPUS.n_texts, count)


@pytest.mark.parametrize("weights", [None, (1.0, 3.0, 0.5)])
def test_zscore_equals_arithmetic_by_hand(tmp_path: Path, weights: tuple[float, ...] | None) -> None:
    settings = replace(SETTINGS, weights=weights)
    images, texts = some_pairs()
    expected = np.zeros(len(images))
    for factor, weight in zip(WEIGHTS, weights or (1.0, 1.0, 1.0), strict=True):
        known = member_scores(factor, *calibration_pairs(CORPUS, settings))
        expected += weight * (member_scores(factor, images, texts) - known.mean()) / known.std()
    expected /= sum(weights or (1.0, 1.0, 1.0))
    found = Counted(tmp_path).ensemble(settings).ask(images, texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def slow_rank(known: np.ndarray, score: float) -> float:
    """Share of calibration scores below, interpolated between neighbours, then straight on past either end."""
    count, values = len(known), sorted(set(known.tolist()))
    share = [(sum(k < v for k in known) + 0.5 * sum(k == v for k in known)) / count for v in values]
    if score <= values[0]:
        return share[0] + (score - values[0]) / known.std() / count
    for at in range(len(values) - 1):
        if score <= values[at + 1]:
            part = (score - values[at]) / (values[at + 1] - values[at])
            return share[at] + part * (share[at + 1] - share[at])
    return share[-1] + (score - values[-1]) / known.std() / count


def test_rank_equals_arithmetic_by_hand(tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="rank", weights=(1.0, 1.0, 2.0))
    images, texts = some_pairs(60)
    expected = np.zeros(len(images))
    outside = 0
    for factor, weight in zip(WEIGHTS, (0.25, 0.25, 0.5), strict=True):
        known = member_scores(factor, *calibration_pairs(CORPUS, settings)).astype(np.float32).astype(np.float64)
        scores = member_scores(factor, images, texts).astype(np.float32)
        outside += int(((scores < known.min()) | (scores > known.max())).sum())
        expected += weight * np.array([slow_rank(known, float(score)) for score in scores])
    assert outside > 2
    np.testing.assert_allclose(Counted(tmp_path).ensemble(settings).ask(images, texts), expected, rtol=1e-5, atol=1e-6)


def test_rank_keeps_every_order_a_member_gives() -> None:
    known = Calibrated.of(np.array([3, 1, 1, 2, 2, 2, 9], np.float32), "m")
    scores = np.linspace(-5, 15, 401).astype(np.float32)
    assert (np.diff(known.rank(scores)) > 0).all()
    np.testing.assert_allclose(known.rank(np.array([1, 2, 9], np.float32)), [1 / 7, 3.5 / 7, 6.5 / 7])


def test_two_members_are_never_in_memory_and_what_is_stored_is_not_asked_again(tmp_path: Path) -> None:
    counted = Counted(tmp_path)  # asserts at each load that no other member lives
    ensemble = counted.ensemble()
    images, texts = some_pairs()
    first = ensemble.ask(images, texts)
    gc.collect()
    assert [ref() for ref in counted.alive] == [None] * 3
    pairs = {(int(i), int(t)) for i, t in zip(images, texts, strict=True)}
    pairs |= {(int(i), int(t)) for i, t in zip(*calibration_pairs(CORPUS, SETTINGS), strict=True)}
    for asked in counted.asked.values():
        assert sorted(asked) == sorted(pairs)
    loads = counted.loads
    np.testing.assert_array_equal(ensemble.ask(images[::-1], texts[::-1]), first[::-1])
    np.testing.assert_array_equal(ensemble.lookup(images, texts), first)
    assert counted.loads == loads, "everything was in the stores"
    again = Counted(tmp_path)
    np.testing.assert_array_equal(again.ensemble().ask(images, texts), first)
    assert set(map(len, again.asked.values())) == {0}, "a new process asks for nothing either"


def test_a_score_does_not_depend_on_what_else_is_asked(tmp_path: Path) -> None:
    images, texts = (ids[:16] for ids in some_pairs())  # each alone is a file of its own
    for method in ("zscore", "rank"):
        settings = replace(SETTINGS, method=method)
        together = Counted(tmp_path / f"{method}-a").ensemble(settings).ask(images, texts)
        ensemble = Counted(tmp_path / f"{method}-b").ensemble(settings)
        alone = [ensemble.ask(images[at : at + 1], texts[at : at + 1])[0] for at in range(len(images))]
        np.testing.assert_array_equal(together, alone)
        assert len(np.unique(together)) > 10


def test_lookup_computes_nothing_and_says_what_is_missing(tmp_path: Path) -> None:
    ensemble = Counted(tmp_path).ensemble()
    asked = ensemble.ask(np.array([1, 2]), np.array([3, 4]))
    grid = ensemble.lookup(np.array([[1], [2], [-1]]), np.array([[3, 4]]))
    assert grid.shape == (3, 2)
    assert grid[0, 0] == asked[0]
    assert grid[1, 1] == asked[1]
    known = {(int(i), int(t)) for i, t in zip(*calibration_pairs(CORPUS, SETTINGS), strict=True)}
    assert np.isnan(grid[2]).all()
    assert not {(1, 4), (2, 3)} & known
    assert np.isnan(grid[0, 1])
    assert np.isnan(grid[1, 0])


def test_identity_follows_members_method_weights_and_calibration(tmp_path: Path) -> None:
    base = Counted(tmp_path).ensemble().identity
    assert Counted(tmp_path).ensemble().identity == base
    assert Counted(tmp_path).ensemble(replace(SETTINGS, weights=(2.0, 2.0, 2.0))).identity == base
    others = [
        Counted(tmp_path).ensemble(changed).identity
        for changed in (
            replace(SETTINGS, method="rank"),
            replace(SETTINGS, weights=(1.0, 1.0, 2.0)),
            replace(SETTINGS, pairs=7),
            replace(SETTINGS, seed=1),
            replace(SETTINGS, split="val"),
        )
    ]
    others.append(Counted(tmp_path).ensemble(factors=(1.0, -2.0)).identity)
    others.append(Counted(tmp_path).ensemble(factors=(1.0, -2.0, 0.75)).identity)
    assert len({base, *others}) == len(others) + 1


def test_calibration_pairs_are_labelled_ones_and_as_many_that_do_not_match() -> None:
    images, texts = calibration_pairs(CORPUS, EnsembleSettings(pairs=10_000))
    half = len(CORPUS.split_pairs("train"))
    assert len(images) == len(texts) == 2 * half
    assert {*zip(images[:half], texts[:half], strict=True)} == {*map(tuple, CORPUS.split_pairs("train"))}
    np.testing.assert_array_equal(images[half:], images[:half])
    assert CORPUS.matches.is_match(images, texts).tolist() == [True] * half + [False] * half
    assert set(texts[half:]) <= set(CORPUS.split("train").texts)
    again = calibration_pairs(CORPUS, EnsembleSettings(pairs=10_000))
    assert all(map(np.array_equal, again, (images, texts)))
    assert len(calibration_pairs(CORPUS, SETTINGS)[0]) == 16
    with pytest.raises(EnsembleError, match="matches nearly every text of the train split"):
        calibration_pairs(toy_corpus(3), SETTINGS)  # one training image, whose captions are all there are


def test_a_shortlist_is_by_the_mean_of_the_members_cosines(tmp_path: Path) -> None:
    counted = Counted(tmp_path)
    members = [
        counted.member(lambda: Stretched(1.0)),
        counted.member(lambda: StudentTeacher(_known(FrozenToyStudent(seed=1)))),
        counted.member(lambda: Headless(name="headless")),
    ]
    ensemble = Ensemble(members, replace(SETTINGS, weights=(1.0, 3.0, 4.0)), CORPUS)
    rows = {"image": np.arange(4, 9), "text": np.arange(7)}
    found = ensemble.vectors(rows)
    cosines = []
    for member in members[:2]:
        vectors = member.vectors(rows)
        cosines.append(vectors["image"] @ vectors["text"].T)
    np.testing.assert_allclose(
        found["image"] @ found["text"].T, 0.25 * cosines[0] + 0.75 * cosines[1], rtol=1e-5, atol=1e-6
    )
    for vectors in found.values():
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    with pytest.raises(NoContrastiveHeadError, match="no member"):
        Ensemble(members[2:], SETTINGS, CORPUS).vectors(rows)


class Headless(ToyTeacher):
    """A toy teacher without vectors of its own."""

    def encode_images(self, inputs):
        return {name: tensor for name, tensor in super().encode_images(inputs).items() if name != "embedding"}

    def encode_texts(self, inputs):
        return {name: tensor for name, tensor in super().encode_texts(inputs).items() if name != "embedding"}


def _known(student: FrozenToyStudent) -> FrozenToyStudent:
    student.identity = f"student {student.image_tower.sum().item():.6f}"
    return student


def test_a_student_scores_by_its_cosine_whatever_the_inputs_are() -> None:
    student = _known(FrozenToyStudent(seed=2))
    teacher = StudentTeacher(student)
    images = teacher.prepare_images(CORPUS.load_images(np.arange(3)))
    texts = teacher.prepare_texts(list(CORPUS.texts[:4]))
    with torch.no_grad():
        expected = student(images, None).images @ student(None, texts).texts.T
        rows = torch.tensor([0, 2, 1, 2]), torch.tensor([3, 0, 0, 1])
        for i, t in ((images, texts), (teacher.freeze("image", images), teacher.freeze("text", texts))):
            found = teacher.score(teacher.encode_images(i), teacher.encode_texts(t), *rows)
            torch.testing.assert_close(found, expected[rows])
    assert teacher.score_kind == "cosine"
    assert teacher.identity != StudentTeacher(_known(FrozenToyStudent(seed=3))).identity
    for side in ("image", "text"):
        assert teacher.frozen_identity(side) == student.frozen_identity(side)
        assert teacher.prepare_identity(side) == student.prepare_identity(side)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnsembleSettings(method="median"), "expected one of zscore, rank"),
        (lambda: EnsembleSettings(weights=(0.0, 0.0)), "sum above 0"),
        (lambda: EnsembleSettings(weights=(1.0, -1.0, 3.0)), "none below 0"),
        (lambda: EnsembleSettings(pairs=1), "at least 2"),
        (
            lambda: Ensemble([Member("m", _not_loaded, RANKS)], EnsembleSettings(weights=(1.0, 1.0)), CORPUS),
            "2 weights",
        ),
        (lambda: Calibrated.of(np.full(4, 2.5, np.float32), "m7"), "m7 gives all 4 calibration pairs the score 2.5"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(EnsembleError, match=message):
        make()


def _not_loaded() -> TeacherScorer:
    raise AssertionError("nothing needs a model here")
