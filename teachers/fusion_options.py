"""What can be chosen about a fusion teacher: how it is built, and how it scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from distill.protocols import ScoreKind
from teachers.itm import check_score_kind

ContrastiveText = Literal["deep", "shallow", "sentence"]


@dataclass(frozen=True)
class FusionDesign:
    """How a fusion teacher is built and which parts of it train.

    fusion_layers: the last so many text layers get cross-attention.
    freeze_vision: the vision backbone keeps its weights; its outputs can be kept on disk.
    frozen_text_layers: so many first text layers keep their weights, embeddings included; 0 = none, and the embeddings
        train. At most the layers without cross-attention.
    embed_dim: width of the contrastive head's vectors.
    dropout: of the new parts and of the text layers that train; in training only.
    image_input_dropout: of the pooled features that the contrastive image head reads; in training only. On frozen
        features it keeps the head from learning them by heart.
    text_input_dropout: the same for the contrastive text head.
    contrastive_text: what the contrastive text vector is read from. "deep": all text layers, run without
        cross-attention (as in BLIP). "shallow": the layers before the first cross-attention (as in ALBEF), cheaper
        and less able. "sentence": the mean over tokens of the pretrained encoder's own last layer, of which a frozen
        copy is kept; it needs all layers before the first cross-attention frozen, costs nothing in training, and
        suits sentence encoders.
    """

    fusion_layers: int = 2
    freeze_vision: bool = True
    frozen_text_layers: int = 0
    embed_dim: int = 256
    dropout: float = 0.1
    contrastive_text: ContrastiveText = "deep"
    image_input_dropout: float = 0.0
    text_input_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.fusion_layers < 1:
            raise ValueError(f"fusion_layers is {self.fusion_layers}; expected at least 1")
        if self.frozen_text_layers < 0:
            raise ValueError(f"frozen_text_layers is {self.frozen_text_layers}; expected 0 (none) or more")
        if self.contrastive_text not in get_args(ContrastiveText):
            allowed = ", ".join(map(repr, get_args(ContrastiveText)))
            raise ValueError(f"contrastive_text is {self.contrastive_text!r}; expected one of {allowed}")
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim is {self.embed_dim}; expected at least 1")
        for name in ("dropout", "image_input_dropout", "text_input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0 and below 1")

    def check_layers(self, text_layers: int) -> None:
        """Raise ValueError where the text encoder has too few layers for what is asked."""
        if self.fusion_layers > text_layers:
            raise ValueError(f"fusion_layers is {self.fusion_layers}; the text encoder has {text_layers} layers")
        before = text_layers - self.fusion_layers
        if self.contrastive_text == "sentence" and self.frozen_text_layers != before:
            raise ValueError(
                f"contrastive_text 'sentence' reads the pretrained encoder, so the {before} layers before the first "
                f"cross-attention must be frozen; frozen_text_layers is {self.frozen_text_layers}: set it to {before}"
            )
        if self.frozen_text_layers > before:
            raise ValueError(
                f"frozen_text_layers is {self.frozen_text_layers}; only the {before} layers before the first "
                f"cross-attention can be frozen ({text_layers} layers, {self.fusion_layers} of them fused)"
            )


@dataclass(frozen=True)
class FusionOptions:
    """How a fusion teacher scores.

    score_kind: see ``teachers.itm.scores_from``.
    cosine_weight: what multiplies the cosine in ``logit+cosine``; 1 in BLIP's published evaluation. A matching head of
        little training is unsure: near the learned contrastive scale both heads count alike.
    max_text_length: tokens kept of a text, special tokens included.
    prompt: put before every text.
    pairs_per_chunk: pairs that are scored at a time while no gradient is wanted; bounds memory, changes no score.
    compile: run the dense blocks through ``torch.compile``; needs a compiler where it runs, and changes no score beyond
        rounding. The first calls are slow.
    """

    score_kind: ScoreKind = "log_odds"
    max_text_length: int = 35
    prompt: str = ""
    pairs_per_chunk: int = 256
    cosine_weight: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        check_score_kind(self.score_kind)
        if self.max_text_length < 2:
            raise ValueError(f"max_text_length is {self.max_text_length}; the two special tokens alone need 2")
        if self.pairs_per_chunk < 1:
            raise ValueError(f"pairs_per_chunk is {self.pairs_per_chunk}; expected at least 1")
