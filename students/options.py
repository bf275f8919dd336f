"""What can be chosen about a dual-encoder beyond its towers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from distill.protocols import SIDES, Side

if TYPE_CHECKING:
    from collections.abc import Mapping

ImagePooling = Literal["pooler", "mean"]
TextPooling = Literal["pooler", "mean", "cls"]
HeadKind = Literal["linear", "mlp"]


@dataclass(frozen=True)
class DualOptions:
    """How tokens become one vector, what trains, and how texts are cut.

    With both poolings ``"pooler"`` and both heads ``"linear"`` the student is exactly a stock transformers class.

    Attributes:
        freeze: sides whose tower does not train; it stays in eval mode and its outputs can be kept on disk. What comes
            after the tower (projection or head) still trains. SigLIP has nothing after its image tower.
        image_pooling: ``"pooler"`` is the tower's own; ``"mean"`` is the mean over grid cells, class token left out.
        text_pooling: ``"pooler"`` is the tower's own; ``"mean"`` is over all tokens but padding; ``"cls"`` the
            first.
        image_head: ``"linear"`` is the stock projection; ``"mlp"`` is LayerNorm, Linear, GELU, Dropout, Linear.
        text_head: like ``image_head``.
        head_width: inner width of an MLP head.
        dropout: inside an MLP head, before its last layer; in training only.
        image_input_dropout: of pooled image features, before pooler and head; in training only, so a student stays
            stock. Frozen features need it: without, a linear projection of 1,280 features overfits within few epochs.
        text_input_dropout: like ``image_input_dropout``.
        train_pooler: keep a frozen text tower's own pooler training. The kept output is then the first token's hidden
            state and the student is still stock.
        tokens: a frozen tower hands out its token states too (attention maps need them; much more disk).
        max_text_length: tokens a text is cut at; None is the tower's own limit.
        init_scale: first value of the learned scale (1 / temperature); None keeps the checkpoint's, or 1 / 0.07 for a
            model that is put together here.
    """

    freeze: frozenset[Side] = frozenset()
    image_pooling: ImagePooling = "pooler"
    text_pooling: TextPooling = "pooler"
    image_head: HeadKind = "linear"
    text_head: HeadKind = "linear"
    head_width: int = 512
    dropout: float = 0.0
    image_input_dropout: float = 0.0
    text_input_dropout: float = 0.0
    train_pooler: bool = False
    tokens: bool = False
    max_text_length: int | None = None
    init_scale: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "freeze", frozenset(self.freeze))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it can be {' or '.join(map(repr, allowed))}")
        if not self.freeze <= set(SIDES):
            raise ValueError(f"freeze is {sorted(self.freeze)}; it can hold {' and '.join(map(repr, SIDES))}")
        self._check_numbers()
        if self.train_pooler and (self.text_pooling != "pooler" or "text" not in self.freeze):
            raise ValueError(
                "train_pooler keeps the pooler of a frozen text tower training: it needs text_pooling 'pooler' and "
                "'text' in freeze (a tower that is not frozen trains its pooler anyway)"
            )

    def _check_numbers(self) -> None:
        for name in ("dropout", "image_input_dropout", "text_input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.head_width < 1:
            raise ValueError(f"head_width is {self.head_width}; it must be at least 1")
        if self.max_text_length is not None and self.max_text_length < 3:
            raise ValueError(
                f"max_text_length is {self.max_text_length}; two tokens only mark the ends, give at least 3"
            )
        if self.init_scale is not None and not 0 < self.init_scale <= MAX_SCALE:
            raise ValueError(f"init_scale is {self.init_scale}; it must be above 0 and at most {MAX_SCALE:g}")

    @property
    def why_not_stock(self) -> str | None:
        """What no stock class can hold, or None."""
        reasons = []
        for side in SIDES:
            pooling, head = getattr(self, f"{side}_pooling"), getattr(self, f"{side}_head")
            if pooling != "pooler":
                reasons.append(f"{side} vectors pooled by {pooling!r} (a stock class takes the tower's own pooler)")
            if head != "linear":
                reasons.append(f"an {head!r} head on the {side} side (a stock class has one linear projection)")
        return "; ".join(reasons) or None

    def shape(self) -> dict[str, object]:
        """The options that decide which embedding an item gets, or which weights there are."""
        return {name: getattr(self, name) for name in _SHAPE}

    def to_json(self) -> dict[str, object]:
        """Plain values, for a file."""
        return {**asdict(self), "freeze": sorted(self.freeze)}


def options_from_json(values: Mapping[str, Any]) -> DualOptions:
    """The reverse of ``DualOptions.to_json``; raises ValueError at a name that is not an option."""
    unknown = set(values) - {field.name for field in fields(DualOptions)}
    if unknown:
        raise ValueError(f"unknown student option {', '.join(sorted(unknown))}: the file is of a newer version")
    return DualOptions(**dict(values))


MAX_SCALE = 100.0
"""The scale is held at this: CLIP (arXiv 2103.00020, section 2.5) found training unstable above."""
_CHOICES: dict[str, tuple[str, ...]] = {
    "image_pooling": get_args(ImagePooling),
    "text_pooling": get_args(TextPooling),
    "image_head": get_args(HeadKind),
    "text_head": get_args(HeadKind),
}
_SHAPE = ("image_pooling", "text_pooling", "image_head", "text_head", "head_width", "max_text_length")
