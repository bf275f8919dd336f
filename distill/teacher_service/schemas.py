"""What the service says of itself, and the shapes of its answers in JSON."""

from __future__ import annotations

from pydantic import BaseModel, Field

from distill.protocols import ScoreKind


class ScoreAnswer(BaseModel):
    """Scores in the order of the pairs."""

    scores: list[float | None] = Field(description="raw; null where the teacher gave no finite number")
    score_kind: ScoreKind
    identity: str = Field(description="of the teacher: changes when a score could")
    asked: int = Field(description="pairs that the teacher read for this request")
    served_from_store: int = Field(description="pairs that were known, or computed for another request")


class EmbedAnswer(BaseModel):
    """Unit vectors in the order of the items."""

    vectors: list[list[float]]
    dim: int
    identity: str


class CorpusInfo(BaseModel):
    """The corpus whose rows may be sent in place of pictures and texts."""

    name: str
    fingerprint: str
    images: int
    texts: int


class LimitsInfo(BaseModel):
    """What one request may hold."""

    body_bytes: int
    pairs: int
    images: int
    texts: int
    text_characters: int
    picture_bytes: int
    picture_pixels: int
    pixels: int
    deadline_s: float


class Info(BaseModel):
    """What this service is."""

    version: str
    teacher: str = Field(description="its class")
    identity: str = Field(description="fingerprint of weights, config, processor, tokenizer, score kind, precision")
    score_kind: ScoreKind
    dim: int | None = Field(description="width of its contrastive head's vectors; null where it has none")
    corpus: CorpusInfo | None
    limits: LimitsInfo
