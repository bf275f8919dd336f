"""The search page in a browser, as a person uses it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.exported import made_export, opened
from tests.serving import served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

SENTENCE = "a small red ring above a large blue square"
TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_export(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    with served(place / "student", "--teacher", str(place / "run"), "--rerank", "24") as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    yield from opened_page(browser, address)


def opened_page(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """A page that may ask nobody else, and whose script may not fail."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(f"{address}/")
    yield page
    context.close()
    elsewhere = [url for url in asked if urlsplit(url).scheme not in ("data", "blob")]
    assert len(elsewhere) >= 4  # the page, its two files, and what it asked
    assert {urlsplit(url).netloc for url in elsewhere} == {urlsplit(address).netloc}
    assert failed == []


def search(page: Any, text: str = SENTENCE) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    until(page, f"document.querySelector('#status').textContent.includes({json.dumps(text)})")


def until(page: Any, holds: str) -> None:
    """Wait for an expression to hold; the page's own policy forbids Playwright's way, which is eval."""
    deadline = time.monotonic() + 20
    while not page.evaluate(holds):
        assert time.monotonic() < deadline, holds
        page.wait_for_timeout(20)


def order(page: Any) -> list[str]:
    return [one.get_attribute("data-key") for one in page.query_selector_all(".hit")]


def png(x: Any, row: int) -> bytes:
    file = BytesIO()
    x.corpus.load_images(np.array([row]))[0].save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def picture(place: Path) -> bytes:
    x = opened(place)
    return png(x, int(x.corpus.split("test").images[0]))


def test_a_sentence_gives_a_grid_of_pictures_with_scores(page: Any, address: str) -> None:
    search(page)
    hits = page.request.post(f"{address}/search", data={"text": SENTENCE, "k": 12}).json()["hits"]
    assert order(page) == [f"images-{hit['id']}" for hit in hits]
    assert "12 of 30 pictures" in page.inner_text("#status")
    first = page.locator(".hit").first
    assert hits[0]["captions"][0] in first.inner_text()
    assert hits[0]["name"] in first.inner_text()
    assert f"{hits[0]['score']:.3f}" in first.inner_text()
    assert page.locator(".teacher").count() == 0
    until(page, "[...document.querySelectorAll('.hit img')].slice(0, 4).every(one => one.naturalWidth > 0)")
    assert page.locator(".bar").count() == 1
    assert re.search(r"preprocess \d.* · embed \d.* · search \d", page.inner_text(".bar"))


def test_re_ranking_changes_the_order_and_the_milliseconds(page: Any, address: str) -> None:
    search(page)
    before = order(page)
    page.check("#rerank")  # asks at once
    page.wait_for_selector(".move")
    asked = {"text": SENTENCE, "k": 12, "rerank": True}
    hits = page.request.post(f"{address}/search", data=asked).json()["hits"]
    assert order(page) == [f"images-{hit['id']}" for hit in hits] != before
    shown = [one.inner_text() for one in page.query_selector_all(".move")]
    for hit, words in zip(hits, shown, strict=True):
        by = hit["rank_before"] - hit["rank"]
        assert words == ("= same place" if not by else f"{'▲' if by > 0 else '▼'} was {hit['rank_before']}")
    assert f"{hits[0]['teacher_score']:.3f}" in page.locator(".hit").first.inner_text()
    alone, together = (one.inner_text() for one in page.query_selector_all(".bar .sum"))
    milliseconds = [float(one.removesuffix(" ms").replace(",", "")) for one in (alone, together)]
    assert milliseconds[0] < milliseconds[1]
    assert "the teacher read the first 24" in page.inner_text("#status")
    page.uncheck("#rerank")
    until(page, "!document.querySelector('.move')")
    assert order(page) == before


