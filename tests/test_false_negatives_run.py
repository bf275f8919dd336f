"""False negatives in a run: what the recipe may say, what the training makes of it, and the page of the command."""

from __future__ import annotations

import csv
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from distill import pipeline
from distill.cli import app
from distill.data.scenes import make_scenes
from distill.detection import Detection
from distill.experiment import Experiment
from distill.false_negatives import KINDS, Suspects
from distill.false_negatives_review import shown
from distill.preflight import claim
from distill.protocols import DIRECTIONS, fingerprint
from distill.recipe.build import build_corpus, builders
from distill.recipe.load import RecipeError, dump, load_recipe
from distill.recipe.schema import ManifestData
from distill.report.false_negatives_page import Entry, Item, Page, render
from distill.results import finish
from tests.data.making import encoded
from tests.toys import ToyTeacher

LABELLED = {"train": 80, "val": 12, "test": 12, "matches": "labelled", "vague": 1.0}
ARMS = "arms={plain: {losses: [{name: contrastive}]}, distilled: {losses: [{name: contrastive}, {name: margin_mse}]}}"
OF_SCENES = [
    "teach=null",
    "teacher={kind: custom, target: 'tests.test_false_negatives_run:TeacherOfScenes'}",
    ARMS,
    "student.vision.layers=1",
    "student.text.layers=1",
    "student.vision.width=16",
    "student.text.width=16",
]
TINY = [
    *(f"data.{name}={value}" for name, value in LABELLED.items()),
    *OF_SCENES,
    "train.steps=10",
    "train.shared=0.4",
    "train.batch_size=16",
    "train.rounds=2",
    "train.log_every=1",
    "mine.k=70",
    "evaluate.rerank=8",
    "device=cpu",
]


