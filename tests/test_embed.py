import pickle

import numpy as np
import pytest
import torch

from distill.embed import LiveSource, NoContrastiveHeadError, embed, embed_with_teacher, item_source, live_source
from distill.features import Features
from distill.inference import evaluating, prefetched
from tests.toys import FrozenToyStudent, ToyStudent, ToyTeacher, toy_corpus


@pytest.fixture(scope="module")
def corpus():
    return toy_corpus(14, 3)


def rows_of(corpus, side):
    return np.arange(corpus.n_images if side == "image" else corpus.n_texts)


def one_by_one(student, corpus, side, rows):
    """Each item alone through the student: no batch, no padding, no cache."""
    found = []
    with torch.no_grad():
        for row in rows.tolist():
            if side == "image":
                found.append(student(student.prepare_images(corpus.load_images(np.array([row]))), None).images)
            else:
                found.append(student(None, student.prepare_texts([corpus.texts[row]])).texts)
    return torch.cat(found).numpy()


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("kind", [ToyStudent, FrozenToyStudent])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_embeddings_equal_those_of_one_item_at_a_time(tmp_path, corpus, side, kind, batch_size):
    student = kind()
    rows = np.random.default_rng(0).permutation(rows_of(corpus, side))[:10]
    expected = one_by_one(student, corpus, side, rows)
    for source in (live_source(corpus, side, student), item_source(corpus, side, student, tmp_path, batch_size=4)):
        found = embed(student, source, rows, side, batch_size=batch_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_frozen_tower_runs_once_for_all_runs(tmp_path, corpus):
    student = FrozenToyStudent().train()
    source = item_source(corpus, "text", student, tmp_path, batch_size=10)
    assert isinstance(source, Features)
    assert set(source.fields) == {"states", "attention_mask"}
    assert student.frozen_calls == 5  # 42 texts
    assert student.training
    assert not source.get(np.arange(3))["states"].requires_grad
    again = FrozenToyStudent()
    item_source(corpus, "text", again, tmp_path)
    assert not hasattr(again, "frozen_calls")
    other = toy_corpus(14, 2)
    item_source(other, "text", again, tmp_path)
    assert again.frozen_calls  # another corpus is another cache


def test_frozen_outputs_can_be_kept_at_half_precision_apart_from_full(tmp_path, corpus):
    full = item_source(corpus, "image", FrozenToyStudent(), tmp_path)
    half = item_source(corpus, "image", FrozenToyStudent(), tmp_path, dtype="float16")
    assert full.folder != half.folder
    rows = np.arange(5)
    torch.testing.assert_close(half.get(rows)["vectors"], full.get(rows)["vectors"], atol=1e-3, rtol=0)


def test_prepared_inputs_are_kept_when_they_fit_and_the_model_says_what_they_are(tmp_path, corpus, monkeypatch):
    student = ToyStudent()
    assert isinstance(item_source(corpus, "image", student, tmp_path, prepared_budget_bytes=14 * 8 - 1), LiveSource)
    assert isinstance(item_source(corpus, "image", ToyTeacher(), tmp_path), LiveSource)  # no prepare_identity
    source = item_source(corpus, "image", student, tmp_path, prepared_budget_bytes=14 * 8)
    assert isinstance(source, Features)
    assert torch.equal(source(np.arange(14))["shade"], live_source(corpus, "image", student)(np.arange(14))["shade"])
    loads = []
    monkeypatch.setattr(type(corpus), "load_images", lambda self, rows: loads.append(rows))
    source(np.arange(14))
    assert loads == []
    monkeypatch.setattr(ToyStudent, "prepare_identity", lambda self, side: "another")
    with pytest.raises(TypeError):  # other preparation: the pictures are wanted again
        item_source(corpus, "image", student, tmp_path)
    assert loads


def test_tokenised_texts_are_kept_with_the_tokenizers_own_padding(tmp_path, corpus):
    student = ToyStudent()
    source = item_source(corpus, "text", student, tmp_path, batch_size=6)
    rows = np.array([3, 40, 11])
    found, expected = source(rows), live_source(corpus, "text", student)(rows)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_live_source_can_be_pickled(corpus):
    source = pickle.loads(pickle.dumps(live_source(corpus, "image", ToyStudent())))
    assert source(np.array([3, 1]))["shade"].tolist() == [[3], [1]]


def test_texts_of_like_length_share_a_batch(corpus):
    student, seen = ToyStudent(), []

    class Noting(LiveSource):
        def __call__(self, rows):
            seen.append(super().__call__(rows)["input_ids"].shape)
            return super().__call__(rows)

    embed(student, Noting(corpus, "text", student), rows_of(corpus, "text"), "text", batch_size=8)
    assert [length for _, length in seen] == sorted(length for _, length in seen)
    assert sum(count * length for count, length in seen) < 42 * 5


def test_vectors_that_are_not_finite_or_not_of_unit_length_name_their_rows(corpus):
    class Broken(ToyStudent):
        factor = float("nan")

        def _images(self, inputs):
            found = super()._images(inputs)
            found = found.clone()
            found[inputs["shade"][:, 0] == 6] *= self.factor
            return found

    student = Broken()
    source = live_source(corpus, "image", student)
    with pytest.raises(ValueError, match=r"1 of 4 vectors are not finite, the first rows: \[6\]"):
        embed(student, source, np.arange(10), "image", batch_size=4)
    student.factor = 1.1
    with pytest.raises(ValueError, match=r"not of unit length, the first rows: \[6\]"):
        embed(student, source, np.arange(10), "image", batch_size=4)


def test_modes_are_put_back_one_by_one(corpus):
    student = ToyStudent().train()
    student.frozen_part = torch.nn.Dropout().eval()
    seen = []
    student.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    embed(student, live_source(corpus, "image", student), np.arange(3), "image")
    assert seen == [(False, False)]
    assert student.training
    assert not student.frozen_part.training

    def fail():
        with evaluating(student):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert student.training


def test_teachers_contrastive_head(corpus):
    teacher = ToyTeacher()
    found = embed_with_teacher(teacher, live_source(corpus, "text", teacher), np.array([5, 0]), "text")
    np.testing.assert_allclose(found, [[np.cos(0.5), np.sin(0.5)], [1, 0]], atol=1e-6)
    teacher.encode_texts = lambda inputs: {"states": inputs["input_ids"]}
    with pytest.raises(NoContrastiveHeadError, match=r"no contrastive head.*'states'"):
        embed_with_teacher(teacher, live_source(corpus, "text", teacher), np.array([5, 0]), "text")


def test_no_rows_and_wrong_side(corpus):
    student = ToyStudent()
    source = live_source(corpus, "image", student)
    assert embed(student, source, np.array([], np.int64), "image").shape[0] == 0
    student.forward = lambda images, texts: type("E", (), {"images": None, "texts": None})
    with pytest.raises(ValueError, match="gave no image embeddings"):
        embed(student, source, np.arange(2), "image")


@pytest.mark.parametrize("threads", [1, 3])
def test_prefetched_keeps_order_runs_ahead_a_little_and_raises_in_turn(threads):
    begun = []

    def prepare(job):
        begun.append(job)
        if job == 30:
            raise RuntimeError("job 30")
        return job * 2

    seen = []

    def drain():
        for job, result in prefetched(prepare, range(100), threads=threads):
            seen.append((job, result))
            assert len(begun) <= job + threads + 2

    with pytest.raises(RuntimeError, match="job 30"):
        drain()
    assert seen == [(job, job * 2) for job in range(30)]
    assert len(begun) < 40
