"""A dual-encoder in a teacher's place: its cosine is the score. For ensembles, whose members may be of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from distill.protocols import Freezable, Student, fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.protocols import Image, Inputs, Memory, ScoreKind, Side


class KnownStudent(Student, Freezable, Protocol):
    """A student that says which one it is, and whose inputs can be kept on disk."""

    @property
    def identity(self) -> str: ...

    def prepare_identity(self, side: Side) -> str: ...


class StudentTeacher(nn.Module):
    """Satisfies ``Teacher`` and ``Freezable``. Memories hold ``embedding`` (N, D) and nothing else."""

    score_kind: ScoreKind = "cosine"

    def __init__(self, student: KnownStudent) -> None:
        """The student is put in eval mode, and its weights are fixed: the identity is computed here, once."""
        super().__init__()
        self.student = student
        self.identity = fingerprint("student as teacher", student.identity)
        self.eval()

    def prepare_images(self, images: Sequence[Image]) -> Inputs:
        """As the student does."""
        return self.student.prepare_images(images)

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """As the student does."""
        return self.student.prepare_texts(texts)

    def prepare_identity(self, side: Side) -> str:
        """The student's: what was kept for it is read again."""
        return self.student.prepare_identity(side)

    def frozen_identity(self, side: Side) -> str | None:
        """The student's, as ``prepare_identity``."""
        return self.student.frozen_identity(side)

    def freeze(self, side: Side, inputs: Inputs) -> Inputs:
        """As the student does."""
        return self.student.freeze(side, inputs)

    def encode_images(self, inputs: Inputs) -> Memory:
        """{"embedding": (N, D)}."""
        return {"embedding": _given(self.student(inputs, None).images)}

    def encode_texts(self, inputs: Inputs) -> Memory:
        """{"embedding": (N, D)}."""
        return {"embedding": _given(self.student(None, inputs).texts)}

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Cosines (P,) float32."""
        left, right = images["embedding"][image_rows].float(), texts["embedding"][text_rows].float()
        return (left * right.to(left.device)).sum(dim=1)


def _given(vectors: Tensor | None) -> Tensor:
    if vectors is None:
        raise ValueError("the student gave no embeddings for the inputs of their side")
    return vectors
