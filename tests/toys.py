"""A toy corpus, teacher and student: tiny, deterministic, without any pretrained part; the teacher counts its calls.

An image of the toy corpus is one grey square whose shade says its row, so that a teacher's score of a pair is known in
closed form: ``expected_scores(image_ids, text_ids)``.
"""

from __future__ import annotations

import hashlib
from io import BytesIO

import numpy as np
import PIL.Image
import safetensors.torch
import torch
from torch import nn

from distill.data.corpus import Corpus, build_corpus
from distill.data.pictures import pictures_of_bytes
from distill.protocols import Embeddings, fingerprint

_TOKENS = 64


def toy_corpus(n_images: int = 12, captions: int = 2) -> Corpus:
    """``captions`` texts of different lengths an image; the first half of the images is train, then val, then test."""
    if n_images > 256:
        raise ValueError(f"the shade of an image says its row, so there are at most 256, got {n_images}")
    contents = []
    for row in range(n_images):
        file = BytesIO()
        PIL.Image.new("L", (4, 4), color=row).save(file, format="PNG")
        contents.append(file.getvalue())
    names = [f"square-{row}.png" for row in range(n_images)]
    pictures = pictures_of_bytes(
        contents, names=names, fingerprints=[hashlib.sha256(content).hexdigest() for content in contents]
    )
    texts = [toy_caption(row) for row in range(n_images * captions)]
    pairs = np.stack([np.repeat(np.arange(n_images), captions), np.arange(len(texts))], axis=1)
    quarter = max(1, n_images // 4)
    splits = ["train"] * (n_images - 2 * quarter) + ["val"] * quarter + ["test"] * quarter
    return build_corpus("toy", pictures, texts=texts, pairs=pairs, image_splits=splits)


def toy_caption(text_id: int) -> str:
    """Text number ``text_id``: its number first, then as many words more as say its length."""
    return " ".join([str(text_id)] + ["word"] * (text_id % 5))


def expected_scores(image_ids: np.ndarray, text_ids: np.ndarray) -> np.ndarray:
    """What ``ToyTeacher`` gives for these pairs of the toy corpus, float32."""
    images, texts = np.asarray(image_ids, np.float64), np.asarray(text_ids, np.float64)
    return (np.sin(images * 0.7 + 1) * 3 + np.cos(texts * 0.3) + (images * 13 + texts * 7) % 11).astype(np.float32)


class ToyTeacher(nn.Module):
    """Scores by formula. ``images``, ``texts`` and ``pairs`` list what was asked, one entry an item or pair.

    ``memory_for`` = most pairs one call may score before it claims to be out of memory; ``bad_pair`` = (image, text)
    whose score is NaN.
    """

    score_kind = "log_odds"

    def __init__(self, *, memory_for: int | None = None, bad_pair: tuple[int, int] | None = None, name: str = "toy"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.memory_for, self.bad_pair = memory_for, bad_pair
        self.identity = fingerprint("toy teacher", name)
        self.images: list[int] = []
        self.texts: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.largest_call = 0
        self.modes: set[tuple[bool, bool]] = set()  # (training, gradients enabled) seen while scoring

    def prepare_images(self, images) -> dict[str, torch.Tensor]:
        return {"shade": torch.tensor([[image.convert("L").getpixel((0, 0))] for image in images])}

    def prepare_texts(self, texts) -> dict[str, torch.Tensor]:
        return toy_tokens(texts)

    def encode_images(self, inputs) -> dict[str, torch.Tensor]:
        self.images += inputs["shade"][:, 0].tolist()
        return {"number": inputs["shade"][:, 0], "embedding": _circle(inputs["shade"][:, 0])}

    def encode_texts(self, inputs) -> dict[str, torch.Tensor]:
        numbers = inputs["input_ids"][:, 0]
        self.texts += numbers.tolist()
        return {**inputs, "embedding": _circle(numbers)}

    def score(self, images, texts, image_rows, text_rows) -> torch.Tensor:
        self.largest_call = max(self.largest_call, len(image_rows))
        if self.memory_for is not None and len(image_rows) > self.memory_for:
            raise torch.OutOfMemoryError("toy device out of memory")
        self.modes.add((self.training, torch.is_grad_enabled()))
        i, t = images["number"][image_rows].numpy(), texts["input_ids"][text_rows, 0].numpy()
        self.pairs += zip(i.tolist(), t.tolist(), strict=True)
        scores = torch.from_numpy(expected_scores(i, t))
        if self.bad_pair is not None:
            scores[torch.from_numpy((i == self.bad_pair[0]) & (t == self.bad_pair[1]))] = float("nan")
        return scores * self.weight.detach()


class ToyStudent(nn.Module):
    """Two linear towers over shade and mean word vector; both can be trained."""

    def __init__(self, dim: int = 8, *, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.dim = dim
        self.image_tower = nn.Parameter(torch.randn(16, dim, generator=generator))
        self.text_tower = nn.Parameter(torch.randn(_TOKENS, dim, generator=generator))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def prepare_images(self, images) -> dict[str, torch.Tensor]:
        return {"shade": torch.tensor([[image.convert("L").getpixel((0, 0))] for image in images])}

    def prepare_texts(self, texts) -> dict[str, torch.Tensor]:
        return toy_tokens(texts)

    def prepare_identity(self, side: str) -> str:
        return fingerprint("toy preparation", side)

    def forward(self, images=None, texts=None, *, attention_pairs=None) -> Embeddings:
        return Embeddings(
            None if images is None else self._images(images),
            None if texts is None else self._texts(texts),
            self.log_scale.exp(),
        )

    def save_pretrained(self, folder) -> None:
        safetensors.torch.save_file(self.state_dict(), f"{folder}/toy.safetensors")

    def _images(self, inputs) -> torch.Tensor:
        steps = torch.arange(1, 17) * (inputs["shade"].float() + 1) * 0.1  # (N, 16)
        return nn.functional.normalize(torch.sin(steps) @ self.image_tower, dim=-1)

    def _texts(self, inputs) -> torch.Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1)  # (N, L, 1)
        words = self.text_tower[inputs["input_ids"] % _TOKENS] * mask
        return nn.functional.normalize(words.sum(dim=1) / mask.sum(dim=1), dim=-1)


class FrozenToyStudent(ToyStudent):
    """The same student with frozen towers, whose outputs ``forward`` takes in place of prepared inputs."""

    def frozen_identity(self, side: str) -> str | None:
        return fingerprint("toy tower", side)

    def freeze(self, side: str, inputs) -> dict[str, torch.Tensor]:
        self.frozen_calls = getattr(self, "frozen_calls", 0) + 1
        if side == "image":
            return {"vectors": self._images(inputs)}
        states = self.text_tower[inputs["input_ids"] % _TOKENS]
        return {"states": states, "attention_mask": inputs["attention_mask"]}

    def forward(self, images=None, texts=None, *, attention_pairs=None) -> Embeddings:
        if images is not None and "vectors" in images:
            return Embeddings(images["vectors"], None, self.log_scale.exp())
        if texts is not None and "states" in texts:
            mask = texts["attention_mask"].unsqueeze(-1)
            mean = (texts["states"] * mask).sum(dim=1) / mask.sum(dim=1)
            return Embeddings(None, nn.functional.normalize(mean, dim=-1), self.log_scale.exp())
        return super().forward(images, texts)


def toy_tokens(texts) -> dict[str, torch.Tensor]:
    """The number of the text, then one token a word; padded to the longest of the batch with token 9."""
    rows = [[int(text.split()[0])] + [len(word) for word in text.split()[1:]] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [9] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _circle(numbers: torch.Tensor) -> torch.Tensor:
    angle = numbers.float() * 0.1
    return torch.stack([angle.cos(), angle.sin()], dim=-1)
