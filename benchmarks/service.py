"""Pairs a second through ``distill serve teacher`` against the same teacher in the process that asks.

Both score the same pairs of the same corpus into a store of their own, from inputs that were prepared before, and take
turns. ``at home`` is one process with all threads; in the others the service has the threads, and each client scores
its share of the images. All of it runs on one machine: clients and service share the cores that ``at home`` has to
itself.

Then requests of so many pairs come at twice the rate that the service has shown, by a clock and not by its answers:
what is answered, what is turned away with 429, how long answers take, what the service holds in memory, and how soon it
answers as before once the burst is over.

Weights are random: time does not depend on them. Scores through the service are compared with those at home.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml

from benchmarks.sidebyside import JsonFile, Quick, show, write_json

_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    images: int
    texts_per_image: int
    layers: int
    width: int
    image_size: int
    rounds: int
    clients: int
    threads: int
    seconds: float  # of the burst

    @property
    def pairs(self) -> int:
        """Scored in each way."""
        return self.images * self.texts_per_image


def recipe_of(folder: Path, setting: Setting, **teacher: Any) -> Path:
    """A recipe of made pictures; ``teacher`` in place of the one on disk."""
    tower = {"layers": setting.layers, "width": setting.width, "heads": setting.width // 64}
    shape = {"vision": {**tower, "patch_size": 16}, "text": tower, "image_size": setting.image_size}
    checkpoint = str(folder / "teacher")
    whole = {
        "name": "service",
        "runs": str(folder / "runs"),
        "cache": str(folder / "cache"),
        "data": {"source": "scenes", "train": setting.images, "val": 8, "test": 8, "size": 96},
        "teacher": teacher or {"kind": "blip", "checkpoint": checkpoint, "max_text_length": 24, **shape},
        "student": {"kind": "config"},
        "arms": {"plain": {"losses": [{"name": "contrastive"}]}},
        "prepared_gib": 64,
    }
    path = folder / f"{'remote' if teacher else 'home'}.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def experiment(recipe: Path) -> Any:
    """Of a recipe's file."""
    from distill.experiment import Experiment
    from distill.pipeline import taught_teacher
    from distill.recipe.build import builders
    from distill.recipe.load import load_recipe

    loaded = load_recipe(str(recipe), ["device=cpu"] if not _has_gpu() else [])
    return Experiment(loaded, builders(loaded), taught=taught_teacher)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pairs_of(setting: Setting, n_texts: int, share: tuple[int, int], seed: int) -> tuple[Any, Any]:
    """Image ids and text ids (P,) of the share-th part of the images, each with distinct texts."""
    draw = np.random.default_rng(seed)
    texts = np.stack([draw.choice(n_texts, setting.texts_per_image, replace=False) for _ in range(setting.images)])
    mine = np.arange(share[0], setting.images, share[1])
    return np.repeat(mine, setting.texts_per_image), texts[mine].ravel()


def prepare(folder: Path, setting: Setting) -> None:
    """Weights, and inputs of every item, on disk."""
    from distill.recipe.build_teachers import build_teacher
    from distill.recipe.load import load_recipe

    home = recipe_of(folder, setting)
    untrained = load_recipe(str(home), ["teacher.checkpoint=null", "teach={}"])
    build_teacher(untrained.teacher, experiment(home).corpus, seed=0).save_pretrained(folder / "teacher")
    x = experiment(home)
    for side in ("image", "text"):
        x.source(x.teacher, side)


def score(recipe: str, setting: Setting, work: tuple[tuple[int, int], int], ready: Any, told: Any) -> None:
    """In a process of its own: one client, or the whole at home."""
    from distill.score import ScoreOptions, score_pairs
    from distill.store import ScoreStore

    x = experiment(Path(recipe))
    teacher, latencies = x.teacher, list[float]()
    if hasattr(teacher, "servers"):
        ask = teacher.servers.ask

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            answer = ask(*arguments)
            latencies.append(time.perf_counter() - began)
            return answer

        teacher.servers.ask = timed
    share, seed = work
    images, texts = pairs_of(setting, x.corpus.n_texts, share, seed)
    sources = {f"{side}_source": x.source(teacher, side) for side in ("image", "text")}
    with tempfile.TemporaryDirectory() as folder:
        about = {"teacher_identity": teacher.identity, "corpus_fingerprint": x.corpus.fingerprint}
        sizes = {"n_images": x.corpus.n_images, "n_texts": x.corpus.n_texts}
        store = ScoreStore(folder, **about, **sizes, score_kind=teacher.score_kind)
        ready.wait(600)
        began = time.time()
        score_pairs(teacher, store, images, texts, options=ScoreOptions(show_progress=False), **sources)
        ended = time.time()
        ready.wait(600)  # a client that ends takes a core from the service, which others still wait for
        told.put((began, ended, latencies, images, texts, store.require(images, texts)))