def test_a_chosen_picture_finds_captions(page: Any, picture: bytes) -> None:
    page.set_input_files("#picture", {"name": "mine.png", "mimeType": "image/png", "buffer": picture})
    page.wait_for_selector(".hit")
    assert "12 of 60 captions for the picture" in page.inner_text("#status")
    assert page.inner_text("#picture-name") == "mine.png"
    assert page.input_value("#find") == "texts"
    until(page, "document.querySelector('#preview').naturalWidth > 0")
    page.select_option("#find", "images")
    until(page, "document.querySelector('#status').textContent.includes('pictures')")
    assert page.is_disabled("#rerank")
    assert "only pictures with sentences" in page.inner_text("#rerank-why")
    assert "1.000" in page.locator(".hit").first.inner_text()  # itself
    page.click("#remove")
    assert page.is_enabled("#rerank")
    search(page, "a large star")
    assert "12 of 30 pictures" in page.inner_text("#status")


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_dropped_or_pasted_picture_finds_captions(page: Any, picture: bytes, kind: str) -> None:
    page.evaluate(
        """([kind, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "given.png", {type: "image/png"}));
            const target = document.querySelector("#drop");
            const send = (name) => target.dispatchEvent(kind === "drop"
                ? new DragEvent(name, {dataTransfer: data, bubbles: true, cancelable: true})
                : new ClipboardEvent(name, {clipboardData: data, bubbles: true, cancelable: true}));
            if (kind === "drop") { send("dragenter"); window.over = target.className; }
            window.prevented = !send(kind);
        }""",
        [kind, list(picture)],
    )
    page.wait_for_selector(".hit")
    assert page.evaluate("window.prevented")  # or the browser would leave the page for the file
    assert kind == "paste" or page.evaluate("window.over") == "drop over"
    assert page.get_attribute("#drop", "class").split() == ["drop"]
    assert page.inner_text("#picture-name") == "given.png"
    assert "captions" in page.inner_text("#status")


def test_what_went_wrong_is_said_in_place_and_the_next_search_works(page: Any, tmp_path: Path) -> None:
    search(page)
    notes = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    page.set_input_files("#picture", notes)
    page.wait_for_selector("#error:not(:empty)")
    assert "not an image of a known format" in page.inner_text("#error")
    assert page.is_hidden("#answer")  # of the query before
    page.click("#remove")
    large = tmp_path / "large.png"
    large.write_bytes(bytes(21 << 20))
    page.set_input_files("#picture", large)
    until(page, "document.querySelector('#error').textContent.includes('may have 20')")
    page.fill("#text", " ")
    page.click("#search button[type=submit]")
    until(page, "document.querySelector('#error').textContent.includes('Type a sentence')")
    search(page, "a large star")
    assert page.inner_text("#error") == ""
    assert page.is_visible("#answer")


def test_by_keyboard_alone(page: Any) -> None:
    seen = []

    def step(key: str = "Tab") -> str:
        page.keyboard.press(key)
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        return str(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))

    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type(SENTENCE)
    page.keyboard.press("Enter")
    page.wait_for_selector(".hit")
    assert step() == "solid"
    step()
    on_label = page.evaluate("getComputedStyle(document.querySelector('label.button')).outlineStyle")
    assert on_label == "solid"  # the input itself is not to be seen
    assert [step(), step(), step()] == ["solid"] * 3
    assert seen[1:] == ["picture", "find", "count", "rerank"]
    page.keyboard.press("Space")
    page.wait_for_selector(".move")
    assert page.evaluate("document.activeElement.id") == "rerank"
    page.keyboard.press("Tab")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("Result 1: ")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#large[open]")
    until(page, "document.querySelector('#large-picture').naturalWidth > 0")
    page.keyboard.press("Escape")
    until(page, "!document.querySelector('#large').open")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == label  # back where it was
    page.keyboard.press("Enter")
    page.wait_for_selector("#large[open]")
    page.focus("#similar")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#status').textContent.includes('for the picture')")


