"""The page, Markdown, JSON and terminal table of a comparison, read back by parsers."""

import base64
import io
import json
import re
from dataclasses import fields, replace
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console

from distill.analysis import analyse
from distill.compare import Comparison, Example, FailedCell, Found, GapPoint, Item
from distill.report.compare_page import show, to_html, to_markdown, write_report
from distill.report.compare_plots import curve_plot, gap_plot
from distill.significance import Resampling
from tests.comparisons import full_comparison, made_comparison

QUICK = Resampling(resamples=199)
HOSTILE = "<script>alert(\"x\")</script>--><b onload='y'>|$x_{"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, words, and tables as lists of rows; asserts that every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.tables, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if "th" in self._open or "td" in self._open:
            self.tables[-1][-1][-1] += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@cache
def full():
    comparison = full_comparison()
    analysis = analyse(comparison, QUICK)
    return comparison, analysis, to_html(comparison, analysis)


def small(**more):
    comparison = made_comparison({"plain": 0.0, "kl": 0.6}, images=60, **more)
    return comparison, analyse(comparison, QUICK)


def picture(colour="red", kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, format=kind)
    return file.getvalue()


def test_the_page_asks_the_network_for_nothing():
    page = Page(full()[2])
    assert len(page.tags) > 500
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")]
        for target in re.findall(r"url\(([^)]*)\)", attributes.get("style") or "") + [attributes.get("clip-path", "")]:
            assert target.startswith(("#", "url(#")) or not target
    assert "http://" not in full()[2]
    assert "https://" not in full()[2]
    (policy,) = [one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "@import" not in full()[2]


def test_links_within_the_page_lead_somewhere_and_ids_are_unique():
    page = Page(full()[2])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    links = {attributes["href"][1:] for _, attributes in page.tags if attributes.get("href", "").startswith("#")}
    links |= set(re.findall(r"url\(#([^)]*)\)", full()[2]))
    links |= {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert links <= set(ids)
    assert len(page.named("nav")) == 1
    assert {
        "recall",
        "differences",
        "agreement",
        "gap",
        "curves",
        "cost",
        "examples",
        "failed",
        "how",
        "again",
    } <= links


def test_pictures_and_tables_can_be_read_aloud():
    page = Page(full()[2])
    images = page.named("img")
    assert len(images) > 10
    assert all(image["alt"].partition(": ")[2] for image in images)
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    Image.open(io.BytesIO(base64.b64decode(images[0]["src"].partition(",")[2]))).verify()
    drawn = page.named("svg")
    assert len(drawn) == 3
    assert all(one["role"] == "img" and len(one["aria-label"]) > 20 for one in drawn)
    assert len(page.named("caption")) == len(page.tables) > 6
    assert page.named("th")
    assert all(one.get("scope") in ("col", "row", "colgroup") for one in page.named("th"))


def test_every_arm_is_in_every_table_with_its_figures():
    comparison, analysis, html = full()
    page = Page(html)
    results, against_plain, against_best, agreement, *_, losses = page.tables
    cost = next(table for table in page.tables if "peak memory" in table[0])
    for table, missing in ((results, None), (against_plain, "plain"), (against_best, analysis.best), (agreement, None)):
        named = [row[0].split(" ")[0] for row in table]
        assert [arm for arm in comparison.arms if arm not in named] == ([missing] if missing else [])
    for table in (cost, losses):
        assert {row[0].split(" ")[0] for row in table[1:]} == set(comparison.arms)
    body = {row[0].split(" ")[0]: row for row in results[2:]}
    assert list(body) == ["teacher", *(figures.arm for figures in analysis.arms)]
    assert body["plain"][0] == "plain undistilled"
    for figures in analysis.arms:
        spread = figures.metrics["t2i_r5"]
        assert body[figures.arm][8] == f"{spread.mean:.1f} ± {spread.std:.1f}"
        assert body[figures.arm][1].startswith(f"{figures.metrics['rsum'].mean:.1f} ± ")
    assert {row[0]: row[1] for row in losses[1:] if row[0] == "m3se"} == {"m3se": comparison.arms["m3se"]}


def test_the_words_of_the_page_are_those_of_the_analysis():
    comparison, analysis, html = full()
    text = Page(html).text
    for one in (*analysis.against_plain, *analysis.against_best):
        assert f"{one.arm}: {one.words}." in text
    assert any(one.verdict == "none" for one in analysis.against_plain)
    assert "no significant difference from plain: " in text
    for note in analysis.notes:
        assert note in text
    assert comparison.command in text
    assert comparison.failed[0].reason in text
    assert comparison.teacher.identity in text
    assert "another sample of test images" in text
    assert "captions written for it are drawn together" in text
    assert "picked by its mean RSUM on the images it is then tested on" in text
    assert all(name in text and words in text for name, words in comparison.same.items())


def test_examples_show_each_arm_once_with_its_rank():
    comparison, _, html = full()
    text = Page(html).text
    ranks = [f"{arm} rank {found.rank}" for example in comparison.examples for arm, found in example.found.items()]
    assert len(ranks) == 8 * len(comparison.examples)
    assert sorted(re.findall(r"\w+ rank \d+", text)) == sorted(ranks)
    assert "✓ right" in text
    assert "✗ wrong" in text


def hostile_comparison():
    comparison = made_comparison({"plain": 0.0, HOSTILE: 0.5, "日本": 0.1}, images=20)
    item = Item(1, HOSTILE, picture())
    text = Item(2, HOSTILE)
    point = GapPoint(HOSTILE, 8, comparison.teacher.metrics, {"i2t": 1.0, "t2i": 2.0})
    found = {arm: Found(item, False, 3) for arm in comparison.arms}
    more = {
        "title": HOSTILE,
        "command": f"distill {HOSTILE} ```",
        "arms": {arm: HOSTILE for arm in comparison.arms},
        "failed": [],
        "same": {HOSTILE: HOSTILE},
        "environment": {HOSTILE: HOSTILE},
        "gap": {HOSTILE: [point]},
        "examples": [Example("t2i", text, [item], found, 0), Example("i2t", item, [text], found, 0)],
        "corpus": replace(comparison.corpus, name=HOSTILE),
    }
    return Comparison(**{one.name: getattr(comparison, one.name) for one in fields(comparison)} | more)


def test_hostile_names_and_captions_are_words():
    comparison = hostile_comparison()
    analysis = analyse(comparison, QUICK)
    page = Page(to_html(comparison, analysis))
    assert not page.named("script")
    assert not page.named("b")
    assert page.text.count('<script>alert("x")</script>') > 15
    assert HOSTILE in page.text
    assert sum(HOSTILE in (one.get("alt") or "") for one in page.named("img")) == 4
    assert any(HOSTILE in one["aria-label"] for one in page.named("svg"))
    rendered = MarkdownIt("commonmark").enable("table").render(to_markdown(comparison, analysis))
    there = Page(rendered)
    assert not there.named("script")
    assert not there.named("b")
    assert all(len(row) == len(table[0]) for table in there.tables for row in table)
    assert any(row[0] == f"{HOSTILE} (best)" for table in there.tables for row in table)
    assert f"distill {HOSTILE} ```" in there.text


def test_markdown_holds_the_same_tables():
    comparison, analysis, html = full()
    page, markdown = (
        Page(html),
        Page(MarkdownIt("commonmark").enable("table").render(to_markdown(comparison, analysis))),
    )
    bare = [[cell.replace(" undistilled", "").replace(" best", "") for cell in row] for row in page.tables[0][2:]]
    marked = [
        [cell.replace(" (undistilled)", "").replace(" (best)", "") for cell in row] for row in markdown.tables[0][1:]
    ]
    assert bare == marked
    assert markdown.tables[0][0][1] == "RSUM"
    assert markdown.tables[0][0][7] == "text → image R@1"
    assert all(f"{one.arm}: {one.words}." in markdown.text for one in analysis.against_best)
    assert "Kendall" in markdown.text
    assert "teacher over K = 64" in markdown.text


def test_files_are_written_whole_and_json_has_numbers_or_nothing(tmp_path):
    comparison, analysis = small()
    nothing = replace(comparison.cells[-1], seconds=float("nan"), agreement=None)
    comparison = replace(comparison, cells=[*comparison.cells[:-1], nothing])
    paths = write_report(comparison, analysis, tmp_path / "deeper")
    assert [path.name for path in paths] == ["compare.html", "compare.md", "compare.json"]
    assert sorted(path.name for path in (tmp_path / "deeper").iterdir()) == sorted(path.name for path in paths)

    def refuse(name):
        raise AssertionError(name)

    data = json.loads(paths[2].read_text(), parse_constant=refuse)
    assert data["cells"][-1]["seconds"] is None
    assert data["cells"][0]["metrics"]["rsum"] == comparison.cells[0].evaluation.retrieval.rsum
    assert data["analysis"]["against_plain"][0]["words"] == analysis.against_plain[0].words
    assert data["teacher"]["metrics"]["rsum"] == comparison.teacher.metrics["rsum"]
    again = [path.read_bytes() for path in paths]
    write_report(comparison, analysis, tmp_path / "deeper")
    assert [path.read_bytes() for path in paths] == again


def test_a_picture_that_browsers_do_not_know_is_refused_and_nothing_is_written(tmp_path):
    comparison, analysis = small()
    for kind, ok in (("PNG", True), ("JPEG", True), ("GIF", True), ("WEBP", True), ("TIFF", False)):
        found = {"kl": Found(Item(0, "x", picture(kind=kind)), True, 1)}
        example = Example("t2i", Item(0, "a caption"), [Item(0, "y", picture())], found, 0)
        shown = replace(comparison, examples=[example])
        if ok:
            assert f"data:image/{kind.lower()};base64," in to_html(shown, analysis)
        else:
            with pytest.raises(ValueError, match="give PNG, JPEG, GIF or WebP"):
                write_report(shown, analysis, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sections_without_content_are_left_out(tmp_path):
    one = made_comparison({"plain": 0.0}, images=20, seeds=(0,), teacher=None)
    bare = [replace(cell, agreement=None, curve=()) for cell in one.cells]
    cases = [replace(one, cells=bare), replace(one, cells=[], failed=[FailedCell("plain", 0, "out of memory")])]
    for comparison in cases:
        html, markdown, _ = write_report(comparison, analyse(comparison, QUICK), tmp_path)
        page = Page(html.read_text())
        ids = {attributes.get("id") for _, attributes in page.tags}
        assert {"in-short", "recall", "cost", "how", "again"} <= ids
        assert not ids & {"differences", "agreement", "gap", "curves", "examples"}
        assert ("failed" in ids) is bool(comparison.failed)
        assert "plain" in markdown.read_text()
        assert not page.named("svg")
    assert "No arm has a student" in page.text


@pytest.mark.parametrize(("least", "most"), [(16.0, 560.0), (3.0, 8.0), (0.02, 9000.0)])
def test_milliseconds_are_written_as_numbers_however_far_they_reach(least, most):
    metrics = full()[0].teacher.metrics
    points = [GapPoint("student", None, metrics, {"i2t": least}), GapPoint("teacher", None, metrics, {"i2t": most})]
    svg = gap_plot({"plain": points})
    assert "mathdefault" not in svg
    ticks = [float(text) for text in re.findall(r">([0-9.e+-]+)</text>", svg) if least / 3 <= float(text) <= most * 3]
    assert len(ticks) >= 2


def test_curves_hold_every_seed_and_survive_gaps():
    comparison, _ = small()
    drawn = curve_plot(comparison)
    parts = {"plain": 1, "kl": 3}  # plain's total is its one part
    assert drawn.count("stroke-width: 0.9") >= 3 * sum(parts.values())
    odd = [replace(comparison.cells[0], curve=[{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}])]
    assert "<svg" in curve_plot(replace(comparison, cells=odd))
    long = [{"step": step, "loss": 1.0 + np.sin(step)} for step in range(50_000)]
    assert len(curve_plot(replace(comparison, cells=[replace(comparison.cells[0], curve=long)]))) < 60_000


def test_wall_time_by_stage_is_shown_where_it_is_known(tmp_path):
    comparison, analysis, page = full()
    assert "Wall clock of the trainings' processes by stage" in Page(page).text.replace("’", "'")
    html, markdown, data = write_report(comparison, analysis, tmp_path)
    rows = [line.split(" | ") for line in markdown.read_text().splitlines() if line.startswith("| train plain")]
    assert ["| train plain", "96.0 s", "90.0 s", "75.0 %", "100 items |"] in rows
    assert ["| train plain / checkpoint", "6.0 s", "6.0 s", "5.0 %", " |"] in rows
    assert json.loads(data.read_text())["time"]["total"] == 120.0
    unknown = replace(comparison, time=None)
    html, markdown, data = write_report(unknown, analysis, tmp_path)
    assert "Wall time" not in markdown.read_text()
    assert "by stage" not in html.read_text()
    assert json.loads(data.read_text())["time"] is None


def test_the_terminal_shows_the_table_and_the_words():
    comparison, analysis = small()
    file = io.StringIO()
    show(comparison, analysis, Console(file=file, width=60))
    lines = file.getvalue().splitlines()
    assert lines[0] == "Losses on made scenes: scenes, test split, percent"
    assert lines[1].split() == ["i2t", "R@1", "R@5", "R@10", "t2i", "R@1", "R@5", "R@10", "RSUM", "gap", "closed"]
    assert [line.split()[0] for line in lines[2:5]] == ["teacher", "kl", "plain"]
    assert lines[5] == f"kl: {analysis.against_plain[0].words}."  # not wrapped: a pipe has no width
    assert "\x1b" not in file.getvalue()
    file = io.StringIO()
    show(comparison, analysis, Console(file=file, width=120, force_terminal=True))
    assert "│" in file.getvalue()
