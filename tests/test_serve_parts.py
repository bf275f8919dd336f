"""Parts of the service by themselves: caches, gates, pictures of a folder, tokens, addresses, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from distill.data.pictures import DataError, UnreadableImageError
from distill.index import VectorIndex
from distill.serving.cache import ByteCache
from distill.serving.catalog import Catalog, CatalogError
from distill.serving.gate import BusyError, Gate
from distill.serving.opening import Beside, ServingError, open_engine
from distill.serving.pictures import FolderPictures, NoPicturesError, Thumbnails, shrunk
from distill.serving.server import allowed_hosts, bound_socket, is_loopback, read_token
from tests.exported import made_export, opened


def test_a_cache_keeps_what_was_used_last_within_its_bytes() -> None:
    cache: ByteCache[str, int] = ByteCache(10)
    cache.put("a", 1, size=4)
    cache.put("b", 2, size=4)
    assert cache.get("a") == 1
    cache.put("c", 3, size=4)  # b was used longest ago
    assert [cache.get(key) for key in "abc"] == [1, None, 3]
    cache.put("a", 4, size=6)
    assert (cache.get("a"), cache.used, len(cache)) == (4, 10, 2)
    cache.put("a", 5, size=11)  # more than all
    assert (cache.get("a"), cache.used) == (None, 4)


def test_a_gate_runs_one_at_a_time_and_gives_its_place_back() -> None:
    gate, go, order = Gate("test", workers=1, waiting=2), threading.Event(), []

    def work(number: int) -> int:
        go.wait(20)
        order.append(number)
        if number == 1:
            raise ArithmeticError
        return number

    async def run() -> list[Any]:
        asked = [asyncio.create_task(gate.run(lambda n=n: work(n))) for n in range(4)]
        await asyncio.sleep(0)
        assert gate.taken == 3
        asked[2].cancel()  # its caller leaves; it never began
        for _ in range(2000):
            await asyncio.sleep(0.001)
            if gate.taken == 2:
                break
        go.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    done = asyncio.run(run())
    assert done[0] == 0
    assert [type(one) for one in done[1:]] == [ArithmeticError, asyncio.CancelledError, BusyError]
    gate.close()
    assert (order, gate.taken) == ([0, 1], 0)


# --- pictures of a folder ---------------------------------------------------------------------------------------------


class Named:
    """A catalog of names."""

    def __init__(self, names: list[str], sha256: list[str]) -> None:
        self.ids = {"image": np.arange(len(names))}
        self._names, self._sha256 = names, sha256

    def name(self, image: int) -> str:
        return self._names[image]

    def sha256(self, image: int) -> str:
        return self._sha256[image]


def test_pictures_of_a_folder_are_those_that_were_indexed_and_inside_it(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.png"
    (inside / "deep").mkdir(parents=True)
    PIL.Image.new("RGB", (30, 20), "red").save(outside)
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()
    shutil.copy(outside, inside / "deep" / "Zürich – 東京.png")
    (inside / "link.png").symlink_to(outside)
    (inside / "cut.png").write_bytes(outside.read_bytes()[:40])
    names = [
        "deep/Zürich – 東京.png",
        "../outside.png",
        str(outside),
        "link.png",
        "gone.png",
        "a\0b",
        "deep",
        "x" * 300,
    ]
    source = FolderPictures(inside, Named(names, [digest] * len(names)))  # type: ignore[arg-type]
    assert source.load(np.array([0, 0]))[1].size == (30, 20)
    for row in range(1, len(names)):
        with pytest.raises(DataError, match="is not in"):
            source.load(np.array([row]))
    changed = FolderPictures(inside, Named(names[:1], ["0" * 64]))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="another one than was indexed"):
        changed.load(np.array([0]))
    cut = hashlib.sha256((inside / "cut.png").read_bytes()).hexdigest()
    broken = FolderPictures(inside, Named(["cut.png"], [cut]))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 0") as error:
        broken.load(np.array([0]))
    assert not isinstance(error.value, UnreadableImageError)  # which would blame what was uploaded
    with pytest.raises(NoPicturesError, match="holds none of the first 1 pictures of the index, such as 'gone.png'"):
        FolderPictures(inside, Named(["gone.png"], [digest]))  # type: ignore[arg-type]
    with pytest.raises(NoPicturesError, match="is no folder"):
        FolderPictures(outside, Named(names, [digest]))  # type: ignore[arg-type]


def test_small_copies_are_made_once() -> None:
    loaded = []

    class Source:
        def load(self, rows: Any) -> Any:
            loaded.append(rows.tolist())
            return [PIL.Image.new("RGB", (400, 200), "blue")]

    thumbnails = Thumbnails(Source())
    first = thumbnails.get(3, 128, "webp")
    assert thumbnails.get(3, 128, "webp") == first == shrunk(PIL.Image.new("RGB", (400, 200), "blue"), 128, "webp")
    thumbnails.get(3, 256, "webp")
    assert loaded == [[3], [3]]


# --- tokens and addresses ---------------------------------------------------------------------------------------------


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTILL_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("DISTILL_TOKEN", "0123456789abcdef")
    assert read_token(None) == "0123456789abcdef"
    file = tmp_path / "token"
    file.write_text("fedcba9876543210\n")
    assert read_token(file) == "fedcba9876543210"
    for bad in ("", "short", "with a space in it", "ünïcödé-0123456789"):
        file.write_text(bad)
        with pytest.raises(ServingError, match="16 or more ASCII characters"):
            read_token(file)
    monkeypatch.setenv("DISTILL_TOKEN", "short")
    with pytest.raises(ServingError, match="DISTILL_TOKEN holds no token"):
        read_token(None)


def test_only_this_machine_is_served_without_a_token() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("127.8.9.1")
    assert is_loopback("::1")
    for address in ("0.0.0.0", "::", "10.0.0.1", "fe80::1%eth0"):
        assert not is_loopback(address)
    with pytest.raises(ServingError, match="a token is needed: set DISTILL_TOKEN"):
        bound_socket("0.0.0.0", 0, token=False)
    with bound_socket("0.0.0.0", 0, token=True) as bound:
        assert bound.getsockname()[1] > 0
    assert allowed_hosts("localhost", token=False) == ["127.0.0.1", "[::1]", "localhost"]
    assert allowed_hosts("::1", token=False) == ["127.0.0.1", "[::1]", "localhost"]
    assert allowed_hosts("127.0.0.1", token=True) == ["*"]


def test_a_port_in_use_and_a_name_without_an_address_are_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=rf"^port {port} of 127.0.0.1 is in use: .*--port"):
            bound_socket("127.0.0.1", port, token=False)
    with pytest.raises(ServingError, match=r"no address of this machine"):
        bound_socket("no-such-host.invalid", 0, token=False)


# --- folders that do not fit ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_export(tmp_path_factory.getbasetemp())


def engine_of(folder: Path, **beside: Any) -> Any:
    return open_engine(folder, Beside(**beside), precision="fp32", say=lambda _: None)


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "student", tmp_path / "student")
    return tmp_path / "student"


def test_an_index_of_another_student_or_with_unnamed_items_is_refused(folder: Path) -> None:
    dim = json.loads((folder / "export_report.json").read_text())["student"]["dim"]
    Catalog(folder, dim=dim)
    with pytest.raises(CatalogError, match=f"vectors of {dim} numbers, the student's have {dim + 1}"):
        Catalog(folder, dim=dim + 1)
    VectorIndex.build(np.eye(2, dim, dtype=np.float32), np.array([3, 10**6])).save(folder / "index" / "image")
    with pytest.raises(CatalogError, match=r"2 items that .* does not name, such as 3: export again"):
        Catalog(folder, dim=dim)
    (folder / "embeddings" / "texts.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="export again"):
        Catalog(folder, dim=dim)


def test_another_corpus_is_refused_and_the_same_taken(place: Path, folder: Path) -> None:
    assert engine_of(folder, data=opened(place)).pictures is not None
    with pytest.raises(ServingError, match=r"made of corpus 'scenes' with fingerprint \w+, but the recipe's corpus"):
        engine_of(folder, data=opened(place, "data.seed=1"))


def test_teachers_that_cannot_re_rank_are_refused_before_anything_is_loaded(place: Path, tmp_path: Path) -> None:
    member = f"{{kind: blip, checkpoint: {place / 'teacher'}}}"
    several = opened(place, f"teacher={{kind: ensemble, members: [{member}, {member}]}}")
    with pytest.raises(ServingError, match="is an ensemble.*one of its members"):
        engine_of(tmp_path, teacher=several)
    untaught = opened(place, "teacher.checkpoint=null", "teach={}", "name=untaught")
    with pytest.raises(ServingError, match="has no taught teacher yet"):
        engine_of(tmp_path, teacher=untaught)


def test_without_an_index_there_is_nothing_to_show(place: Path) -> None:
    assert engine_of(place / "bare").catalog is None
    with pytest.raises(ServingError, match="exported without an index"):
        engine_of(place / "bare", data=opened(place))


def test_pictures_of_a_folder_come_before_those_of_the_corpus(place: Path, folder: Path, tmp_path: Path) -> None:
    x = opened(place)
    catalog = Catalog(folder, dim=json.loads((folder / "export_report.json").read_text())["student"]["dim"])
    shown = tmp_path / "pictures"
    shown.mkdir()
    row = int(catalog.ids["image"][0])
    content = x.corpus.pictures.dataset[row]["image"]["bytes"]
    (shown / catalog.name(row)).write_bytes(content)
    engine = engine_of(folder, data=x, pictures=shown)
    assert isinstance(engine.pictures, FolderPictures)
    np.testing.assert_array_equal(engine.pictures.load(np.array([row]))[0], x.corpus.load_images(np.array([row]))[0])
    os.remove(shown / catalog.name(row))
    with pytest.raises(DataError, match="is not in"):
        engine.pictures.load(np.array([row]))
