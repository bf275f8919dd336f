"""The types every part agrees on: what a teacher, a student and a loss are, and what travels between them.

Shape key, the same in every file: ``B`` queries, ``K`` candidates, ``P`` pairs, ``D`` width, ``N`` items, ``L`` tokens.
Ids are int64 rows of the corpus; -1 is "no item". A *temperature* divides, a *scale* multiplies. Teacher output is a
raw logit, never a probability.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image as PILImage
    from torch import Tensor, nn

Image: TypeAlias = "PILImage"
Inputs: TypeAlias = "Mapping[str, Tensor]"
"""What a processor makes: named tensors whose first dimension counts items."""
Memory: TypeAlias = "Mapping[str, Tensor]"
"""What a teacher keeps of encoded items: named tensors whose first dimension counts items. ``embedding`` (N, D), where
present, holds the unit vectors of the teacher's own contrastive head."""
Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Direction = Literal["i2t", "t2i"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = get_args(Side)


def sides_of(direction: Direction) -> tuple[Side, Side]:
    """The side that asks and the side that answers."""
    return ("image", "text") if direction == "i2t" else ("text", "image")


ScoreKind = Literal["log_odds", "logit", "logit+cosine", "cosine", "log_likelihood"]


@runtime_checkable
class Teacher(Protocol):
    """Reads an image and a text together and says how well they match."""

    @property
    def identity(self) -> str:
        """Fingerprint of weights, config, processor, tokenizer, score kind, precision: changes when a score could."""

    @property
    def score_kind(self) -> ScoreKind: ...

    def prepare_images(self, images: Sequence[Image]) -> Inputs:
        """CPU side; runs in loader workers."""

    def prepare_texts(self, texts: Sequence[str]) -> Inputs: ...

    def encode_images(self, inputs: Inputs) -> Memory:
        """Once per image: all that no text can change."""

    def encode_texts(self, inputs: Inputs) -> Memory:
        """Once per text: all that no image can change (may be little more than ids)."""

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Raw scores (P,) float32 of the pairs (image_rows[p], text_rows[p]); rows index the memories."""


@runtime_checkable
class Distant(Protocol):
    """A teacher that computes elsewhere: it takes rows of a corpus that is there too, or the files as they are."""

    images_at_once: int
    """Images whose pairs make a call long enough for its requests to overlap, where rows travel."""

    files_at_once: int
    """The same where picture files travel, all of which are in memory, each as long as the longest."""

    def knows(self, corpus_fingerprint: str) -> bool:
        """Whether rows of this corpus name the same items there."""

    def prepare_rows(self, side: Side, rows: Ids) -> Inputs:
        """Inputs of rows of a corpus that it knows."""

    def prepare_files(self, contents: Sequence[bytes]) -> Inputs:
        """Inputs of picture files."""

    def answer_within(self, seconds: float) -> None:
        """Give up after about so long from now on: somebody waits for every answer."""

    def close(self) -> None:
        """End what waits for an answer, and the connections."""


@runtime_checkable
class TeachableTeacher(Teacher, Protocol):
    """A teacher that ``distill teach`` can train: an nn.Module with a contrastive (ITC) and a matching (ITM) head.

    While gradients are enabled, ``encode_images`` and ``encode_texts`` must give unit vectors ``embedding`` (N, D).
    Where these cost a pass of their own, leave them out of the memory otherwise and have a method ``embed(side,
    inputs)`` give them: a shortlist then costs no more than it needs. ``pair_logits`` gives the log-odds of a match
    with gradient, whatever ``score_kind`` says, so that its logistic loss equals the two-way cross-entropy of the ITM
    head. ``pretrained_parameters()``, where there is one, yields what started from a checkpoint: it may be taught at a
    rate of its own.
    """

    @property
    def scale(self) -> Tensor:
        """() learned scale of the contrastive head: multiplies the cosine."""

    def pair_logits(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Log-odds (P,) of a match, with gradient."""

    def save_pretrained(self, folder: str | Path) -> None: ...


@runtime_checkable
class ContrastiveTeachable(Teacher, Protocol):
    """A teacher without a matching head that ``distill teach`` can train by contrast: an nn.Module.

    ``encode_images`` and ``encode_texts`` give ``embedding`` (N, D) unit vectors, as those of a ``TeachableTeacher``;
    ``pretrained_parameters()`` as there.
    """

    @property
    def scale(self) -> Tensor:
        """() learned scale of the contrastive head: multiplies the cosine."""

    @property
    def pair_scale(self) -> Tensor:
        """() learned scale of ``pair_matrix``: multiplies it."""

    def pair_matrix(self, images: Memory, texts: Memory) -> Tensor:
        """Similarities (N, M) of every image with every text, about -1 to 1, with gradient."""

    def save_pretrained(self, folder: str | Path) -> None: ...


@runtime_checkable
class MapsTeacher(Teacher, Protocol):
    """A teacher whose cross-attention can be read."""

    def attention_maps(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Log-probabilities (P, L, G): last layer's text→image attention, mean over heads, over the G grid cells only.

        A class token's column is dropped and the row normalised again. Rows of padding tokens are finite and unused.
        """

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image grid that G = rows * columns counts, row-major."""


@runtime_checkable
class Freezable(Protocol):
    """A model with towers that do not train: their outputs are a function of the item alone and can be kept on disk.

    ``freeze`` turns prepared inputs into the frozen part's outputs; ``forward`` (student) and ``encode_*`` (teacher)
    accept those outputs in place of prepared inputs and give the same result. A name ending in ``_mask`` marks a ragged
    array: every other array of the same inputs that has its (N, L) shape is stored without padding.
    """

    def frozen_identity(self, side: Side) -> str | None:
        """Fingerprint of the frozen part and its preprocessing; None where the side is not frozen."""

    def freeze(self, side: Side, inputs: Inputs) -> Inputs: ...


@runtime_checkable
class Recomputable(Protocol):
    """A student that can do without most of its activations: its layers run again in the backward pass.

    Gradients are those of a student that keeps them, random numbers included; running statistics of a batch norm inside
    such a layer would move twice a step.
    """

    def recompute_activations(self) -> frozenset[Side]:
        """From now on, in training. Gives the sides whose tower does; raises ValueError where neither can."""


class Tower(Protocol):
    """One tower of a student by itself. Also an ``nn.Module`` without a branch on the data."""

    @property
    def input_names(self) -> Sequence[str]:
        """What ``forward`` takes, in this order: names that the saved tokenizer or image processor gives."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Unit vectors (N, D) float32."""


@runtime_checkable
class Deployable(Protocol):
    """A student that can be exported: its ``save_pretrained`` writes tokenizer, image processor and ``config.json``."""

    @property
    def why_not_stock(self) -> str | None:
        """Why no transformers class gives the same embeddings from the saved folder; None where one does."""

    def standalone(self, side: Side) -> Tower:
        """A tower with all that follows it, up to the unit vector."""


@dataclass(frozen=True)
class Embeddings:
    """What a student's forward returns."""

    images: Tensor | None  # (N, D) unit vectors
    texts: Tensor | None  # (M, D) unit vectors
    scale: Tensor  # () learned, positive; multiplies the cosine
    attention: Tensor | None = None  # (P, L, G) log-probabilities of the student's text→image map


class Student(Protocol):
    """A dual-encoder. Also an ``nn.Module``; training calls only ``forward``, so that DDP or FSDP can wrap it."""

    @property
    def dim(self) -> int: ...

    def prepare_images(self, images: Sequence[Image]) -> Inputs: ...

    def prepare_texts(self, texts: Sequence[str]) -> Inputs: ...

    def __call__(
        self, images: Inputs | None, texts: Inputs | None, *, attention_pairs: tuple[Tensor, Tensor] | None = None
    ) -> Embeddings:
        """``attention_pairs``: (image rows (P,), text rows (P,)) of this call's inputs whose map is wanted."""

    def save_pretrained(self, folder: str | Path) -> None: ...


@dataclass(frozen=True)
class Candidates:
    """Mined candidates of one direction, hardest first. Arrays live on the CPU."""

    direction: Direction
    query_ids: Ids  # (B,)
    item_ids: Ids  # (B, K); -1 = fewer than K were found
    similarity: np.ndarray[Any, np.dtype[np.float32]]  # (B, K) by the student that mined; -inf where item_ids is -1
    positive: np.ndarray[Any, np.dtype[np.bool_]]  # (B, K)
    # (B,) similarity of each query's labelled match by the same student; None = not kept
    labelled: np.ndarray[Any, np.dtype[np.float32]] | None = None

    def __post_init__(self) -> None:
        shape = self.item_ids.shape
        if len(shape) != 2 or self.similarity.shape != shape or self.positive.shape != shape:
            raise ValueError(
                f"item_ids, similarity and positive must share one (B, K) shape, got {shape}, {self.similarity.shape}, "
                f"{self.positive.shape}"
            )
        if self.query_ids.shape != shape[:1]:
            raise ValueError(f"query_ids must be ({shape[0]},), got {self.query_ids.shape}")
        if self.labelled is not None and self.labelled.shape != shape[:1]:
            raise ValueError(f"labelled must be ({shape[0]},), got {self.labelled.shape}")

    def first(self, k: int) -> Candidates:
        """The first ``k`` of each query."""
        return replace(
            self,
            item_ids=self.item_ids[:, :k],
            similarity=self.similarity[:, :k],
            positive=self.positive[:, :k],
        )

    def pairs(self) -> tuple[Ids, Ids]:
        """(image ids, text ids) of every candidate that is there, in row order."""
        there = self.item_ids >= 0
        queries = np.broadcast_to(self.query_ids[:, None], there.shape)[there]
        items = self.item_ids[there]
        return (queries, items) if self.direction == "i2t" else (items, queries)


@dataclass(frozen=True)
class Scored:
    """What a loss sees: a row a query, a column a candidate. In-batch negatives are more columns of the same row."""

    student: Tensor  # (B, K) similarity with gradient: the cosine, before any scale
    teacher: Tensor  # (B, K) raw; NaN = not asked
    positive: Tensor  # (B, K) bool
    valid: Tensor  # (B, K) bool, False = padding
    scale: Tensor  # () the student's learned scale; multiplies ``student``
    in_batch: Tensor | None = (
        None  # (B, K) bool: the column is one of the batch's own items, not only a mined candidate
    )
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def asked(self) -> Tensor:
        """(B, K) bool: there, and the teacher gave a score."""
        return self.valid & ~self.teacher.isnan()

    def asked_only(self) -> Scored:
        """The same rows with only the asked columns, order kept, padded to the longest row (``valid`` False).

        Losses over pairs of candidates cost the square of the columns; a batch has far more columns than a row has
        scores.
        """
        asked = self.asked
        width = max(1, int(asked.sum(dim=1).max()))
        columns = asked.int().argsort(dim=1, descending=True, stable=True)[:, :width]  # (B, width)
        return replace(
            self,
            student=self.student.gather(1, columns),
            teacher=self.teacher.gather(1, columns),
            positive=self.positive.gather(1, columns),
            valid=asked.gather(1, columns),
            in_batch=None if self.in_batch is None else self.in_batch.gather(1, columns),
        )


Loss: TypeAlias = "Callable[[Scored], Tensor]"
"""-> (), the mean over rows; never holds a model, a tokenizer or a process group. An attribute ``needs`` (names of
``Scored.extras``), where present, states what it needs beyond scores."""


def fingerprint(*parts: object) -> str:
    """32 hex digits of SHA-256 over the parts, each framed by its length so that no two lists collide.

    Bytes and text count as they are, arrays by dtype, shape and content, anything else by its sorted JSON.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            head, body = f"{part.dtype.str}{part.shape}".encode(), np.ascontiguousarray(part).tobytes()
        elif isinstance(part, bytes):
            head, body = b"bytes", part
        elif isinstance(part, str):
            head, body = b"text", part.encode()
        else:
            head, body = b"json", json.dumps(part, sort_keys=True).encode()
        for piece in (head, body):
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
    return digest.hexdigest()[:32]


def weights_fingerprint(modules: nn.Module | Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of named weights: one flipped byte, another name, dtype or shape makes another one."""
    named = modules.state_dict().items() if hasattr(modules, "state_dict") else modules
    digest = hashlib.sha256()
    for name, tensor in sorted(named):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{flat.dtype}|{tuple(flat.shape)}|".encode())
        digest.update(flat.reshape(-1).view(_byte_type()).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:32]


def _byte_type() -> Any:
    import torch  # late: importing this module must not import torch

    return torch.uint8
