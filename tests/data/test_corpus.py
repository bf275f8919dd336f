"""What a corpus promises, however it was made."""

import gc
import hashlib
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill.data.corpus import DataError, build_corpus
from distill.data.pictures import pictures_of_bytes, pictures_of_paths
from distill.data.summary import describe

from .making import encoded, pixels


def built(seeds=(0, 1, 2, 3), texts=None, pairs=None, splits=None, **more):
    """Four images with a caption each unless told otherwise."""
    contents = [encoded(seed) for seed in seeds]
    pictures = pictures_of_bytes(
        contents,
        names=[f"p{n}" for n in range(len(seeds))],
        fingerprints=[hashlib.sha256(content).hexdigest() for content in contents],
    )
    texts = [f"caption {n}" for n in range(len(seeds))] if texts is None else texts
    pairs = [[n, n] for n in range(len(texts))] if pairs is None else pairs
    splits = ["train", "train", "val", "test"] if splits is None else splits
    return build_corpus("toy", pictures, texts=texts, pairs=np.asarray(pairs), image_splits=splits, **more)


def test_a_text_is_in_each_split_that_one_of_its_images_is_in():
    corpus = built(texts=["a", "b", "c"], pairs=[[0, 0], [1, 0], [2, 1], [3, 2], [2, 2]])
    assert corpus.split("train").texts.tolist() == [0]
    assert corpus.split("val").texts.tolist() == [1, 2]
    assert corpus.split("test").texts.tolist() == [2]
    assert corpus.split_pairs("val").tolist() == [[2, 1], [2, 2]]
    assert corpus.split_pairs("test").tolist() == [[3, 2]]


def test_copies_match_unless_told_otherwise():
    same = {"seeds": (0, 1, 0, 3), "texts": ["a", "b", "c", "b"]}
    corpus = built(**same)
    expected = np.eye(4, dtype=bool)
    expected[0, 2] = expected[2, 0] = True  # images 0 and 2 are one file
    expected[1, 3] = expected[3, 1] = True  # captions 1 and 3 are one text
    np.testing.assert_array_equal(corpus.matches.is_match(np.arange(4)[:, None], np.arange(4)), expected)
    assert len(corpus.pairs) == 4
    apart = built(**same, copies_match=False)
    assert len(apart.matches) == 4
    assert apart.fingerprint != corpus.fingerprint


def test_extra_matches_join_the_labelled_ones():
    corpus = built(extra_matches=np.asarray([[0, 3], [0, 0]]))
    assert corpus.matches.pairs().tolist() == [[0, 0], [0, 3], [1, 1], [2, 2], [3, 3]]
    assert corpus.pairs.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_the_fingerprint_changes_with_every_part_and_with_nothing_else():
    base = built().fingerprint
    assert built().fingerprint == base
    changed = {
        "an image": built(seeds=(0, 1, 2, 4)),
        "a caption": built(texts=["caption 0", "caption 1", "caption 2", "caption 3!"]),
        "a pair": built(pairs=[[0, 0], [1, 1], [2, 2], [3, 3], [0, 1]]),
        "the order of pairs": built(pairs=[[1, 1], [0, 0], [2, 2], [3, 3]]),
        "a match": built(extra_matches=np.asarray([[0, 1]])),
        "a split": built(splits=["train", "val", "val", "test"]),
        "the order of images": built(seeds=(1, 0, 2, 3)),
    }
    prints = {what: corpus.fingerprint for what, corpus in changed.items()}
    assert len({base, *prints.values()}) == len(prints) + 1, prints


def test_one_pixel_changes_the_fingerprint(tmp_path):
    from .making import Source

    source = Source(tmp_path, "csv")
    before = source.load()
    array = pixels(3).copy()
    array[0, 0, 0] ^= 1
    from PIL import Image

    Image.fromarray(array).save(source.images / "img3.png")
    after = source.load()
    assert before.fingerprint != after.fingerprint
    differing = [a != b for a, b in zip(before.image_fingerprints, after.image_fingerprints, strict=True)]
    assert differing == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"texts": ["a", " ", "c", "d"]}, "caption 1 is empty or no text: ' '"),
        ({"texts": ["a", None, "c", "d"]}, "caption 1 is empty or no text: None"),
        (
            {"splits": ["train", "train", "dev", "test"]},
            "image 'p2' is in unknown split 'dev'; known: train, val, test",
        ),
        ({"splits": ["train"]}, "1 split names for 4 images"),
        ({"pairs": [[0, 0], [1, 1], [2, 2], [3, 3], [0, 0]]}, r"1 pair\(s\) are given twice"),
        ({"pairs": [[0, 0], [1, 1], [2, 2], [2, 3]]}, r"1 image\(s\) with no caption, such as 'p3'"),
        ({"pairs": [[0, 0], [1, 1], [2, 2], [3, 2]]}, r"1 caption\(s\) with no image, such as 'caption 3'"),
        ({"pairs": [[0, 0], [1, 1], [2, 2], [3, 4]]}, r"a pair names caption 0\.\.4, there are 0\.\.3"),
        ({"pairs": [[0, 0], [1, 1], [2, 2], [-1, 3]]}, r"a pair names image -1\.\.2, there are 0\.\.3"),
        ({"seeds": (), "splits": []}, "is empty: 0 images, 0 captions"),
    ],
)
def test_broken_corpora_are_refused(wrong, message):
    with pytest.raises(DataError, match=message):
        built(**wrong)


