"""Smaller vectors: codes, ranks and shares against loops over signs, bytes and FAISS's own indexes; the command."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import PIL.Image
import pytest
from rich.console import Console
from typer.testing import CliRunner

from distill.cli import app
from distill.codes import KINDS, Kind, Quantiser, cut, signs, stored
from distill.compact import Cells, Measured, Table, both_ways, least_helpful, measure
from distill.data.matches import Matches
from distill.evaluate import evaluate_embeddings
from distill.report import compact_table
from tests.test_run import TINY
from tests.test_wrong_recipes import distill

RNG = np.random.default_rng(0)
N_IMAGES, CAPTIONS, DIM = 70, 2, 32


def unit(rows: int, rng: np.random.Generator, dim: int = DIM) -> np.ndarray:
    vectors = rng.standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def split():
    """Captions near their image, so that recall is neither 0 nor 100; ids that are no places."""
    rng = np.random.default_rng(3)
    images = unit(N_IMAGES, rng)
    texts = np.repeat(images, CAPTIONS, axis=0) + 2.0 * unit(N_IMAGES * CAPTIONS, rng)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    rows = np.repeat(np.arange(N_IMAGES) + 5, CAPTIONS)
    matches = Matches(rows, np.arange(N_IMAGES * CAPTIONS) + 9, n_images=N_IMAGES + 5, n_texts=N_IMAGES * CAPTIONS + 9)
    shuffled = rng.permutation(N_IMAGES * CAPTIONS)
    ids = {"image": np.arange(N_IMAGES) + 5, "text": shuffled + 9}
    return {"image": images, "text": texts[shuffled]}, ids, matches


@pytest.fixture(scope="module")
def lines(split) -> dict[tuple[int, str], Measured]:
    vectors, ids, matches = split
    samples = {side: unit(400, np.random.default_rng(8)) for side in vectors}
    found = list(measure(both_ways(vectors, ids, matches), samples, [8, 12, 32], rescore=2))
    assert (found[0].width, found[0].kind) == (32, "float32")
    assert len(found) == 3 * len(KINDS)
    return {(line.width, line.kind): line for line in found}


# --- codes ------------------------------------------------------------------------------------------------------------


def test_vectors_are_cut_and_stretched_to_one_and_whole_ones_are_left_alone() -> None:
    vectors = unit(5, RNG)
    vectors[2, :4] = 0
    found = cut(vectors, 4)
    for row in (0, 1, 3, 4):
        kept = [float(number) for number in vectors[row, :4]]
        length = sum(number * number for number in kept) ** 0.5
        assert found[row].tolist() == pytest.approx([number / length for number in kept], abs=1e-6)
    assert found[2].tolist() == [0, 0, 0, 0]
    assert cut(vectors, DIM) is vectors


def test_bytes_stand_for_the_middle_of_256_steps_over_each_number_s_range() -> None:
    sample, vectors = unit(300, RNG), 1.5 * unit(50, RNG)  # some outside the range
    low, high = sample.min(axis=0), sample.max(axis=0)
    found = Quantiser(sample).restored(vectors)
    for row in range(50):
        for place in range(DIM):
            span = high[place] - low[place]
            step = min(255, max(0, int(np.floor(255 * (vectors[row, place] - low[place]) / span))))
            assert found[row, place] == pytest.approx(
                float(low[place] + (step + 0.5) / 255 * span), abs=1.1 * float(span) / 255
            )
    inside = (vectors > low) & (vectors < high)
    assert np.abs(found - vectors)[inside].max() <= 0.51 * (high - low).max() / 255
    assert not inside.all()


def test_products_are_those_of_faiss_s_own_indexes() -> None:
    sample, items, queries = unit(300, RNG), unit(40, RNG), unit(7, RNG)
    index = faiss.index_factory(DIM, "SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    index.add(items)
    values, rows = index.search(queries, 40)
    ours = queries @ stored(items, "int8", Quantiser(sample)).T
    np.testing.assert_allclose(np.take_along_axis(ours, rows, axis=1), values, atol=1e-5)

    index = faiss.index_factory(DIM, "SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    index.add(items)
    values, rows = index.search(queries, 40)
    ours = queries @ stored(items, "float16", None).T
    np.testing.assert_allclose(np.take_along_axis(ours, rows, axis=1), values, atol=1e-6)

    binary = faiss.IndexBinaryFlat(DIM)
    binary.add(np.packbits(items > 0, axis=1))
    distances, rows = binary.search(np.packbits(queries > 0, axis=1), 40)
    ours = (DIM - signs(queries) @ stored(items, "binary", None).T) / 2
    assert np.array_equal(np.take_along_axis(ours, rows, axis=1), distances)


@pytest.mark.parametrize(
    ("kind", "memory", "disk"),
    [
        (Kind("float32"), 96, 96),
        (Kind("float16"), 48, 48),
        (Kind("int8"), 24, 24),
        (Kind("int8", "float32"), 24, 24 + 96),
        (Kind("binary"), 3, 3),
        (Kind("binary", "binary"), 3, 3),
        (Kind("binary", "int8"), 3, 3 + 24),
        (Kind("binary", "float32"), 3, 3 + 96),
    ],
)
def test_bytes_of_an_item_of_24_numbers(kind: Kind, memory: int, disk: int) -> None:
    assert (kind.bytes_in_memory(24), kind.bytes_on_disk(24)) == (memory, disk)
    assert kind in KINDS


def test_bits_fill_whole_bytes() -> None:
    assert [Kind("binary").bytes_in_memory(width) for width in (1, 8, 9, 12)] == [1, 1, 2, 2]


# --- ranks and shares -------------------------------------------------------------------------------------------------


def slow_order(score, wanted) -> list[int]:
    """All columns, best first; among equals the unwanted, then the first."""
    return sorted(range(len(score)), key=lambda column: (-score[column], wanted[column], column))


def test_of_items_that_tie_those_that_help_least_come_first() -> None:
    similarity = RNG.integers(0, 4, (200, 17)).astype(np.float32)
    wanted = RNG.random((200, 17)) < 0.3
    for k in (1, 5, 16, 17):
        found = least_helpful(similarity, wanted, k)
        for row in range(200):
            assert found[row].tolist() == sorted(slow_order(similarity[row], wanted[row])[:k])


def test_cells_of_a_block_are_those_of_the_matrix() -> None:
    matrix = RNG.random((23, 9)) < 0.2
    rows, columns = np.nonzero(matrix)
    for start, stop in ((0, 5), (5, 20), (20, 23), (0, 23)):
        assert np.array_equal(Cells(rows, columns).of(slice(start, stop), 9), matrix[start:stop])


def shortened(row: np.ndarray, width: int) -> np.ndarray:
    return row[:width] / np.sqrt((row[:width] ** 2).sum())


def both_stages(score, again, wanted) -> list[int]:
    """The first stage's order, with its first twenty in the order of the second where there is one."""
    found = slow_order(score, wanted)
    if again is None:
        return found
    return sorted(found[:20], key=lambda column: (-again[column], wanted[column])) + found[20:]