def timed_run(recipe: Path, setting: Setting, clients: int, seed: int) -> dict[str, Any]:
    """Seconds from the first client's beginning to the last one's end, and what came."""
    ready, told = _CONTEXT.Barrier(clients), _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=score, args=(str(recipe), setting, ((n, clients), seed), ready, told))
        for n in range(clients)
    ]
    for process in processes:
        process.start()
    found = collected(processes, told)
    seconds = max(one[1] for one in found) - min(one[0] for one in found)
    images, texts, scores = (np.concatenate([one[at] for one in found]) for at in (3, 4, 5))
    order = np.lexsort((texts, images))
    return {"seconds": seconds, "latencies": [t for one in found for t in one[2]], "scores": scores[order]}


def collected(processes: list[Any], told: Any) -> list[Any]:
    """What each process tells; raises RuntimeError where one ends without a word, instead of waiting for it."""
    found = list[Any]()
    try:
        while len(found) < len(processes):
            try:
                found.append(told.get(timeout=1))
            except queue.Empty:
                if any(process.exitcode for process in processes):
                    raise RuntimeError("a client failed; what it said last is above") from None
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    return found


@contextmanager
def service(folder: Path, setting: Setting, name: str, *options: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a service with an empty store."""
    command = [sys.executable, "-m", "distill", "serve", "teacher", str(folder / "home.yaml"), "--port", "0", *options]
    held = folder / f"cache-{name}"
    held.mkdir()
    (held / "features").symlink_to(folder / "cache" / "features")  # the inputs that were prepared
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    own = ["--set", f"cache={held}", *(() if _has_gpu() else ("--set", "device=cpu"))]
    with subprocess.Popen([*command, *own], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            raise RuntimeError(f"the service did not start: {line}")
        try:
            yield line.split(" at ")[1].split()[0].rstrip("/"), process.pid
        finally:
            process.terminate()
            process.wait(120)


def compare(folder: Path, setting: Setting) -> tuple[dict[str, Any], list[list[object]]]:
    """The ways in turn; ratios are of one round, medians over rounds."""
    ways: dict[str, list[float]] = {"at home": []}
    ways |= {f"service, {clients} client{'s' * (clients > 1)}": [] for clients in (1, setting.clients)}
    latencies: dict[str, list[float]] = {name: [] for name in ways}
    worst = 0.0
    for seed in range(setting.rounds):
        scores = None
        for name, clients in zip(ways, (1, 1, setting.clients), strict=True):
            if name == "at home":
                os.environ["OMP_NUM_THREADS"] = str(setting.threads)
                found = timed_run(folder / "home.yaml", setting, 1, seed)
                scores = found["scores"]
            else:
                os.environ["OMP_NUM_THREADS"] = "1"
                with service(folder, setting, f"{seed}-{clients}") as (url, _):
                    found = timed_run(recipe_of(folder, setting, kind="remote", urls=[url]), setting, clients, seed)
                worst = max(worst, float(np.abs(found["scores"] - scores).max()))
            ways[name].append(setting.pairs / found["seconds"])
            latencies[name] += found["latencies"]
    home = ways["at home"]
    rows, figures = list[list[object]](), dict[str, Any]()
    for name, rates in ways.items():
        ratio = statistics.median(rate / at_home for rate, at_home in zip(rates, home, strict=True))
        slow = np.quantile(latencies[name], [0.5, 0.99]) * 1000 if latencies[name] else [float("nan")] * 2
        rows.append([name, statistics.median(rates), ratio, *("-" if np.isnan(one) else float(one) for one in slow)])
        figures[name] = {"pairs_per_second": statistics.median(rates), "ratio_in_process": ratio, "all": rates}
        figures[name] |= {} if np.isnan(slow[0]) else {"p50_ms": float(slow[0]), "p99_ms": float(slow[1])}
    figures["largest_difference"] = worst
    figures["ratio_in_process"] = figures[list(ways)[-1]]["ratio_in_process"]
    return figures, rows


def _blocks(corpus: Any, texts: int, pairs: int) -> Iterator[tuple[Any, Any]]:
    """Image ids and text ids of one request after another: no pair comes twice before all have come."""
    left = np.array_split(np.arange(corpus.n_images), max(1, corpus.n_images * texts // pairs))
    right = np.array_split(np.arange(corpus.n_texts), max(1, corpus.n_texts // texts))
    for round_ in itertools.count():
        for place in np.random.default_rng(round_).permutation(len(left) * len(right)).tolist():
            yield left[place // len(right)], right[place % len(right)]


def burst(folder: Path, setting: Setting, rate: float, pairs: int = 64) -> dict[str, Any]:
    """Requests of ``pairs`` at twice ``rate`` pairs a second, whatever comes back."""
    import httpx2
    import psutil

    from distill.wire import MSGPACK, packed

    x = experiment(folder / "home.yaml")
    statuses, times = list[int](), list[float]()
    waiting = max(4 * pairs, int(2 * rate))  # two seconds of work
    with (
        service(folder, setting, "burst", "--waiting-pairs", str(waiting)) as (url, number),
        httpx2.Client(timeout=120, limits=httpx2.Limits(max_connections=256)) as client,
    ):
        blocks = _blocks(x.corpus, setting.texts_per_image, pairs)

        def body() -> bytes:
            chosen, texts = next(blocks)
            rows = np.meshgrid(np.arange(len(chosen)), np.arange(len(texts)), indexing="ij")
            named = {"corpus": x.corpus.fingerprint, "image_ids": chosen, "text_ids": texts}
            return packed({**named, "image_rows": rows[0].ravel(), "text_rows": rows[1].ravel()})

        def ask(content: bytes) -> tuple[int, float]:
            began = time.perf_counter()
            answer = client.post(f"{url}/score", content=content, headers={"Content-Type": MSGPACK})
            return answer.status_code, time.perf_counter() - began

        calm = [ask(body())[1] for _ in range(5)]
        memory, done = [psutil.Process(number).memory_info().rss], threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                memory.append(psutil.Process(number).memory_info().rss)

        watching = threading.Thread(target=watch)
        watching.start()
        began, sent = time.perf_counter(), 0
        with ThreadPoolExecutor(128) as pool:
            futures = []
            while (at := time.perf_counter() - began) < setting.seconds:
                if sent < at * 2 * rate / pairs:
                    futures.append(pool.submit(ask, body()))
                    sent += 1
                else:
                    time.sleep(0.002)
            over = time.perf_counter()
            for future in futures:
                status, took = future.result()
                statuses.append(status)
                times += [took] if status == 200 else []
        ended, after = time.perf_counter(), float("nan")
        for _ in range(50):
            status, took = ask(body())
            if status == 200 and took < 2 * statistics.median(calm):
                after = time.perf_counter() - over
                break
        done.set()
        watching.join()
    answered = statuses.count(200)
    return {
        "asked_pairs_per_second": sent * pairs / (over - began),
        "answered_pairs_per_second": answered * pairs / (ended - began),
        "requests": len(statuses),
        "answered": answered,
        "turned_away": statuses.count(429),
        "other": len(statuses) - answered - statuses.count(429),
        "p50_ms": float(np.quantile(times or [np.nan], 0.5) * 1000),
        "p99_ms": float(np.quantile(times or [np.nan], 0.99) * 1000),
        "calm_ms": statistics.median(calm) * 1000,
        "waiting_pairs": waiting,
        "memory_before_mib": memory[0] / 2**20,
        "memory_most_mib": max(memory) / 2**20,
        "recovered_after_s": after,
    }


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    images: Annotated[int, typer.Option(min=8)] = 256,
    texts: Annotated[int, typer.Option(min=1, help="of each image")] = 16,
    layers: Annotated[int, typer.Option(min=1)] = 6,
    width: Annotated[int, typer.Option(min=64, help="a multiple of 64")] = 384,
    image_size: Annotated[int, typer.Option(min=32)] = 224,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    clients: Annotated[int, typer.Option(min=2)] = 4,
    threads: Annotated[int, typer.Option(min=1, help="of the teacher")] = len(os.sched_getaffinity(0)),
    seconds: Annotated[float, typer.Option(min=1, help="of the burst")] = 20.0,
) -> None:
    """Measure, show, write."""
    setting = Setting(images, texts, layers, width, image_size, rounds, clients, threads, seconds)
    if quick:
        setting = Setting(16, 8, 1, 64, 48, 1, 2, 1, 2.0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, setting)
        figures, rows = compare(folder, setting)
        show(
            f"{setting.pairs:,} pairs, BLIP of {setting.layers} layers, width {setting.width}, "
            f"{setting.image_size} px, {setting.threads} threads",
            ("", "pairs/s", "of at home", "p50 ms", "p99 ms"),
            rows,
        )
        rate = max(figures[name]["pairs_per_second"] for name in list(figures)[1:3])  # the most it has shown
        figures["burst"] = burst(folder, setting, rate)
        show("twice the load", ("", ""), [[name, value] for name, value in figures["burst"].items()])
    about = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), **vars(setting)}
    write_json(json_file, {**figures, "setting": about})


if __name__ == "__main__":
    typer.run(main)
