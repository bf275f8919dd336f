"""What shapes two towers give, found by running them once, and whether that serves what the options ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from students.pooling import grid_of
from students.reading import Reading, projection_of, read_images, read_texts, tower_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from distill.protocols import Inputs, Side
    from students.options import DualOptions


@dataclass(frozen=True)
class Layout:
    """Widths and grid of a pair of towers."""

    grid: tuple[int, int] | None  # rows, columns; None where the image tower has no grid
    prefix: int | None  # tokens before the first cell; None likewise
    pooled: Mapping[Side, int]  # width of pooled vectors
    tokens: Mapping[Side, int]  # width of token states; no "image" where there is no grid
    dim: int  # width of embeddings


@torch.no_grad()
def look_at(model: PreTrainedModel, options: DualOptions, probe: tuple[Inputs, Inputs], names: Sequence[str]) -> Layout:
    """Run both towers on one picture and one text.

    Raises:
        ValueError: a pooler, grid or projection that the options ask for is not there.
    """
    seen = model.vision_model(pixel_values=probe[0]["pixel_values"])
    patch = getattr(model.vision_model.config, "patch_size", None)
    grid, prefix = grid_of(seen.last_hidden_state, probe[0]["pixel_values"], patch) or (None, None)
    _check_image(model, options, getattr(seen, "pooler_output", None), grid)
    _check_text(model, options, probe[1], names)
    image = read_images(model, probe[0], options, prefix=prefix)
    text = read_texts(model, probe[1], options, names=names)
    pooled: dict[Side, int] = {"image": image.pooled.shape[1], "text": text.pooled.shape[1]}
    read: dict[Side, Reading] = {"image": image, "text": text}
    tokens = {side: reading.tokens.shape[2] for side, reading in read.items() if reading.tokens is not None}
    return Layout(grid, prefix, pooled, tokens, _dim(model, options, pooled))


def check_fresh_poolers(options: DualOptions, fresh: frozenset[str]) -> None:
    """Raises ValueError where a frozen tower would be read through a pooler with random weights."""
    for side in sorted(fresh & options.freeze):
        if getattr(options, f"{side}_pooling") == "pooler" and not (side == "text" and options.train_pooler):
            other = "text_pooling 'mean' or train_pooler" if side == "text" else "image_pooling 'mean'"
            raise ValueError(
                f"the {side} checkpoint holds no pooler weights, so a frozen tower would be read through a random one: "
                f"choose {other}, or do not freeze the tower"
            )


def keep_reached(module: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Set every parameter that the outputs do not depend on to need no gradient.

    Found by differentiating, so that it holds for any tower: SigLIP's bias, a pooler that is not read, a mask token.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    total = torch.stack([output.sum() for output in outputs]).sum()
    for weight, gradient in zip(weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
        weight.requires_grad_(gradient is not None)


def _check_image(
    model: PreTrainedModel, options: DualOptions, pooled: Tensor | None, grid: tuple[int, int] | None
) -> None:
    name = model.vision_model.config.model_type
    if options.image_pooling == "pooler" and (pooled is None or pooled.dim() != 2):
        found = "no pooler_output" if pooled is None else f"pooler_output of shape {tuple(pooled.shape)}"
        raise ValueError(
            f"the image tower ({name}) gives {found}, not one vector a picture: choose image_pooling 'mean'"
        )
    if grid is None and options.image_pooling == "mean":
        raise ValueError(f"the image tower ({name}) shows no grid of cells to average: choose image_pooling 'pooler'")
    if grid is None and options.tokens and "image" in options.freeze:
        raise ValueError(
            f"the image tower ({name}) shows no grid of cells, so it has no tokens to keep: set tokens to false"
        )


def _check_text(model: PreTrainedModel, options: DualOptions, probe: Inputs, names: Sequence[str]) -> None:
    if options.text_pooling != "pooler":
        return
    tower, name = model.text_model, model.text_model.config.model_type
    seen = tower(**{key: probe[key] for key in names if key in probe})
    pooled = getattr(seen, "pooler_output", None)
    if pooled is None:
        raise ValueError(f"the text tower ({name}) gives no pooler_output: choose text_pooling 'mean' or 'cls'")
    if options.train_pooler:
        pooler = getattr(tower, "pooler", None)
        if pooler is None or not torch.equal(pooler(seen.last_hidden_state[:, :1]), pooled):
            raise ValueError(
                f"the text tower ({name}) has no pooler over its first token that could train by itself: set "
                "train_pooler to false, or choose text_pooling 'mean' or 'cls'"
            )


def _dim(model: PreTrainedModel, options: DualOptions, pooled: Mapping[Side, int]) -> int:
    text = projection_of(model, "text")
    dim = pooled["text"] if text is None else int(text.out_features)
    for side, width in pooled.items():
        projection = projection_of(model, side)
        wanted = dim if projection is None else projection.in_features
        if getattr(options, f"{side}_head") == "linear" and width != wanted:
            raise ValueError(
                f"pooled vectors of the {side} tower ({tower_of(model, side).config.model_type}) are {width} wide, but "
                f"the stock class wants {wanted}: choose {side}_head 'mlp', or another pooling"
            )
    return dim