def slowly(split, width: int, kind: str, samples) -> dict[str, tuple[list[int], list[float]]]:
    """Ranks and shares by direction, one query at a time."""
    vectors, ids, matches = split
    made = {}
    for direction, query, item in (("i2t", "image", "text"), ("t2i", "text", "image")):
        short = {side: np.array([shortened(row, width) for row in vectors[side]]) for side in vectors}
        seen = np.array([shortened(row, width) for row in samples[item]])
        low, high = seen.min(axis=0), seen.max(axis=0)

        def numbers(name, row, low=low, high=high):
            if name == "float16":
                return row.astype(np.float16).astype(np.float64)
            if name == "int8":
                return low + (np.clip(np.floor(255 * (row - low) / (high - low)), 0, 255) + 0.5) / 255 * (high - low)
            return np.where(row > 0, 1.0, -1.0) if name in ("binary", "codes") else row.astype(np.float64)

        stored_as, _, finer = kind.partition(" + rescore ")
        ranks, shares = [], []
        for place, asking in enumerate(short[query]):
            whole = vectors[item].astype(np.float64) @ vectors[query][place].astype(np.float64)
            best = set(np.argsort(-whole)[:10].tolist())
            is_best = [column in best for column in range(len(whole))]
            pair = [
                (ids[query][place], other) if query == "image" else (other, ids[query][place]) for other in ids[item]
            ]
            true = [bool(matches.is_match(*(np.array(one) for one in both))) for both in pair]
            first = numbers(stored_as, asking) if stored_as == "binary" else asking
            score = [round(float(first @ numbers(stored_as, row)), 6) for row in short[item]]
            again = [round(float(asking @ numbers(finer, row)), 6) for row in short[item]] if finer else None
            ranks.append(1 + min(place for place, column in enumerate(both_stages(score, again, true)) if true[column]))
            shares.append(sum(is_best[column] for column in both_stages(score, again, is_best)[:10]) / 10)
        made[direction] = ranks, shares
    return made


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
@pytest.mark.parametrize("width", [8, 12, 32])
def test_a_line_equals_a_loop_over_queries(split, lines, width: int, kind: str) -> None:
    samples = {side: unit(400, np.random.default_rng(8)) for side in ("image", "text")}
    slow = slowly(split, width, kind, samples)
    line = lines[width, kind]
    for direction, (ranks, _) in slow.items():
        for k in (1, 5, 10):
            expected = 100 * np.mean([rank <= k for rank in ranks])
            # a byte may fall to the other side of a step by rounding: one query in a hundred
            assert line.metrics[f"{direction}_r{k}"] == pytest.approx(expected, abs=1.5 if "int8" in kind else 1e-6)
    kept = 100 * np.mean([np.mean(shares) for _, shares in slow.values()])
    assert line.top_kept == pytest.approx(kept, abs=0.5 if "int8" in kind else 1e-4)
    assert line.rsum_change == pytest.approx(line.metrics["rsum"] - lines[32, "float32"].metrics["rsum"])


