"""What only ``datasets`` data sets have: their own splits, images inside or beside them, typed columns."""

import gc

import datasets
import numpy as np
import pytest

from distill.data.columns import Columns
from distill.data.corpus import DataError
from distill.data.hub import load_hub
from distill.data.reading import ReadOptions

from .making import encoded, image_folder, pixels


@pytest.fixture(autouse=True)
def _quiet():
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    yield
    if shown:
        datasets.enable_progress_bars()


def cells(*numbers):
    return [{"bytes": encoded(n), "path": None} for n in numbers]


def dataset(columns, image="image"):
    made = datasets.Dataset.from_dict(columns)
    return made.cast_column(image, datasets.Image())


def saved(made, tmp_path, name="set"):
    made.save_to_disk(str(tmp_path / name))
    return tmp_path / name


def test_splits_come_from_the_dict_and_validation_is_val(tmp_path):
    parts = datasets.DatasetDict(
        {
            "train": dataset({"image": cells(0, 1), "caption": ["a", "b"]}),
            "validation": dataset({"image": cells(2), "caption": ["c"]}),
            "test": dataset({"image": cells(3), "caption": ["d"]}),
        }
    )
    corpus = load_hub(saved(parts, tmp_path))
    assert {name: split.images.tolist() for name, split in corpus.splits.items()} == {
        "train": [0, 1],
        "val": [2],
        "test": [3],
    }
    assert corpus.texts == ("a", "b", "c", "d")
    np.testing.assert_array_equal(np.asarray(corpus.load_images(np.asarray([2]))[0]), pixels(2))


def test_other_columns_and_a_split_column_of_class_numbers(tmp_path):
    made = dataset(
        {"picture": cells(0, 1, 2), "texts": [["a", "b"], ["c"], ["d"]], "part": [1, 0, 1]}, image="picture"
    ).cast_column("part", datasets.ClassLabel(names=["test", "train"]))
    columns = Columns(image="picture", caption="texts", split="part")
    corpus = load_hub(saved(made, tmp_path), columns=columns)
    assert corpus.split("train").images.tolist() == [0, 2]
    assert corpus.texts == ("a", "b", "c", "d")


def test_rows_with_one_image_id_are_one_image(tmp_path):
    made = dataset({"image": cells(0, 1, 0), "caption": ["a", "b", "c"], "image_id": [5, 6, 5]})
    corpus = load_hub(saved(made, tmp_path))
    assert corpus.image_names == ("5", "6")
    assert corpus.texts == ("a", "c", "b")
    assert corpus.pairs.tolist() == [[0, 0], [0, 1], [1, 2]]
    wrong = dataset({"image": cells(0, 1, 2), "caption": ["a", "b", "c"], "image_id": [5, 6, 5]})
    with pytest.raises(DataError, match="wrong row 2: duplicate id: image_id 5 is another image than at wrong row 0"):
        load_hub(saved(wrong, tmp_path, "wrong"))


def test_no_image_in_a_row(tmp_path):
    made = dataset({"image": [*cells(0), None], "caption": ["a", "b"]})
    with pytest.raises(DataError, match="set row 1: caption for no image: the image column is empty"):
        load_hub(saved(made, tmp_path))


def test_skipped_rows_leave_the_right_pictures(tmp_path):
    images = [*cells(0), {"bytes": b"broken", "path": None}, *cells(2)]
    made = dataset({"image": images, "caption": ["a", "b", "c"]})
    corpus = load_hub(saved(made, tmp_path), options=ReadOptions(on_bad_item="skip", max_skip_rate=0.5))
    assert corpus.texts == ("a", "c")
    np.testing.assert_array_equal(np.asarray(corpus.load_images(np.asarray([1]))[0]), pixels(2))
    assert [item.where for item in corpus.skipped] == ["set row 1"]


def paths_only(paths, root):
    """A data set on disk whose image column holds paths, as one made elsewhere may."""
    features = datasets.Features({"image": datasets.Value("string"), "caption": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": paths, "caption": ["x"] * len(paths)}, features=features)
    return saved(made, root)


def test_images_beside_the_data_set_need_a_named_folder(tmp_path):
    root = image_folder(tmp_path / "images")
    folder = paths_only(["img1.png", str(root / "img0.png")], tmp_path)
    with pytest.raises(DataError, match=r"set row 0: the image is not inside the data set .*say with image_root"):
        load_hub(folder)
    corpus = load_hub(folder, image_root=root)
    np.testing.assert_array_equal(np.asarray(corpus.load_images(np.asarray([1]))[0]), pixels(0))


@pytest.mark.parametrize("path", ["../outside.png", "/outside.png"])
def test_images_beside_the_named_folder_are_refused(tmp_path, path):
    root = image_folder(tmp_path / "images")
    (tmp_path / "outside.png").write_bytes(encoded(9))
    listed = str(tmp_path / path[1:]) if path.startswith("/") else path
    with pytest.raises(DataError, match="is absolute or leads upward"):
        load_hub(paths_only([listed], tmp_path), image_root=root)


@pytest.fixture
def _reader_left_open():
    """The library leaves the metadata file, read half-way, to the garbage collector: now, not in a later test."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_reader_left_open")
def test_a_folder_of_files_with_metadata_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    root = image_folder(tmp_path / "files" / "train", 3)
    rows = "".join(f"img{n}.png,caption {n}\n" for n in range(3))
    (root / "metadata.csv").write_text("file_name,caption\n" + rows)
    corpus = load_hub(tmp_path / "files")
    assert corpus.n_images == 3
    assert any((tmp_path / "home").iterdir())
    assert sorted(corpus.texts) == ["caption 0", "caption 1", "caption 2"]


def test_wrong_data_sets(tmp_path):
    with pytest.raises(DataError, match="neither a save_to_disk folder nor a data set that can be loaded"):
        load_hub(tmp_path / "none")
    made = dataset({"image": cells(0), "text": ["a"]})
    with pytest.raises(DataError, match="set: no column 'caption'; found 'image', 'text'"):
        load_hub(saved(made, tmp_path))
    numbers = datasets.Dataset.from_dict({"image": [1, 2], "caption": ["a", "b"]})
    with pytest.raises(DataError, match="column 'image' holds no images"):
        load_hub(saved(numbers, tmp_path, "numbers"))
