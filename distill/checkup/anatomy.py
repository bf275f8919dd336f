"""What a teacher is made of, as far as it can be seen from outside: heads, vocabulary, text length, picture size.

Any teacher is looked at through the attributes that transformers' models and tokenizers have, wherever it keeps them;
what a teacher does not have is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from distill.protocols import Teacher


@dataclass(frozen=True)
class Anatomy:
    """A teacher's parts, and how some captions fit its text side.

    Attributes:
        kind: Name of the class.
        text_width: Width of the text encoder.
        text_heads: Its attention heads.
        text_layers: Its layers.
        embedding_rows: Rows of its word embedding.
        tokenizer_length: Tokens of the tokenizer, added ones included.
        special_tokens: The tokenizer's special tokens.
        max_text_length: Tokens that are kept of a text, special tokens included.
        image_size: (height, width) of a prepared picture.
        captions: Captions that were cut into tokens.
        longest: Tokens of the longest, before any cut.
        cut: Share of the captions that are longer than ``max_text_length``.
        unknown: Share of the tokens that the tokenizer does not know.
    """

    kind: str
    text_width: int | None = None
    text_heads: int | None = None
    text_layers: int | None = None
    embedding_rows: int | None = None
    tokenizer_length: int | None = None
    special_tokens: tuple[str, ...] = ()
    max_text_length: int | None = None
    image_size: tuple[int, int] | None = None
    captions: int = 0
    longest: int | None = None
    cut: float | None = None
    unknown: float | None = None


def anatomy(teacher: Teacher, captions: Sequence[str]) -> Anatomy:
    """Look at a teacher, and at how captions of the user's own fit it."""
    text = _first(teacher, lambda part: hasattr(_config(part), "vocab_size") and hasattr(_config(part), _HEADS))
    config = _config(text)
    tokenizer = _tokenizer(teacher)
    options = _first(teacher, lambda part: isinstance(getattr(part, "max_text_length", None), int))
    limit = getattr(options, "max_text_length", None)
    prompt = getattr(options, "prompt", "")
    lengths, unknown = _token_counts(tokenizer, [prompt + caption for caption in captions])
    return Anatomy(
        type(teacher).__name__,
        text_width=getattr(config, "hidden_size", None),
        text_heads=getattr(config, _HEADS, None),
        text_layers=getattr(config, "num_hidden_layers", None),
        embedding_rows=_embedding_rows(text),
        tokenizer_length=None if tokenizer is None else len(tokenizer),
        special_tokens=() if tokenizer is None else tuple(map(str, tokenizer.all_special_tokens)),
        max_text_length=limit,
        image_size=_image_size(teacher),
        captions=len(captions),
        longest=int(lengths.max()) if len(lengths) else None,
        cut=float((lengths > limit).mean()) if len(lengths) and limit is not None else None,
        unknown=unknown,
    )


_HEADS = "num_attention_heads"


def _parts(teacher: object) -> Iterator[Any]:
    """The teacher, its submodules, and what each of them holds as plain attributes."""
    modules = list(teacher.modules()) if hasattr(teacher, "modules") else [teacher]
    yield from modules
    for module in modules:
        yield from (value for name, value in vars(module).items() if not name.startswith("_"))


def _first(teacher: object, wanted: Callable[[Any], bool]) -> Any:
    return next((part for part in _parts(teacher) if wanted(part)), None)


def _config(part: Any) -> Any:
    return getattr(part, "config", None)


def _tokenizer(teacher: object) -> Any:
    """A transformers tokenizer, held as it is or inside a processor."""
    for part in _parts(teacher):
        for found in (part, getattr(part, "tokenizer", None)):
            if hasattr(found, "convert_tokens_to_ids") and hasattr(found, "all_special_tokens"):
                return found
    return None


def _embedding_rows(text: Any) -> int | None:
    embedding = text.get_input_embeddings() if hasattr(text, "get_input_embeddings") else None
    return getattr(embedding, "num_embeddings", None)


def _token_counts(tokenizer: Any, captions: list[str]) -> tuple[np.ndarray[Any, np.dtype[np.int64]], float | None]:
    """Tokens of each caption uncut, and the share of them that are unknown."""
    if tokenizer is None or not captions:
        return np.empty(0, np.int64), None
    made = tokenizer(captions, padding=False, truncation=False, verbose=False)["input_ids"]
    lengths = np.array([len(ids) for ids in made], np.int64)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown == getattr(tokenizer, "eos_token_id", None):  # CLIP's end of text stands for both
        return lengths, None
    return lengths, float(sum(ids.count(unknown) for ids in made) / max(1, int(lengths.sum())))


def _image_size(teacher: Teacher) -> tuple[int, int] | None:
    """Of one prepared picture, where it is prepared to pixels."""
    import PIL.Image

    pixels = teacher.prepare_images([PIL.Image.new("RGB", (64, 64))]).get("pixel_values")
    return None if pixels is None or pixels.ndim < 4 else (int(pixels.shape[-2]), int(pixels.shape[-1]))
