"""A BLIP-style cross-encoder put together from a vision backbone and a BERT-like text encoder.

After Li et al., "Align before Fuse", NeurIPS 2021: the first text layers read the text alone, the last ones read the
image too, through cross-attention whose keys and values depend on the image alone and are computed once per image.

Shape key: ``N`` items, ``P`` pairs, ``F`` fused layers, ``L`` text tokens, ``S`` real tokens of all pairs, ``T`` image
tokens (class and register tokens, then ``G`` grid cells), ``H`` text width, ``D`` embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.protocols import Inputs, Memory, Side, fingerprint, weights_fingerprint
from teachers import itm, layers
from teachers.crossattention import PackedPairs, attention_over_grid, keys_and_values, score_packed
from teachers.fusion_options import FusionDesign, FusionOptions
from teachers.fusion_parts import CrossAttention, MatchingHead
from teachers.fusion_sides import ImageSide, TextSide
from teachers.joined_teacher import JoinedTeacher

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SCORING_VERSION = 1  # part of every identity; raise it when the same weights would give other scores


class FusionTeacher(JoinedTeacher[FusionDesign, FusionOptions]):
    """A ``Teacher`` that can be taught, whose cross-attention can be read and whose frozen parts can be kept on disk.

    Image memory: ``keys`` and ``values`` (N, F, T, H), ``embedding`` (N, D). Text memory: ``states`` (N, L, H) before
    the first cross-attention, ``attention_mask`` (N, L), ``embedding`` (N, D). Both ``encode_*`` also take such a
    memory back as it is.
    """

    kind = "fusion_teacher"
    text: TextSide

    def _build(self, vision: PreTrainedModel, text: PreTrainedModel) -> None:
        width, heads, dropout = text.config.hidden_size, text.config.num_attention_heads, self.design.dropout
        self.text = TextSide(text, self.tokenizer, self.design, self.options)
        self.image = ImageSide(vision, self.image_processor, self.design, width=width)
        self.cross = nn.ModuleList(CrossAttention(width, heads, dropout) for _ in range(self.design.fusion_layers))
        self.itm_head = MatchingHead(width, dropout)
        self.to(text.dtype)
        self.logit_scale = nn.Parameter(itm.first_log_scale())  # stays float32: it has no business in half precision
        _, self._feed_forward = layers.dense_blocks(compiled=self.options.compile)

    @classmethod
    def design_from(cls, saved: Mapping[str, Any]) -> FusionDesign:
        """The design that ``dataclasses.asdict`` made a dictionary of; what is missing is as usual."""
        return FusionDesign(**saved)

    @classmethod
    def options_from(cls, saved: Mapping[str, Any]) -> FusionOptions:
        """The options that ``dataclasses.asdict`` made a dictionary of; what is missing is as usual."""
        return FusionOptions(**saved)

    def _identity_now(self) -> str:
        weights = {name: tensor for name, tensor in self.state_dict().items() if name != "logit_scale"}
        return fingerprint(
            {"teacher": "fusion", "version": SCORING_VERSION, "score_kind": self.score_kind},
            {"cosine_weight": self.options.cosine_weight},
            {"fusion_layers": self.design.fusion_layers, "contrastive_text": self.design.contrastive_text},
            weights_fingerprint(weights.items()),
            *self.image.states(),
            *self.text.states(),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image grid."""
        return self.image.shape.rows, self.image.shape.columns

    def freeze(self, side: Side, inputs: Inputs) -> Inputs:
        """Outputs of the frozen part of a side for prepared inputs; ValueError where nothing of it is frozen.

        Image: ``grid`` (N, G, C) and, where the backbone has class or register tokens, ``others`` (N, R, C). Text:
        ``hidden`` (N, L, H), ``attention_mask`` (N, L), and where the design reads it ``sentence`` (N, H).
        """
        if not (self.design.freeze_vision if side == "image" else self.design.frozen_text_layers):
            raise ValueError(f"nothing of the {side} side is frozen; see freeze_vision and frozen_text_layers")
        with torch.no_grad():
            return self.image.freeze(inputs) if side == "image" else self.text.freeze(inputs)

    def encode_images(self, inputs: Inputs) -> Memory:
        """{"keys", "values": (N, F, T, H), "embedding": (N, D)} of prepared images or frozen outputs."""
        if "keys" in inputs:
            return inputs
        features = self.image.features(inputs)
        blocks = [(block.key, block.value) for block in self._cross()]
        return {**keys_and_values(blocks, self.image.tokens(features)), "embedding": self.image.head(features)}

    def encode_texts(self, inputs: Inputs) -> Memory:
        """{"states": (N, L, H), "attention_mask": (N, L), "embedding": (N, D)} of prepared texts or frozen outputs."""
        if "states" in inputs:
            return inputs
        states, attention, embedding = self.text(inputs)
        packing = layers.Packing.of(attention)
        states = packing.pad(layers.self_attention(self.text.fused_layers[0], packing.pack(states), packing))
        return {"states": states, "attention_mask": attention, "embedding": embedding}

    def embed(self, side: Side, inputs: Inputs) -> Tensor:
        """Unit vectors (N, D) of the contrastive head, of prepared items or frozen outputs."""
        if side == "image":
            vectors: Tensor = self.image.head(self.image.features(inputs))
            return vectors
        embedding: Tensor = self.text(inputs)[2]
        return embedding

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Raw scores (P,) float32 of ``score_kind``."""
        rows, weight = (image_rows, text_rows), self.options.cosine_weight
        return itm.pair_scores(self.score_kind, self._matching_logits, images, texts, rows, cosine_weight=weight)

    def pair_logits(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Log-odds (P,) of a match, with gradient."""
        return itm.pair_scores("log_odds", self._matching_logits, images, texts, (image_rows, text_rows))

    def attention_maps(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Log-probabilities (P, L, G) of the last layer's cross-attention; L is that of the text memory."""
        itm.check_rows(images, texts, image_rows, text_rows)
        pairs = PackedPairs.of(images, texts, image_rows, text_rows, trim=False)
        states, last = self._before_cross(pairs, self.design.fusion_layers - 1), self._cross()[-1]
        return attention_over_grid(last.queries(states), pairs, last.heads, others=self.image.shape.others)

    def _matching_logits(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """(P, 2) float32."""
        rows, size = (image_rows, text_rows), self.options.pairs_per_chunk
        return score_packed(self._logits_of, images, texts, rows, pairs_per_chunk=size)

    def _logits_of(self, pairs: PackedPairs) -> Tensor:
        last = self.design.fusion_layers - 1
        states = self._cross()[last](self._before_cross(pairs, last), pairs.source(last))
        states = self._feed_forward(self.text.fused_layers[last], states)
        logits: Tensor = self.itm_head(pairs.packing.pad(states), pairs.packing.attention)
        return logits

    def _before_cross(self, pairs: PackedPairs, at: int) -> Tensor:
        """(S, H) that the cross-attention of fused layer ``at`` reads; the memory's states are what the first reads."""
        states, fused = pairs.states, self.text.fused_layers
        for before in range(at):
            states = self._cross()[before](states, pairs.source(before))
            states = self._feed_forward(fused[before], states)
            states = layers.self_attention(fused[before + 1], states, pairs.packing)
        return states

    def _cross(self) -> list[CrossAttention]:
        return [block for block in self.cross if isinstance(block, CrossAttention)]
