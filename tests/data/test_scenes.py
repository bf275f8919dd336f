"""Made scenes: what captions say, the truth table, the pictures, and how hard they are."""

import numpy as np
import pytest

from distill.data.corpus import DataError
from distill.data.scene_drawing import RGB
from distill.data.scene_words import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    Description,
    Scene,
    Thing,
    full_captions,
)
from distill.data.scenes import SceneMix, hard_negatives, make_scenes, make_world, truth_table

RING = Thing("ring", "red", "small", column=0, row=2)
SQUARE = Thing("square", "blue", "large", column=2, row=2)
STAR = Thing("star", "red", "large", column=2, row=0)
SCENE = Scene((RING, SQUARE, STAR))


def description(words):
    said = words.split()[1:]
    return Description(
        said[-1], next((w for w in said if w in COLOURS), None), next((w for w in said if w in SIZES), None)
    )


def caption(text):
    for relation in RELATIONS:
        if f" {relation} " in text:
            first, second = text.split(f" {relation} ")
            return Caption(description(first), relation, description(second))
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("a small red ring left of a large blue square", True),
        ("a large blue square left of a small red ring", False),
        ("a large blue square right of a small red ring", True),
        ("a small red ring above a large blue square", False),  # they stand in one row
        ("a small red ring below a large red star", True),
        ("a small red ring left of a large red star", True),  # on a diagonal both are true
        ("a large red star above a large blue square", True),
        ("a large red star left of a large blue square", False),  # they stand in one column
        ("a large blue square and a small red ring", True),
        ("a small blue square and a small red ring", False),
        ("a large red square and a small blue ring", False),  # colours bound to the wrong things
        ("a red ring left of a square", True),
        ("a red star and a red star", False),  # takes two different things
        ("an orange ring and a star", False),
    ],
)
def test_captions_hold_as_a_reader_would_say(text, true):
    made = caption(text)
    assert str(made) == text
    assert made.holds(SCENE) is true
    assert truth_table([SCENE], [made]).pairs().tolist() == ([[0, 0]] if true else [])


@pytest.fixture(scope="module")
def world():
    mix = SceneMix(vague=0.3, conjunctions=0.3, family=3)
    return make_world(images=80, val=21, test=40, seed=5, captions_per_image=3, mix=mix)


def test_the_truth_table_equals_a_double_loop(world):
    negatives = [other for made in world.captions[:12] for other in hard_negatives(made)[:8]]
    captions = [*world.captions, *negatives]
    table = truth_table(world.scenes, captions)
    slow = {(i, j) for i, scene in enumerate(world.scenes) for j, made in enumerate(captions) if made.holds(scene)}
    assert {tuple(pair) for pair in table.pairs().tolist()} == slow
    assert len(slow) > len(world.captions)