def test_everything_that_is_operated_has_a_name_and_news_is_announced(page: Any) -> None:
    search(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button")].filter(one => !one.labels?.length
            && !one.textContent.trim() && !one.getAttribute("aria-label")).map(one => one.outerHTML)"""
    )
    assert nameless == []
    assert page.get_attribute("#status", "aria-live") == "polite"
    assert page.get_attribute("#error", "role") == "alert"
    assert all(one.get_attribute("alt") for one in page.query_selector_all(".hit img"))
    assert page.evaluate("document.documentElement.lang") == "en"


def test_a_reload_asks_the_same_again(page: Any) -> None:
    page.check("#rerank")
    search(page)
    found = order(page)
    page.reload()
    page.wait_for_selector(".move")
    assert order(page) == found
    assert page.input_value("#text") == SENTENCE
    assert SENTENCE.split()[0] not in urlsplit(page.url).path + urlsplit(page.url).query  # what is sent to the service


def test_what_comes_from_a_caption_is_text_and_never_markup(page: Any) -> None:
    evil = "<img src=x onerror='window.hacked=1'>"

    def answered(route: Any) -> None:
        answer = route.fetch().json()
        answer["hits"][0] |= {"captions": [evil], "name": evil}
        route.fulfill(json=answer)

    page.route("**/search", answered)
    search(page, "a <b>star</b>")
    assert evil in page.locator(".hit").first.inner_text()
    page.locator(".hit > button").first.click()
    page.wait_for_selector("#large[open]")
    assert page.inner_text("#large-title") == evil
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, address: str, picture: bytes, scheme: str) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True, "is_mobile": True}
    for page in opened_page(browser, address, **options):
        page.check("#rerank")
        search(page, "a" * 300)
        page.wait_for_selector(".move")
        widths = "[document.documentElement.scrollWidth, window.innerWidth]"
        assert page.evaluate(widths) == [360, 360]
        long = {"name": "x" * 200 + ".png", "mimeType": "image/png", "buffer": picture}
        page.set_input_files("#picture", long)
        until(page, "document.querySelector('#status').textContent.includes('captions')")
        assert page.evaluate(widths) == [360, 360]
        page.locator(".hit > button").first.click()
        page.wait_for_selector("#large[open]")
        assert page.evaluate("document.querySelector('#large').getBoundingClientRect().right") <= 360
        ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        light = [sum(map(int, re.findall(r"\d+", one))) for one in (ink, paper)]
        assert (light[0] < light[1]) == (scheme == "light")


def test_a_token_is_asked_for_once_and_pictures_come_with_it(browser: Any, place: Path) -> None:
    with served(place / "student", "--data", str(place / "run"), DISTILL_TOKEN=TOKEN) as (address, _):
        for page in opened_page(browser, address):
            page.wait_for_selector("#token-form:not([hidden])")
            assert page.is_hidden("#main")
            page.fill("#token", "wrong")
            page.keyboard.press("Enter")
            until(page, "document.querySelector('#token-error').textContent.includes('not right')")
            page.fill("#token", TOKEN)
            page.keyboard.press("Enter")
            search(page)
            until(page, "[...document.querySelectorAll('.hit img')].every(one => one.naturalWidth > 0)")
            assert "no teacher" in page.inner_text("#rerank-why")
            page.reload()
            page.wait_for_selector(".hit")
            assert page.is_hidden("#token-form")
            assert page.evaluate("Object.keys(localStorage).length") == 0
            assert TOKEN not in page.url


def test_without_pictures_a_tile_shows_the_name(browser: Any, place: Path) -> None:
    with served(place / "student") as (address, _):
        for page in opened_page(browser, address):
            search(page)
            assert page.locator(".tile").count() == 12
            assert page.locator(".tile").first.inner_text().startswith("test-")
            page.locator(".hit > button").first.click()
            page.wait_for_selector("#large[open]")
            assert page.is_hidden("#large-picture")
    for page in [browser.new_page()]:  # and the service is gone now
        with pytest.raises(playwright.Error):
            page.goto(address)
        page.close()
