"""BLIP as a teacher: image tower once per image, image-grounded text encoder per pair, two-way matching head.

Li et al., "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation",
ICML 2022. Weights and configuration are those of ``transformers.BlipForImageTextRetrieval``; its forward re-runs the
image tower for every pair and leaves out the [ENC] token of the original code, so the layers are run here.

Shape key: ``N`` items, ``P`` pairs, ``U`` distinct images of a call, ``L`` tokens, ``T`` image tokens (class token
first), ``A`` heads, ``H`` width, ``D`` embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from distill.protocols import Image, Inputs, Memory, ScoreKind, Side, fingerprint, weights_fingerprint
from teachers import itm, layers
from teachers.blip_options import (
    BlipOptions,
    check_fields,
    check_fit,
    check_heads,
    check_loaded,
    load_beside,
    resolve_enc_token,
    save_beside,
    special_ids,
)
from teachers.grouping import ImageGroups, group_by_image, over_chunks
from teachers.identity import (
    config_state,
    image_inputs_identity,
    image_processor_state,
    text_inputs_identity,
    tokenizer_state,
)
from teachers.processing import image_processor_from, pixel_values, token_ids, tokenizer_from

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, BlipForImageTextRetrieval, PreTrainedTokenizerBase

SCORING_VERSION = 1  # part of every identity; raise it when the same weights would give other scores


class BlipTeacher(nn.Module):
    """A ``Teacher`` that can be taught and whose cross-attention can be read.

    Image memory: ``hidden`` (N, T, H), ``embedding`` (N, D). Text memory: ``input_ids`` and ``attention_mask`` (N, L),
    ``embedding`` (N, D). Both ``encode_*`` also take such a memory back as it is.
    """

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        options: BlipOptions | None = None,
    ) -> None:
        """Wrap a model and its processors; ValueError where they do not fit each other or the options."""
        super().__init__()
        self.model = model
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.options = options or BlipOptions()
        check_fit(model.config, image_processor, tokenizer, self.options)
        self.enc_token_id = resolve_enc_token(self.options.enc_token, tokenizer, model.config.text_config.vocab_size)
        self.logit_scale = nn.Parameter(itm.first_log_scale())
        self._fixed_identity: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        options: BlipOptions | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> BlipTeacher:
        """Load a checkpoint of ``BlipForImageTextRetrieval``, or a folder that ``save_pretrained`` wrote; in eval mode.

        ``options`` None: those saved in the folder, else the defaults. ValueError where the checkpoint has no matching
        or contrastive head, or is BLIP-base with other than 12 heads.
        """
        from transformers import BlipConfig, BlipForImageTextRetrieval

        name = str(name_or_folder)
        saved = load_beside(Path(name))
        config = BlipConfig.from_pretrained(name, revision=revision or "main")
        if saved is None:
            check_heads(config.text_config, name)
        model, report = BlipForImageTextRetrieval.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            revision=revision or "main",
            use_safetensors=True,
            output_loading_info=True,
        )
        check_loaded(report["missing_keys"], name)
        image_processor = image_processor_from(name, revision=revision)
        tokenizer = tokenizer_from(name, revision=revision)
        teacher = cls(model, image_processor, tokenizer, options or (saved.options if saved else None))
        if saved:
            teacher.logit_scale.data.copy_(saved.logit_scale)
        return teacher.eval()

    @classmethod
    def from_config(
        cls,
        *,
        vision: Mapping[str, Any],
        text: Mapping[str, Any],
        embed_dim: int,
        image_size: int,
        tokenizer: PreTrainedTokenizerBase,
        options: BlipOptions | None = None,
    ) -> BlipTeacher:
        """A BLIP with random weights (torch's global generator) over the given tokenizer; in eval mode.

        ``vision`` and ``text`` are fields of ``BlipVisionConfig`` and ``BlipTextConfig``; size of the vocabulary and
        ids of special tokens follow the tokenizer, whose last two entries should be [DEC] and [ENC].
        """
        from transformers import BlipConfig, BlipForImageTextRetrieval, BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        check_fields(vision, BlipVisionConfig, "vision")
        check_fields(text, BlipTextConfig, "text")
        config = BlipConfig(
            # The library's spread of an image tower's first weights, 1e-10, is for loading: nothing trains from it.
            vision_config={"initializer_range": 0.02, **vision, "image_size": image_size},
            text_config={**text, **special_ids(tokenizer), "vocab_size": len(tokenizer)},
            image_text_hidden_size=embed_dim,
        )
        image_processor = BlipImageProcessorPil(size={"height": image_size, "width": image_size})
        return cls(BlipForImageTextRetrieval(config), image_processor, tokenizer, options).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``from_pretrained`` and transformers' own classes load, in the weights' precision."""
        from transformers import BlipProcessor

        folder = Path(folder)
        self.model.save_pretrained(folder)
        BlipProcessor(self.image_processor, self.tokenizer).save_pretrained(folder)
        save_beside(folder, self.options, self.logit_scale)

    @property
    def identity(self) -> str:
        """Computed from every weight at each call, or as ``fix_identity`` left it."""
        return self._fixed_identity or self._identity_now()

    def fix_identity(self) -> str:
        """Compute the identity once and keep it until the next ``train()``: for weights that no longer change."""
        self._fixed_identity = self._identity_now()
        return self._fixed_identity

    def _identity_now(self) -> str:
        options = asdict(self.options)
        del options["pairs_per_chunk"], options["enc_token"]
        return fingerprint(
            {"teacher": "blip", "version": SCORING_VERSION, "dtype": str(self.model.dtype), **options},
            {"enc_token_id": self.enc_token_id},
            weights_fingerprint(self.model),
            config_state(self.model.config),
            image_processor_state(self.image_processor),
            tokenizer_state(self.tokenizer),
        )

    def train(self, mode: bool = True) -> BlipTeacher:
        """Set training mode; weights may change from here on, so a fixed identity is forgotten."""
        super().train(mode)
        if mode:
            self._fixed_identity = None
        return self

    @property
    def score_kind(self) -> ScoreKind:
        """What ``score`` returns."""
        return self.options.score_kind

    @property
    def scale(self) -> Tensor:
        """() learned scale of the contrastive head, within 2 .. 1000."""
        return itm.scale_of(self.logit_scale)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image patches."""
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        return side, side

    def prepare_images(self, images: Sequence[Image]) -> Inputs:
        """{"pixel_values": (N, 3, size, size)}."""
        return pixel_values(self.image_processor, images)

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """{"input_ids", "attention_mask"}: (N, L)."""
        return token_ids(self.tokenizer, texts, prompt=self.options.prompt, max_length=self.options.max_text_length)

    def prepare_identity(self, side: Side) -> str:
        """Fingerprint of what ``prepare_images`` or ``prepare_texts`` makes of an item."""
        if side == "image":
            return image_inputs_identity(self.image_processor)
        return text_inputs_identity(self.tokenizer, self.options.prompt, self.options.max_text_length)

    def encode_images(self, inputs: Inputs) -> Memory:
        """{"hidden": (N, T, H), "embedding": (N, D)}."""
        if "hidden" in inputs and "embedding" in inputs:
            return inputs
        hidden = layers.image_tower(self.model.vision_model, inputs["pixel_values"].to(self.model.device))
        return {"hidden": hidden, "embedding": _unit(self.model.vision_proj(hidden[:, 0]))}

    def encode_texts(self, inputs: Inputs) -> Memory:
        """{"input_ids", "attention_mask": (N, L), "embedding": (N, D)}; this pass keeps the first token, [CLS]."""
        if "embedding" in inputs:
            return inputs
        ids, attention = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        encoder = self.model.text_encoder
        packing = layers.Packing.of(attention)
        first = packing.pack(encoder.embeddings(input_ids=ids))
        states = packing.pad(layers.text_only(encoder.encoder.layer, first, packing))
        return {"input_ids": ids, "attention_mask": attention, "embedding": _unit(self.model.text_proj(states[:, 0]))}

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Raw scores (P,) float32 of ``score_kind``; keys and values are computed per image and chunk, not per pair."""
        rows, weight = (image_rows, text_rows), self.options.cosine_weight
        return itm.pair_scores(self.score_kind, self._matching_logits, images, texts, rows, cosine_weight=weight)

    def pair_logits(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Log-odds (P,) of a match, with gradient."""
        return itm.pair_scores("log_odds", self._matching_logits, images, texts, (image_rows, text_rows))

    def attention_maps(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Log-probabilities (P, L, G) of the last layer's cross-attention; L is that of the text memory."""
        itm.check_rows(images, texts, image_rows, text_rows)
        pairs = self._pairs(images, texts, image_rows, text_rows, trim=False)
        *before, last = self.model.text_encoder.encoder.layer
        states = layers.self_attention(last, self._fused(before, pairs), pairs.packing)
        keys, _ = layers.keys_values(last.crossattention, pairs.hidden)
        others = pairs.hidden.shape[1] - self.grid[0] * self.grid[1]
        query = layers.queries(last.crossattention, states, pairs.packing)
        return layers.grid_attention(query, keys[pairs.groups.image], others)

    def _matching_logits(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """(P, 2) float32."""
        if torch.is_grad_enabled():
            return self._logits_of(images, texts, image_rows, text_rows)
        order = image_rows.argsort(stable=True)  # so that an image's pairs share a chunk
        return over_chunks(
            lambda chunk: self._logits_of(images, texts, image_rows[chunk], text_rows[chunk]),
            order,
            self.options.pairs_per_chunk,
        )

    def _logits_of(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        pairs = self._pairs(images, texts, image_rows, text_rows, trim=True)
        states = self._fused(self.model.text_encoder.encoder.layer, pairs)
        logits: Tensor = self.model.itm_head(pairs.packing.pad(states)[:, 0])
        return logits.float()

    def _pairs(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor, *, trim: bool) -> _Pairs:
        device = self.model.device
        groups = group_by_image(image_rows.to(device))
        attention = itm.take(texts["attention_mask"], text_rows).to(device)
        length = layers.used_length(attention) if trim else attention.shape[1]
        ids = itm.take(texts["input_ids"], text_rows)[:, :length].to(device)
        if self.enc_token_id is not None:
            ids = torch.cat([torch.full_like(ids[:, :1], self.enc_token_id), ids[:, 1:]], dim=1)
        hidden = itm.take(images["hidden"], groups.used).to(device)
        return _Pairs(ids, layers.Packing.of(attention[:, :length]), hidden, groups)

    def _fused(self, through: Sequence[layers.Layer], pairs: _Pairs) -> Tensor:
        """(S, H) after the given layers, each with its cross-attention."""
        states = pairs.packing.pack(self.model.text_encoder.embeddings(input_ids=pairs.ids))
        for layer in through:
            states = layers.self_attention(layer, states, pairs.packing)
            source = layers.Source(*layers.keys_values(layer.crossattention, pairs.hidden), pairs.groups)
            states = layers.cross_attention(layer.crossattention, states, pairs.packing, source)
            states = layers.feed_forward(layer, states)
        return states


@dataclass(frozen=True)
class _Pairs:
    ids: Tensor  # (P, L), the first token replaced where asked
    packing: layers.Packing
    hidden: Tensor  # (U, T, H) of the distinct images
    groups: ImageGroups


def _unit(vectors: Tensor) -> Tensor:
    """(N, D) float32 unit vectors."""
    return functional.normalize(vectors.float(), dim=-1)
