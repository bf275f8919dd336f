"""Training with Margin-MSE on mined hard negatives, beside sentence-transformers' own trainer.

``python -m benchmarks.training [--quick] [--json FILE]``

Made scenes, a small CLIP with random weights that both sides load from one folder, both towers trained in float32. The
student first learns by contrast for a while, as a recipe's shared steps do; then it mines eight hard negatives for each
text and each image, and a formula gives the teacher's scores. From there on both train on the same queries, positives,
negatives and margins, as many queries a step: a query is a text or an image with its positive and its negatives.

Ours is ``distill.train.train`` as a recipe sets it up:

- ``encode``: ``train.candidates: encode``. A step encodes each distinct item once. Prepared pictures and token ids come
  from disk, where a run puts them before its first step; that work, once for all steps, is in no figure;
- ``encode_live``: the same without that cache: each picture is decoded and each text cut anew in every step;
- ``memory``: ``train.candidates: memory``. Mined items keep the vectors that they were mined by;
- ``in_batch``: ``train.candidates: in_batch``. Batches of neighbours, each query with the others of its group of 16 as
  negatives, more than the eight of all other ways.

Theirs is ``SentenceTransformerTrainer`` with ``MarginMSELoss`` on rows of a query, its positive and its negatives. A
batch holds rows of one direction, and the directions take turns: ``whole`` has all of a step's queries in one batch,
``halves`` adds up the gradients of a batch of either direction. Pictures lie decoded in memory, which is the most that
can be kept there; ``theirs_live`` decodes them in every step, found by id in a table. No evaluation, saving or logging.
``times theirs`` is over the fastest of all of these, with 0 and with 2 loader workers.

Each way runs in a process of its own, whose anonymous memory is watched from outside (not that of loader workers). The
ways take turns over several rounds, and each way's best round counts: whatever else runs on the machine only ever adds.
CPU time is there for machines that are never quiet; with one thread and no workers an idle machine takes as long.
``bare`` is a plain torch step on batches made beforehand, in turns with each step of our loop, in one process.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.child import Phase as Watched
from benchmarks.child import in_child, memory_of
from benchmarks.made_pairs import made_scores
from benchmarks.sidebyside import JsonFile, Quick, show, write_json
from distill.protocols import DIRECTIONS, SIDES, Candidates, Direction, Ids, Inputs, Side, sides_of

if TYPE_CHECKING:
    from distill.batches import Batches, PairScores, StepBatch
    from distill.data.corpus import Corpus
    from distill.train import TrainSettings

LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP, WARMUP = 1e-3, 0.05, 1.0, 0.05
GROUP = 16  # of neighbours: at least the other pairs of a group less those that match
CHECKED = 3  # steps whose grids are looked at
BLOCKS = 2  # of bare steps and ours in turns, in one process


@dataclass(frozen=True)
class Sizes:
    """The corpus, the model, and how long is measured."""

    images: int = 6000  # with two captions each
    pairs: int = 64  # labelled pairs a step: as many queries of each direction
    negatives: int = 8
    shared: int = 100  # contrastive steps before mining
    warm: int = 5  # steps before the clock starts, and steps of one line of the log
    steps: int = 10  # measured
    rounds: int = 3
    width: int = 64
    layers: int = 2
    image_size: int = 48

    @property
    def all_steps(self) -> int:
        """One more than are measured: a step ends where the next one begins."""
        return self.warm + self.steps + 1


@dataclass(frozen=True)
class Way:
    """A function that a process of its own runs on (folder, corpus, sizes, *arguments)."""

    work: Callable[..., dict[str, float]]
    arguments: tuple[Any, ...] = ()


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    images: Annotated[int | None, typer.Option(min=100, help="another number of pictures; two captions each")] = None,
    pairs: Annotated[int | None, typer.Option(min=2, help="another number of labelled pairs a step")] = None,
    width: Annotated[int | None, typer.Option(help="another width of both towers; a head is 16 wide")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="another depth of both towers")] = None,
    image_size: Annotated[int | None, typer.Option(min=32, help="another side of the pictures; patches of 16")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="another number of steps that are measured")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="another number of rounds")] = None,
) -> None:
    """Measure every way, print tables."""
    sizes = QUICK if quick else Sizes()
    asked = {"images": images, "pairs": pairs, "width": width, "layers": layers, "image_size": image_size}
    asked |= {"steps": steps, "rounds": rounds}
    sizes = replace(sizes, **{name: value for name, value in asked.items() if value is not None})
    if sizes.pairs % GROUP:
        raise typer.BadParameter(
            f"batches of neighbours are made of groups of {GROUP}: give a multiple", param_hint="--pairs"
        )
    with tempfile.TemporaryDirectory(prefix="cross2dual-training-") as folder:
        figures = measure(Path(folder), sizes)
    show_all(figures, sizes)
    write_json(json_file, figures)


QUICK = Sizes(images=150, pairs=16, shared=4, warm=1, steps=4, rounds=1)


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Figures of each way by name, those of ``bare``, and ratios.

    ``ways[name]``: ``queries_per_second``, ``queries_per_cpu_second``, ``steps_per_second``, ``waiting_share`` of the
    time that goes into waiting for data, ``bytes`` of anonymous memory at the peak, ``bytes_above`` those when the
    training began, ``items_per_query`` encoded. ``ratios[name]``: queries a second over those of the fastest way of
    sentence-transformers, whose name is at ``sentence_transformers``; ``cpu_ratios``: in CPU time, without workers.
    """
    corpus = prepare(folder, sizes)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(sizes.rounds):
        for name, way in WAYS.items():
            found[name].append(_run(way, folder, corpus, sizes))
    overheads = [_run(Way(bare), folder, corpus, sizes) for _ in range(sizes.rounds)]
    return {"sizes": asdict(sizes), **summary(found, overheads)}