def test_the_corpus_holds_the_truth(world):
    corpus = world.corpus
    assert (corpus.n_images, corpus.n_texts) == (141, 423)
    assert {name: (len(s.images), len(s.texts)) for name, s in corpus.splits.items()} == {
        "train": (80, 240),
        "val": (21, 63),
        "test": (40, 120),
    }
    assert corpus.pairs.tolist() == [[n // 3, n] for n in range(423)]
    assert corpus.texts == tuple(str(made) for made in world.captions)
    table = truth_table(world.scenes, world.captions)
    assert corpus.matches.keys.tolist() == table.keys.tolist()
    assert corpus.matches.is_match(corpus.pairs[:, 0], corpus.pairs[:, 1]).all()
    assert corpus.image_names[80] == "val-000000"


def test_empty_truth_tables():
    assert len(truth_table([], [caption("a ring and a star")])) == 0
    assert len(truth_table([SCENE], [])) == 0


def test_scenes_are_well_formed(world):
    for scene in world.scenes:
        cells = {(thing.column, thing.row) for thing in scene.things}
        looks = {(thing.shape, thing.colour, thing.size) for thing in scene.things}
        assert len(cells) == len(looks) == len(scene.things)
        assert 2 <= len(scene.things) <= 4
        for thing in scene.things:
            assert thing.shape in SHAPES
            assert thing.colour in COLOURS
            assert thing.size in SIZES


def test_twins_differ_by_one_change_and_captions_tell_them_apart(world):
    for first in range(0, 78, 3):
        base, *twins = world.scenes[first : first + 3]
        for twin in twins:
            differing = [(a, b) for a, b in zip(base.things, twin.things, strict=True) if a != b]
            assert len(differing) in (1, 2)
            changed = [
                sum(getattr(a, name) != getattr(b, name) for name in ("shape", "colour", "size")) for a, b in differing
            ]
            moved = [(a.column, a.row) != (b.column, b.row) for a, b in differing]
            assert [changed, moved] in ([[1], [False]], [[1, 1], [False, False]], [[0, 0], [True, True]])
    pairs = make_world(images=200, val=0, test=0, mix=SceneMix(conjunctions=0.5, vague=0.5))
    captions = {row: pairs.captions[2 * row : 2 * row + 2] for row in range(200)}
    mistaken = sum(made.holds(pairs.scenes[row ^ 1]) for row in range(200) for made in captions[row])
    assert mistaken == 0


def test_without_families_scenes_are_unrelated():
    alone = make_world(images=100, val=0, test=0, mix=SceneMix(family=1)).scenes
    shared = [len(set(a.things) & set(b.things)) for a, b in zip(alone[::2], alone[1::2], strict=True)]
    assert sum(shared) <= 2


def test_captions_of_one_picture_do_not_repeat_themselves(world):
    for row in range(len(world.scenes)):
        said = world.captions[3 * row : 3 * row + 3]
        assert len(set(said)) == 3
    made = make_world(images=100, val=0, test=0, mix=SceneMix(conjunctions=0.0))
    repeated = [row for row in range(100) if made.captions[2 * row + 1] == made.captions[2 * row].mirrored()]
    assert repeated
    for row in repeated:  # said from the other side only where there is nothing else to tell it from its twin
        scene, said = made.scenes[row], made.captions[2 * row]
        others = [c for c in full_captions(scene) if c.relation != "and" and c not in (said, said.mirrored())]
        assert all(caption.holds(made.scenes[row ^ 1]) for caption in others)


def test_shares_of_vague_captions_and_conjunctions():
    def shares(**mix):
        made = make_world(images=300, val=0, test=0, mix=SceneMix(**mix)).captions
        vague = np.mean([None in (m.first.size, m.first.colour, m.second.size, m.second.colour) for m in made])
        return vague, np.mean([m.relation == "and" for m in made])

    assert shares(vague=0.0, conjunctions=0.0)[0] == 0.0
    assert shares(vague=0.0, conjunctions=0.0)[1] == 0.0
    vague, conjunctions = shares(vague=0.4, conjunctions=0.3)
    assert 0.3 < vague < 0.45
    assert 0.15 < conjunctions < 0.35


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    first, again, other = (make_scenes(images=20, val=3, test=5, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert first.image_fingerprints == again.image_fingerprints
    assert set(first.image_fingerprints).isdisjoint(other.image_fingerprints)
    assert first.texts != other.texts


def test_a_picture_does_not_depend_on_how_many_there_are():
    few, many = make_scenes(images=5, val=0, test=4, seed=1), make_scenes(images=30, val=7, test=11, seed=1)
    assert few.image_fingerprints[:5] == many.image_fingerprints[:5]
    assert few.texts[:10] == many.texts[:10]
    assert few.image_fingerprints[5:9] == many.image_fingerprints[37:41]
    assert few.texts[10:18] == many.texts[74:82]


def test_pictures_show_each_thing_where_the_scene_says(world):
    rows = np.arange(60)
    for row, image in zip(rows.tolist(), world.corpus.load_images(rows), strict=True):
        shown = np.asarray(image, np.float32)
        assert shown.shape == (48, 48, 3)
        for cell in range(9):
            column, line = cell % 3, cell // 3
            patch = shown[16 * line : 16 * line + 16, 16 * column : 16 * column + 16].reshape(-1, 3)
            here = [t for t in world.scenes[row].things if (t.column, t.row) == (column, line)]
            inked = patch[patch.min(axis=1) < 190]
            if not here:
                assert len(inked) <= 14, (row, cell)  # a neighbour's rim at most
                continue
            core = inked[
                np.argsort(inked.min(axis=1))[: len(inked) // 3]
            ]  # inside, where nothing of the background is mixed in
            nearest = min(RGB, key=lambda name: np.abs(np.median(core, axis=0) - RGB[name]).sum())
            assert nearest == here[0].colour, (row, cell)
            assert len(inked) > (40 if here[0].size == "large" else 12)


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_apart_for_each_shape(shape):
    from distill.data.scene_drawing import draw_scene

    def ink(size):
        scene = Scene((Thing(shape, "black", size, 1, 1),))
        image = draw_scene(scene, np.random.default_rng(0), size=48)
        return int((np.asarray(image).max(axis=2) < 130).sum())

    assert ink("large") > 1.8 * ink("small") > 0


def test_hard_negatives_differ_in_one_thing():
    made = caption("a small red ring left of a large blue square")
    found = hard_negatives(made)
    texts = [str(other) for other in found]
    assert len(set(found)) == len(found)
    assert "a small red ring right of a large blue square" in texts
    assert "a small blue ring left of a large red square" in texts
    assert "a large red ring left of a large blue square" in texts
    assert "a small red square left of a large blue ring" in texts
    assert "a small red ring left of a large blue star" in texts
    # 2 x (5 shapes + 7 colours + 1 size), 3 relations, 3 exchanges
    assert len(found) == 2 * 13 + 3 + 3
    two = Scene((RING, SQUARE))
    assert made.holds(two)
    assert not any(other.holds(two) for other in found)


def test_hard_negatives_of_less_specific_captions():
    assert not any(other.relation != "and" for other in hard_negatives(caption("a red ring and a blue square")))
    made = caption("a ring left of a square")
    assert len(hard_negatives(made)) == 2 * 5 + 3 + 1
    assert str(caption("a square right of a ring")) not in {str(other) for other in hard_negatives(made)}


def test_few_false_negatives_at_the_size_of_a_test_split():
    corpus = make_scenes(images=0, val=0, test=500, seed=0)
    per_caption = np.bincount(corpus.matches.pairs()[:, 1], minlength=1000)
    assert per_caption.min() >= 1
    assert 1.0 < per_caption.mean() < 1.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": 0, "val": 0, "test": 0}, "with one above 0"),
        ({"images": -1}, "'train': -1"),
        ({"size": 8}, "size=8"),
        ({"captions_per_image": 0}, "captions_per_image=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(DataError, match=message):
        make_scenes(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"least": 1}, "2 to 9 things, got least=1, most=4"),
        ({"most": 10}, "got least=2, most=10"),
        ({"family": 0}, "family must be at least 1"),
        ({"vague": 1.5}, "vague is a share between 0 and 1, got 1.5"),
    ],
)
def test_impossible_mixes_are_refused(wrong, message):
    with pytest.raises(DataError, match=message):
        SceneMix(**wrong)
