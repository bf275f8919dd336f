"""BridgeTower as a teacher: both towers once per item, cross-modal layers per pair, two-way matching head.

Xu et al., "BridgeTower: Building Bridges Between Encoders in Vision-Language Representation Learning", AAAI 2023.
Weights and configuration are those of ``transformers.BridgeTowerForImageAndTextRetrieval``, whose forward runs both
towers again for every pair. The towers never read the other side; each of their last layers feeds one cross-modal layer
over a bridge, so all that the bridges take is kept for an item.

Shape key: ``N`` items, ``P`` pairs, ``F`` cross-modal layers, ``L`` text tokens, ``T`` image tokens (class token
first), ``H`` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.protocols import Inputs, Memory, ScoreKind
from teachers import itm
from teachers.pairwise import attend, by_length, gathered, in_chunks, key_mask
from teachers.pretrained import Published, check_image_size, check_options, check_texts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, BridgeTowerForImageAndTextRetrieval, PreTrainedTokenizerBase

SCORING_VERSION = 1  # part of every identity; raise it when the same weights would give other scores
ALL, FIRST = slice(None), slice(1)  # which tokens of a stream go on


@dataclass(frozen=True)
class BridgeTowerOptions:
    """How a BridgeTower scores.

    score_kind: "log_odds" or "logit"; see ``teachers.itm.scores_from``.
    max_text_length: tokens kept of a text, special tokens included; 50 in the published evaluation.
    prompt: put before every text.
    pairs_per_chunk: pairs that are scored at a time; bounds memory, changes no score.
    """

    score_kind: ScoreKind = "log_odds"
    max_text_length: int = 50
    prompt: str = ""
    pairs_per_chunk: int = 32

    def __post_init__(self) -> None:
        check_options(self, ("log_odds", "logit"))


class BridgeTowerTeacher(Published):
    """A ``Teacher``; it cannot be taught and stays in eval mode.

    Image memory: ``states`` (N, F, T, H), what each cross-modal layer takes from the image tower. Text memory:
    ``states`` (N, L, F, H), the same of the text tower, ``attention_mask`` (N, L).
    """

    kind = "bridgetower"
    version = SCORING_VERSION
    library_class = "BridgeTowerForImageAndTextRetrieval"
    options: BridgeTowerOptions

    def __init__(
        self,
        model: BridgeTowerForImageAndTextRetrieval,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        options: BridgeTowerOptions | None = None,
    ) -> None:
        """Wrap a model, which is frozen, and its processors; ValueError where they do not fit each other."""
        options = options or BridgeTowerOptions()
        text = model.config.text_config
        check_image_size(image_processor, model.config.vision_config.image_size)
        check_texts(
            options,
            tokens=len(tokenizer),
            vocabulary=text.vocab_size,
            positions=text.max_position_embeddings - text.pad_token_id - 1,  # they begin after the padding id
        )
        super().__init__(model, image_processor, tokenizer, options)

    def encode_images(self, inputs: Inputs) -> Memory:
        """{"states": (N, F, T, H)} of prepared images; a memory comes back as it is."""
        if "states" in inputs:
            return inputs
        model, visual = self._tower, self._tower.vision_model.visual
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        states, taken = visual.forward_pre(pixels), []  # (T, N, width): this tower's layers count items second
        for at, block in enumerate(visual.transformer.resblocks[: self._text_layers]):
            states = block(states)
            if (bridge := at - self._first_bridge) >= 0:
                taken.append(_transform(model.cross_modal_image_transform, visual.forward_post(states), bridge))
        kind = model.token_type_embeddings.weight[1]
        return {"states": self._ready(taken, kind, model.cross_modal_image_layernorm, dim=1)}

    def encode_texts(self, inputs: Inputs) -> Memory:
        """{"states": (N, L, F, H), "attention_mask": (N, L)} of prepared texts; a memory comes back as it is."""
        if "states" in inputs:
            return inputs
        model, taken = self._tower, []
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        states, keys = model.text_model.embeddings(input_ids=ids), key_mask(mask)
        for at, layer in enumerate(model.text_model.encoder.layer):
            states = _feed_forward(layer, _self_attention(layer, states, keys))
            if (bridge := at - self._first_bridge) >= 0:
                taken.append(_transform(model.cross_modal_text_transform, states, bridge))
        kind = model.token_type_embeddings.weight[0]
        return {"states": self._ready(taken, kind, model.cross_modal_text_layernorm, dim=2), "attention_mask": mask}

    @staticmethod
    def _ready(taken: list[Tensor], kind: Tensor, norm: Any, *, dim: int) -> Tensor:
        """What the F cross-modal layers take, stacked at ``dim``; the first has a norm in place of a bridge."""
        first, *others = (states + kind for states in taken)
        return torch.stack([norm(first), *others], dim=dim)

    @property
    def _tower(self) -> Any:
        return self.model.bridgetower

    @property
    def _text_layers(self) -> int:
        return len(self._tower.text_model.encoder.layer)

    @property
    def _first_bridge(self) -> int:
        """Number of the tower layer that feeds the first cross-modal layer."""
        return self._text_layers - int(self.model.config.num_hidden_layers)

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Raw scores (P,) float32 of ``score_kind``."""
        itm.check_rows(images, texts, image_rows, text_rows)
        return in_chunks(
            lambda chunk: self._scores(images, texts, image_rows[chunk], text_rows[chunk]),
            by_length(texts["attention_mask"], text_rows),
            self.options.pairs_per_chunk,
        )

    def _scores(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        device, model = self.model.device, self._tower
        words, mask = gathered(texts["states"], texts["attention_mask"], text_rows, device)
        keys, last = key_mask(mask), self.model.config.num_hidden_layers - 1
        text, image = words[:, :, 0], itm.take(images["states"][:, 0], image_rows).to(device)
        for at in range(last + 1):
            if at:
                patches = itm.take(images["states"][:, at], image_rows).to(device)
                text = model.cross_modal_text_link_tower[at - 1](words[:, :, at], text, None)
                image = model.cross_modal_image_link_tower[at - 1](patches, image, None)
            only = FIRST if at == last else ALL  # the head reads nothing else
            text_layer, image_layer = model.cross_modal_text_layers[at], model.cross_modal_image_layers[at]
            text, image = (
                _cross_layer(text_layer, text, image, keys, None, only=only),
                _cross_layer(image_layer, image, text, None, keys, only=only),
            )
        logits = self.model.itm_score(model.get_cls_features(text, image))
        return itm.scores_from(self.score_kind, logits, None)


def _transform(transform: Any, states: Tensor, bridge: int) -> Tensor:
    """Tower states (N, L, width) at the cross-modal width (N, L, H); one map for all bridges, or one each."""
    found: Tensor = (transform[bridge] if isinstance(transform, nn.ModuleList) else transform)(states)
    return found


def _self_attention(layer: Any, states: Tensor, mask: Tensor | None, *, only: slice = ALL) -> Tensor:
    """The layer's self-attention block: (P, L, H) -> the same, or ``only`` some tokens of it."""
    context = attend(layer.attention.self, states[:, only], states, mask)
    output: Tensor = layer.attention.output(context, states[:, only])
    return output


def _feed_forward(layer: Any, states: Tensor) -> Tensor:
    output: Tensor = layer.output(layer.intermediate(states), states)
    return output


def _cross_layer(
    layer: Any, states: Tensor, source: Tensor, mask: Tensor | None, source_mask: Tensor | None, *, only: slice
) -> Tensor:
    """A cross-modal layer: one stream's states (P, L, H) read themselves, then the other stream (P, T, H)."""
    states = _self_attention(layer, states, mask, only=only)
    context = attend(layer.crossattention.self, states, source, source_mask)
    return _feed_forward(layer, layer.crossattention.output(context, states))
