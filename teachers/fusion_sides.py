"""The two halves of a fusion teacher before they meet, each with a part that may be frozen and kept on disk.

Shape key: ``N`` items, ``L`` text tokens, ``G`` grid cells, ``R`` class and register tokens, ``T`` = R + G, ``C``
backbone width, ``H`` text width, ``D`` embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.protocols import Inputs, fingerprint, weights_fingerprint
from teachers import layers
from teachers.backbones import (
    check_text_family,
    embed_tokens,
    grid_shape,
    most_text_tokens,
    vision_tokens,
    without_pooler,
)
from teachers.fusion_options import FusionDesign, FusionOptions
from teachers.fusion_parts import ImageTokens, PooledHead
from teachers.identity import config_state, image_processor_state, tokenizer_state

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

FREEZING_VERSION = 1  # part of every frozen identity; raise it when the same weights would give other outputs


class ImageSide(nn.Module):
    """Vision backbone, its projection to the text encoder's width, and the contrastive image head."""

    def __init__(
        self, backbone: PreTrainedModel, processor: BaseImageProcessor, design: FusionDesign, *, width: int
    ) -> None:
        """``width`` is that of the text encoder. Runs the backbone once, to see what it gives."""
        super().__init__()
        self.backbone = without_pooler(backbone)
        self.processor = processor
        self.frozen = design.freeze_vision
        self.shape = grid_shape(backbone, processor)
        shape, dropout = self.shape, design.dropout
        self.tokens = ImageTokens(
            shape.channels, width, grid=(shape.rows, shape.columns), others=shape.others, dropout=dropout
        )
        self.head = PooledHead(
            shape.channels, design.embed_dim, dropout=dropout, input_dropout=design.image_input_dropout
        )
        if self.frozen:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> ImageSide:
        """Set training mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def states(self) -> tuple[Any, ...]:
        """What decides the backbone's output beside its weights, for fingerprints."""
        return config_state(self.backbone.config), image_processor_state(self.processor)

    def frozen_identity(self) -> str | None:
        """Fingerprint of the backbone and its preprocessing; None where it trains."""
        if not self.frozen:
            return None
        return fingerprint("fusion image", FREEZING_VERSION, weights_fingerprint(self.backbone), *self.states())

    def freeze(self, inputs: Inputs) -> Inputs:
        """Backbone outputs: ``grid`` (N, G, C) and, where there are any, ``others`` (N, R, C)."""
        features, others = self.features(inputs), self.shape.others
        cells = {"grid": features[:, others:]}
        return {**cells, "others": features[:, :others]} if others else cells

    def features(self, inputs: Inputs) -> Tensor:
        """Backbone outputs (N, T, C) of prepared images, or of what ``freeze`` gave."""
        device, dtype = self.backbone.device, self.backbone.dtype
        if "grid" in inputs:
            parts = [inputs[name] for name in ("others", "grid") if name in inputs]
            return torch.cat(parts, dim=1).to(device, dtype)
        with torch.no_grad() if self.frozen else nullcontext():
            return vision_tokens(self.backbone, inputs["pixel_values"])


class TextSide(nn.Module):
    """Text encoder and the contrastive text head; its last ``fusion_layers`` layers are also run with an image."""

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        design: FusionDesign,
        options: FusionOptions,
    ) -> None:
        """ValueError where family, number of layers, tokenizer or text length do not fit."""
        super().__init__()
        _check_fit(encoder.config, tokenizer, design, options)
        self.encoder = without_pooler(encoder)
        self.tokenizer, self.options, self.design = tokenizer, options, design
        self.head = PooledHead(
            encoder.config.hidden_size,
            design.embed_dim,
            dropout=design.dropout,
            input_dropout=design.text_input_dropout,
        )
        self.pretrained = nn.ModuleList()  # the fused layers as they were, for what reads the pretrained encoder
        if design.contrastive_text == "sentence":
            self.pretrained.extend(copy.deepcopy(layer) for layer in self.encoder.encoder.layer[self._split :])
        for module in self.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = design.dropout
        for module in self._frozen():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> TextSide:
        """Set training mode; frozen layers stay in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    @property
    def fused_layers(self) -> list[layers.Layer]:
        """The layers that are also run with an image."""
        return list(self.encoder.encoder.layer[self._split :])

    @property
    def _split(self) -> int:
        return len(self.encoder.encoder.layer) - self.design.fusion_layers

    def _frozen(self) -> Iterator[nn.Module]:
        if self.design.frozen_text_layers:
            yield self.encoder.embeddings
            if hasattr(self.encoder, "embeddings_project"):
                yield self.encoder.embeddings_project
            yield from self.encoder.encoder.layer[: self.design.frozen_text_layers]
        yield from self.pretrained

    def states(self) -> tuple[Any, ...]:
        """What decides the encoder's output beside its weights, for fingerprints."""
        cut = {"max_text_length": self.options.max_text_length, "prompt": self.options.prompt}
        return config_state(self.encoder.config), tokenizer_state(self.tokenizer), cut

    def frozen_identity(self) -> str | None:
        """Fingerprint of the frozen layers and their preprocessing; None where all layers train."""
        weights = [weights_fingerprint(module) for module in self._frozen()]
        return fingerprint("fusion text", FREEZING_VERSION, weights, *self.states()) if weights else None

    def freeze(self, inputs: Inputs) -> Inputs:
        """Outputs of the frozen layers: ``hidden`` (N, L, H), ``attention_mask`` (N, L), maybe ``sentence`` (N, H)."""
        device = self.encoder.device
        attention = inputs["attention_mask"].to(device)
        if "hidden" in inputs:
            kept = {
                name: inputs[name].to(device, self.encoder.dtype) for name in ("hidden", "sentence") if name in inputs
            }
            return {**kept, "attention_mask": attention}
        count = self.design.frozen_text_layers
        with torch.no_grad() if count else nullcontext():
            packing = layers.Packing.of(attention)
            states = packing.pack(embed_tokens(self.encoder, inputs["input_ids"].to(device)))
            states = layers.text_only(self.encoder.encoder.layer[:count], states, packing)
            frozen = {"hidden": packing.pad(states), "attention_mask": attention}
            if self.pretrained:
                last = packing.pad(layers.text_only(list(self.pretrained), states, packing))
                real = attention.to(last.dtype).unsqueeze(-1)  # (N, L, 1)
                frozen["sentence"] = (last * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        return frozen

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """What the fused layers read (N, L, H), its mask (N, L), and the contrastive vectors (N, D)."""
        first = self.freeze(inputs)
        attention = first["attention_mask"]
        packing = layers.Packing.of(attention)
        before = self.encoder.encoder.layer[self.design.frozen_text_layers : self._split]
        states = layers.text_only(before, packing.pack(first["hidden"]), packing)
        if self.design.contrastive_text == "sentence":
            return packing.pad(states), attention, self.head(first["sentence"][:, None])
        deep = (
            layers.text_only(self.fused_layers, states, packing) if self.design.contrastive_text == "deep" else states
        )
        return packing.pad(states), attention, self.head(packing.pad(deep), attention)


def _check_fit(config: Any, tokenizer: PreTrainedTokenizerBase, design: FusionDesign, options: FusionOptions) -> None:
    check_text_family(config)
    design.check_layers(config.num_hidden_layers)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder only {config.vocab_size}")
    most = most_text_tokens(config)
    if options.max_text_length > most:
        raise ValueError(f"max_text_length is {options.max_text_length}; the text encoder has {most} positions")
