"""What a fingerprint of a teacher is made of: the states of its configuration, image processor and tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from distill.protocols import fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

# Say where a file came from or which library wrote it; no score depends on them.
_NOT_SCORING = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
}


def config_state(config: PreTrainedConfig) -> Any:
    """The configuration without what cannot change a score, ready for ``fingerprint``."""
    return _plain(config.to_dict())


def image_processor_state(processor: BaseImageProcessor) -> Any:
    """Settings and the class that applies them: two back-ends resize differently under the same settings."""
    return {"class": type(processor).__name__, **_plain(processor.to_dict())}


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Everything that maps a text to ids. Padding and truncation are left out: each call sets its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = {"vocabulary": tokenizer.get_vocab(), "settings": _plain(tokenizer.init_kwargs)}
    else:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"special": special, "state": state}


def image_inputs_identity(processor: BaseImageProcessor) -> str:
    """Fingerprint of what an image processor makes of an image."""
    return fingerprint("image inputs", image_processor_state(processor))


def text_inputs_identity(tokenizer: PreTrainedTokenizerBase, prompt: str, max_text_length: int) -> str:
    """Fingerprint of what a tokenizer makes of a text."""
    return fingerprint(
        "text inputs", tokenizer_state(tokenizer), {"prompt": prompt, "max_text_length": max_text_length}
    )


def _plain(state: Mapping[str, Any]) -> Any:
    """JSON's view of a mapping: tuples become lists and enumerations numbers, as they come back from a file."""
    kept = {name: value for name, value in state.items() if name not in _NOT_SCORING}
    kept = {name: _plain(value) if isinstance(value, dict) else value for name, value in kept.items()}
    return json.loads(json.dumps(kept, sort_keys=True, default=str))
