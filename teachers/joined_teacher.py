"""What teachers put together from a vision backbone and a BERT-like text encoder share: how they start and are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import nn

from distill.protocols import Side
from teachers import itm
from teachers.fusion_sides import ImageSide
from teachers.identified import Options, Prepared
from teachers.joined_folder import Joined, from_checkpoints, read_joined, write_joined

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase


class _TextSide(Protocol):
    encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def frozen_identity(self) -> str | None: ...


DesignT = TypeVar("DesignT")
OptionsT = TypeVar("OptionsT", bound=Options)


class JoinedTeacher(Prepared, Generic[DesignT, OptionsT]):
    """A teacher of two backbones and new parts over them. A subclass builds ``image``, ``text`` and ``logit_scale``.

    ``design`` is how it is built, ``options`` how it scores; ``kind`` names the two files that hold it.
    """

    kind: ClassVar[str]
    design: DesignT
    options: OptionsT
    image: ImageSide
    text: _TextSide
    logit_scale: nn.Parameter

    def __init__(
        self,
        vision: PreTrainedModel,
        text: PreTrainedModel,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        design: DesignT | None = None,
        options: OptionsT | None = None,
    ) -> None:
        """Join two backbones; the new parts start from torch's global generator. ValueError where they do not fit.

        ``design`` and ``options`` are the usual ones unless given. In eval mode.
        """
        super().__init__()
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.design, self.options = design or self.design_from({}), options or self.options_from({})
        self._build(vision, text)
        self.eval()

    def _build(self, vision: PreTrainedModel, text: PreTrainedModel) -> None:
        """Make ``image``, ``text``, ``logit_scale`` and what else there is of the backbones."""
        raise NotImplementedError(f"{type(self).__name__} builds nothing")

    @classmethod
    def design_from(cls, saved: Mapping[str, Any]) -> DesignT:
        """The design that ``dataclasses.asdict`` made a dictionary of; what is missing is as usual."""
        raise NotImplementedError(f"{cls.__name__} reads no design")

    @classmethod
    def options_from(cls, saved: Mapping[str, Any]) -> OptionsT:
        """The options that ``dataclasses.asdict`` made a dictionary of; what is missing is as usual."""
        raise NotImplementedError(f"{cls.__name__} reads no options")

    @classmethod
    def from_backbones(
        cls,
        vision: str | Path,
        text: str | Path,
        *,
        design: DesignT | None = None,
        options: OptionsT | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Start from two checkpoints (hub names or folders) with their image processor and tokenizer; in eval mode."""
        return cls._of(from_checkpoints(vision, text, dtype), design, options)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, options: OptionsT | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load what ``save_pretrained`` wrote, with its own options unless others are given; in eval mode."""
        saved = read_joined(folder, cls.kind, dtype)
        teacher = cls._of(saved.parts, cls.design_from(saved.design), options or cls.options_from(saved.options))
        teacher.load_state_dict(saved.weights)
        return teacher

    @classmethod
    def _of(cls, parts: Joined, design: DesignT | None, options: OptionsT | None) -> Self:
        return cls(parts.vision, parts.text, parts.image_processor, parts.tokenizer, design, options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, both backbones' configurations, image processor and tokenizer: all that loading needs."""
        parts = Joined(self.image.backbone, self.text.encoder, self.image.processor, self.text.tokenizer)
        settings = {"design": asdict(self.design), "options": asdict(self.options)}  # type: ignore[call-overload]
        write_joined(folder, self.kind, parts, **settings, weights=self.state_dict())

    def pretrained_parameters(self) -> Iterator[nn.Parameter]:
        """Weights that train and came from a checkpoint: they usually want a smaller learning rate than new ones."""
        for module in (self.image.backbone, self.text.encoder):
            yield from (parameter for parameter in module.parameters() if parameter.requires_grad)

    @property
    def scale(self) -> Tensor:
        """() learned scale of the contrastive head, within 2 .. 1000."""
        return itm.scale_of(self.logit_scale)

    def frozen_identity(self, side: Side) -> str | None:
        """Fingerprint of a side's frozen weights and of what prepares its inputs; None where none are frozen.

        Teachers of different kinds over one frozen vision backbone share it: what one kept, the other reads.
        """
        return self.image.frozen_identity() if side == "image" else self.text.frozen_identity()
