"""What only manifests have: ids given by the user, and text files that can be broken."""

import json

import pytest

from distill.data.columns import Columns
from distill.data.corpus import DataError
from distill.data.manifest import load_manifest
from distill.data.reading import ReadOptions

from .making import image_folder


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path)


def write(folder, text, name="m.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(folder, *rows):
    return write(folder, "\n".join(json.dumps(row) for row in rows) + "\n\n", "m.jsonl")


def test_one_path_is_one_image_and_the_folder_of_the_manifest_is_the_default(folder):
    text = "image,caption\nimg0.png,one\nimg1.png,two\n./img0.png,three\n"
    corpus = load_manifest(write(folder, text))
    assert corpus.image_names == ("img0.png", "img1.png")
    assert corpus.texts == ("one", "three", "two")
    assert corpus.pairs.tolist() == [[0, 0], [0, 1], [1, 2]]
    tabs = load_manifest(write(folder, text.replace(",", "\t"), "m.tsv"))
    assert tabs.fingerprint == corpus.fingerprint


def test_bom_quotes_and_other_column_names(folder):
    text = '\ufefffile,text,part,note\nimg0.png,"red, small\nand ""new""",test,x\n'
    corpus = load_manifest(write(folder, text), columns=Columns(image="file", caption="text", split="part"))
    assert corpus.texts == ('red, small\nand "new"',)
    assert list(corpus.splits) == ["test"]


def test_image_ids_name_images_and_caption_ids_share_captions(folder):
    corpus = load_manifest(
        lines(
            folder,
            {
                "image": "img0.png",
                "caption": ["a dog", "brown"],
                "image_id": 7,
                "caption_id": ["d", None],
                "split": "train",
            },
            {"image": "img1.png", "caption": "a dog", "image_id": "x", "caption_id": "d", "split": "test"},
            {"image": "img0.png", "caption": "more", "image_id": 7},
        )
    )
    assert corpus.image_names == ("7", "x")
    assert corpus.texts == ("a dog", "brown", "more")
    assert corpus.pairs.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
    assert corpus.matches.images_of(0).tolist() == [0, 1]
    assert corpus.split("train").texts.tolist() == [0, 1, 2]
    assert corpus.split("test").texts.tolist() == [0]  # one caption in two splits, as one of its images is in each
    assert corpus.split_pairs("test").tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [
                {"image": "img0.png", "caption": "a", "image_id": 1},
                {"image": "img1.png", "caption": "b", "image_id": 1},
            ],
            r"m\.jsonl:2: duplicate id: image_id '1' is 'img1\.png' here and 'img0\.png' in an earlier row",
        ),
        (
            [
                {"image": "img0.png", "caption": "a", "image_id": 1},
                {"image": "img0.png", "caption": "b", "image_id": 2},
            ],
            r"m\.jsonl:2: duplicate id: image 'img0\.png' has image_id '2' here and '1' before",
        ),
        (
            [
                {"image": "img0.png", "caption": "a", "caption_id": 1},
                {"image": "img1.png", "caption": "b", "caption_id": 1},
            ],
            r"m\.jsonl:2: duplicate id: caption_id '1' has two different texts",
        ),
        (
            [
                {"image": "img0.png", "caption": "a", "caption_id": 1},
                {"image": "img0.png", "caption": "a", "caption_id": 1},
            ],
            r"m\.jsonl:2: caption '1' is given twice for image 'img0\.png'",
        ),
        (
            [
                {"image": "img0.png", "caption": "a", "split": "train"},
                {"image": "img0.png", "caption": "b", "split": "val"},
            ],
            r"m\.jsonl:2: image 'img0\.png' is in split 'val' here and in 'train' at m\.jsonl:1",
        ),
        (
            [{"image": "img0.png", "caption": ["a", "b"], "caption_id": [1]}],
            r"m\.jsonl:1: 'caption_id' must hold one id for",
        ),
        ([{"image": "img0.png"}], r"m\.jsonl:1: no 'caption'; found 'image'"),
        ([{"image": "img0.png", "caption": ["a", 3]}], r"m\.jsonl:1, caption 2: the caption is no text but int: 3"),
        ([{"image": "img0.png", "caption": None}], r"m\.jsonl:1: the caption is no text but NoneType"),
        ([{"image": None, "caption": "a"}], r"m\.jsonl:1: caption for no image"),
        ([["img0.png", "a"]], r"m\.jsonl:1: a row must be an object, found list"),
        ([{"image": "img0.png", "caption": []}], r"m\.jsonl:1: image 'img0\.png' has no caption"),
        ([{"image": "http://host/a.png", "caption": "a"}], r"the file does not exist"),
    ],
)
def test_wrong_rows(folder, rows, message):
    with pytest.raises(DataError, match=message):
        load_manifest(lines(folder, *rows))
    good = {"image": "img5.png", "caption": ["fine", "good"], "split": "train"}
    options = ReadOptions(on_bad_item="skip", max_skip_rate=0.9)
    assert load_manifest(lines(folder, *rows, good), options=options).skipped


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("image,caption\nimg0.png,a,b,c\n", "m.csv", r"m\.csv:2: 4 cells where the header has 2; quote captions"),
        ("image,caption,split\nimg0.png,a\n", "m.csv", r"m\.csv:2: 2 cells where the header has 3"),
        ('image,caption\nimg0.png,"open\n', "m.csv", r"m\.csv cannot be read as CSV: .*quote that is not closed"),
        ("path,caption\nimg0.png,a\n", "m.csv", r"m\.csv: no column 'image'; found 'path', 'caption'"),
        ("", "m.csv", r"no column 'image' and 'caption'; found none"),
        ("image,caption\n", "m.csv", "there is nothing in it"),
        (b"image,caption\nimg0.png,caf\xe9\n", "m.csv", "is not UTF-8 text.*save it as UTF-8"),
        ('{"image": "img0.png"\n', "m.jsonl", r"m\.jsonl:1: not valid JSON"),
        ("x", "m.xlsx", r"unknown kind '\.xlsx'; known: \.csv, \.tsv, \.jsonl"),
    ],
)
def test_broken_files(folder, text, name, message):
    with pytest.raises(DataError, match=message):
        load_manifest(write(folder, text, name))


def test_missing_manifest(tmp_path):
    with pytest.raises(DataError, match=r"manifest '.*gone\.csv' does not exist"):
        load_manifest(tmp_path / "gone.csv")
