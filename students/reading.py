"""How a stock model's two towers are run, the same for every family."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from students.pooling import cells_of, masked_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distill.protocols import Inputs, Side
    from students.options import DualOptions


class Reading(NamedTuple):
    """What a tower made of its inputs, before any projection."""

    pooled: Tensor  # (N, H)
    tokens: Tensor | None  # (N, L, H); of an image the grid cells only; None where a tower has no grid
    mask: Tensor | None  # (N, L), 0 at padding; None for images


def tower_of(model: PreTrainedModel, side: Side) -> PreTrainedModel:
    """The image or text tower of a stock dual-encoder."""
    tower: PreTrainedModel = model.vision_model if side == "image" else model.text_model
    return tower


def projection_of(model: PreTrainedModel, side: Side) -> nn.Linear | None:
    """The stock class's last linear map. SigLIP keeps the text side's inside its tower and has none for images."""
    if model.config.model_type == "siglip":
        return None if side == "image" else model.text_model.head
    projection: nn.Linear = model.visual_projection if side == "image" else model.text_projection
    return projection


def modules_after(model: PreTrainedModel, side: Side, options: DualOptions) -> list[nn.Module]:
    """The stock model's modules that turn a tower's pooled vectors into embeddings, or that no embedding needs."""
    after: list[nn.Module] = []
    projection = projection_of(model, side)
    if projection is not None:
        after.append(projection)
    if side == "text" and (options.train_pooler or options.text_pooling != "pooler"):
        pooler = getattr(model.text_model, "pooler", None)
        if pooler is not None:
            after.append(pooler)
    return after


def read_images(model: PreTrainedModel, inputs: Inputs, options: DualOptions, *, prefix: int | None) -> Reading:
    """Pooled vectors and grid cells; ``prefix`` tokens come before the first cell, None where there is no grid."""
    seen = model.vision_model(pixel_values=inputs["pixel_values"])
    cells = None if prefix is None else cells_of(seen.last_hidden_state, prefix)
    if options.image_pooling == "mean" and cells is not None:
        return Reading(cells.mean(dim=1), cells, None)
    return Reading(seen.pooler_output, cells, None)


def read_texts(model: PreTrainedModel, inputs: Inputs, options: DualOptions, *, names: Sequence[str]) -> Reading:
    """Pooled vectors, token states and mask; ``names`` are the inputs the tower takes."""
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
    else:
        mask = (torch.arange(ids.shape[1], device=ids.device) < inputs["lengths"][:, None]).long()  # (N, L)
    taken: dict[str, Any] = {**inputs, "attention_mask": mask}
    seen = model.text_model(**{name: taken[name] for name in names})
    hidden = seen.last_hidden_state
    if options.text_pooling == "mean":
        return Reading(masked_mean(hidden, mask), hidden, mask)
    if options.text_pooling == "cls" or options.train_pooler:
        return Reading(hidden[:, 0], hidden, mask)
    if model.config.model_type == "siglip":
        return Reading(hidden[:, -1], hidden, mask)  # before the tower's own head, which is this family's projection
    return Reading(seen.pooler_output, hidden, mask)


def by_length(read: Callable[[Inputs], Reading], inputs: Inputs, *, part: int = 32) -> Reading:
    """What ``read`` gives for a batch, run in parts of texts of like length: half of a mixed batch is padding."""
    mask = inputs.get("attention_mask")
    if mask is None or len(mask) <= part:  # a fixed length has nothing to save
        return read(inputs)
    lengths = mask.sum(dim=1)
    places = lengths.argsort(stable=True)
    parts = [places[start : start + part] for start in range(0, len(places), part)]
    seen = [read({name: value[at][:, : int(lengths[at].max())] for name, value in inputs.items()}) for at in parts]
    back = places.argsort()
    pooled = torch.cat([one.pooled for one in seen])[back]
    tokens = [one.tokens for one in seen if one.tokens is not None]
    if not tokens:
        return Reading(pooled, None, mask)
    padded = [functional.pad(states, (0, 0, 0, mask.shape[1] - states.shape[1])) for states in tokens]
    return Reading(pooled, torch.cat(padded)[back], mask)


@dataclass(frozen=True)
class TextInputs:
    """From texts to token ids: as the stock class wants them."""

    tokenizer: PreTrainedTokenizerBase
    names: tuple[str, ...]  # inputs of the tower
    limit: int  # tokens a text is cut at
    fixed: bool  # every text is padded to the limit (SigLIP pools at the last place)

    def __call__(self, texts: Sequence[str]) -> Inputs:
        """``input_ids`` (N, L) int64 with ``attention_mask`` (N, L), or ``lengths`` (N,) where the length is fixed.

        A fixed length has no array whose name ends in ``_mask``: such arrays are stored without their padding, which
        this tower reads.
        """
        if not texts:
            raise ValueError("prepare_texts was given no text")
        made: Any = self.tokenizer(
            list(texts),
            padding="max_length" if self.fixed else "longest",
            padding_side="right",
            truncation=True,
            max_length=self.limit,
            return_attention_mask=True,
            return_tensors="pt",
        )
        kept = {name: made[name] for name in self.names if name != "attention_mask"}
        if self.fixed:
            return {**kept, "lengths": made["attention_mask"].sum(dim=1)}
        return {**kept, "attention_mask": made["attention_mask"]}


def text_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> TextInputs:
    """How texts go into this model. Raises ValueError where ``limit`` is more than the tower can take."""
    tower = model.text_model
    most = min(tokenizer.model_max_length, getattr(tower.config, "max_position_embeddings", tokenizer.model_max_length))
    if most > _NO_LIMIT and limit is None:
        raise ValueError("neither the tokenizer nor the text tower states a longest text: set max_text_length")
    if limit is not None and limit > most:
        raise ValueError(f"max_text_length is {limit}, but the text tower reads at most {most} tokens")
    fixed = tower.config.model_type.startswith("siglip")
    accepted = set(inspect.signature(tower.forward).parameters)
    wanted = {"input_ids", *tokenizer.model_input_names} | (set() if fixed else {"attention_mask"})
    names = tuple(sorted(wanted & accepted & {"input_ids", "attention_mask", "token_type_ids"}))
    return TextInputs(tokenizer=tokenizer, names=names, limit=limit or most, fixed=fixed)


_NO_LIMIT = 1_000_000  # transformers writes 1e30 for a tokenizer that states none
