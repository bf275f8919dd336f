"""BLIP as a teacher: image tower once per image, image-grounded text encoder per pair, two-way matching head.

Li et al., "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation",
ICML 2022. Weights and configuration are those of ``transformers.BlipForImageTextRetrieval``; its forward re-runs the
image tower for every pair and leaves out the [ENC] token of the original code, so the layers are run here.

Shape key: ``N`` items, ``P`` pairs, ``F`` text layers, ``L`` tokens, ``S`` real tokens of all pairs, ``T`` image tokens
(class token first), ``H`` width, ``D`` embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from distill.protocols import Inputs, Memory, Side, fingerprint, weights_fingerprint
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
from teachers.crossattention import (
    PackedPairs,
    attention_over_grid,
    cross_attention,
    keys_and_values,
    score_packed,
)
from teachers.identified import Prepared
from teachers.identity import (
    config_state,
    image_processor_state,
    tokenizer_state,
)
from teachers.processing import image_processor_from, tokenizer_from

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, BlipForImageTextRetrieval, PreTrainedTokenizerBase

SCORING_VERSION = 1  # part of every identity; raise it when the same weights would give other scores


class BlipTeacher(Prepared):
    """A ``Teacher`` that can be taught and whose cross-attention can be read.

    Image memory: ``keys`` and ``values`` (N, F, T, H) of every cross-attention layer, ``embedding`` (N, D). Text
    memory: ``states`` (N, L, H) before the first cross-attention, ``attention_mask`` (N, L), and ``embedding`` (N, D)
    where teaching or the score kind reads it: that is a whole pass over the text encoder. Both ``encode_*`` also take
    such a memory back as it is.
    """

    options: BlipOptions

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
        self._image_tower, self._feed_forward = layers.dense_blocks(compiled=self.options.compile)

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

    def _identity_now(self) -> str:
        options = asdict(self.options)
        del options["pairs_per_chunk"], options["compile"], options["enc_token"]
        return fingerprint(
            {"teacher": "blip", "version": SCORING_VERSION, "dtype": str(self.model.dtype), **options},
            {"enc_token_id": self.enc_token_id},
            weights_fingerprint(self.model),
            config_state(self.model.config),
            image_processor_state(self.image_processor),
            tokenizer_state(self.tokenizer),
        )

    @property
    def scale(self) -> Tensor:
        """() learned scale of the contrastive head, within 2 .. 1000."""
        return itm.scale_of(self.logit_scale)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image patches."""
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        return side, side

    def encode_images(self, inputs: Inputs) -> Memory:
        """{"keys", "values": (N, F, T, H), "embedding": (N, D)}."""
        if "keys" in inputs:
            return inputs
        hidden = self._hidden(inputs)  # (N, T, H)
        blocks = [(layer.crossattention.self.key, layer.crossattention.self.value) for layer in self._text_layers]
        return {**keys_and_values(blocks, hidden), "embedding": _unit(self.model.vision_proj(hidden[:, 0]))}

    def encode_texts(self, inputs: Inputs) -> Memory:
        """{"states": (N, L, H), "attention_mask": (N, L)} and, where it is read, "embedding": (N, D)."""
        if "states" in inputs:
            return inputs
        ids, attention = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        if self.enc_token_id is not None:
            ids = torch.cat([torch.full_like(ids[:, :1], self.enc_token_id), ids[:, 1:]], dim=1)
        packing = layers.Packing.of(attention)
        first = packing.pack(self.model.text_encoder.embeddings(input_ids=ids))
        states = packing.pad(layers.self_attention(self._text_layers[0], first, packing))
        memory = {"states": states, "attention_mask": attention}
        if torch.is_grad_enabled() or "cosine" in self.score_kind:
            memory["embedding"] = self.embed("text", inputs)
        return memory

    def embed(self, side: Side, inputs: Inputs) -> Tensor:
        """Unit vectors (N, D) of the contrastive head: no text reads an image here, and [CLS] stays."""
        if side == "image":
            return _unit(self.model.vision_proj(self._hidden(inputs)[:, 0]))
        ids, attention = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        packing = layers.Packing.of(attention)
        first = packing.pack(self.model.text_encoder.embeddings(input_ids=ids))
        states = layers.text_only(self._text_layers, first, packing)
        return _unit(self.model.text_proj(states[packing.first]))

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
        pairs = PackedPairs.of(images, texts, image_rows, text_rows, trim=False)
        last = self._text_layers[-1]
        states = self._before_last(pairs)
        if len(self._text_layers) > 1:
            states = layers.self_attention(last, states, pairs.packing)
        block = last.crossattention.self
        others = pairs.keys.shape[2] - self.grid[0] * self.grid[1]
        return attention_over_grid(block.query(states), pairs, block.num_attention_heads, others=others)

    def _matching_logits(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """(P, 2) float32."""
        rows, size = (image_rows, text_rows), self.options.pairs_per_chunk
        return score_packed(self._logits_of, images, texts, rows, pairs_per_chunk=size)

    def _logits_of(self, pairs: PackedPairs) -> Tensor:
        """(P, 2). The head reads the first token alone, and so in the last layer nothing else is computed."""
        last, states = self._text_layers[-1], self._before_last(pairs)
        if len(self._text_layers) > 1:
            first = layers.first_token_attention(last, states, pairs.packing)  # (P, H)
        else:
            first = states[pairs.packing.first]
        first = cross_attention(last.crossattention, first, pairs.source(-1), per_pair=True)
        logits: Tensor = self.model.itm_head(self._feed_forward(last, first))
        return logits.float()

    def _before_last(self, pairs: PackedPairs) -> Tensor:
        """(S, H) that the last layer reads; the memory's states are past the first layer's self-attention."""
        states = pairs.states
        for at, layer in enumerate(self._text_layers[:-1]):
            if at > 0:
                states = layers.self_attention(layer, states, pairs.packing)
            states = cross_attention(layer.crossattention, states, pairs.source(at))
            states = self._feed_forward(layer, states)
        return states

    def _hidden(self, inputs: Inputs) -> Tensor:
        """Image tokens (N, T, H)."""
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        if torch.is_grad_enabled():
            return self._image_tower(self.model.vision_model, pixels)
        size = layers.images_at_once(pixels, each=self.grid[0] * self.grid[1] + 1)
        parts = [self._image_tower(self.model.vision_model, part) for part in torch.split(pixels, size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def _text_layers(self) -> list[layers.Layer]:
        return list(self.model.text_encoder.encoder.layer)


def _unit(vectors: Tensor) -> Tensor:
    """(N, D) float32 unit vectors."""
    return functional.normalize(vectors.float(), dim=-1)
