"""A dual-encoder over a stock transformers model: CLIP, SigLIP, or any two towers under VisionTextDualEncoder."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as Pillow
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import dropout, normalize

from distill.protocols import SIDES, Embeddings, Image, Inputs, Side, fingerprint, weights_fingerprint
from students.folder import is_student_folder, read_folder, write_folder
from students.from_scratch import Family, random_model
from students.identity import config_state, image_processor_state, tokenizer_state, tokens_fingerprint
from students.layout import check_fresh_poolers, keep_reached, look_at
from students.options import MAX_SCALE, DualOptions
from students.pooling import AttentionHeads, MlpHead
from students.reading import (
    Reading,
    by_length,
    modules_after,
    projection_of,
    read_images,
    read_texts,
    text_inputs,
    tower_of,
)
from students.recompute import recompute_layers
from students.standalone import StandaloneTower
from students.towers import Parts, join_towers, load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

_PADDED = 1.25  # places of a batch of texts to one that holds a token, from which on it is cut into parts
_LEAST_PART, _MOST_PARTS = 64, 8


class DualEncoder(nn.Module):
    """Unit vectors for images and texts from a stock model with, where asked for, other pooling and heads.

    Satisfies ``Student``, ``Freezable``, ``Recomputable`` and ``Deployable``. Starts in eval mode. ``model`` holds
    every stock weight. SigLIP's ``logit_bias`` is in it but no part of a cosine: it keeps its value. Parameters that
    ``forward`` never reaches are set to need no gradient, so that distributed training finds none unused.

    Raises:
        ValueError: the towers cannot give what the options ask for.
    """

    def __init__(self, parts: Parts, options: DualOptions | None = None) -> None:
        super().__init__()
        self.options = options or DualOptions()
        self.model: Any = parts.model.float()
        self.image_processor, self.tokenizer = parts.image_processor, parts.tokenizer
        self.text_inputs = text_inputs(parts.model, parts.tokenizer, self.options.max_text_length)
        self.heads = nn.ModuleDict()
        self.attention_heads: AttentionHeads | None = None
        check_fresh_poolers(self.options, parts.fresh_poolers)
        if self.options.init_scale is not None:
            with torch.no_grad():
                self.model.logit_scale.fill_(math.log(self.options.init_scale))
        self.eval()
        probe = self.prepare_images([Pillow.new("RGB", (64, 64))]), self.prepare_texts(["a"])
        self.layout = look_at(self.model, self.options, probe, self.text_inputs.names)
        for side in SIDES:
            if getattr(self.options, f"{side}_head") == "mlp":
                width, drop = self.options.head_width, self.options.dropout
                self.heads[side] = MlpHead(self.layout.pooled[side], self.layout.dim, width=width, dropout=drop)
        self.eval()
        self._choose_what_trains(*probe)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, options: DualOptions | None = None) -> DualEncoder:
        """A CLIP, SigLIP or VisionTextDualEncoder checkpoint, or what ``save_pretrained`` wrote (see ``load``)."""
        if is_student_folder(name_or_folder):
            return cls.load(name_or_folder, options=options)
        return cls(load_checkpoint(name_or_folder), options)

    @classmethod
    def from_towers(
        cls, vision: str | Path, text: str | Path, *, projection_dim: int = 512, options: DualOptions | None = None
    ) -> DualEncoder:
        """Any two pretrained towers under ``VisionTextDualEncoderModel``; projections are random (torch's seed)."""
        return cls(join_towers(vision, text, projection_dim=projection_dim), options)

    @classmethod
    def from_config(
        cls,
        *,
        vision: Mapping[str, Any],
        text: Mapping[str, Any],
        projection_dim: int,
        tokenizer: PreTrainedTokenizerFast,
        image_size: int,
        family: Family = "clip",
        options: DualOptions | None = None,
    ) -> DualEncoder:
        """A CLIP or SigLIP of any size with random weights (torch's seed); see ``random_model``."""
        parts = random_model(
            family,
            vision=vision,
            text=text,
            projection_dim=projection_dim,
            tokenizer=tokenizer,
            image_size=image_size,
        )
        return cls(parts, options)

    @classmethod
    def load(cls, folder: str | Path, *, options: DualOptions | None = None) -> DualEncoder:
        """The student that ``save_pretrained`` wrote, bit-equal. Other options may change what trains, not what it is.

        Raises:
            FileNotFoundError: not such a folder.
            ValueError: the options name another pooling or head than the weights were made for.
        """
        parts, saved, heads = read_folder(folder)
        if options is not None and options.shape() != saved.shape():
            theirs = {name: value for name, value in saved.shape().items() if value != options.shape()[name]}
            raise ValueError(f"{folder} holds a student with {theirs}; other pooling or heads need a student made anew")
        student = cls(parts, options or saved)
        student.heads.load_state_dict(dict(heads))
        return student

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return self.layout.dim

    @property
    def stock(self) -> bool:
        """Whether a plain transformers class gives the same embeddings from the saved folder."""
        return self.options.why_not_stock is None

    @property
    def why_not_stock(self) -> str | None:
        """What a stock class cannot hold, or None."""
        return self.options.why_not_stock

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image grid, row-major. Raises ValueError where the image tower has none."""
        if self.layout.grid is None:
            raise ValueError(
                f"the image tower ({self.model.vision_model.config.model_type}) shows no grid of cells, so there is no "
                "attention map: leave out the attention loss, or choose another tower"
            )
        return self.layout.grid

    @property
    def token_ids_kind(self) -> str:
        """Fingerprint of how texts are cut: an attention map's rows mean the same only under the same one."""
        return tokens_fingerprint(self.tokenizer)

    @property
    def identity(self) -> str:
        """Fingerprint of weights, configs, processor and tokenizer: changes when an embedding could."""
        weights = (
            (name, value) for name, value in self.state_dict().items() if not name.startswith("attention_heads.")
        )
        return fingerprint(
            "dual encoder",
            weights_fingerprint(weights),
            config_state(self.model.config),
            image_processor_state(self.image_processor),
            tokenizer_state(self.tokenizer),
            self.options.shape(),
            [self.text_inputs.limit, *self.text_inputs.names],
        )

    def prepare_images(self, images: Sequence[Image]) -> Inputs:
        """{"pixel_values": (N, 3, height, width) float32}."""
        if not images:
            raise ValueError("prepare_images was given no image")
        made: Any = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return {"pixel_values": made["pixel_values"]}

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """Token ids, cut at ``max_text_length``; see ``TextInputs``."""
        return self.text_inputs(texts)

    def prepare_identity(self, side: Side) -> str:
        """Fingerprint of what ``prepare_images`` or ``prepare_texts`` makes of an item."""
        if side == "image":
            return fingerprint("image inputs", image_processor_state(self.image_processor))
        cut = [self.text_inputs.limit, *self.text_inputs.names]
        return fingerprint("text inputs", tokenizer_state(self.tokenizer), cut)

    def forward(
        self, images: Inputs | None, texts: Inputs | None, *, attention_pairs: tuple[Tensor, Tensor] | None = None
    ) -> Embeddings:
        """Unit vectors (float32), the scale, and the text→image maps (P, L, G) of the pairs asked for.

        Of a frozen tower what ``freeze`` gave is taken in place of prepared inputs.
        """
        image = None if images is None else self._read("image", images)
        text = None if texts is None else self._read_texts(texts)
        return Embeddings(
            images=None if image is None else self._embed("image", image),
            texts=None if text is None else self._embed("text", text),
            scale=self.model.logit_scale.float().exp().clamp(max=MAX_SCALE).sum(),  # of one number; no view: FSDP warns
            attention=None if attention_pairs is None else self._maps(image, text, attention_pairs),
        )

    def freeze(self, side: Side, inputs: Inputs) -> Inputs:
        """Outputs of a frozen tower, which ``forward`` takes in place of the inputs.

        ``pooled`` (N, H); with ``options.tokens`` also ``tokens`` (N, L, H), of an image its grid cells, of a text with
        ``attention_mask`` (N, L). Raises ValueError where the tower trains.
        """
        if side not in self.options.freeze:
            raise ValueError(
                f"the {side} tower trains, its outputs cannot be kept; frozen are {sorted(self.options.freeze)}"
            )
        seen = self._read(side, inputs) if side == "image" else by_length(partial(self._read, side), inputs)
        kept = {"pooled": seen.pooled}
        if self.options.tokens and seen.tokens is not None:
            kept["tokens"] = seen.tokens
            if seen.mask is not None:
                kept["attention_mask"] = seen.mask
        return kept

    def frozen_identity(self, side: Side) -> str | None:
        """Fingerprint of what ``freeze`` gives for an item; None where the tower trains."""
        if side not in self.options.freeze:
            return None
        tower = tower_of(self.model, side)
        after = {
            id(weight)
            for module in modules_after(self.model, side, self.options)
            for weight in module.state_dict(keep_vars=True).values()
        }
        own = [(name, value) for name, value in tower.state_dict(keep_vars=True).items() if id(value) not in after]
        prepared = (
            image_processor_state(self.image_processor)
            if side == "image"
            else [tokenizer_state(self.tokenizer), self.text_inputs.limit, *self.text_inputs.names]
        )
        pooling = [
            self.options.image_pooling if side == "image" else self.options.text_pooling,
            self.options.train_pooler,
        ]
        return fingerprint(
            side, weights_fingerprint(own), config_state(tower.config), prepared, pooling, self.options.tokens
        )

    def recompute_activations(self) -> frozenset[Side]:
        """From now on, in training; see ``Recomputable``. Raises ValueError where no tower trains that could."""
        return recompute_layers(self.model, frozen=self.options.freeze)

    def enable_attention(self, width: int) -> None:
        """Add the two small maps that ``attention_pairs`` needs. They train, and are not saved.

        Raises:
            ValueError: no grid of image cells, token states that the head cannot read, or a frozen tower that keeps
                none.
        """
        _ = self.grid
        for side in SIDES:
            if self.layout.tokens[side] != self.layout.pooled[side]:
                raise ValueError(
                    f"the {side} tower's token states are {self.layout.tokens[side]} wide and its pooled vectors "
                    f"{self.layout.pooled[side]}: the head that places one cannot place the other, so there is no "
                    "attention map: leave out the attention loss, or choose another pooling"
                )
        if self.options.freeze and not self.options.tokens:
            raise ValueError(
                "attention maps need the token states of the frozen towers: make the student with tokens=True"
            )
        weight = self.model.logit_scale
        self.attention_heads = AttentionHeads(self.dim, width=width).to(weight.device)

    def project(self, side: Side, states: Tensor) -> Tensor:
        """A tower's pooled vectors (N, H) in the joint space (N, D), not normalised."""
        pooled, head = self._pooled(side, states), self._head(side)
        projected: Tensor = pooled if head is None else head(pooled)
        return projected

    def standalone(self, side: Side) -> StandaloneTower:
        """One tower with all that follows it, for export; it shares this student's weights."""
        return StandaloneTower(self, side)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``load`` restores bit-equal and that, of a stock student, transformers reads as it is."""
        parts = Parts(self.model, self.image_processor, self.tokenizer)
        options, heads = replace(self.options, init_scale=None), self.heads.state_dict()  # the scale is a weight by now
        write_folder(folder, parts, options=options, heads=heads, limit=self.text_inputs.limit)

    def train(self, mode: bool = True) -> DualEncoder:
        """As ``nn.Module.train``, but frozen towers stay in eval mode: no dropout, no batch statistics."""
        super().train(mode)
        for side in self.options.freeze:
            tower_of(self.model, side).eval()
        return self

    def _choose_what_trains(self, images: Inputs, texts: Inputs) -> None:
        for side in self.options.freeze:
            tower_of(self.model, side).requires_grad_(False)
            for module in modules_after(self.model, side, self.options):
                module.requires_grad_(True)
        with torch.enable_grad():
            out = self(images, texts)
            keep_reached(self, [out.images, out.texts, out.scale])

    def _read(self, side: Side, inputs: Inputs) -> Reading:
        frozen = side in self.options.freeze
        if "pooled" in inputs:
            if not frozen:
                raise ValueError(
                    f"kept outputs were given for the {side} tower, but that tower trains: give prepared inputs"
                )
            return Reading(inputs["pooled"].float(), inputs.get("tokens"), inputs.get("attention_mask"))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if side == "image":
                return read_images(self.model, inputs, self.options, prefix=self.layout.prefix)
            return read_texts(self.model, inputs, self.options, names=self.text_inputs.names)

    def _read_texts(self, texts: Inputs) -> Reading:
        """In parts of like length where a batch would be padding in good part."""
        mask = texts.get("attention_mask")
        if "pooled" in texts or mask is None or torch.compiler.is_compiling() or self._is_sharded:
            return self._read("text", texts)
        if _PADDED * int(mask.sum()) >= mask.numel():
            return self._read("text", texts)
        return by_length(partial(self._read, "text"), texts, part=max(_LEAST_PART, -(-len(mask) // _MOST_PARTS)))

    @property
    def _is_sharded(self) -> bool:
        """Whether processes hold parts of the weights: then all must call a tower equally often, whatever they read."""
        return isinstance(self, FSDPModule)

    def _embed(self, side: Side, seen: Reading) -> Tensor:
        rate = self.options.image_input_dropout if side == "image" else self.options.text_input_dropout
        return normalize(self.project(side, dropout(seen.pooled, rate, training=self.training)).float(), dim=-1)

    def _pooled(self, side: Side, states: Tensor) -> Tensor:
        """(N, H) -> (N, H): through the text tower's pooler where that trains."""
        if side == "text" and self.options.train_pooler:
            states = self.model.text_model.pooler(states[:, None])
        return states

    def _head(self, side: Side) -> nn.Module | None:
        """What maps pooled vectors to the joint space."""
        return self.heads[side] if side in self.heads else projection_of(self.model, side)

    def _maps(self, image: Reading | None, text: Reading | None, pairs: tuple[Tensor, Tensor]) -> Tensor:
        if self.attention_heads is None:
            raise ValueError("attention maps were asked for without enable_attention(width) before")
        if image is None or text is None:
            raise ValueError("attention maps need images and texts in the same call")
        if image.tokens is None or text.tokens is None:
            raise ValueError("the kept tower outputs hold no token states: keep them again with tokens=True")
        states = text.tokens.float()  # (M, L, H)
        tokens = self._pooled("text", states.flatten(0, 1)).view(states.shape)
        maps: Tensor = self.attention_heads(
            tokens, image.tokens.float(), pairs, heads=(self._head("text"), self._head("image"))
        )
        return maps
