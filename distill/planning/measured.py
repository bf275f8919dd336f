"""What a short measurement found out, as a file that another machine can plan with. Times are seconds on the clock.

What a model's work costs is measured from ready inputs, apart from making these (``Source``), so that each can be
scaled by itself: by items, by pairs, by steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.planning.ranges import Range
from distill.protocols import Side

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Shape(_Part):
    """How much of everything there is. Of the training split where nothing else is said."""

    images: int = Field(ge=1)
    texts: int = Field(ge=1)
    pairs: int = Field(ge=1, description="labelled ones")
    all_images: int = Field(ge=1, description="of every split: what is prepared")
    all_texts: int = Field(ge=1)
    judged_images: int = Field(ge=1, description="of the split that students are evaluated on")
    judged_texts: int = Field(ge=1)
    picture_bytes: Amount = Field(description="of an encoded picture, the mean of the sample")

    @model_validator(mode="after")
    def _parts_of_the_whole(self) -> Shape:
        if self.all_images < self.images or self.all_texts < self.texts:
            raise ValueError("all_images and all_texts are those of every split, the training split among them")
        return self

    def with_images(self, images: int) -> Shape:
        """With so many training images, as many captions an image as here, and the other splits as they are.

        Raises:
            ValueError: there is none.
        """
        if images < 1:
            raise ValueError(f"--images is {images}: give the number of training images, at least 1")
        texts, pairs = (max(1, round(each * images / self.images)) for each in (self.texts, self.pairs))
        return self.model_copy(
            update={
                "images": images,
                "texts": texts,
                "pairs": pairs,
                "all_images": images + self.all_images - self.images,
                "all_texts": texts + self.all_texts - self.texts,
            }
        )


class Source(_Part):
    """Inputs of one side for the models that share them, an item."""

    users: tuple[Literal["teacher", "student"], ...]
    side: Side
    kind: Literal["frozen", "prepared", "live"] = Field(
        description="outputs of a frozen tower or prepared inputs, made once and kept; or made each time they are used"
    )
    wall: Range = Field(description="as the stage goes: reading, preparing and the tower, side by side where they are")
    host: Range = Field(description="reading, decoding and preparing alone")
    device: Range = Field(description="the frozen tower alone")
    bytes: Amount = Field(description="on disk")
    input_bytes: Amount = Field(description="as prepared")


class TeacherCost(_Part):
    """One model that scores."""

    name: str
    image: Range = Field(description="to encode one for scoring, and what scoring takes once an image")
    text: Range = Field(description="to encode one")
    pair: Range = Field(description="to score one, and to write it down")
    vector: dict[Side, Range] | None = Field(description="a unit vector by its contrastive head; None: it has none")
    dim: int = Field(ge=0, description="of these vectors")
    map: Range | None = Field(description="an attention map of a labelled pair")
    map_bytes: Amount = Field(default=0, description="of it, on disk")
    image_bytes: Amount = Field(description="of the memory of an encoded image")
    text_bytes: Amount
    weight_bytes: Amount
    first_call: Amount = Field(description="seconds that the first call took longer: compiling, filling caches")


class TeachingCost(_Part):
    """Teaching the teacher."""

    step: Range
    checkpoint: Range
    checkpoint_bytes: Amount


class TrainingCost(_Part):
    """A step of a student: ``base`` and what each distinct image and text of it adds; then what an arm's loss adds."""

    base: Range
    image: Range
    text: Range
    loss: dict[str, Range] = Field(description="by arm, a step at ``loss_items``; grows with the step's items")
    fixed: dict[str, Range] = Field(description="by arm, a step, whatever the number of items")
    loss_items: Amount
    checkpoint: Range
    checkpoint_bytes: Amount
    weight_bytes: Amount
    first_step: Amount = Field(description="seconds that the first step took longer")


class EmbeddingCost(_Part):
    """A vector by the student."""

    image: Range
    text: Range
    dim: int = Field(ge=1)


class IndexCost(_Part):
    """Mining: what an index of ``factory`` takes."""

    build: Range = Field(description="an item")
    query: Range = Field(description="a query, whatever the number of items")
    cell: Range = Field(description="a query and an item of the index")
    on_gpu: bool


class StoreCost(_Part):
    """The score store, written to a temporary folder."""

    unit_bytes: Amount = Field(description="a pair, in unit files")
    table_bytes: Amount = Field(description="a pair, in the table for look-up")


class Once(_Part):
    """What does not grow with the corpus."""

    start: Amount
    check: Range
    read: Range = Field(description="reading and checking the data, an image of it")
    load_teacher: Range
    load_student: Range
    judge: Range = Field(description="the ranks of one model's vectors of the evaluated split")
    report: Range


class Machine(_Part):
    """Where it was measured."""

    processor: str
    device: Literal["cpu", "cuda"]
    gpu: str | None
    clock: Literal["wall", "processor"] = Field(
        description="what seconds are: on the clock, or of the process's processors"
    )
    threads: int = Field(ge=1)
    cores: int = Field(ge=1)
    memory_bytes: Amount
    matmul_tflops: Amount = Field(description="of large float32 products on the device")
    torch: str
    busy: str | None = Field(description="words on who else was at work")


class Measured(_Part):
    """All of it, and the parts of the recipe that it is true of."""

    format: Literal[1] = 1
    recipe: dict[str, Any]
    shape: Shape
    machine: Machine
    sources: tuple[Source, ...]
    teachers: tuple[TeacherCost, ...]
    teaching: TeachingCost | None
    training: TrainingCost
    embedding: EmbeddingCost
    index: IndexCost
    store: StoreCost
    once: Once
    seconds: Amount = Field(description="that measuring took")
    images: int = Field(ge=1, description="pictures that were looked at")

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        from distill.durable import write_atomically

        text = json.dumps(self.model_dump(mode="json"), indent=1) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: Path) -> Measured:
        """Read what ``save`` wrote.

        Raises:
            ValueError: it is something else, with what is wrong.
            OSError: it cannot be read.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "(the whole file)"
            raise ValueError(
                f"{path} is no measurement of this version: {where}: {first['msg']}; distill plan RECIPE --save "
                f"{path} makes one"
            ) from None