def summary(found: Mapping[str, Sequence[dict[str, float]]], overheads: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What ``measure`` gives, of every way's rounds and of those of ``bare``."""
    ways = {name: max(runs, key=lambda run: run["queries_per_second"]) for name, runs in found.items()}
    cpu = {name: max(run["queries_per_cpu_second"] for run in runs) for name, runs in found.items()}
    # the time of loader workers is not in that of their process
    alone = {name: value for name, value in cpu.items() if "workers" not in name}
    best = max(_theirs(ways), key=lambda name: ways[name]["queries_per_second"])
    base, cpu_base = ways[best]["queries_per_second"], max(alone[name] for name in _theirs(alone))
    middle = {name: float(np.median([run[name] for run in overheads])) for name in overheads[0]}
    return {
        "machine": {"cores": os.cpu_count(), "threads": int(middle.pop("threads"))},
        "ways": ways,
        "sentence_transformers": best,
        "ratios": {name: figures["queries_per_second"] / base for name, figures in ways.items()},
        "cpu_ratios": {name: value / cpu_base for name, value in alone.items()},
        "runs": {name: list(runs) for name, runs in found.items()},
        "bare": middle,
    }


def _theirs(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("theirs")]


def _run(way: Way, folder: Path, corpus: Corpus, sizes: Sizes) -> dict[str, float]:
    watched: Watched = in_child(way.work, folder, corpus, sizes, *way.arguments)
    before = watched.result.pop("before")
    return {**watched.result, "bytes": watched.anonymous, "bytes_above": watched.anonymous - before}


def show_all(figures: Mapping[str, Any], sizes: Sizes) -> None:
    """Print what was measured."""
    rows = [
        (
            name,
            way["queries_per_second"],
            figures["ratios"][name],
            figures["cpu_ratios"].get(name, ""),
            way["steps_per_second"],
            100 * way["waiting_share"],
            way["items_per_query"],
            way["bytes"] / 2**20,
            way["bytes_above"] / 2**20,
        )
        for name, way in figures["ways"].items()
    ]
    title = (
        f"{sizes.images:,} pictures x 2 captions, CLIP of {sizes.layers} x {sizes.width} at {sizes.image_size} px, "
        f"{2 * sizes.pairs} queries a step with {sizes.negatives} negatives, {figures['machine']['threads']} threads"
    )
    columns = (
        "way",
        "queries/s",
        "times theirs",
        "in CPU time",
        "steps/s",
        "waiting %",
        "items/query",
        "MiB",
        "MiB added",
    )
    show(title, columns, rows)
    bare = figures["bare"]
    columns_of_bare = ("our step over a bare torch step", "bare ms", "more %", "bare CPU ms", "more CPU %")
    rows_of_bare = [
        (
            said,
            bare[f"{name}_bare_ms"],
            100 * bare[f"{name}_overhead_wall"],
            bare[f"{name}_bare_cpu_ms"],
            100 * bare[f"{name}_overhead_cpu"],
        )
        for name, said in (("loop", "batches made beforehand"), ("whole", "batches from the cache"))
    ]
    show("overhead of our loop", columns_of_bare, rows_of_bare)


# ---- what both sides start from


def prepare(folder: Path, sizes: Sizes) -> Corpus:
    """Student, candidates, their vectors and the prepared inputs in ``folder``; the corpus lives as long as it is held.

    A short contrastive training comes first: a student with random weights finds the same few items for every query.
    """
    import torch
    from accelerate import Accelerator

    from distill.batches import Batches
    from distill.data.scenes import make_scenes
    from distill.data.vocabulary import learn_tokenizer
    from distill.embed import item_source
    from distill.features import write_features
    from distill.losses import Contrastive, Part, Weighted
    from distill.sampler import BatchSampler
    from distill.train import Phase, train
    from students.dual import DualEncoder
    from students.options import DualOptions

    corpus = make_scenes(images=sizes.images, val=0, test=0, size=sizes.image_size)
    tower = {
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": max(1, sizes.width // 16),
    }
    torch.manual_seed(0)
    student = DualEncoder.from_config(
        vision={**tower, "patch_size": 16},
        text={**tower, "max_position_embeddings": 32},
        projection_dim=64,
        tokenizer=learn_tokenizer(corpus.texts, size=1000),
        image_size=sizes.image_size,
        options=DualOptions(max_text_length=32),
    )
    sources = [item_source(corpus, side, student, folder, batch_size=32) for side in SIDES]
    sampler = BatchSampler(corpus.split_pairs("train"), sizes.pairs, 0)
    phase = Phase(
        0,
        sizes.shared,
        Batches(sampler, sources[0], sources[1], corpus.matches),
        Weighted((Part("contrastive", 1.0, Contrastive()),)),
        "shared",
    )
    train(student, phase, settings(sizes, sizes.shared), folder=folder / "shared", accelerator=Accelerator(cpu=True))
    student.save_pretrained(folder / "student")
    vectors = _mine(folder, corpus, student, dict(zip(SIDES, sources, strict=True)), sizes)
    for side in SIDES:
        whole = {"vectors": torch.from_numpy(vectors[side])}
        write_features(folder / f"vectors-{side}", side, len(vectors[side]), partial(_rows_of, whole))
    return corpus


def _rows_of(whole: Inputs, rows: Ids) -> Inputs:
    return {name: tensor[rows] for name, tensor in whole.items()}


def _mine(folder: Path, corpus: Corpus, student: Any, sources: Mapping[Side, Any], sizes: Sizes) -> dict[Side, Any]:
    """Candidates of both directions to ``folder``; unit vectors of all items."""
    from distill.embed import embed
    from distill.index import VectorIndex
    from distill.mine import MineSettings, mine

    rows: dict[Side, Ids] = {side: _rows(corpus, side) for side in SIDES}
    vectors: dict[Side, Any] = {side: embed(student, sources[side], rows[side], side) for side in SIDES}
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        mined = mine(
            VectorIndex.build(vectors[item], rows[item], device="cpu"),
            vectors[query],
            query_ids=rows[query],
            matches=corpus.matches,
            direction=direction,
            settings=MineSettings(sizes.negatives),
        )
        np.savez(folder / f"{direction}.npz", ids=mined.item_ids, similarity=mined.similarity)
    return vectors


def _rows(corpus: Corpus, side: Side) -> Ids:
    return np.arange(corpus.n_images if side == "image" else corpus.n_texts)


def mined_candidates(folder: Path, direction: Direction) -> Candidates:
    """What was mined: a row a query, in the order of the corpus."""
    with np.load(folder / f"{direction}.npz") as arrays:
        ids, similarity = arrays["ids"], arrays["similarity"]
    return Candidates(direction, np.arange(len(ids)), ids, similarity, np.zeros(ids.shape, np.bool_))


def scores_of(image_ids: Ids, text_ids: Ids) -> Any:
    """What the teacher says of pairs, float32: spread as cosines are, so that the loss stays a plain squared error."""
    return 0.1 * made_scores(image_ids, text_ids)


def pair_scores(corpus: Corpus, candidates: Mapping[Direction, Candidates]) -> PairScores:
    """The teacher's scores of labelled pairs and candidates."""
    from distill.batches import PairScores

    asked = [(corpus.pairs[:, 0], corpus.pairs[:, 1]), *(those.pairs() for those in candidates.values())]
    images, texts = (np.concatenate(ids) for ids in zip(*asked, strict=True))
    return PairScores.of(images, texts, scores_of(images, texts), corpus.n_texts)


def settings(sizes: Sizes, steps: int, *, workers: int = 0) -> TrainSettings:
    """A recipe's defaults for so many steps, but for a line in the log at the end of what is measured."""
    from distill.train import TrainSettings

    return TrainSettings(
        steps=steps,
        batch_size=sizes.pairs,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        warmup=WARMUP,
        grad_clip=GRAD_CLIP,
        seed=0,
        workers=workers,
        log_every=min(sizes.warm, sizes.steps),
        checkpoint_every=500,
    )


# ---- ours


def ours(
    folder: Path, corpus: Corpus, sizes: Sizes, candidates: str = "encode", cached: bool = True, workers: int = 0
) -> dict[str, float]:
    """``distill.train.train``; times are taken when the student is called, which is once a step."""
    student, batches = our_parts(folder, corpus, sizes, candidates=candidates, cached=cached)
    for step in range(CHECKED):
        check(batches[step], sizes.negatives if batches.candidates else 1)
    before, _ = memory_of(os.getpid())
    clock = Clock()
    student.register_forward_pre_hook(clock.tick)
    home = folder / f"run-{time.time_ns()}"
    train_ours(student, batches, sizes, steps=sizes.all_steps, home=home, workers=workers)
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    measured = [batches[step] for step in range(sizes.warm, sizes.warm + sizes.steps)]
    queries = sum(len(grid.rows) for batch in measured for grid in batch.grids.values())
    items = sum(len(batch.encoded(side)) for batch in measured for side in SIDES)
    return {
        **clock.figures(sizes, queries),
        "before": before,
        "waiting_share": float(np.mean([line["waiting_share"] for line in lines if line["step"] > sizes.warm])),
        "items_per_query": items / queries,
    }


@dataclass
class Clock:
    """When each step began, or ended: the same for all steps of a way. By the wall, and by the CPU time of the process.

    CPU time hardly changes when others work on the machine; that of loader workers is not in it.
    """

    times: list[tuple[float, float]] = field(default_factory=list)

    def tick(self, *_: object) -> None:
        """Now."""
        self.times.append(_now())

    def figures(self, sizes: Sizes, queries: int) -> dict[str, float]:
        """Of the measured steps, in which so many queries were answered."""
        (wall, cpu), (wall_end, cpu_end) = self.times[sizes.warm], self.times[sizes.warm + sizes.steps]
        return {
            "seconds": wall_end - wall,
            "queries_per_second": queries / (wall_end - wall),
            "steps_per_second": sizes.steps / (wall_end - wall),
            "queries_per_cpu_second": queries / (cpu_end - cpu),
        }


def train_ours(student: Any, batches: Batches, sizes: Sizes, *, steps: int, home: Path, workers: int = 0) -> None:
    """Train on Margin-MSE as sentence-transformers defines it: on plain cosines."""
    from accelerate import Accelerator

    from distill.losses import MarginMSE, Part, Weighted
    from distill.train import Phase, train

    losses = Weighted((Part("margin_mse", 1.0, MarginMSE(convention="sentence_transformers")),))
    phase, schedule = Phase(0, steps, batches, losses, "measured"), settings(sizes, steps, workers=workers)
    train(student, phase, schedule, folder=home, accelerator=Accelerator(cpu=True))


def check(batch: StepBatch, least: int) -> None:
    """Every query of a step has its positive and its negatives, at least so many, scored; AssertionError otherwise."""
    for direction, grid in batch.grids.items():
        asked = ~grid.teacher.isnan()
        where = f"step {batch.step}, {direction}"
        assert bool((asked & grid.positive).any(dim=1).all()), f"{where}: a query lacks its positive"
        fewest = int((asked & ~grid.positive).sum(dim=1).min())
        assert fewest >= least, f"{where}: a query has {fewest} negatives, not {least}"


def our_parts(
    folder: Path, corpus: Corpus, sizes: Sizes, *, candidates: str = "encode", cached: bool = True
) -> tuple[Any, Batches]:
    """The student and what makes its batches, put together as a recipe does."""
    from distill.batches import Batches
    from distill.embed import item_source, live_source
    from distill.features import Features
    from distill.groups import GroupedSampler, dense_candidates, grouped
    from distill.mined_vectors import RememberedVectors
    from distill.sampler import BatchSampler, CandidateSampler
    from students.dual import DualEncoder

    student = DualEncoder.load(folder / "student")
    sources: list[Any] = [
        item_source(corpus, side, student, folder) if cached else live_source(corpus, side, student) for side in SIDES
    ]
    memory = {side: RememberedVectors(Features.open(folder / f"vectors-{side}", side)) for side in SIDES}
    mined = {direction: mined_candidates(folder, direction) for direction in DIRECTIONS}
    pairs = corpus.split_pairs("train")
    if candidates == "in_batch":
        groupings = grouped(pairs, mined, group=GROUP, count=2, seed=[0])
        vectors = {side: (rows, of(rows).numpy()) for side, of in memory.items() for rows in [_rows(corpus, side)]}
        held = dense_candidates(pairs, groupings, GROUP, corpus.matches, vectors)
        sampler = GroupedSampler(pairs, groupings, GROUP, sizes.pairs, 0)
        return student, Batches(sampler, sources[0], sources[1], corpus.matches, pair_scores(corpus, held))
    return student, Batches(
        BatchSampler(pairs, sizes.pairs, 0),
        sources[0],
        sources[1],
        corpus.matches,
        pair_scores(corpus, mined),
        tuple(CandidateSampler(those, sizes.negatives, 0) for those in mined.values()),
        memory=memory if candidates == "memory" else {},
    )


# ---- theirs


def theirs(
    folder: Path, corpus: Corpus, sizes: Sizes, workers: int = 0, halves: bool = False, live: bool = False
) -> dict[str, float]:
    """``SentenceTransformerTrainer``; times are taken at the end of each optimizer step."""
    if workers:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns at each fork and does so itself
    model = their_model(folder)
    rows = their_rows(folder, corpus, live=live)
    clock = Clock()
    trainer = their_trainer(model, rows, sizes, clock, home=folder / f"run-{time.time_ns()}", options=(workers, halves))
    before, _ = memory_of(os.getpid())
    trainer.train()
    figures = clock.figures(sizes, 2 * sizes.pairs * sizes.steps)
    waited = trainer.waited[sizes.warm + 1 : sizes.warm + 1 + sizes.steps]
    return {
        **figures,
        "before": before,
        "waiting_share": sum(waited) / figures["seconds"],
        "items_per_query": 2.0 + sizes.negatives,
    }


def their_model(folder: Path) -> Any:
    """The student's own folder; CLIP's features made unit vectors, as ours are."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    model = SentenceTransformer(str(folder / "student"), device="cpu")
    model.append(Normalize())
    return model


def their_rows(folder: Path, corpus: Corpus, *, live: bool = False) -> dict[Direction, Any]:
    """A data set a direction: rows of a query, its first labelled positive, its negatives, and the margins.

    ``live``: pictures are decoded when a row is read, as their own ``resolve_ids`` does it.
    """
    from datasets import Dataset, Image
    from sentence_transformers.util import resolve_ids

    tables: dict[Side, Any]
    if live:
        pictures = corpus.pictures.dataset.cast_column("image", Image()).add_column("id", np.arange(corpus.n_images))
        texts = Dataset.from_dict({"id": np.arange(corpus.n_texts), "text": list(corpus.texts)})
        tables = {"image": pictures, "text": texts}
    else:
        tables = {"image": corpus.load_images(np.arange(corpus.n_images)), "text": corpus.texts}
    made: dict[Direction, Any] = {}
    for direction in DIRECTIONS:
        query, item = sides_of(direction)
        columns = their_columns(folder, corpus, direction)
        made[direction] = Dataset.from_dict({name: array.tolist() for name, array in columns.items()})
        made[direction].set_transform(
            resolve_ids({"query_id": tables[query], "positive_id": tables[item], "negative_ids": tables[item]})
            if live
            else Held(tables[query], tables[item])
        )
    return made


@dataclass(frozen=True)
class Held:
    """What ``resolve_ids`` does, from lists."""

    queries: Sequence[Any]
    items: Sequence[Any]

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of ids become columns of texts and pictures."""
        negatives = zip(*batch["negative_ids"], strict=True)
        return {
            "query": [self.queries[row] for row in batch["query_id"]],
            "positive": [self.items[row] for row in batch["positive_id"]],
            **{f"negative_{place}": [self.items[row] for row in rows] for place, rows in enumerate(negatives, 1)},
            "label": batch["label"],
        }


def their_columns(folder: Path, corpus: Corpus, direction: Direction) -> dict[str, Any]:
    """``query_id`` (Q,), ``positive_id`` (Q,), ``negative_ids`` (Q, K), ``label`` (Q, K): the teacher's margins."""
    mined = mined_candidates(folder, direction)
    queries, items = (corpus.pairs if direction == "i2t" else corpus.pairs[:, ::-1]).T
    positive = items[np.unique(queries, return_index=True)[1]]
    candidates = np.concatenate([positive[:, None], mined.item_ids], axis=1)
    asking = np.broadcast_to(mined.query_ids[:, None], candidates.shape)
    scores = scores_of(asking, candidates) if direction == "i2t" else scores_of(candidates, asking)
    return {
        "query_id": mined.query_ids,
        "positive_id": positive,
        "negative_ids": mined.item_ids,
        "label": scores[:, :1] - scores[:, 1:],
    }


def their_trainer(
    model: Any, rows: Mapping[Direction, Any], sizes: Sizes, clock: Clock, *, home: Path, options: tuple[int, bool]
) -> Any:
    """Set up for speed; ``waited`` holds the seconds that each step waited for its batches."""
    from datasets import DatasetDict
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import MultiDatasetBatchSamplers
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss
    from transformers import PrinterCallback, TrainerCallback

    class Watched(SentenceTransformerTrainer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.waited: list[float] = []

        def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
            asked = time.perf_counter()
            found = super().get_batch_samples(*arguments, **named)
            self.waited.append(time.perf_counter() - asked)
            return found

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    workers, halves = options
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(home),
        use_cpu=True,
        max_steps=sizes.all_steps,
        per_device_train_batch_size=sizes.pairs if halves else 2 * sizes.pairs,
        gradient_accumulation_steps=2 if halves else 1,
        multi_dataset_batch_sampler=MultiDatasetBatchSamplers.ROUND_ROBIN,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=GRAD_CLIP,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_prefetch_factor=4 if workers else None,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Watched(
        model=model,
        args=arguments,
        train_dataset=DatasetDict(rows),
        loss=MarginMSELoss(model),
        callbacks=[Ticks()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- our loop over a bare step


def bare(folder: Path, corpus: Corpus, sizes: Sizes) -> dict[str, float]:
    """Milliseconds of a step, and what our loop takes beyond them, as a share: medians over steps.

    A bare step on the same batch goes before each step of our loop, so that both meet the same noise. ``loop`` is our
    loop on batches made beforehand, ``whole`` makes them; ``_cpu`` is CPU time.
    """
    import torch

    student, batches = our_parts(folder, corpus, sizes)
    before, _ = memory_of(os.getpid())
    made = [batches[step] for step in range(sizes.all_steps)]
    found: dict[str, float] = {"threads": torch.get_num_threads(), "before": before}
    for name, source in (("loop", ready(batches, made)), ("whole", batches)):
        ours_, plain = [], []
        for number in range(BLOCKS):
            copied, turns = copy.deepcopy(student), Turns(BareStep(copy.deepcopy(student), sizes), made)
            copied.register_forward_pre_hook(turns.take)
            home = folder / f"{name}-{number}-{time.time_ns()}"
            train_ours(copied, source, sizes, steps=sizes.all_steps, home=home)
            ours_ += turns.ours[sizes.warm : sizes.warm + sizes.steps]
            plain += turns.bare[sizes.warm : sizes.warm + sizes.steps]
        loop, step = 1e3 * np.array(ours_), 1e3 * np.array(plain)  # (steps, 2)
        for place, (unit, of) in enumerate((("ms", "wall"), ("cpu_ms", "cpu"))):
            middle = float(np.median(step[:, place]))
            found[f"{name}_bare_{unit}"] = middle
            found[f"{name}_overhead_{of}"] = float(np.median(loop[:, place] - step[:, place])) / middle
    return found


def ready(batches: Batches, made: Sequence[StepBatch]) -> Batches:
    """Batches that were made before."""
    from distill.batches import Batches

    class Ready(Batches):
        def __getitem__(self, step: int) -> StepBatch:
            return made[step]

    return Ready(batches.sampler, batches.images, batches.texts, batches.matches)


@dataclass
class BareStep:
    """What a training cannot do without: forward, loss, backward, clipping, AdamW."""

    student: Any
    sizes: Sizes

    def __post_init__(self) -> None:
        from distill.losses import MarginMSE
        from distill.train import make_optimizer

        self.loss = MarginMSE(convention="sentence_transformers")
        self.optimizer = make_optimizer(self.student, settings(self.sizes, self.sizes.all_steps))
        self.student.train()

    def __call__(self, batch: StepBatch) -> None:
        """Take the step."""
        import torch

        from distill.protocols import Scored

        out = self.student(batch.images, batch.texts)
        losses = []
        for direction, grid in batch.grids.items():
            asking, items = (out.images, out.texts) if direction == "i2t" else (out.texts, out.images)
            everywhere = torch.ones_like(grid.positive)
            scored = Scored(asking[grid.rows] @ items.T, grid.teacher, grid.positive, everywhere, out.scale)
            losses.append(self.loss(scored))
        torch.autograd.backward(torch.stack(losses).mean())
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Turns:
    """A hook on our student's call: a bare step first, and what either took, (wall, CPU) seconds."""

    step: BareStep
    made: Sequence[StepBatch]
    ours: list[tuple[float, float]] = field(default_factory=list)
    bare: list[tuple[float, float]] = field(default_factory=list)
    _left: tuple[float, float] | None = None

    def take(self, *_: object) -> None:
        """Between two steps of our loop."""
        import torch

        met = _now()
        if self._left is not None:
            self.ours.append(_since(self._left, met))
        number = len(self.bare)
        torch.use_deterministic_algorithms(False)  # as a plain torch program has it
        began = _now()
        self.step(self.made[number])
        self.bare.append(_since(began, _now()))
        torch.use_deterministic_algorithms(True)
        self._left = _now()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    return after[0] - before[0], after[1] - before[1]


WAYS: dict[str, Way] = {
    "encode": Way(ours),
    "encode_live": Way(ours, ("encode", False)),
    "encode_live, 2 workers": Way(ours, ("encode", False, 2)),
    "memory": Way(ours, ("memory",)),
    "in_batch": Way(ours, ("in_batch",)),
    "theirs, whole": Way(theirs),
    "theirs, whole, 2 workers": Way(theirs, (2,)),
    "theirs, halves": Way(theirs, (0, True)),
    "theirs, halves, 2 workers": Way(theirs, (2, True)),
    "theirs_live, halves": Way(theirs, (0, True, True)),
    "theirs_live, halves, 2 workers": Way(theirs, (2, True, True)),
}


if __name__ == "__main__":
    typer.run(main)
