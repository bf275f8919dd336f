"""ViLT as a teacher: one transformer over the words and patches of a pair, one rank logit.

Kim et al., "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", ICML 2021. Weights and
configuration are those of ``transformers.ViltForImageAndTextRetrieval``. Both sides are fused from the first layer on,
so that only their embeddings can be computed once; every pair costs the whole transformer.

Pictures keep their aspect, so that they have different numbers of patches. The library pads a batch with pixels, fills
up with patches drawn at random (masked), and draws ``max_image_length`` patches where an image has more. Here a picture
is cut into its own patches alone, and all of them are kept: a score is a function of its pair.

Shape key: ``N`` items, ``P`` pairs, ``S`` patches of the largest image, ``L`` text tokens, ``C`` numbers of a patch,
``H`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from distill.protocols import Image, Inputs, Memory, ScoreKind, Side, fingerprint
from teachers import itm
from teachers.identity import image_inputs_identity, text_inputs_identity
from teachers.pairwise import attend, by_length, gathered, in_chunks, key_mask
from teachers.pretrained import Published, check_options, check_texts
from teachers.processing import pixel_values

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ViltForImageAndTextRetrieval

SCORING_VERSION = 1  # part of every identity; raise it when the same weights would give other scores
PATCHING_VERSION = 1  # of ``prepare_images``


@dataclass(frozen=True)
class ViltOptions:
    """How a ViLT scores.

    score_kind: "logit" alone: the rank output was trained to order candidates, not to give log-odds.
    max_text_length: tokens kept of a text, special tokens included; published checkpoints have 40 positions.
    prompt: put before every text.
    pairs_per_chunk: pairs that are scored at a time; bounds memory, changes no score.
    """

    score_kind: ScoreKind = "logit"
    max_text_length: int = 40
    prompt: str = ""
    pairs_per_chunk: int = 64

    def __post_init__(self) -> None:
        check_options(self, ("logit",))


class ViltTeacher(Published):
    """A ``Teacher``; it cannot be taught and stays in eval mode.

    Image memory: ``states`` (N, 1 + S, H) of the class token and the patches, ``states_mask`` (N, 1 + S). Text memory:
    ``states`` (N, L, H), ``attention_mask`` (N, L).
    """

    kind = "vilt"
    library_class = "ViltForImageAndTextRetrieval"
    version = (SCORING_VERSION, PATCHING_VERSION)
    options: ViltOptions

    def __init__(
        self,
        model: ViltForImageAndTextRetrieval,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        options: ViltOptions | None = None,
    ) -> None:
        """Wrap a model, which is frozen, and its processors; ValueError where they do not fit each other."""
        options = options or ViltOptions()
        config = model.config
        check_texts(
            options,
            tokens=len(tokenizer),
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
        )
        super().__init__(model, image_processor, tokenizer, options)

    def prepare_images(self, images: Sequence[Image]) -> Inputs:
        """{"patches": (N, S, C), "patch_mask": (N, S), "grid_rows" and "grid_columns": (N,), row-major}."""
        if not images:
            raise ValueError("prepare_images was given no image")
        grids = [self._grid(image) for image in images]
        cells = [grid.flatten(0, 1) for grid in grids]  # each (rows * columns, C)
        return {
            "patches": nn.utils.rnn.pad_sequence(cells, batch_first=True),
            "patch_mask": nn.utils.rnn.pad_sequence([one.new_ones(len(one)).long() for one in cells], batch_first=True),
            "grid_rows": torch.tensor([grid.shape[0] for grid in grids]),
            "grid_columns": torch.tensor([grid.shape[1] for grid in grids]),
        }

    def _grid(self, image: Image) -> Tensor:
        """(rows, columns, C): a picture alone, so that no other one's size pads it."""
        try:
            pixels = pixel_values(self.image_processor, [image])["pixel_values"][0]  # (3, height, width)
        except ValueError as error:
            raise ValueError(f"a picture of {image.width} x {image.height} cannot be prepared: {error}") from error
        size = self.model.config.patch_size
        cut = pixels.unfold(1, size, size).unfold(2, size, size)  # (3, rows, columns, size, size)
        if not cut.numel():
            raise ValueError(f"a picture of {image.width} x {image.height} has no whole patch of {size} x {size}")
        return cut.permute(1, 2, 0, 3, 4).flatten(2)

    def prepare_identity(self, side: Side) -> str:
        """Fingerprint of what ``prepare_images`` or ``prepare_texts`` makes of an item."""
        if side == "image":
            cut = {"patch_size": self.model.config.patch_size, "version": PATCHING_VERSION}
            return fingerprint("vilt patches", cut, image_inputs_identity(self.image_processor))
        return text_inputs_identity(self.tokenizer, self.options.prompt, self.options.max_text_length)

    def encode_images(self, inputs: Inputs) -> Memory:
        """{"states": (N, 1 + S, H), "states_mask": (N, 1 + S)} of prepared images; a memory comes back as it is."""
        if "states" in inputs:
            return inputs
        embeddings = self.model.vilt.embeddings
        projection = embeddings.patch_embeddings.projection
        patches = inputs["patches"].to(self.model.device, projection.weight.dtype)
        # A convolution whose stride is its width is a linear map of each patch.
        states = functional.linear(patches, projection.weight.flatten(1), projection.bias)
        states = states + self._positions(states, inputs["grid_rows"].tolist(), inputs["grid_columns"].tolist())
        first = (embeddings.cls_token + embeddings.position_embeddings[:, :1]).expand(len(states), -1, -1)
        states = torch.cat([first, states], dim=1) + embeddings.token_type_embeddings.weight[1]
        mask = inputs["patch_mask"].to(self.model.device)
        return {"states": states, "states_mask": torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)}

    def _positions(self, patches: Tensor, rows: list[int], columns: list[int]) -> Tensor:
        """Position vectors (N, S, H): the learned square grid, stretched to each image's own."""
        learned = self.model.vilt.embeddings.position_embeddings[:, 1:]  # (1, side * side, H)
        side = self.model.config.image_size // self.model.config.patch_size
        square = learned.transpose(1, 2).unflatten(2, (side, side))
        stretched = {
            shape: functional.interpolate(square, size=shape, mode="bilinear", align_corners=True)[0].flatten(1).T
            for shape in set(zip(rows, columns, strict=True))
        }
        found = torch.zeros_like(patches)
        for item, shape in enumerate(zip(rows, columns, strict=True)):
            found[item, : len(stretched[shape])] = stretched[shape]
        return found

    def encode_texts(self, inputs: Inputs) -> Memory:
        """{"states": (N, L, H), "attention_mask": (N, L)} of prepared texts; a memory comes back as it is."""
        if "states" in inputs:
            return inputs
        embeddings = self.model.vilt.embeddings
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        states = embeddings.text_embeddings(input_ids=ids) + embeddings.token_type_embeddings.weight[0]
        return {"states": states, "attention_mask": mask}

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Rank logits (P,) float32."""
        itm.check_rows(images, texts, image_rows, text_rows)
        short = by_length(texts["attention_mask"], text_rows)
        order = short[by_length(images["states_mask"], image_rows[short])]  # by patches, then by words
        return in_chunks(
            lambda chunk: self._logits(images, texts, image_rows[chunk], text_rows[chunk]),
            order,
            self.options.pairs_per_chunk,
        )

    def _logits(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        device, model = self.model.device, self.model.vilt
        words, words_mask = gathered(texts["states"], texts["attention_mask"], text_rows, device)
        patches, patches_mask = gathered(images["states"], images["states_mask"], image_rows, device)
        states = torch.cat([words, patches], dim=1)
        mask = key_mask(torch.cat([words_mask, patches_mask], dim=1))
        *before, last = model.encoder.layer
        for layer in before:
            states = _block(layer, states, mask)
        first = _block(last, states, mask, only=slice(1))  # the rank output reads nothing else
        logits: Tensor = self.model.rank_output(model.pooler(model.layernorm(first)))
        return logits.squeeze(1)


def _block(layer: Any, states: Tensor, mask: Tensor | None, *, only: slice = slice(None)) -> Tensor:
    """A pre-norm layer: (P, L, H) -> the same, or ``only`` some tokens of it, where the others are not read again."""
    ready = layer.layernorm_before(states)
    context = attend(layer.attention.attention, ready[:, only], ready, mask)
    states = states[:, only] + layer.attention.output(context, ready)
    output: Tensor = layer.output(layer.intermediate(layer.layernorm_after(states)), states)
    return output
