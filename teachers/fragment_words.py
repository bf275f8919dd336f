"""The text half of a fragment teacher: token states of a BERT-like encoder, of which the words are kept.

Shape key: ``N`` texts, ``T`` tokens, ``L`` words, ``H`` width of the encoder, ``F`` width of a fragment, ``D`` width
of the contrastive head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.protocols import Inputs, fingerprint, weights_fingerprint
from teachers.backbones import check_text_family, most_text_tokens, without_pooler
from teachers.fragment_options import FragmentDesign, FragmentOptions
from teachers.fusion_parts import PooledHead
from teachers.identity import config_state, tokenizer_state

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FREEZING_VERSION = 1  # part of every frozen identity; raise it when the same weights would give other outputs
_TOGETHER = 32  # texts of like length that run at a time: half of a mixed batch would be padding


class WordSide(nn.Module):
    """Text encoder, the projection of its words, and the contrastive text head."""

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        design: FragmentDesign,
        options: FragmentOptions,
    ) -> None:
        """ValueError where family, tokenizer or text length do not fit the encoder."""
        super().__init__()
        _check_fit(encoder.config, tokenizer, options)
        self.encoder = without_pooler(encoder)
        self.tokenizer, self.frozen = tokenizer, design.freeze_text
        self.special_words, self.max_text_length = design.special_words, options.max_text_length
        width = encoder.config.hidden_size
        self.input_dropout = nn.Dropout(design.text_input_dropout)
        self.project = nn.Linear(width, design.fragment_dim)
        self.norm = nn.LayerNorm(design.fragment_dim)
        self.dropout = nn.Dropout(design.dropout)
        self.head = PooledHead(width, design.embed_dim, dropout=design.dropout, input_dropout=design.text_input_dropout)
        marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # an unknown word is a word
        self.register_buffer("marks", torch.tensor(sorted(marks)), persistent=False)
        if self.frozen:
            self.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> WordSide:
        """Set training mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def states(self) -> tuple[Any, ...]:
        """What decides the encoder's output beside its weights, for fingerprints."""
        cut = {"max_text_length": self.max_text_length}
        return config_state(self.encoder.config), tokenizer_state(self.tokenizer), cut

    def frozen_identity(self) -> str | None:
        """Fingerprint of the encoder and its preprocessing; None where it trains."""
        if not self.frozen:
            return None
        return fingerprint("fragment text", FREEZING_VERSION, weights_fingerprint(self.encoder), *self.states())

    def freeze(self, inputs: Inputs) -> Inputs:
        """``hidden`` (N, T, H) of the encoder's last layer, with ``input_ids`` and ``attention_mask`` (N, T)."""
        device = self.encoder.device
        ids, attention = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        if "hidden" in inputs:
            hidden = inputs["hidden"].to(device, self.encoder.dtype)
        elif self.frozen or not torch.is_grad_enabled():
            with torch.no_grad():
                hidden = self._by_length(ids, attention)
        else:
            hidden = self.encoder(input_ids=ids, attention_mask=attention).last_hidden_state
        return {"hidden": hidden, "input_ids": ids, "attention_mask": attention}

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Words (N, L, F), float32 unit vectors with padding last; which are real (N, L) bool; embedding (N, D)."""
        seen = self.freeze(inputs)
        hidden, mask = seen["hidden"], self.word_mask(seen["input_ids"], seen["attention_mask"])
        words, real = _together(hidden, mask)
        words = self.dropout(self.norm(self.project(self.input_dropout(words))))
        return nn.functional.normalize(words.float(), dim=-1), real, self.head(hidden, seen["attention_mask"])

    def embed(self, inputs: Inputs) -> Tensor:
        """Contrastive vectors (N, D) of prepared texts or of what ``freeze`` gave."""
        seen = self.freeze(inputs)
        vectors: Tensor = self.head(seen["hidden"], seen["attention_mask"])
        return vectors

    def word_mask(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Which tokens (N, T) are words, bool. A text of nothing but special tokens keeps them: it needs a word."""
        real = attention.bool()
        if self.special_words:
            return real
        words = real & ~torch.isin(ids, self.get_buffer("marks"))
        return torch.where(words.any(dim=1, keepdim=True), words, real)

    def _by_length(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Last layer's states (N, T, H), zero at padding, run in parts of texts of like length."""
        lengths = attention.sum(dim=1)
        hidden = torch.zeros(*ids.shape, self.encoder.config.hidden_size, dtype=self.encoder.dtype, device=ids.device)
        for rows in torch.split(lengths.argsort(stable=True), _TOGETHER):
            longest = int(lengths[rows].max())
            part = {"input_ids": ids[rows, :longest], "attention_mask": attention[rows, :longest]}
            states = self.encoder(**part).last_hidden_state
            hidden[rows, :longest] = states * part["attention_mask"].unsqueeze(-1)
        return hidden


def _together(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The states (N, T, H) that ``mask`` (N, T) marks, moved to the front in their order, cut at the most of a text."""
    most = int(mask.sum(dim=1).max())
    places = (~mask).int().argsort(dim=1, stable=True)[:, :most]  # (N, L)
    chosen = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return chosen, mask.gather(1, places)


def _check_fit(config: Any, tokenizer: PreTrainedTokenizerBase, options: FragmentOptions) -> None:
    check_text_family(config)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder only {config.vocab_size}")
    most = most_text_tokens(config)
    if options.max_text_length > most:
        raise ValueError(f"max_text_length is {options.max_text_length}; the text encoder has {most} positions")
