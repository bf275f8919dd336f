"""What holds for every teacher, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import teachers
from distill.inference import joined
from distill.protocols import SIDES, Teacher
from tests.teachers import tiny_teachers as tiny
from tests.teachers.test_fragment import fragment
from tests.teachers.tiny_teachers import TEXTS, every_pair, tokenizer, unlike_pictures

PAIRS = every_pair(4, len(TEXTS))
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@dataclass(frozen=True)
class Case:
    """A teacher of random weights, and how it comes from and goes to disk."""

    name: str  # of its class in ``teachers``
    make: Callable[..., Any]  # options -> teacher
    save: Callable[[Any, Path], None]
    load: Callable[..., Any]  # (folder, options=, dtype=) -> teacher
    other_kind: str | None  # a second score kind; None where there is one alone
    owner: str = ""  # attribute that holds the tokenizer; the teacher itself when empty
    prompts: bool = True  # whether it can put words before every text

    def prompted(self, **options: Any) -> Any:
        """The teacher with a prompt where it takes one."""
        return self.make(**options, **({"prompt": "w1 "} if self.prompts else {}))


def _save_own(teacher: Any, folder: Path) -> None:
    teacher.save_pretrained(folder)


def _save_plain(teacher: Any, folder: Path) -> None:
    save_file(teacher.model.state_dict(), folder / "model.safetensors")
    teacher.image_processor.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)


def _load(name: str) -> Callable[..., Any]:
    return lambda folder, **chosen: getattr(teachers, name).from_pretrained(folder, **chosen)


def _load_classifier(folder: Path, **chosen: Any) -> Any:
    return teachers.PairClassifierTeacher.from_pretrained(folder, classifier=tiny.TinyClassifier, **chosen)


CASES = [
    Case("BlipTeacher", tiny.blip, _save_own, _load("BlipTeacher"), "cosine"),
    Case("FusionTeacher", tiny.fusion, _save_own, _load("FusionTeacher"), "logit+cosine", owner="text"),
    Case("FragmentTeacher", fragment, _save_own, _load("FragmentTeacher"), "cosine", owner="text", prompts=False),
    Case("Blip2Teacher", tiny.blip2, tiny.save_checkpoint, _load("Blip2Teacher"), "cosine"),
    Case("ViltTeacher", tiny.vilt, tiny.save_checkpoint, _load("ViltTeacher"), None),
    Case("BridgeTowerTeacher", tiny.bridgetower, tiny.save_checkpoint, _load("BridgeTowerTeacher"), "logit"),
    Case("PairClassifierTeacher", tiny.classifier, _save_plain, _load_classifier, "logit"),
]


def test_every_teacher_of_the_package_is_here():
    assert CASES
    assert {case.name for case in CASES} == {name for name in teachers.__all__ if name.endswith("Teacher")}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def encoded(teacher: Any, *, pictures: Any = None, texts: Any = TEXTS, batch: int = 99) -> tuple[Any, Any]:
    """Both memories, encoded and prepared ``batch`` items at a time."""
    pictures = unlike_pictures() if pictures is None else pictures
    images, words = [], []
    with torch.no_grad():
        for start in range(0, len(pictures), batch):
            images.append(teacher.encode_images(teacher.prepare_images(pictures[start : start + batch])))
        for start in range(0, len(texts), batch):
            words.append(teacher.encode_texts(teacher.prepare_texts(texts[start : start + batch])))
    return joined(images), joined(words)


def scores(teacher: Any, images: Any, texts: Any, image_rows: Any = PAIRS[0], text_rows: Any = PAIRS[1]) -> Any:
    with torch.no_grad():
        return teacher.score(images, texts, image_rows, text_rows)


def all_scores(teacher: Any) -> torch.Tensor:
    return scores(teacher, *encoded(teacher))


def test_scores_are_a_vector_of_float32(case: Case):
    teacher = case.make()
    assert isinstance(teacher, Teacher)
    assert type(teacher).__name__ == case.name
    assert not teacher.training
    found = all_scores(teacher)
    assert found.shape == (len(PAIRS[0]),)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    matrix = found.view(4, len(TEXTS))
    assert (matrix - matrix.mean(dim=0)).std() > 1e-3, "scores do not depend on the image"
    assert (matrix - matrix.mean(dim=1, keepdim=True)).std() > 1e-3, "scores do not depend on the text"


def test_no_pairs_give_no_scores(case: Case):
    teacher, none = case.make(), torch.zeros(0, dtype=torch.long)
    found = scores(teacher, *encoded(teacher), none, none)
    assert found.shape == (0,)
    assert found.dtype == torch.float32


def test_the_order_of_the_pairs_and_pairs_given_twice_change_nothing(case: Case):
    teacher = case.make()
    memories = encoded(teacher)
    expected = scores(teacher, *memories)
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    order = torch.cat([order, order[PAIRS[0][order] == 2].repeat(5)])
    got = scores(teacher, *memories, PAIRS[0][order], PAIRS[1][order])
    torch.testing.assert_close(got, expected[order], **CLOSE)


def test_a_pair_alone_scores_as_in_company(case: Case):
    teacher = case.make()
    memories = encoded(teacher)
    alone = torch.cat(
        [scores(teacher, *memories, i[None], t[None]) for i, t in zip(*PAIRS, strict=True)],
    )
    torch.testing.assert_close(scores(teacher, *memories), alone, **CLOSE)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_size_of_a_chunk_changes_nothing(case: Case, size: int):
    torch.testing.assert_close(all_scores(case.make(pairs_per_chunk=size)), all_scores(case.make()), **CLOSE)


def test_a_longer_text_or_a_larger_picture_beside_it_changes_nothing(case: Case):
    teacher = case.make()
    expected = all_scores(teacher).view(4, len(TEXTS))
    for image, picture in enumerate(unlike_pictures()):
        for text, words in enumerate(TEXTS):
            memories = encoded(teacher, pictures=[picture], texts=[words])
            got = scores(teacher, *memories, torch.tensor([0]), torch.tensor([0]))
            torch.testing.assert_close(got[0], expected[image, text], **CLOSE)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_batches_in_which_items_are_encoded_change_nothing(case: Case, batch: int):
    teacher = case.make()
    got = scores(teacher, *encoded(teacher, batch=batch))
    torch.testing.assert_close(got, all_scores(teacher), **CLOSE)


def test_the_same_call_gives_the_same_bits(case: Case):
    teacher = case.make()
    first = all_scores(teacher)
    assert torch.equal(all_scores(teacher), first)
    teacher.train()
    teacher.eval()
    assert torch.equal(all_scores(teacher), first)
    assert torch.equal(all_scores(case.make()), first)


def test_rows_outside_the_memories_are_refused(case: Case):
    teacher = case.make()
    memories = encoded(teacher)
    for rows in (([4], [0]), ([0], [len(TEXTS)]), ([-1], [0]), ([0, 1], [0])):
        with pytest.raises(ValueError, match="rows"):
            scores(teacher, *memories, *map(torch.tensor, rows))


def test_a_memory_and_what_was_prepared_fit_on_one_device(case: Case):
    teacher = case.make()
    for side, memory in zip(SIDES, encoded(teacher), strict=True):
        count = 4 if side == "image" else len(TEXTS)
        assert memory
        assert {len(tensor) for tensor in memory.values()} == {count}
        assert not any(tensor.requires_grad for tensor in memory.values())


def test_saving_and_loading_change_neither_identity_nor_scores(case: Case, tmp_path: Path):
    teacher = case.prompted(max_text_length=9)
    case.save(teacher, tmp_path)
    again = case.load(tmp_path, options=teacher.options)
    assert again.identity == teacher.identity
    assert again.score_kind == teacher.score_kind
    found = all_scores(again)
    assert torch.equal(all_scores(case.load(tmp_path, options=teacher.options)), found)
    # Mapped from a file, weights lie at other addresses than those made here, and sums may be taken in another order.
    torch.testing.assert_close(found, all_scores(teacher), **CLOSE)


def test_half_precision_has_another_identity_and_nearly_the_same_scores(case: Case, tmp_path: Path):
    teacher = case.make()
    case.save(teacher, tmp_path)
    half = case.load(tmp_path, options=teacher.options, dtype=torch.bfloat16)
    assert half.identity != teacher.identity
    got, expected = all_scores(half), all_scores(teacher)
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    assert torch.corrcoef(torch.stack([got, expected]))[0, 1] > 0.97


def test_identity_stays_with_whatever_cannot_change_a_score(case: Case):
    base = case.make()
    assert len(base.identity) == 32
    assert case.make().identity == base.identity
    assert case.make(pairs_per_chunk=3).identity == base.identity
    used = case.make()
    all_scores(used)
    assert used.identity == base.identity


def test_identity_changes_with_whatever_could_change_a_score(case: Case):
    base = case.make()
    others = {"length": case.make(max_text_length=8)}
    if case.prompts:
        others["prompt"] = case.prompted()
    if case.other_kind:
        others["score kind"] = case.make(score_kind=case.other_kind)
    words = case.make()
    holder = getattr(words, case.owner) if case.owner else words
    assert hasattr(holder, "tokenizer")
    holder.tokenizer = tokenizer(words=39, special=("extra", "[DEC]", "[ENC]"))
    others["vocabulary"] = words
    found = {name: other.identity for name, other in others.items()}
    assert len({base.identity, *found.values()}) == 1 + len(found), found


def test_one_flipped_byte_of_any_weight_changes_the_identity(case: Case):
    teacher = case.make()
    base = teacher.identity
    weights = {name: weight for name, weight in teacher.named_parameters() if "logit_scale" not in name}
    assert weights
    for name, weight in weights.items():
        byte = weight.data.view(-1).view(torch.uint8)[:1]
        byte ^= 1
        assert teacher.identity != base, name
        byte ^= 1
    assert teacher.identity == base


def test_a_fixed_identity_holds_until_training(case: Case):
    teacher = case.make()
    fixed = teacher.fix_identity()
    next(weight for name, weight in teacher.named_parameters() if "logit_scale" not in name).data += 1
    assert teacher.identity == fixed
    teacher.train()
    assert teacher.identity != fixed


def test_prepared_inputs_have_an_identity_that_follows_what_prepares_them(case: Case):
    base = case.make()
    image, text = (base.prepare_identity(side) for side in SIDES)
    assert image != text
    for other in (case.prompted(max_text_length=8), case.make(max_text_length=9)):
        assert other.prepare_identity("image") == image
        assert other.prepare_identity("text") != text
    assert case.make(pairs_per_chunk=3).prepare_identity("text") == text


def test_texts_are_cut_and_prompted(case: Case):
    teacher, vocabulary = case.prompted(max_text_length=5), tokenizer().get_vocab()
    made = teacher.prepare_texts(["w2 w3 w4 w5 w6", "w2"])
    kept = ("w1", "w2", "w3") if case.prompts else ("w2", "w3", "w4")
    assert made["input_ids"].tolist()[0] == [2, *(vocabulary[word] for word in kept), 3]


@pytest.mark.parametrize("side", SIDES)
def test_nothing_to_prepare_is_an_error(case: Case, side: str):
    with pytest.raises(ValueError, match="was given no"):
        getattr(case.make(), f"prepare_{side}s")([])