def test_nothing_is_decoded_before_it_is_asked_for(monkeypatch):
    from distill.data import pictures

    seen = []
    real = pictures.decode_image
    monkeypatch.setattr(pictures, "decode_image", lambda content, **k: seen.append(1) or real(content, **k))
    corpus = built()
    assert seen == []
    corpus.load_images(np.asarray([2, 3]))
    assert len(seen) == 2


def test_a_pickled_corpus_is_small_and_whole(tmp_path):
    generator = np.random.default_rng(0)
    big = [generator.integers(0, 256, 200_000, dtype=np.uint8).tobytes() for _ in range(10)]
    names = [str(n) for n in range(10)]
    assert len(pickle.dumps(pictures_of_bytes(big, names=names, fingerprints=names))) < 10_000
    paths = [tmp_path / name for name in names]
    assert len(pickle.dumps(pictures_of_paths(paths, names=names, fingerprints=names))) < 10_000
    corpus = built()
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.fingerprint == corpus.fingerprint
    assert copy.matches.pairs().tolist() == corpus.matches.pairs().tolist()
    np.testing.assert_array_equal(np.asarray(copy.load_images(np.asarray([3]))[0]), pixels(3))


def first_pixel(corpus, row):
    return np.asarray(corpus.load_images(np.asarray([row]))[0])[0, 0].tolist()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_images_load_in_worker_processes_and_stay_for_the_next(start):
    corpus = built()
    for _ in range(2):  # the end of one worker must not clear away the images
        with multiprocessing.get_context(start).Pool(1) as pool:
            assert pool.apply(first_pixel, (corpus, 2)) == pixels(2)[0, 0].tolist()
    assert first_pixel(corpus, 1) == pixels(1)[0, 0].tolist()


HELD = []


def forget():
    HELD.clear()
    gc.collect()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_that_lets_go_leaves_the_images_alone():
    HELD.append(built())
    place = Path(HELD[0].pictures.dataset.cache_files[0]["filename"])
    child = multiprocessing.get_context("fork").Process(target=forget)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert place.is_file()
    forget()
    assert not place.exists()


def test_temporary_files_go_with_the_corpus():
    pictures = built().pictures
    place = Path(pictures.dataset.cache_files[0]["filename"])
    assert place.is_file()
    del pictures
    assert not place.parent.exists()


def test_importing_the_sources_is_cheap():
    code = (
        "import sys, distill.data.corpus, distill.data.karpathy, distill.data.manifest, distill.data.hub\n"
        "import distill.data.scenes, distill.data.summary, distill.data.vocabulary\n"
        "heavy = {'torch', 'datasets', 'pyarrow', 'PIL', 'transformers', 'tokenizers', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_describe_counts():
    corpus = built(
        seeds=(0, 1, 2, 0),
        texts=["a", "b", "c", "d", "b"],
        pairs=[[0, 0], [1, 1], [2, 2], [3, 3], [2, 4], [0, 2]],
    )
    found = describe(corpus)
    assert (found.images, found.captions, found.pairs) == (4, 5, 6)
    assert found.splits == {"train": (2, 3), "val": (1, 2), "test": (1, 1)}
    per_image, per_caption = found.captions_per_image, found.images_per_caption
    assert (per_image.least, per_image.mean, per_image.most) == (1, 1.5, 2)
    assert (per_caption.least, per_caption.mean, per_caption.most) == (1, 1.2, 2)
    assert (found.copied_images.surplus, found.copied_images.across) == (1, 1)
    assert found.copied_images.examples == (("p0 (train)", "p3 (test)"),)
    assert (found.copied_captions.surplus, found.copied_captions.across) == (1, 1)
    assert found.copied_captions.examples == (("b (train)", "b (val)"),)
    assert built(texts=["a", "a", "c", "d"]).splits["train"].texts.tolist() == [0, 1]
    within = describe(built(texts=["a", "a", "c", "d"])).copied_captions
    assert (within.surplus, within.across) == (1, 0)


def test_describe_renders_what_was_skipped(tmp_path):
    from .making import Source

    source = Source(tmp_path, "karpathy")
    (source.images / "img2.png").write_bytes(b"")
    text = describe(source.load(on_bad_item="skip", max_skip_rate=0.5)).render()
    assert "skipped             1 images, 0 captions" in text
    assert "images[2] (img2.png): image 'img2.png': the file is empty (0 bytes)" in text
    assert "train               3 images, 6 captions" in text
    assert "captions per image  2 to 2, mean 2.00" in text