class TeacherOfScenes(ToyTeacher):
    """Scores any captions by a formula of their letters; it is right about nothing, which is all that counts here."""

    def prepare_texts(self, texts) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[zlib.crc32(text.encode()) % 997] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def experiment(folder: Path, *more: str) -> Experiment:
    recipe = load_recipe("quickstart", [*TINY, f"runs={folder / 'runs'}", f"cache={folder / 'cache'}", *more])
    return Experiment(recipe, builders(recipe), taught=pipeline.taught_teacher)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    x = experiment(folder)
    claim(x, resume=False)
    finish(x)
    return folder


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("false_negatives.masks=1", "false_negatives.masks: unknown key"),
        ("false_negatives.disagreement=drop", "false_negatives.disagreement: Input should be 'keep', 'mask', 'down_"),
        ("false_negatives.keep_share=2", "false_negatives.keep_share: Input should be less than or equal to 1"),
        ("false_negatives.margin=.inf", "false_negatives.margin: Input should be a finite number"),
        ("false_negatives.hash_distance=40", "false_negatives.hash_distance: Input should be less than or equal to 32"),
        (
            "false_negatives={near_duplicate: mask, hash_distance: null}",
            "near_duplicate is mask, but nothing says what is near: give hash_distance or embedding_cosine",
        ),
        ("data.matches=some", "data.matches: Input should be 'all' or 'labelled'"),
    ],
)
def test_a_wrong_recipe_says_what_to_change(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    assert message in str(caught.value)


def test_a_treatment_that_could_do_nothing_is_refused() -> None:
    mask = "false_negatives.disagreement=mask"
    with pytest.raises(RecipeError, match="no arm has a loss that reads them"):
        load_recipe("quickstart", [mask, "arms={plain: {losses: [{name: contrastive}]}}"])
    with pytest.raises(RecipeError, match="mining leaves out all that could be found"):
        load_recipe("quickstart", [mask, ARMS, "mine.drop_above_positive=0"])
    assert load_recipe("quickstart", [mask, ARMS, "mine.drop_above_positive=1"]).false_negatives.active


def test_what_is_not_said_is_not_written() -> None:
    silent = dump(load_recipe("quickstart"))
    assert "false_negatives" not in silent
    assert "matches" not in silent
    assert "vague" not in silent
    said = load_recipe("quickstart", ["false_negatives.margin=1", "data.matches=labelled"])
    assert "false_negatives:\n  margin: 1.0" in dump(said)
    assert "matches: labelled" in dump(said)


def test_copies_match_reaches_the_corpus(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        (tmp_path / f"{name}.png").write_bytes(encoded(seed))
    lines = [{"image": f"{name}.png", "caption": "the same words", "split": "train"} for name in "ab"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for copies, count in ((True, 4), (False, 2)):
        data = ManifestData(source="manifest", file=tmp_path / "pairs.jsonl", copies_match=copies)
        assert len(build_corpus(data, tmp_path / "cache").matches) == count


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_labelled_scenes_hide_what_is_true_and_keep_it_as_the_truth() -> None:
    sizes = {"images": 60, "val": 10, "test": 10}
    every, labelled = make_scenes(**sizes), make_scenes(**sizes, labelled_only=True)
    assert labelled.matches.pairs().tolist() == labelled.pairs.tolist()
    assert labelled.truth.keys.tolist() == every.matches.keys.tolist() == every.truth.keys.tolist()
    assert np.isin(labelled.matches.keys, labelled.truth.keys).all()
    assert len(labelled.truth) > len(labelled.matches)
    assert labelled.fingerprint != every.fingerprint
    assert every.fingerprint == make_scenes(**sizes).fingerprint


# --- training ---------------------------------------------------------------------------------------------------------


def phase_of(x: Experiment, whole: Path, tmp_path: Path):
    """The first round's phase of the distilled arm, with the candidates of the run."""
    (tmp_path / "work").mkdir(parents=True, exist_ok=True)
    mined = pipeline.mined_before(experiment(whole))
    arm = x.recipe.arms["distilled"]
    losses, stretch = x.builders.losses(arm.losses), pipeline.stretches(x)[1]
    student = x.fresh_student()
    options = {"folder": tmp_path / "work", "recipe_of_losses": arm.losses, "found": mined, "scores": True}
    return pipeline._phase(x, student, losses, stretch, **options)


def meaning_before_there_was_a_section(x: Experiment, phase, whole: Path) -> str:
    stretch, known = pipeline.stretches(x)[1], phase.batches.scores
    return fingerprint(
        x.corpus.fingerprint,
        x.recipe.student.model_dump(mode="json"),
        x.recipe.train.model_dump(mode="json", include=pipeline._MEANING_OF_TRAIN),
        [part.model_dump(mode="json") for part in x.recipe.arms["distilled"].losses],
        [x.recipe.seed, stretch.number, stretch.start, stretch.stop],
        *(a for found in pipeline.mined_before(experiment(whole)).values() for a in (found.query_ids, found.item_ids)),
        known.keys,
        known.scores,
    )


def test_keeping_all_means_what_it_meant_and_computes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.suspecting.find", None)
    for more in ([], ["false_negatives.margin=0.5", "false_negatives.keep_share=0.1"]):
        x = experiment(whole, *more)
        phase = phase_of(x, whole, tmp_path)
        assert phase.batches.revision is None
        assert phase.meaning == meaning_before_there_was_a_section(x, phase, whole)
        assert "false_negatives/" not in (tmp_path / "work" / "metrics.jsonl").read_text()


def test_a_treatment_changes_the_meaning_and_is_counted(whole: Path, tmp_path: Path) -> None:
    meanings = []
    for number, more in enumerate(
        [[], ["disagreement=mask"], ["disagreement=promote"], ["disagreement=mask", "margin=4"]]
        + [["disagreement=down_weight"], ["disagreement=down_weight", "keep_share=0.1"]]
    ):
        x = experiment(whole, *(f"false_negatives.{one}" for one in more))
        folder = tmp_path / str(number)
        phase = phase_of(x, whole, folder)
        meanings.append(phase.meaning)
        if not more:
            continue
        lines = (folder / "work" / "metrics.jsonl").read_text().splitlines()
        (line,) = [json.loads(one) for one in lines if "false_negatives/" in one]
        assert (line["round"], line["step"]) == (1, 4)
        mined = pipeline.mined_before(x)
        for direction in DIRECTIONS:
            assert line[f"candidates/{direction}"] == int((mined[direction].item_ids >= 0).sum())
            assert sum(line[f"false_negatives/{direction}/{kind}"] for kind in KINDS) > 20
        disagreeing = phase.batches.revision.arrays[0]
        total = sum(line[f"false_negatives/{direction}/disagreement"] for direction in DIRECTIONS)
        assert len(disagreeing) <= total <= 2 * len(disagreeing)
    assert len(set(meanings)) == len(meanings)


def test_a_run_trains_by_its_treatment(whole: Path, tmp_path: Path) -> None:
    weights = {}
    for name in ("keep", "mask", "promote"):
        x = experiment(whole, f"name={name}", *(f"false_negatives.{kind}={name}" for kind in KINDS))
        student = pipeline.trained_arm(x, "distilled")
        weights[name] = (student / "model.safetensors").read_bytes()
        text = (x.folder / "arms" / "distilled" / "metrics.jsonl").read_text()
        assert text.count("false_negatives/i2t/disagreement") == (0 if name == "keep" else 2)  # one a round
    before = whole / "runs" / "quickstart" / "arms" / "distilled" / "student" / "model.safetensors"
    assert weights["keep"] == before.read_bytes()
    assert len(set(weights.values())) == 3


def test_the_teacher_s_vectors_tell_near_duplicates_where_the_recipe_says_so(whole: Path) -> None:
    from distill.asking import scores_of
    from distill.suspecting import find

    counts = []
    for cosine in (0.9999999, 0.5):
        x = experiment(whole, f"false_negatives.embedding_cosine={cosine}", "false_negatives.hash_distance=null")
        mined = pipeline.mined_before(x)
        found = find(x, mined, scores_of(x, x.corpus.split_pairs("train"), mined))
        counts.append(sum(part.counts()["near_duplicate"] for part in found.suspects.values()))
        vectors = x.scorer.vectors({"image": x.corpus.split("train").images})["image"]
        for part in found.suspects.values():
            for image, text, kind in zip(part.image_ids, part.text_ids, part.kinds, strict=True):
                if KINDS[kind] != "same_image":
                    near = max(vectors[image] @ vectors[own] for own in x.corpus.matches.images_of(text)) >= cosine
                    assert KINDS[kind] == ("near_duplicate" if near else "disagreement")
    assert 0 < counts[0] < counts[1]


# --- the page ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a browser would find: tags, the text of each class, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.classes: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        if tag == "article":
            self.classes.append(given["class"])
        self.fetched += [given[name] for name in ("src", "href") if name in given]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def called(*arguments: str):
    return CliRunner().invoke(app, ["false-negatives", *arguments])


@pytest.fixture(scope="module")
def reviewed(whole: Path) -> Path:
    done = called(str(whole / "runs" / "quickstart"), "--top", "25")
    assert done.exit_code == 0, done.output
    assert "same image" in done.output
    assert "i2t: precision" in done.output
    return whole / "runs" / "quickstart" / "false-negatives"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "pairs.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_files_hold_every_suspect_with_what_is_known_of_it(whole: Path, reviewed: Path) -> None:
    import pyarrow.parquet as pq

    x, rows = experiment(whole), rows_of(reviewed)
    assert pq.read_table(reviewed / "pairs.parquet").num_rows == len(rows)
    mined, listed = pipeline.mined_before(x), {(r["direction"], int(r["image_id"]), int(r["text_id"])) for r in rows}
    expected = set()
    for direction, found in mined.items():
        for query, items in zip(found.query_ids.tolist(), found.item_ids.tolist(), strict=True):
            own = x.corpus.matches.of(direction, np.array([query]))[1].tolist()
            pairs = [np.full(len(items) + len(own), query), np.array(items + own)]
            scores = x.scorer.lookup(*(pairs if direction == "i2t" else pairs[::-1])).tolist()
            best = max(scores[len(items) :])
            for item, score in zip(items, scores, strict=False):
                if score > best:
                    expected.add((direction, query, item) if direction == "i2t" else (direction, item, query))
    assert listed == expected
    for row in rows[:50]:
        image, text = int(row["image_id"]), int(row["text_id"])
        assert row["image"] == x.corpus.image_names[image]
        assert row["text"] == x.corpus.texts[text]
        assert float(row["above"]) == pytest.approx(
            float(row["teacher_score"]) - float(row["labelled_score"]), abs=1e-5
        )
        assert float(row["above"]) > 0
        assert row["holds"] == str(bool(x.corpus.truth.is_match(np.array([image]), np.array([text]))[0])).lower()
        assert row["treatment"] == "keep"


def test_the_summary_s_precision_and_recall_are_those_of_the_files(whole: Path, reviewed: Path) -> None:
    x, rows = experiment(whole), rows_of(reviewed)
    summary = json.loads((reviewed / "summary.json").read_text())
    assert summary["margin"] == 0
    for direction, found in pipeline.mined_before(x).items():
        those = [row for row in rows if row["direction"] == direction]
        true = int(x.corpus.truth.is_match(*found.pairs()).sum())
        right = sum(row["holds"] == "true" for row in those)
        said = summary["directions"][direction]
        assert said["suspects"] == len(those)
        assert said["detection"]["true"] == true > 0
        assert said["detection"]["precision"] == pytest.approx(right / len(those))
        assert said["detection"]["recall"] == pytest.approx(right / true)
        assert sum(said["that_hold"].values()) == right
        for kind in KINDS:
            assert said[kind] == sum(row["class"] == kind for row in those)
        margins = [one["margin"] for one in said["over_margins"]]
        assert margins == sorted(margins)
        assert 0 in margins


def test_the_page_needs_nothing_else_and_shows_the_furthest(reviewed: Path) -> None:
    html = (reviewed / "index.html").read_text(encoding="utf-8")
    page, rows = read(html), rows_of(reviewed)
    assert page.tags.count("article") == 25
    assert set(page.classes) <= set(KINDS)
    assert "script" not in page.tags
    assert page.fetched
    assert all(one.startswith("data:image/") for one in page.fetched)
    assert "viewport" in html
    assert f"25 of {len(rows)} suspects" in html
    furthest = max(rows, key=lambda row: float(row["above"]))
    assert furthest["text"] in " ".join(page.text)
    assert len(html) < 2_000_000


def test_another_margin_finds_fewer(whole: Path, reviewed: Path) -> None:
    before = len(rows_of(reviewed))
    done = called(str(whole / "runs" / "quickstart"), "--margin", "6")
    assert done.exit_code == 0, done.output
    after = rows_of(reviewed)
    assert 0 < len(after) < before
    assert min(float(row["above"]) for row in after) > 6
    assert called(str(whole / "runs" / "quickstart"), "--margin", "1e9").exit_code == 0
    assert rows_of(reviewed) == []
    assert "There is none." in (reviewed / "index.html").read_text()
    called(str(whole / "runs" / "quickstart"), "--top", "25")


def test_a_folder_without_a_run_or_candidates_is_refused(tmp_path: Path) -> None:
    missing = called(str(tmp_path / "nowhere"))
    assert isinstance(missing.exception, FileNotFoundError)
    claim(experiment(tmp_path), resume=False)
    early = called(str(tmp_path / "runs" / "quickstart"))
    assert "has no mined candidates yet" in str(early.exception)


def test_whatever_data_says_is_shown_as_text() -> None:
    nasty = "<script>alert('x')</script> & \"quotes\""
    item = Item(nasty, text=nasty, score=1.5)
    picture = Item('"><img src=http://example.org/x>', picture="data:image/png;base64,AA==")
    entry = Entry("i2t", "disagreement", 2.0, picture, (item,), 4, item, (picture,), False)
    several = [Detection(m, 10, 4, 2, 1) for m in (0.0, 1.0)]
    found = {direction: several for direction in DIRECTIONS}
    html = render(Page(nasty, [nasty], KINDS, [["", "n"], ["a", "1"]], [entry], 1, 0.0, found, found))
    page = read(html)
    assert "script" not in page.tags
    assert not [one for one in page.fetched if not one.startswith("data:image/")]
    assert "".join(page.text).count(nasty) == 5  # title, heading, line, match, candidate
    assert page.tags.count("article") == 1
    assert "really false" in html
    assert "and 4 more" in html
    assert "50.0%" in html


def test_kinds_take_turns_so_that_few_are_not_crowded_out() -> None:
    leads = np.array([5, 4, 3, 2, 1, 0.5], np.float32)
    kinds = np.array([2, 2, 2, 2, 1, 1], np.int8)
    ids, none = np.arange(6), np.zeros(6, np.float32)
    found = {"i2t": Suspects("i2t", ids, ids, leads, none, kinds, 9)}
    assert [place for _, place in shown(found, 3)] == [0, 1, 4]
    assert [place for _, place in shown(found, 99)] == [0, 1, 2, 3, 4, 5]
    assert [place for _, place in shown(found, 1)] == [0]
