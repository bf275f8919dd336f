"""A teacher that compares fragments: the grid cells of an image with the words of a text, by stacked cross attention.

After Lee et al., ECCV 2018 (SCAN), over any vision backbone that gives a grid and any BERT-like text encoder. Neither
side reads the other before its fragments are done, so both are encoded once, and a pair costs a few thousand numbers.

Shape key: ``N`` images, ``M`` texts, ``P`` pairs, ``G`` grid cells, ``L`` words, ``F`` width of a fragment, ``D`` width
of the contrastive head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.protocols import Inputs, Memory, Side, fingerprint, weights_fingerprint
from teachers import itm
from teachers.fragment_options import FragmentDesign, FragmentOptions
from teachers.fragment_pairs import all_pairs, given_pairs
from teachers.fragment_words import WordSide
from teachers.fusion_options import FusionDesign
from teachers.fusion_sides import ImageSide
from teachers.joined_teacher import JoinedTeacher

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SCORING_VERSION = 1  # part of every identity; raise it when the same weights would give other scores


class FragmentTeacher(JoinedTeacher[FragmentDesign, FragmentOptions]):
    """A ``Teacher`` that ``distill teach`` trains by contrast, and whose frozen backbones' outputs can be kept on disk.

    Image memory: ``cells`` (N, G, F) unit vectors, ``embedding`` (N, D). Text memory: ``words`` (M, L, F) unit vectors,
    ``word_mask`` (M, L) bool, ``embedding`` (M, D).
    """

    kind = "fragment_teacher"
    text: WordSide

    def _build(self, vision: PreTrainedModel, text: PreTrainedModel) -> None:
        self.text = WordSide(text, self.tokenizer, self.design, self.options)
        self.image = ImageSide(vision, self.image_processor, _image_design(self.design), width=self.design.fragment_dim)
        self.cell_dropout = nn.Dropout(self.design.image_input_dropout)
        self.to(text.dtype)
        self.logit_scale = nn.Parameter(itm.first_log_scale())  # both stay float32
        self.log_pair_scale = nn.Parameter(itm.first_log_scale())

    @classmethod
    def design_from(cls, saved: Mapping[str, Any]) -> FragmentDesign:
        """The design that ``dataclasses.asdict`` made a dictionary of; what is missing is as usual."""
        return FragmentDesign.from_json(saved) if saved else FragmentDesign()

    @classmethod
    def options_from(cls, saved: Mapping[str, Any]) -> FragmentOptions:
        """The options that ``dataclasses.asdict`` made a dictionary of; what is missing is as usual."""
        return FragmentOptions(**saved)

    def _identity_now(self) -> str:
        weights = {name: tensor for name, tensor in self.state_dict().items() if name != "logit_scale"}
        return fingerprint(
            {"teacher": "fragment", "version": SCORING_VERSION, "score_kind": self.score_kind},
            {"cosine_weight": self.options.cosine_weight, "special_words": self.design.special_words},
            asdict(self.design.scan),
            weights_fingerprint(weights.items()),
            *self.image.states(),
            *self.text.states(),
        )

    @property
    def pair_scale(self) -> Tensor:
        """() learned scale of the fragments' similarity, within 2 .. 1000."""
        return itm.scale_of(self.log_pair_scale)

    def freeze(self, side: Side, inputs: Inputs) -> Inputs:
        """Outputs of a side's frozen backbone for prepared inputs; ValueError where it trains.

        Image: ``grid`` (N, G, C) and, where the backbone has class or register tokens, ``others`` (N, R, C). Text:
        ``hidden`` (M, T, H), ``input_ids`` and ``attention_mask`` (M, T).
        """
        chosen: ImageSide | WordSide = self.image if side == "image" else self.text
        if not chosen.frozen:
            raise ValueError(f"the {side} backbone is not frozen; see freeze_vision and freeze_text")
        with torch.no_grad():
            return chosen.freeze(inputs)

    def embed(self, side: Side, inputs: Inputs) -> Tensor:
        """Vectors (N, D) of the contrastive head alone, without the fragments that only pairs need."""
        if side == "image":
            vectors: Tensor = self.image.head(self.image.features(inputs))
            return vectors
        return self.text.embed(inputs)

    def encode_images(self, inputs: Inputs) -> Memory:
        """{"cells": (N, G, F), "embedding": (N, D)} of prepared images or frozen outputs."""
        features = self.image.features(inputs)
        cells = self.image.tokens(self.cell_dropout(features))[:, self.image.shape.others :]
        return {"cells": nn.functional.normalize(cells.float(), dim=-1), "embedding": self.image.head(features)}

    def encode_texts(self, inputs: Inputs) -> Memory:
        """{"words": (M, L, F), "word_mask": (M, L), "embedding": (M, D)} of prepared texts or frozen outputs."""
        words, real, embedding = self.text(inputs)
        return {"words": words, "word_mask": real, "embedding": embedding}

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Raw scores (P,) float32 of ``score_kind``."""
        itm.check_rows(images, texts, image_rows, text_rows)
        score = torch.zeros(len(image_rows), device=self.logit_scale.device)
        if not len(image_rows):
            return score
        if self.score_kind != "cosine":
            found = given_pairs(
                images, texts, (image_rows, text_rows), self.design.scan, pairs_per_chunk=self.options.pairs_per_chunk
            )
            score = score + self.pair_scale * found.to(score.device)
        if "cosine" in self.score_kind:
            weight = self.options.cosine_weight if self.score_kind == "logit+cosine" else 1.0
            score = score + weight * itm.pair_cosine(images, texts, image_rows, text_rows).to(score.device)
        return score

    def pair_matrix(self, images: Memory, texts: Memory) -> Tensor:
        """Similarities (N, M) of every image with every text, before any scale, with gradient."""
        return all_pairs(images, texts, self.design.scan, pairs_per_chunk=self.options.pairs_per_chunk)


def _image_design(design: FragmentDesign) -> FusionDesign:
    """The image side is a fusion teacher's: backbone, cells with a learned place, contrastive head."""
    return FusionDesign(
        freeze_vision=design.freeze_vision,
        embed_dim=design.embed_dim,
        dropout=design.dropout,
        image_input_dropout=design.image_input_dropout,
    )
