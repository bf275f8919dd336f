"""A run that is mined in shards: the files and the student of one that is mined in memory, killed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import mined_vectors
from distill.mined import Round
from distill.pipeline import first_candidates, trained_arm
from distill.preflight import PreflightError, claim
from distill.protocols import DIRECTIONS
from distill.shard_writer import ShardWriter
from distill.shards import Shards
from tests.test_groups import experiment

ARM = "distilled"
SMALL = ["evaluate.batch_size=16"]  # several batches a side, each with places in several shards


def files(x: Any) -> dict[str, bytes]:
    """All that mining leaves, and the student."""
    found = [*x.folder.rglob("candidates-*.npz"), *x.folder.rglob("groups-*.npz"), *x.folder.rglob("mined-*.json")]
    found += [*x.folder.rglob("vectors-*/vectors.npy"), x.folder / "arms" / ARM / "student" / "model.safetensors"]
    return {str(path.relative_to(x.folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("kind", [pytest.param("encode", marks=pytest.mark.slow), "in_batch", "memory"])
def test_a_run_in_shards_leaves_the_same_candidates_and_the_same_student(tmp_path: Path, kind: str) -> None:
    own = [*SMALL, f"train.candidates={kind}", "mine.overlap_below=0.9"]
    whole, cut = experiment(tmp_path / "one", *own), experiment(tmp_path / "cut", *own, "mine.shard_items=37")
    for x in (whole, cut):
        trained_arm(x, ARM)
    assert files(cut) == files(whole)
    assert len(files(whole)) >= 7
    assert not list(cut.folder.rglob("shards-*"))  # gone when their candidates are kept


def mined(x: Any) -> dict[str, np.ndarray]:
    found = first_candidates(x)
    return {f"{d}/{name}": getattr(found[d], name) for d in DIRECTIONS for name in ("item_ids", "similarity")}


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])


def test_killed_while_embedding_it_goes_on_from_the_last_batches_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.embed._KEPT_EVERY_S", 0)
    whole = mined(experiment(tmp_path / "one", *SMALL))
    put = ShardWriter.put
    calls: list[Path] = []

    def counted(self: ShardWriter, rows: np.ndarray, vectors: np.ndarray) -> None:
        calls.append(self.folder)
        put(self, rows, vectors)
        if len(calls) == dies_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "put", counted)
    own = [*SMALL, "mine.shard_items=37"]
    dies_at, batches = 3, {"image": 120 // 16 + 1}
    with pytest.raises(KeyboardInterrupt):
        first_candidates(experiment(tmp_path / "cut", *own))
    assert len(calls) == 3
    dies_at = 10**6
    x = experiment(tmp_path / "cut", *own)
    assert_same(whole, mined(x))
    of_images = [folder for folder in calls[3:] if folder.name.endswith("image")]
    assert len(of_images) == batches["image"] - 2  # two of three had been kept


def test_killed_between_the_last_vector_and_the_manifest_no_item_is_embedded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [*SMALL, "mine.shard_items=50"]
    whole = mined(experiment(tmp_path / "one", *SMALL))
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            first_candidates(experiment(tmp_path / "cut", *own))
    put, sides = ShardWriter.put, []
    monkeypatch.setattr(ShardWriter, "put", lambda self, *given: (sides.append(self.folder.name), put(self, *given)))
    assert_same(whole, mined(experiment(tmp_path / "cut", *own)))
    assert set(sides) == {"shards-1-text"}  # the side that had not been begun


def test_killed_between_embedding_and_the_end_of_mining_nothing_is_embedded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [*SMALL, "mine.shard_items=50"]
    whole = mined(experiment(tmp_path / "one", *SMALL))
    with monkeypatch.context() as patch:
        patch.setattr(mined_vectors, "index_over", lambda *_: (_ for _ in ()).throw(RuntimeError("the end")))
        with pytest.raises(RuntimeError, match="the end"):
            first_candidates(experiment(tmp_path / "cut", *own))
    x = experiment(tmp_path / "cut", *own)
    of = Round(1, x.folder / "shared")
    assert len(Shards(of.shards("image"))) == 120
    with monkeypatch.context() as patch:
        patch.setattr("distill.embed.embed_into", lambda *_, **__: pytest.fail("embedded again"))
        assert_same(whole, mined(x))
    assert not of.shards("image").exists()


def test_a_run_goes_on_with_smaller_shards_than_those_that_lie_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mined(experiment(tmp_path / "one", *SMALL))
    with monkeypatch.context() as patch:
        patch.setattr(mined_vectors, "index_over", lambda *_: (_ for _ in ()).throw(MemoryError("too large")))
        with pytest.raises(MemoryError):
            first_candidates(experiment(tmp_path / "cut", *SMALL, "mine.shard_items=90"))
    x = experiment(tmp_path / "cut", *SMALL, "mine.shard_items=20")
    sizes, index_over = [], mined_vectors.index_over

    def seen(x: Any, vectors: Any, ids: Any) -> Any:
        sizes.extend(shard.items for shard in vectors.shards)
        return index_over(x, vectors, ids)

    monkeypatch.setattr(mined_vectors, "index_over", seen)
    assert_same(whole, mined(x))
    assert max(sizes) == 20


def test_a_spoilt_shard_stops_the_run_by_name_and_another_student_s_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [*SMALL, "mine.shard_items=50"]
    with monkeypatch.context() as patch:
        patch.setattr(mined_vectors, "index_over", lambda *_: (_ for _ in ()).throw(RuntimeError("the end")))
        with pytest.raises(RuntimeError, match="the end"):
            first_candidates(experiment(tmp_path, *own))
    x = experiment(tmp_path, *own)
    of = Round(1, x.folder / "shared")
    path = of.shards("text") / "00002.vectors.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"shards-1-text/00002\.vectors\.npy is missing or is not what was written"):
        first_candidates(x)
    student = x.fresh_student()
    before = Shards(of.shards("image")).identity
    again = mined_vectors.embedded(x, of, student)  # not the one that trained the shared steps
    assert again["image"].identity != before
    np.testing.assert_array_equal(again["image"][:], x.embed(student, "image", x.corpus.split("train").ids["image"]))


def test_an_approximate_index_in_shards_tells_its_recall(tmp_path: Path) -> None:
    own = ["mine.factory='IVF8,Flat'", "mine.nprobe=7", "mine.recall_floor=0.5", "mine.shard_items=70"]
    x = experiment(tmp_path, *SMALL, *own)
    first_candidates(x)
    noted = (x.folder / "shared" / "mined-1.json").read_text()
    assert "candidates/index_recall/i2t" in noted
    with pytest.raises(ValueError, match=r"mine\.factory, i2t: the index 'IVF8,Flat' finds"):
        first_candidates(experiment(tmp_path / "refused", *own, "mine.nprobe=1", "mine.recall_floor=1.0"))


def test_a_run_goes_on_with_other_shards_where_that_changes_nothing(tmp_path: Path) -> None:
    claim(experiment(tmp_path / "flat"), resume=False)
    claim(experiment(tmp_path / "flat", "mine.shard_items=9"), resume=True)
    claim(experiment(tmp_path / "flat"), resume=True)
    approximate = ["mine.factory='IVF8,Flat'"]
    claim(experiment(tmp_path / "ivf", *approximate), resume=False)
    with pytest.raises(PreflightError, match=r"mine\.shard_items: was None, now 9"):
        claim(experiment(tmp_path / "ivf", *approximate, "mine.shard_items=9"), resume=True)
