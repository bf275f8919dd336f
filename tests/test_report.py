"""Contact sheets by their pixels, tables by their text."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from distill.report import fonts
from distill.report.fonts import font_for
from distill.report.sheet import RIGHT, THUMB, WRONG, Row, Strip, hits_sheet, pick_sample, retrieval_sheet
from distill.report.table import results_table, to_markdown

CAPTIONS = [
    "a dog",
    "",
    "word " * 120,
    "x" * 900,
    "Ein Mädchen läuft – über die Straße",
    "Девочка бежит, ένα κορίτσι, 東京の女の子, بنت, लड़की, 🐕",
    "tabs\tand\nnewlines\x00and controls",
    "[b]not markup[/b] {braces} %s",
]


def colours(count):
    """Colours that nothing else on a sheet has."""
    return [(255, 10 * number, 200) for number in range(count)]


def block(colour, size=(160, 160)):
    return Image.new("RGB", size, colour)


def box_of(pixels, colour):
    """(top, bottom, left, right) of a colour, bottom and right not included; asserts that it fills its box."""
    there = (pixels == np.array(colour)).all(axis=-1)
    rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    assert len(rows), f"{colour} is nowhere"
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert there[top:bottom, left:right].all()
    return top, bottom, left, right


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def ring(pixels, box, distance):
    """The pixels exactly ``distance`` outside of a box."""
    top, bottom, left, right = box
    top, bottom, left, right = top - distance, bottom + distance, left - distance, right + distance
    lines = [
        pixels[top, left:right],
        pixels[bottom - 1, left:right],
        pixels[top:bottom, left],
        pixels[top:bottom, right - 1],
    ]
    return {tuple(int(value) for value in pixel) for line in lines for pixel in line}


def test_frames_stand_around_the_right_pictures_in_order(tmp_path):
    truth, *found = colours(11)
    correct = [False, True, False, False, False, True, False, False, False, False]
    strips = [
        Strip(label, [block(one) for one in found[part]], [0.5] * 5, correct[part], "note")
        for label, part in (("plain", slice(0, 5)), ("distilled", slice(5, 10)))
    ]
    retrieval_sheet([Row("a caption", [block(truth)], strips)], tmp_path / "sheet.png", title="title")
    pixels = pixels_of(tmp_path / "sheet.png")
    boxes = [box_of(pixels, one) for one in found]
    for box, right in zip(boxes, correct, strict=True):
        assert (box[1] - box[0], box[3] - box[2]) == (THUMB, THUMB)
        assert ring(pixels, box, 1) == {RIGHT if right else WRONG}
        assert ring(pixels, box, 2) == {RIGHT if right else WRONG}
        assert ring(pixels, box, 6) == {RIGHT if right else (255, 255, 255)}
        assert ring(pixels, box, 7) == {(255, 255, 255)}
    true_box = box_of(pixels, truth)
    assert ring(pixels, true_box, 6) == {RIGHT}
    for strip in (boxes[:5], boxes[5:]):
        assert len({box[0] for box in strip}) == 1
        assert [box[2] for box in strip] == sorted(box[2] for box in strip)
    assert boxes[5][0] > boxes[0][1]  # distilled below plain
    assert true_box[3] < boxes[0][2]  # the true picture to the left of both
    assert true_box[0] == boxes[0][0]
    for left, right in zip(boxes[:4], boxes[1:5], strict=True):
        assert right[2] - left[3] >= 12  # two frames fit between


def test_text_is_there_and_does_not_touch_the_pictures(tmp_path):
    truth, *found = colours(6)

    def sheet(caption, label, value):
        strip = Strip(label, [block(one) for one in found], [value] * 5, [False] * 5)
        retrieval_sheet([Row(caption, [block(truth)], [strip])], tmp_path / "sheet.png")
        return pixels_of(tmp_path / "sheet.png")

    pixels = sheet("a caption " * 30, "label", 0.123)
    boxes = [box_of(pixels, one) for one in [truth, *found]]  # box_of asserts that nothing is drawn into them
    beneath = pixels[boxes[1][1] + 8 : boxes[1][1] + 28, boxes[1][2] : boxes[1][3]]
    assert (beneath < 160).any()
    other = sheet("a caption " * 30, "label", 0.456)
    assert (other != pixels).any()
    short = sheet("a caption", "label", 0.123)
    assert len(short) < len(pixels)
    assert (sheet("a caption", "other", 0.123) != short).any()
    assert ((pixels != 255).any(axis=-1)[:, :24] == 0).all()  # the margins stay empty
    assert ((pixels != 255).any(axis=-1)[:, -24:] == 0).all()


def test_rows_follow_one_another_and_more_true_pictures_are_counted(tmp_path):
    one, two, *rest = colours(12)
    strip = Strip("plain", [block((0, 0, 90))], [1.0], [False])
    many = Row("first", [block(one), *(block(other) for other in rest[:4])], [strip, strip])
    retrieval_sheet([many, Row("second", [block(two)], [strip])], tmp_path / "sheet.png")
    pixels = pixels_of(tmp_path / "sheet.png")
    first, second, last = box_of(pixels, one), box_of(pixels, rest[0]), box_of(pixels, two)
    assert first[1] < second[0] < second[1] < last[0]
    assert not (pixels == np.array(rest[1])).all(axis=-1).any()  # beyond the height of two strips


@pytest.mark.parametrize("size", [(48, 48), (500, 300), (1, 1), (2000, 3), (119, 121)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pictures_of_every_size_and_mode(tmp_path, size, mode):
    picture = block((255, 0, 200), size).convert(mode)
    retrieval_sheet([Row("x", [picture], [Strip("s", [picture], [0.1], [True])])], tmp_path / "sheet.png")
    hits_sheet(picture, [picture], labels=["x"], path=tmp_path / "hits.png")
    assert pixels_of(tmp_path / "hits.png").shape[1] == 5 * 132 + 4 * 10 + 48


def test_small_pictures_stay_sharp(tmp_path):
    """A made picture of 48 pixels has only its own two colours when it is enlarged."""
    picture = block((255, 0, 200), (48, 48))
    picture.paste((0, 90, 250), (10, 10, 30, 30))
    hits_sheet("q", [picture], labels=["x"], path=tmp_path / "hits.png")
    top, _, left, _ = box_of(pixels_of(tmp_path / "hits.png"), (0, 90, 250))
    inside = pixels_of(tmp_path / "hits.png")[top - 25 : top + 95, left - 25 : left + 95].reshape(-1, 3)
    assert {tuple(map(int, pixel)) for pixel in inside} == {(255, 0, 200), (0, 90, 250)}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_any_caption_can_be_drawn(tmp_path, caption):
    picture = block((255, 0, 200))
    strip = Strip(caption or "s", [picture] * 5, [0.0] * 5, [False] * 5, caption)
    retrieval_sheet([Row(caption, [picture], [strip])], tmp_path / "sheet.png", title=caption)
    hits_sheet(caption, [], labels=[caption, caption], path=tmp_path / "hits.png")
    for name in ("sheet.png", "hits.png"):
        assert pixels_of(tmp_path / name).shape[1] in (5 * 142 + 132 + 30 + 48, 5 * 132 + 4 * 10 + 48)


def test_hits_of_a_text_and_of_a_picture(tmp_path):
    asked, *found = colours(8)
    path = tmp_path / "deeper" / "hits.png"
    hits_sheet("a query", [block(one) for one in found], labels=[f"0.{n} name.jpg" for n in range(7)], path=path)
    boxes = [box_of(pixels_of(path), one) for one in found]
    assert len({box[0] for box in boxes[:5]}) == 1
    assert boxes[5][0] > boxes[0][1]
    assert boxes[5][2] == boxes[0][2]
    hits_sheet(block(asked), [], labels=["a caption that was found"], path=path)
    top, bottom, *_ = box_of(pixels_of(path), asked)
    assert bottom - top == 2 * THUMB
    hits_sheet("a query", [], labels=[], path=path)
    with pytest.raises(ValueError, match="one label a picture is needed, got 1 pictures and 0 labels"):
        hits_sheet("a query", [block(asked)], labels=[], path=path)


def test_sheets_are_whole_or_not_there(tmp_path):
    strip = Strip("s", [block((1, 2, 3))], [0.1], [True])
    retrieval_sheet([Row("x", [block((1, 2, 3))], [strip])], tmp_path / "sheet.png")
    before = (tmp_path / "sheet.png").read_bytes()
    for bad in ([], [Row("x", [], [strip])], [Row("x", [block((1, 2, 3))], [])]):
        with pytest.raises(ValueError, match="at least one"):
            retrieval_sheet(bad, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="strip 's': one similarity and one mark a picture"):
        Strip("s", [block((1, 2, 3))], [0.1, 0.2], [True])


def test_flickr_pictures(tmp_path):
    shared = Path(os.environ.get("CROSS2DUAL_SHARED", Path(__file__).parents[2] / "shared"))
    folder = shared / "data" / "flickr8k-160" / "images"
    names = sorted(folder.glob("*.jpg"))[:6] if folder.is_dir() else []
    if not names:
        pytest.skip(f"no pictures in {folder}; set CROSS2DUAL_SHARED")
    pictures = []
    for name in names:
        with Image.open(name) as image:
            pictures.append(image.convert("RGB"))
    strip = Strip("plain", pictures[1:], [0.3] * 5, [False] * 5)
    retrieval_sheet([Row("a caption", pictures[:1], [strip])], tmp_path / "sheet.png")
    pixels = pixels_of(tmp_path / "sheet.png")
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10_000  # photographs, not blocks


def test_letters_without_a_font_lose_their_accents(monkeypatch):
    monkeypatch.setattr(fonts, "_WIDE", ())
    assert font_for("Mädchen – naïve ☃", 14)[1] == "Madchen - naive ☃"
    assert font_for("plain\ttext", 14)[1] == "plain text"


def test_a_wider_font_is_taken_where_there_is_one():
    if fonts._system("DejaVuSans.ttf", 14) is None:
        pytest.skip("DejaVu Sans is neither in the system's font folders nor beside matplotlib")
    font, text = font_for("Ελλάδα – Москва ğ", 14)
    assert text == "Ελλάδα – Москва ğ"
    assert font.getname()[0] != "Aileron"
    assert font_for("ascii", 14)[0].getname()[0] == "Aileron"


def test_the_sample_is_random_fixed_and_spread_over_groups():
    groups = np.arange(5000) // 5
    chosen = pick_sample(groups, count=40, seed=0)
    assert len(chosen) == 40
    assert (np.diff(chosen) > 0).all()
    assert len(set(groups[chosen])) == 40
    np.testing.assert_array_equal(chosen, pick_sample(groups, count=40, seed=0))
    assert not np.array_equal(chosen, pick_sample(groups, count=40, seed=1))
    assert pick_sample(np.array([7, 7, 7]), count=5, seed=0).shape == (1,)
    assert len(pick_sample(np.empty(0, np.int64), count=5, seed=0)) == 0
    counts = np.zeros(12)
    for seed in range(3000):
        counts[pick_sample(np.repeat([0, 1, 2], [6, 3, 3]), count=1, seed=seed)] += 1
    assert (counts > 100).all()  # every query can be drawn


ROWS = {
    "plain": {
        "i2t_r1": 16.6,
        "i2t_r5": 37.5,
        "i2t_r10": 49.2,
        "t2i_r1": 12.94,
        "t2i_r5": 35.1,
        "t2i_r10": 48.6,
        "rsum": 200.0,
    },
    "distilled [kl|a]": {"i2t_r1": 18.0, "rsum": 210.04, "gap_closed": 25.125, "t2i_r10": float("nan")},
}


def test_plain_lines_where_there_is_no_terminal():
    file = io.StringIO()
    results_table(ROWS, extra=["gap_closed"], title="test", console=Console(file=file, width=40))
    assert file.getvalue().splitlines() == [
        "test",
        "                  i2t R@1   R@5  R@10  t2i R@1   R@5  R@10   RSUM  gap closed",
        "plain                16.6  37.5  49.2     12.9  35.1  48.6  200.0           –",
        "distilled [kl|a]     18.0     –     –        –     –     –  210.0       25.12",
    ]


def test_a_table_on_a_terminal():
    file = io.StringIO()
    results_table(ROWS, title="[test]", console=Console(file=file, width=100, force_terminal=True, color_system=None))
    text = file.getvalue()
    lines = text.splitlines()
    assert len(lines) > len(ROWS) + 3
    assert "[test]" in lines[0]
    assert any("distilled [kl|a]" in line and "210.0" in line and "–" in line for line in lines)


def test_markdown():
    assert to_markdown(ROWS, extra=["gap_closed"]).splitlines() == [
        "|  | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | RSUM | gap closed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| plain | 16.6 | 37.5 | 49.2 | 12.9 | 35.1 | 48.6 | 200.0 | – |",
        "| distilled [kl\\|a] | 18.0 | – | – | – | – | – | 210.0 | 25.12 |",
    ]
    for show in (to_markdown, results_table):
        with pytest.raises(ValueError, match="at least one row"):
            show({})