def test_full_float32_is_the_evaluation_itself_and_keeps_all(split, lines) -> None:
    vectors, ids, matches = split
    found = evaluate_embeddings(
        vectors["image"], vectors["text"], image_ids=ids["image"], text_ids=ids["text"], matches=matches
    )
    line = lines[32, "float32"]
    assert line.metrics == found.retrieval.as_dict()
    assert (line.rsum_change, line.top_kept) == (0, 100)
    assert 100 < line.metrics["rsum"] < 590  # else nothing is compared


def test_vectors_that_are_all_alike_find_nothing(split) -> None:
    _, ids, matches = split
    same = {side: np.tile(unit(1, np.random.default_rng(1)), (len(ids[side]), 1)) for side in ids}
    for line in measure(both_ways(same, ids, matches), same, [32], rescore=2):
        assert line.metrics["i2t_r10"] == line.metrics["t2i_r10"] == 0, line.kind


def test_vectors_that_are_not_finite_are_refused(split) -> None:
    vectors, ids, matches = split
    bad = vectors["text"].copy()
    bad[3, 4] = np.nan
    with pytest.raises(ValueError, match="1 of 140 text vectors are not finite"):
        both_ways({**vectors, "text": bad}, ids, matches)


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.fixture
def table(lines) -> Table:
    counts = {"image": N_IMAGES, "text": N_IMAGES * CAPTIONS}
    return Table(
        "run", "a|b", "made", "test", 32, (8, 12), counts, {"image": 400, "text": 400}, 20, tuple(lines.values())
    )


def test_the_page_has_a_line_a_width_and_kind_and_says_how_it_was_trained(table: Table) -> None:
    page = compact_table.to_markdown(table)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 24
    first = [cell.strip() for cell in rows[2].split(" | ")]
    assert first[0].strip("| ") == "32"
    assert first[1] == "float32"
    assert first[9:] == ["+0.0", "100.0", "128", "128 |"]
    assert "trained at widths 8, 12, 32 (train.matryoshka)" in page
    assert "first 20 items of 70 images and 140 texts" in page
    alone = Table(**{**vars(table), "trained": ()})
    assert "trained at its full width of 32 alone (without train.matryoshka)" in compact_table.to_markdown(alone)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_screen_shows_each_width_and_kind_however_narrow(table: Table, terminal: bool) -> None:
    console = Console(width=60, file=io.StringIO(), force_terminal=terminal, color_system=None)
    compact_table.show(table, console=console)
    shown = console.file.getvalue()
    for kind in KINDS:
        for width in (8, 12, 32):
            assert f"{width:>2} {kind.name} " in shown


