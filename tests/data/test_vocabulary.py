"""A tokenizer learnt from captions."""

import random

import pytest

from distill.data.scenes import make_scenes
from distill.data.vocabulary import learn_tokenizer

TEXTS = [
    "A small red ring left of a large blue square",
    "a large green star above a small black cross",
    "two dogs run, and one barks!",
]


@pytest.fixture(scope="module")
def tokenizer():
    return learn_tokenizer(TEXTS, size=120)


def test_special_ids(tokenizer):
    words = tokenizer.get_vocab()
    assert [words[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert len(tokenizer) == len(words) <= 120
    assert (words["[DEC]"], words["[ENC]"]) == (len(words) - 2, len(words) - 1)
    assert sorted(words.values()) == list(range(len(words)))
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (0, 2, 3)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 3)


def test_framing_lower_case_and_padding(tokenizer):
    found = tokenizer(["A small RED ring", "a star"], padding=True)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in found["input_ids"]]
    assert tokens[0][0] == "[CLS]"
    assert tokens[0][-1] == "[SEP]"
    assert tokens[1][-1] == "[PAD]"
    assert len(tokens[0]) == len(tokens[1])
    assert found["attention_mask"][1][-1] == 0
    assert tokenizer.decode(found["input_ids"][0], skip_special_tokens=True) == "a small red ring"
    assert tokenizer("A STAR")["input_ids"] == tokenizer("a star")["input_ids"]


def test_words_of_the_texts_are_known_and_others_fall_apart(tokenizer):
    assert tokenizer.tokenize("large square") == ["large", "square"]
    assert tokenizer.tokenize("\u2603") == ["[UNK]"]
    assert len(tokenizer.tokenize("larges")) > 1


def test_the_order_of_texts_changes_nothing(tokenizer):
    again = learn_tokenizer(TEXTS, size=120)
    shuffled = TEXTS * 3
    random.Random(1).shuffle(shuffled)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert learn_tokenizer(shuffled, size=120).get_vocab() == learn_tokenizer(TEXTS * 3, size=120).get_vocab()


def test_it_survives_a_folder(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in (*TEXTS, "larges of \u2603", "[ENC] a star"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    kept = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    assert [getattr(loaded, f"{name}_token_id") for name in kept] == [0, 1, 2, 3, 4, 2, 3]
    assert loaded.model_max_length == 64
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert set(loaded.convert_tokens_to_ids(["[DEC]", "[ENC]"])) <= set(loaded.all_special_ids)


def test_scene_captions_are_whole_words():
    texts = make_scenes(images=200, val=0, test=0).texts
    tokenizer = learn_tokenizer(texts)
    for text in texts:
        assert tokenizer.tokenize(text) == text.split()


def test_impossible_requests():
    with pytest.raises(ValueError, match="at least one text"):
        learn_tokenizer([])
    with pytest.raises(ValueError, match=r"size=10 cannot hold .* it takes at least"):
        learn_tokenizer(TEXTS, size=10)
