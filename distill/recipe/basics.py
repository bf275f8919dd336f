"""What every part of a recipe's schema is made of: numbers within bounds, strict models, import paths, small towers."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Every part of a recipe: extra keys forbidden, values fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Grown(Strict):
    """A part of a recipe that got options after runs had been made.

    Attributes:
        later: those options. They are written only where they are set, so that what such a run did keeps its meaning.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {
            name: value
            for name, value in written.items()
            if name not in self.later or getattr(self, name) != fields[name].default
        }


class Target(Strict):
    """A class or function of the user's own, by import path, with its options."""

    target: str = Field(description="module:Name, importable where the command runs")
    options: dict[str, Any] = {}

    @field_validator("target")
    @classmethod
    def _importable(cls, value: str) -> str:
        module, _, name = value.partition(":")
        if not module or not name:
            raise ValueError(f"{value!r} is not of the form module:Name")
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{value!r}: {error}; is its folder on PYTHONPATH?") from None
        if found is None:
            raise ValueError(f"{value!r}: no module named {module!r}; is its folder on PYTHONPATH?")
        return value


class TinyTower(Strict):
    """Shape of a tower that starts from random weights."""

    layers: Count = 3
    width: Count = 96
    heads: Count = 4
    mlp_width: Count | None = Field(default=None, description="4 x width when absent")
    patch_size: Count = 16
    dropout: Share = 0.0

    def sizes(self) -> dict[str, int]:
        """Its shape by the names of transformers' configurations."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.mlp_width or 4 * self.width,
        }