def test_every_kind_is_on_the_plot(table: Table, tmp_path: Path) -> None:
    compact_table.plot(table, tmp_path / "plot.png")
    with PIL.Image.open(tmp_path / "plot.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = set(map(tuple, np.unique(pixels, axis=0)))
    assert {kind.name for kind in KINDS} == set(compact_table._LOOKS)
    for colour, _, _ in compact_table._LOOKS.values():
        assert tuple(bytes.fromhex(colour[1:])) in colours


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compact")
    arms = "arms={plain: {losses: [{name: contrastive}]}, other: {losses: [{name: contrastive}]}}"
    settings = [item for item in TINY if not item.startswith(("arms", "train.trackers", "train.rounds"))]
    done = distill("run", "quickstart", folder=folder, settings=[*settings, arms, "train.matryoshka=[8, 24]"])
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "quickstart"


def compacted(run: Path, *arguments: str):
    return CliRunner().invoke(app, ["compact", str(run), *arguments])


def test_the_command_writes_table_json_and_plot_beside_the_student(run: Path) -> None:
    done = distill("compact", str(run), "--arm", "plain", folder=run.parent)
    assert done.returncode == 0, done.stderr
    folder = run / "arms" / "plain" / "compact"
    found = json.loads((folder / "compact.json").read_text())
    assert (found["run"], found["arm"], found["split"], found["dim"]) == ("quickstart", "plain", "test", 64)
    assert found["trained"] == [8, 24]
    assert found["items"] == {"image": 24, "text": 48}
    assert found["sample"] == {"image": 120, "text": 240}
    assert [(line["width"], line["kind"]) for line in found["lines"]] == [
        (width, kind.name) for width in (64, 24, 8) for kind in KINDS
    ]
    summary = json.loads((run / "summary.json").read_text())["plain"]
    assert {name: found["lines"][0][name] for name in summary} == summary
    assert "trained at widths 8, 24, 64 (train.matryoshka)" in (folder / "compact.md").read_text()
    with PIL.Image.open(folder / "compact.png") as picture:
        assert picture.size[0] > 600
    for line in found["lines"]:
        assert f"{line['width']:>2} {line['kind']}" in done.stdout
    assert f"plot: {folder / 'compact.png'}" in done.stdout


def test_the_last_arm_chosen_widths_another_split_and_folder(run: Path, tmp_path: Path) -> None:
    done = compacted(run, "--widths", "48,16", "--split", "val", "--rescore", "1", "--out", str(tmp_path / "made"))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "made" / "compact.json").read_text())
    assert (found["arm"], found["split"], found["shortlist"]) == ("other", "val", 10)
    assert sorted({line["width"] for line in found["lines"]}) == [16, 48, 64]
    assert not (run / "arms" / "other" / "compact").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "third"], "no arm 'third' in this run; it has plain, other"),
        (["--widths", "16,65,0"], "widths must be 1 to 64, the numbers of this student's vectors; got [65, 0]"),
        (["--split", "train"], "measure on another one (--split test)"),
        (["--split", "dev"], "dev"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_words(run: Path, arguments: list[str], message: str) -> None:
    done = compacted(run, *arguments)
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)


def test_widths_that_are_no_numbers_and_folders_that_are_no_run_are_refused(run: Path, tmp_path: Path) -> None:
    done = compacted(run, "--widths", "16;32")
    assert done.exit_code == 2
    assert "no list of whole numbers such as 16,32,64" in " ".join(done.output.replace("│", " ").split())
    done = compacted(tmp_path)
    assert "is not a run's folder" in str(done.exception)


def test_an_arm_that_was_not_trained_is_named(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "quickstart"
    shutil.copytree(run, copied, ignore=shutil.ignore_patterns("student", "checkpoints"))
    done = compacted(copied)
    assert isinstance(done.exception, FileNotFoundError)
    assert "finish the run first (distill run RECIPE --resume)" in str(done.exception)
