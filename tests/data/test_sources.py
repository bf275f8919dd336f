"""Every kind of source gives the same corpus, and says what is wrong in the same words."""

import re

import numpy as np
import pytest

from distill.data.corpus import DataError

from .making import Source, bomb, encoded, pixels

KINDS = ("karpathy", "jsonl", "csv", "hub")


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    return Source(tmp_path, request.param)


def test_all_kinds_give_the_same_corpus(tmp_path):
    corpora = [Source(tmp_path / kind, kind).load() for kind in KINDS]
    assert len(corpora) == 4
    for corpus in corpora:
        assert (corpus.n_images, corpus.n_texts) == (6, 12)
        assert corpus.texts[:3] == ("picture 0 one", "picture 0 two", "picture 1 one")
        assert corpus.pairs.tolist() == [[n // 2, n] for n in range(12)]
        assert {name: split.images.tolist() for name, split in corpus.splits.items()} == {
            "train": [0, 1, 2, 3],
            "val": [4],
            "test": [5],
        }
        assert corpus.splits["val"].texts.tolist() == [8, 9]
        assert corpus.split_pairs("test").tolist() == [[5, 10], [5, 11]]
        assert corpus.skipped == ()
        np.testing.assert_array_equal(np.asarray(corpus.load_images(np.asarray([4, 1]))[1]), pixels(1))
    assert len({corpus.fingerprint for corpus in corpora}) == 1


def broken(source, content):
    (source.images / "img2.png").write_bytes(content)


BAD_IMAGES = {
    "truncated": (lambda s: broken(s, encoded(2, (40, 40))[:900]), "cannot be decoded: image file is truncated"),
    "zero bytes": (lambda s: broken(s, b""), r"the file is empty \(0 bytes\)"),
    "bomb": (
        lambda s: broken(s, bomb()),
        r"too large to decode safely: .*900000000 pixels.*|too large to decode safely",
    ),
    "above the cap": (lambda s: broken(s, encoded(2, (300, 200))), r"300 x 200 = 60,000 pixels, the limit .* 50,000"),
    "no image": (lambda s: broken(s, b"hello"), r"not an image of a known format \(JPEG, PNG"),
    "no captions": (lambda s: s.rows[2].update(captions=[" ", ""]), "image .* has no caption"),
    "unknown split": (lambda s: s.rows[2].update(split="holdout"), "unknown split 'holdout'; known: train, val, test"),
    "no split": (lambda s: s.rows[2].update(split=""), "no 'split'|no split, while other rows have one"),
    "no picture": (lambda s: s.rows[2].update(image=""), "caption for no image"),
}
OPTIONS = {"max_pixels": 50_000}
WHERE = {
    "karpathy": r"dataset\.json: images\[2\]",
    "jsonl": r"dataset\.jsonl:3",
    "csv": r"dataset\.csv:[67]",
    "hub": r"saved row 2",
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_an_error_with_its_place_and_reason(source, case):
    spoil, reason = BAD_IMAGES[case]
    spoil(source)
    with pytest.raises(DataError, match=rf"{WHERE[source.kind]}.*: (image .*: )?({reason})") as caught:
        source.load(**OPTIONS)
    assert "problem(s) found" in str(caught.value)
    assert "set on_bad_item to 'skip'" in str(caught.value)


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_skipped_and_listed_where_allowed(source, case):
    spoil, reason = BAD_IMAGES[case]
    spoil(source)
    corpus = source.load(**OPTIONS, on_bad_item="skip", max_skip_rate=0.5)
    assert corpus.n_images == 5
    assert not any("picture 2" in text for text in corpus.texts)
    items = [item for item in corpus.skipped if item.what == "image"]
    assert items
    for item in items:
        assert re.search(reason, item.reason), item
        assert re.search(WHERE[source.kind], item.where), item


def test_an_empty_caption_is_an_error_or_a_skip(source):
    source.rows[3]["captions"][1] = "  "
    with pytest.raises(DataError, match=r"(images\[3\]|:4|:9|row 3).*empty caption of image"):
        source.load()
    corpus = source.load(on_bad_item="skip", max_skip_rate=0.1)
    assert (corpus.n_images, corpus.n_texts) == (6, 11)
    assert [item.what for item in corpus.skipped] == ["caption"]


def test_too_many_skips_are_an_error_with_the_counts(source):
    broken(source, b"")
    with pytest.raises(DataError, match=r"1 of 6 images would be skipped, more than max_skip_rate 0\.01"):
        source.load(on_bad_item="skip")
    with pytest.raises(DataError, match=r"0 bytes"):
        source.load(on_bad_item="skip", max_skip_rate=0.16)
    assert source.load(on_bad_item="skip", max_skip_rate=0.17).n_images == 5


def test_problems_are_shown_together(source):
    source.rows[1]["captions"][0] = ""
    source.rows[2]["split"] = "holdout"
    with pytest.raises(DataError, match=r"(?s)problem.*empty caption.*unknown split|problem.*unknown split.*empty"):
        source.load()


def test_many_problems_are_cut_with_a_count(source):
    for row in source.rows:
        row["captions"] = [""] * 9
    with pytest.raises(DataError, match=r"(?s)60 problem\(s\) found.*and 40 more") as caught:
        source.load()
    assert str(caught.value).count("\n  ") == 21


def test_splits_can_be_mapped_and_left_out(source):
    source.rows[2]["split"], source.rows[3]["split"] = "holdout", "extra"
    corpus = source.load(split_names={"holdout": "test", "extra": None})
    assert corpus.n_images == 5
    assert corpus.split("test").images.tolist() == [2, 4]
    assert corpus.skipped == ()
    with pytest.raises(DataError, match="has no split 'dev'; it has train, val, test"):
        corpus.split("dev")


def test_a_source_where_nothing_is_readable_says_so(source):
    for row in source.rows:
        (source.images / row["image"]).write_bytes(b"")
    with pytest.raises(DataError, match=r"6 of 6 images would be skipped"):
        source.load(on_bad_item="skip", max_skip_rate=0.9)


@pytest.mark.parametrize("kind", ["karpathy", "jsonl", "csv"])
@pytest.mark.parametrize(
    "path",
    [
        "../outside.png",
        "/etc/outside.png",
        "C:\\outside.png",
        "a/../../outside.png",
        "..\\outside.png",
        "\\\\host\\x.png",
    ],
)
def test_paths_out_of_the_folder_are_refused(tmp_path, kind, path):
    source = Source(tmp_path, kind)
    (tmp_path / "outside.png").write_bytes(encoded(9))
    source.rows[2]["image"] = path
    with pytest.raises(DataError, match="is absolute or leads upward"):
        source.load()
    corpus = source.load(on_bad_item="skip", max_skip_rate=0.5)
    assert corpus.n_images == 5


@pytest.mark.parametrize("kind", ["karpathy", "jsonl", "csv"])
def test_links_out_of_the_folder_are_refused_and_links_within_are_not(tmp_path, kind):
    source = Source(tmp_path, kind)
    (tmp_path / "outside.png").write_bytes(encoded(9))
    (source.images / "link.png").symlink_to(tmp_path / "outside.png")
    (source.images / "up").symlink_to(tmp_path)
    (source.images / "inside.png").symlink_to(source.images / "img2.png")
    for path in ("link.png", "up/outside.png"):
        source.rows[2]["image"] = path
        with pytest.raises(DataError, match=f"image path '{path}' leads outside the image folder through a link"):
            source.load()
    source.rows[2]["image"] = "inside.png"
    assert source.load().n_images == 6


@pytest.mark.parametrize("kind", ["karpathy", "jsonl", "csv"])
def test_a_missing_file_is_an_error(tmp_path, kind):
    source = Source(tmp_path, kind)
    (source.images / "img2.png").unlink()
    with pytest.raises(DataError, match=rf"{WHERE[kind]}.*'img2\.png': the file does not exist"):
        source.load()
    assert source.load(on_bad_item="skip", max_skip_rate=0.5).n_images == 5


@pytest.mark.parametrize("kind", ["jsonl", "csv", "hub"])
def test_without_splits_all_is_train_or_drawn_by_content(tmp_path, kind):
    source = Source(tmp_path, kind)
    for row in source.rows:
        row["split"] = ""
    assert {name: len(split.images) for name, split in source.load().splits.items()} == {"train": 6}
    drawn = source.load(split_shares={"val": 0.3, "test": 0.4})
    source.rows.reverse()
    again = source.load(split_shares={"val": 0.3, "test": 0.4})
    assert len(drawn.splits) > 1

    def by_content(corpus):
        return {corpus.image_fingerprints[i]: s.name for s in corpus.splits.values() for i in s.images.tolist()}

    assert by_content(drawn) == by_content(again)


def test_wrong_options_are_refused():
    from distill.data.reading import ReadOptions

    for wrong, message in (
        ({"on_bad_item": "ignore"}, "must be 'fail' or 'skip', got 'ignore'"),
        ({"max_skip_rate": 1.0}, "from 0 to below 1, got 1.0"),
        ({"max_pixels": 0}, "at least 1, got 0"),
        ({"split_names": {"a": "b"}}, "maps 'a' to unknown split 'b'"),
        ({"split_shares": {"val": 0.7, "test": 0.7}}, "sum to at most 1"),
        ({"split_shares": {"dev": 0.1}}, "split_shares must give train, val, test"),
    ):
        with pytest.raises(DataError, match=message):
            ReadOptions(**wrong)
