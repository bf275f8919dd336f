"""What only Karpathy's layout has: paths in two parts, restval, ids inside the file."""

import json

import pytest

from distill.data.corpus import DataError
from distill.data.karpathy import load_karpathy
from distill.data.reading import ReadOptions

from .making import image_folder


@pytest.fixture
def content():
    return [
        {
            "filename": f"img{n}.png",
            "filepath": "sub",
            "imgid": n,
            "split": split,
            "sentences": [{"raw": f"caption {n} {k}", "imgid": n, "sentid": 2 * n + k} for k in range(2)],
        }
        for n, split in enumerate(["train", "restval", "val", "test"])
    ]


@pytest.fixture
def load(tmp_path, content):
    image_folder(tmp_path / "images" / "sub")

    def loaded(**keywords):
        path = tmp_path / "dataset_x.json"
        path.write_text(json.dumps({"images": content, "dataset": "x"}))
        return load_karpathy(path, tmp_path / "images", **keywords)

    return loaded


def test_restval_joins_train_unless_told_otherwise(load):
    assert load().split("train").images.tolist() == [0, 1]
    assert load().name == "dataset_x"
    assert load().image_names[0] == "sub/img0.png"
    apart = load(merge_restval=False)
    assert apart.n_images == 3
    assert apart.split("train").images.tolist() == [0]
    mapped = load(merge_restval=False, options=ReadOptions(split_names={"restval": "val"}))
    assert mapped.split("val").images.tolist() == [1, 2]


def same_file(images):
    images[2]["filename"] = "img1.png"


def same_imgid(images):
    images[2]["imgid"] = 1


def same_sentid(images):
    images[2]["sentences"][1]["sentid"] = 3


def foreign_caption(images):
    images[2]["sentences"][1]["imgid"] = 99


def no_raw(images):
    del images[2]["sentences"][1]["raw"]


def number_as_caption(images):
    images[2]["sentences"][1]["raw"] = 7


def no_sentences(images):
    images[2]["sentences"] = "none"


def no_object(images):
    images[2] = ["img2.png"]


@pytest.mark.parametrize(
    ("spoil", "where", "reason"),
    [
        (same_file, r"images\[2\] \(img1\.png\)", r"duplicate id: file 'sub/img1\.png' is also that of .*images\[1\]"),
        (same_imgid, r"images\[2\]", r"duplicate id: imgid 1 is also that of .*images\[1\]"),
        (same_sentid, r"images\[2\] .*sentences\[1\]", r"duplicate id: sentid 3 is also that of .*images\[1\]"),
        (foreign_caption, r"images\[2\] .*sentences\[1\]", r"caption for no image: its imgid is 99, its image's 2"),
        (no_raw, r"images\[2\] .*sentences\[1\]", "a sentence must be an object with 'raw'"),
        (number_as_caption, r"images\[2\] .*sentences\[1\]", "the caption is no text but int: 7"),
        (no_sentences, r"images\[2\]", "'sentences' must be a list"),
        (no_object, r"images\[2\]", "an image must be an object, found list"),
    ],
)
def test_wrong_entries(load, content, spoil, where, reason):
    spoil(content)
    with pytest.raises(DataError, match=rf"dataset_x\.json: {where}.*: {reason}"):
        load()
    corpus = load(options=ReadOptions(on_bad_item="skip", max_skip_rate=0.5))
    assert len(corpus.skipped) == 1
    assert corpus.n_texts in (6, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "no Karpathy file: expected an object with a non-empty list 'images'"),
        ('{"images": []}', "non-empty list 'images'"),
        ('{"annotations": [1]}', "non-empty list 'images'"),
    ],
)
def test_files_of_another_kind(tmp_path, text, message):
    path = tmp_path / "dataset.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_karpathy(path, tmp_path)


def test_missing_file_and_folder(tmp_path, load):
    with pytest.raises(DataError, match=r"cannot read '.*none\.json': No such file"):
        load_karpathy(tmp_path / "none.json", tmp_path)
    with pytest.raises(DataError, match=r"image folder '.*none' does not exist.*point image_root"):
        load_karpathy(tmp_path / "none.json", tmp_path / "none")
