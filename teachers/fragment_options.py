"""What can be chosen about a fragment teacher: how it is built, and how it scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from teachers.fragment_pipeline import DirectionDesign, ScanDesign

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill.protocols import ScoreKind

FRAGMENT_SCORE_KINDS: tuple[ScoreKind, ...] = ("logit", "logit+cosine", "cosine")


@dataclass(frozen=True)
class FragmentDesign:
    """How a fragment teacher is built and which parts of it train.

    fragment_dim: width of the projected cells and words.
    embed_dim: width of the contrastive head's vectors.
    freeze_vision, freeze_text: the backbone keeps its weights; its outputs can be kept on disk.
    special_words: whether the marks that the tokenizer puts around a text count as words.
    dropout: inside the new parts; in training only.
    image_input_dropout, text_input_dropout: of the backbone's outputs that the new parts read; in training only. On
        frozen features they keep the projections from learning them by heart.
    scan: the stages from fragments to a similarity.
    """

    fragment_dim: int = 256
    embed_dim: int = 256
    freeze_vision: bool = True
    freeze_text: bool = True
    special_words: bool = False
    dropout: float = 0.1
    image_input_dropout: float = 0.0
    text_input_dropout: float = 0.0
    scan: ScanDesign = field(default_factory=ScanDesign)

    def __post_init__(self) -> None:
        for name in ("fragment_dim", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("dropout", "image_input_dropout", "text_input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0 and below 1")

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> FragmentDesign:
        """The design that ``dataclasses.asdict`` made a dictionary of."""
        scan = saved["scan"]
        directions = {name: DirectionDesign(**scan[name]) for name in ("i2t", "t2i")}
        return cls(**{**saved, "scan": ScanDesign(**{**scan, **directions})})


@dataclass(frozen=True)
class FragmentOptions:
    """How a fragment teacher scores.

    score_kind: ``logit`` is the learned scale times the fragments' similarity, the number whose softmax over a batch
        the teacher was taught by; ``cosine`` is that of the contrastive head; ``logit+cosine`` adds ``cosine_weight``
        times it to the logit.
    cosine_weight: near the contrastive head's learned scale both parts count alike.
    max_text_length: tokens kept of a text, special tokens included.
    pairs_per_chunk: pairs that are compared at a time; bounds memory, changes no score.
    """

    score_kind: ScoreKind = "logit"
    max_text_length: int = 35
    prompt: ClassVar[str] = ""  # words are compared one by one: there is no place for one
    pairs_per_chunk: int = 1024
    cosine_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.score_kind not in FRAGMENT_SCORE_KINDS:
            raise ValueError(
                f"score_kind is {self.score_kind!r}; a fragment teacher has no matching head and gives one of "
                f"{', '.join(FRAGMENT_SCORE_KINDS)}"
            )
        if self.max_text_length < 3:
            raise ValueError(f"max_text_length is {self.max_text_length}; two special tokens and one word need 3")
        if self.pairs_per_chunk < 1:
            raise ValueError(f"pairs_per_chunk is {self.pairs_per_chunk}; expected at least 1")
