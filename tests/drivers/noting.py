"""A teacher that notes every pair it is asked, in a file that outlives its process; and the experiments of these tests.

Its scores are sums over real products, so that their last digits depend on what they are computed beside.
"""

from __future__ import annotations

import collections
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distill.experiment import Experiment
from distill.protocols import fingerprint, weights_fingerprint
from distill.recipe.build import builders
from distill.recipe.load import load_recipe

WIDTH, LONGEST = 48, 12


class NotingTeacher(nn.Module):
    """``notes``: folder of the notes, one file a process; ``seconds``: a call takes while a file ``slow`` is there.

    While a file ``hold`` is there a call does not end, and its process is found in ``held``.
    """

    score_kind = "logit"

    def __init__(self, notes: str, seconds: float = 0.0, seed: int = 0, bad: int = -1, dies: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.pixels = nn.Parameter(torch.randn(16 * 16, WIDTH, generator=generator) / 16)
        self.words = nn.Parameter(torch.randn(997, WIDTH, generator=generator))
        self.mixed = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        self.notes, self.seconds, self.bad, self.dies = Path(notes), seconds, bad, dies

    @property
    def identity(self) -> str:
        return fingerprint("noting", weights_fingerprint(self))

    def prepare_images(self, images):
        small = [np.asarray(image.convert("L").resize((16, 16)), np.float32).reshape(-1) / 255 for image in images]
        return {"pixels": torch.from_numpy(np.stack(small))}

    def prepare_texts(self, texts):
        rows = [[zlib.crc32(word.encode()) % 997 for word in text.split()][:LONGEST] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"ids": ids, "text_mask": mask, "own": torch.tensor([[zlib.crc32(text.encode())] for text in texts])}

    def encode_images(self, inputs):
        own = [zlib.crc32(row.tobytes()) for row in inputs["pixels"].numpy()]
        vectors = torch.tanh(inputs["pixels"] @ self.pixels)
        return {"vectors": vectors, "own": torch.tensor(own), "embedding": nn.functional.normalize(vectors, dim=1)}

    def encode_texts(self, inputs):
        mask = inputs["text_mask"].unsqueeze(-1)
        vectors = (self.words[inputs["ids"]] * mask).sum(1) / mask.sum(1)
        vectors = torch.tanh(vectors @ self.mixed)
        return {"vectors": vectors, "own": inputs["own"][:, 0], "embedding": nn.functional.normalize(vectors, dim=1)}

    def score(self, images, texts, image_rows, text_rows):
        if self.dies:
            os.kill(os.getpid(), 9)
        asked = list(zip(images["own"][image_rows].tolist(), texts["own"][text_rows].tolist(), strict=True))
        self.notes.mkdir(parents=True, exist_ok=True)
        with (self.notes / str(os.getpid())).open("a") as file:
            file.writelines(f"{image} {text}\n" for image, text in asked)
        folder = self.notes.parent
        if self.seconds and (folder / "slow").exists():
            time.sleep(self.seconds)
        while (folder / "hold").exists():
            (folder / "held").mkdir(exist_ok=True)
            (folder / "held" / str(os.getpid())).touch()
            time.sleep(0.01)
        scores = ((images["vectors"][image_rows] @ self.mixed) * texts["vectors"][text_rows]).sum(1)
        if self.bad >= 0:
            scores[text_rows % 64 == self.bad] = float("nan")
        return scores


def notes(folder: Path) -> collections.Counter[str]:
    """How often each pair was asked, by whatever process."""
    found: collections.Counter[str] = collections.Counter()
    for path in (folder / "notes").glob("*"):
        found.update(path.read_text().splitlines())
    return found


def kill_one_amid_a_call(folder: Path) -> None:
    """Kills a process that has noted the pairs of a call and has not answered it; the others go on, no longer slow."""
    (folder / "hold").touch()
    held = folder / "held"
    until(lambda: held.exists() and any(held.iterdir()))
    os.kill(int(next(held.iterdir()).name), signal.SIGKILL)
    (folder / "slow").unlink()
    (folder / "hold").unlink()


def experiment(folder: Path, *settings: str, seconds: float = 0.0, seed: int = 0, bad: int = -1, dies: bool = False):
    """Of the quickstart's data, a few, with the noting teacher; notes, runs and cache lie in the folder."""
    options = f"notes: {folder / 'notes'}, seconds: {seconds}, seed: {seed}, bad: {bad}, dies: {str(dies).lower()}"
    teacher = f"teacher={{kind: custom, target: 'tests.drivers.noting:NotingTeacher', options: {{{options}}}}}"
    sizes = ["data.train=60", "data.val=20", "data.test=20", "train.batch_size=16"]
    places = [f"runs={folder / 'runs'}", f"cache={folder / 'cache'}"]
    own = ["teach=null", "device=cpu", "score.pairs_per_unit=60", "score.pairs_per_chunk=25", "prepared_gib=0"]
    recipe = load_recipe("quickstart", [*sizes, teacher, *own, *places, *settings])
    return Experiment(recipe, builders(recipe), taught=never)


def never(x: Experiment) -> Path:
    raise AssertionError("no teacher is taught here")


def pairs(x: Experiment, count: int = 900) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs, some given twice."""
    drawn = np.random.default_rng(0).choice(x.corpus.n_images * x.corpus.n_texts, count, replace=False)
    images, texts = np.divmod(drawn, x.corpus.n_texts)
    return np.concatenate([images, images[:50]]), np.concatenate([texts, texts[:50]])


def units(x: Experiment) -> dict[str, bytes]:
    """Content of the store's units by name."""
    return {path.name: path.read_bytes() for path in x.store.folder.glob("unit-*")}


def until(there: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def once(there: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
    """Does something beside the test, once something is there."""

    def wait() -> None:
        until(there)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def workers_at_work(folder: Path) -> list[int]:
    """Processes that have noted a pair."""
    return [int(path.name) for path in (folder / "notes").glob("*")]
