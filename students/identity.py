"""What the fingerprint of a student is made of: the states of configs, image processor and tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from distill.protocols import fingerprint

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

# Say where a file came from, which library wrote it or what classes are called; no embedding depends on them.
_NOT_EMBEDDING = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id"}
)


def config_state(config: PreTrainedConfig) -> object:
    """The configuration without what cannot change an embedding."""
    return _plain(config.to_dict())


def image_processor_state(processor: BaseImageProcessor) -> object:
    """Settings, and the class that applies them: two back-ends resize differently under the same settings."""
    return {"class": type(processor).__name__, "settings": _plain(processor.to_dict())}


def tokens_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of how a text is cut into word pieces, and where marks are added at its ends.

    Vocabulary, normaliser, splitter and post-processor count; added tokens, padding and truncation do not: a teacher
    that adds a token of its own (BLIP's ``[ENC]``) still cuts texts as the student does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return fingerprint("vocabulary", type(tokenizer).__name__, tokenizer.get_vocab())
    state = json.loads(backend.to_str())
    return fingerprint("backend", {name: state.get(name) for name in _CUTTING})


_CUTTING = ("model", "normalizer", "pre_tokenizer", "post_processor")


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> object:
    """Everything that maps a text to ids, apart from padding and truncation, which every call states."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cut = tokens_fingerprint(tokenizer)
    added = json.loads(backend.to_str()).get("added_tokens") if backend is not None else None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"tokens": cut, "added": added, "special": special}


def _plain(state: object) -> object:
    """JSON's view: tuples become lists and enumerations numbers, as they come back from a file."""
    return json.loads(json.dumps(_kept(state), sort_keys=True, default=str))


def _kept(state: object) -> object:
    if not isinstance(state, dict):
        return state
    return {str(name): _kept(value) for name, value in state.items() if name not in _NOT_EMBEDDING}
