"""What the teachers of this package are: models that say which one they are, and that prepare images and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from torch import nn

from distill.protocols import Image, Inputs, ScoreKind, Side
from teachers.identity import image_inputs_identity, text_inputs_identity
from teachers.processing import pixel_values, token_ids

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase


class Identified(nn.Module):
    """What all teachers of this package share: an identity that follows the weights, or is kept while they are fixed.

    A subclass gives ``_identity_now``, a fingerprint of all that a score depends on. ``trains`` False: it stays in eval
    mode whatever is asked.
    """

    trains: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._fixed_identity: str | None = None

    @property
    def identity(self) -> str:
        """Computed from every weight at each call, or as ``fix_identity`` left it."""
        return self._fixed_identity or self._identity_now()

    def fix_identity(self) -> str:
        """Compute the identity once and keep it until the next ``train()``: for weights that no longer change."""
        self._fixed_identity = self._identity_now()
        return self._fixed_identity

    def train(self, mode: bool = True) -> Self:
        """Set training mode; weights may change from here on, so that a fixed identity is forgotten."""
        if mode:
            self._fixed_identity = None
        return super().train(mode and self.trains)

    def _identity_now(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} gives no identity")


class Options(Protocol):
    """What every teacher lets its user choose."""

    @property
    def score_kind(self) -> ScoreKind: ...

    @property
    def max_text_length(self) -> int: ...

    @property
    def prompt(self) -> str: ...

    @property
    def pairs_per_chunk(self) -> int: ...


class Prepared(Identified):
    """A teacher over an image processor that makes ``pixel_values`` of one size, and a tokenizer."""

    image_processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase
    options: Options

    @property
    def score_kind(self) -> ScoreKind:
        """What ``score`` returns."""
        return self.options.score_kind

    def prepare_images(self, images: Sequence[Image]) -> Inputs:
        """{"pixel_values": (N, 3, height, width)}."""
        return pixel_values(self.image_processor, images)

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """{"input_ids", "attention_mask"}: (N, L)."""
        return token_ids(self.tokenizer, texts, prompt=self.options.prompt, max_length=self.options.max_text_length)

    def prepare_identity(self, side: Side) -> str:
        """Fingerprint of what ``prepare_images`` or ``prepare_texts`` makes of an item."""
        if side == "image":
            return image_inputs_identity(self.image_processor)
        return text_inputs_identity(self.tokenizer, self.options.prompt, self.options.max_text_length)
