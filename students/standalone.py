"""One tower of a dual-encoder as a module of its own: what a preparation gives in, unit vectors out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from students.reading import projection_of, read_images, read_texts, tower_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.protocols import Side
    from students.dual import DualEncoder


class StandaloneTower(nn.Module):
    """(N, ...) tensors, in the order of ``input_names``, to unit vectors (N, D) float32: no branch on the data.

    Texts take their mask as an input even where training derives it, so that a tokenizer's own output fits.
    """

    student: DualEncoder

    def __init__(self, student: DualEncoder, side: Side) -> None:
        super().__init__()
        # only this side's modules are registered: a program of torch.export holds all that is
        object.__setattr__(self, "student", student)
        after = [student.heads[side]] if side in student.heads else [projection_of(student.model, side)]
        self.parts = nn.ModuleList([tower_of(student.model, side), *(one for one in after if one is not None)])
        self.side = side
        names = student.text_inputs.names
        if side == "text" and student.options.text_pooling == "mean":
            names = tuple(sorted({*names, "attention_mask"}))  # a mean has to know what is padding
        self.input_names: Sequence[str] = names if side == "text" else ("pixel_values",)

    def forward(self, *inputs: Tensor) -> Tensor:
        """See the class."""
        given = dict(zip(self.input_names, inputs, strict=True))
        student = self.student
        if self.side == "image":
            seen = read_images(student.model, given, student.options, prefix=student.layout.prefix)
        else:
            if "attention_mask" not in given:
                given["attention_mask"] = given["input_ids"].new_ones(given["input_ids"].shape)
            seen = read_texts(student.model, given, student.options, names=student.text_inputs.names)
        return functional.normalize(student.project(self.side, seen.pooled).float(), dim=-1)
