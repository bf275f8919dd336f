"""BLIP-2 as a teacher: image tower once per image, Q-Former per pair, two-way matching head on every query token.

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
ICML 2023. Weights and configuration are those of ``transformers.Blip2ForImageTextRetrieval``. Its forward re-runs the
image tower for every pair, and its flag ``use_image_text_matching_head`` decides which of two heads fills the one field
``logits_per_image``: False, the default, the contrastive one. Here ``score_kind`` says it.

Shape key: ``N`` items, ``P`` pairs, ``Q`` query tokens, ``L`` text tokens, ``T`` image tokens, ``F`` layers with
cross-attention, ``H`` width, ``D`` embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from distill.protocols import Inputs, Memory, ScoreKind
from teachers import itm
from teachers.crossattention import Source, keys_and_values, plan_pairs
from teachers.pairwise import attend, gathered, in_chunks, key_mask
from teachers.pretrained import Published, check_image_size, check_options, check_texts
from teachers.processing import token_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, Blip2ForImageTextRetrieval, PreTrainedTokenizerBase

SCORING_VERSION = 1  # part of every identity; raise it when the same weights would give other scores


@dataclass(frozen=True)
class Blip2Options:
    """How a BLIP-2 scores.

    score_kind: see ``teachers.itm.scores_from``; the cosine is the largest over the image's query tokens.
    max_text_length: tokens kept of a text, special tokens included; 35 in the published evaluation.
    prompt: put before every text.
    pairs_per_chunk: pairs that are scored at a time; bounds memory, changes no score.
    cosine_weight: what multiplies the cosine in ``logit+cosine``.
    """

    score_kind: ScoreKind = "log_odds"
    max_text_length: int = 35
    prompt: str = ""
    pairs_per_chunk: int = 128
    cosine_weight: float = 1.0

    def __post_init__(self) -> None:
        check_options(self, itm.ITM_SCORE_KINDS)


class Blip2Teacher(Published):
    """A ``Teacher``; it cannot be taught and stays in eval mode.

    Image memory, as far as the score kind reads it: ``keys`` and ``values`` (N, F, T, H), ``queries`` (N, Q, D)
    unit vectors. Text memory: ``states`` (N, L, H), ``attention_mask`` (N, L), ``vector`` (N, D). There is no
    ``embedding``: a maximum over queries is no cosine of one vector an image.
    """

    kind = "blip2"
    version = SCORING_VERSION
    library_class = "Blip2ForImageTextRetrieval"
    options: Blip2Options

    def __init__(
        self,
        model: Blip2ForImageTextRetrieval,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        options: Blip2Options | None = None,
    ) -> None:
        """Wrap a model, which is frozen, and its processors; ValueError where they do not fit each other."""
        options = options or Blip2Options()
        _check_fit(model.config, image_processor, tokenizer, options)
        super().__init__(model, image_processor, tokenizer, options)

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """{"input_ids", "attention_mask"}: (N, L), without the placeholders that the library's processor puts first.

        ValueError where a text holds such a placeholder: the Q-Former has no vector for it.
        """
        options = self.options
        inputs = token_ids(self.tokenizer, texts, prompt=options.prompt, max_length=options.max_text_length)
        outside = (inputs["input_ids"] >= self.model.config.qformer_config.vocab_size).any(dim=1)
        if bool(outside.any()):
            raise ValueError(f"the text {texts[int(outside.nonzero()[0])]!r} holds a token that the Q-Former lacks")
        return inputs

    def encode_images(self, inputs: Inputs) -> Memory:
        """Keys and values of every cross-attention, and the contrastive query vectors: what the score kind reads."""
        if "keys" in inputs or "queries" in inputs:
            return inputs
        pixels = inputs["pixel_values"].to(self.model.device)
        hidden = self.model.vision_model(pixel_values=pixels).last_hidden_state
        blocks = [layer.crossattention.attention for layer in self._layers if layer.has_cross_attention]
        read = keys_and_values([(block.key, block.value) for block in blocks], hidden.to(blocks[0].key.weight.dtype))
        memory = {} if self.score_kind == "cosine" else dict(read)
        if "cosine" in self.score_kind:
            every = torch.arange(len(hidden), device=hidden.device)
            states = self._through(self._first_queries(len(hidden)), None, self._sources(read, every))
            memory["queries"] = _unit(self.model.vision_projection(states.to(self._head_dtype)))
        return memory

    def encode_texts(self, inputs: Inputs) -> Memory:
        """What the first layer reads of a text, its mask, and its contrastive vector where the score kind reads it."""
        if "states" in inputs:
            return inputs
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        norm = self.model.qformer.layernorm
        states = norm(self.model.embeddings(input_ids=ids).to(norm.weight.dtype))
        memory = {"states": states, "attention_mask": mask}
        if "cosine" in self.score_kind:
            first = self._through(states, key_mask(mask), [])[:, 0]
            memory["vector"] = _unit(self.model.text_projection(first.to(self._head_dtype)))
        return memory

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Raw scores (P,) float32 of ``score_kind``."""
        itm.check_rows(images, texts, image_rows, text_rows)
        order = image_rows.argsort(stable=True)  # so that an image's pairs share a chunk
        return in_chunks(
            lambda chunk: self._scores(images, texts, image_rows[chunk], text_rows[chunk]),
            order,
            self.options.pairs_per_chunk,
        )

    def _scores(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        kind, logits, cosine = self.score_kind, None, None
        if kind != "cosine":
            logits = self._matching_logits(images, texts, image_rows, text_rows)
        if "cosine" in kind:
            queries, vectors = itm.take(images["queries"], image_rows), itm.take(texts["vector"], text_rows)
            cosine = torch.einsum("pqd,pd->pq", queries, vectors.to(queries.device)).amax(dim=1)
        return itm.scores_from(kind, logits, cosine, cosine_weight=self.options.cosine_weight)

    def _matching_logits(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """(P, 2): mean over the query tokens, as the published head has it."""
        device = self.model.device
        sources = self._sources(images, image_rows.to(device))
        order = sources[0].plan.order
        words, mask = gathered(texts["states"], texts["attention_mask"], text_rows.to(device)[order], device)
        queries = self._first_queries(len(words))
        mask = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
        states = self._through(torch.cat([queries, words], dim=1), key_mask(mask), sources)[:, : queries.shape[1]]
        logits: Tensor = self.model.itm_head(states.to(self._head_dtype)).float().mean(dim=1)
        return logits[order.argsort()]

    @property
    def _head_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.itm_head.weight.dtype
        return dtype

    @property
    def _layers(self) -> list[Any]:
        return list(self.model.qformer.encoder.layer)

    def _first_queries(self, count: int) -> Tensor:
        """(count, Q, H): what the first layer reads of the learned query tokens."""
        norm = self.model.qformer.layernorm
        states: Tensor = norm(self.model.query_tokens.to(norm.weight.dtype))
        return states.expand(count, -1, -1)

    def _sources(self, images: Memory, image_rows: Tensor) -> list[Source]:
        """What each cross-attention reads for pairs of these image rows (P,); their plan says in which order."""
        plan = plan_pairs(image_rows, torch.full_like(image_rows, self.model.query_tokens.shape[1]))
        keys, values = images["keys"], images["values"]
        return [Source(keys[:, at], values[:, at], plan) for at in range(keys.shape[1])]

    def _through(self, states: Tensor, mask: Tensor | None, sources: Sequence[Source]) -> Tensor:
        """All Q-Former layers, (P, Q + L, H) -> the same; without ``sources`` there are no query tokens, only text."""
        queries, left = self.model.query_tokens.shape[1] if sources else 0, list(sources)
        for layer in self._layers:
            states = layer.attention.output(attend(layer.attention.attention, states, mask=mask), states)
            asking, words = states[:, :queries], states[:, queries:]
            if queries and layer.has_cross_attention:
                block = layer.crossattention
                context = left.pop(0).attend(
                    block.attention.query(asking).flatten(0, 1), block.attention.num_attention_heads
                )
                asking = block.output(context.view_as(asking), asking)
            parts = [layer.feed_forward_chunk_query(asking)] if queries else []
            if words.shape[1]:
                parts.append(layer.feed_forward_chunk(words))
            states = torch.cat(parts, dim=1)
        return states


def _unit(vectors: Tensor) -> Tensor:
    """(..., D) float32 unit vectors."""
    return functional.normalize(vectors.float(), dim=-1)


def _check_fit(
    config: Any, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, options: Blip2Options
) -> None:
    qformer = config.qformer_config
    if not qformer.use_qformer_text_input:
        raise ValueError(
            "this BLIP-2's Q-Former reads no text (use_qformer_text_input is false): it was made for captions; take a "
            "checkpoint such as blip2-itm-vit-g"
        )
    check_image_size(image_processor, config.vision_config.image_size)
    placeholders = int("<image>" in tokenizer.get_vocab())  # stands for the queries; it is never embedded
    check_texts(
        options,
        tokens=len(tokenizer) - placeholders,
        vocabulary=qformer.vocab_size,
        positions=qformer.max_position_embeddings,
    )
