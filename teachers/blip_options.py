"""How a BLIP scores, what must fit together for it, and the two small files beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.protocols import ScoreKind
from teachers.itm import check_score_kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from transformers import (
        BaseImageProcessor,
        BlipConfig,
        BlipTextConfig,
        PreTrainedConfig,
        PreTrainedTokenizerBase,
    )

OPTIONS_FILE = "blip_teacher.json"
SCALE_FILE = "blip_teacher.safetensors"
ORIGINAL_VOCABULARY = 30_524  # BERT's 30,522 word pieces, then [DEC], then [ENC]


@dataclass(frozen=True)
class BlipOptions:
    """How a BLIP scores.

    score_kind: see ``teachers.itm.scores_from``.
    cosine_weight: what multiplies the cosine in ``logit+cosine``; 1 in BLIP's published evaluation. A matching head of
        little training is unsure: near the learned contrastive scale both heads count alike.
    enc_token: what stands in place of the first text token before the image-grounded encoder. "original": [ENC], as in
        the original code and its published figures; "cls": the tokenizer's own first token, as in transformers'
        forward; a number: that id.
    max_text_length: tokens kept of a text, special tokens included; 35 in the published evaluation.
    prompt: put before every text.
    pairs_per_chunk: pairs that are scored at a time while no gradient is wanted; bounds memory, changes no score.
    compile: run the dense blocks through ``torch.compile``; needs a compiler where it runs, and changes no score beyond
        rounding. The first calls are slow.
    """

    score_kind: ScoreKind = "log_odds"
    enc_token: str | int = "original"
    max_text_length: int = 35
    prompt: str = ""
    pairs_per_chunk: int = 128
    cosine_weight: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        check_score_kind(self.score_kind)
        if isinstance(self.enc_token, str) and self.enc_token not in ("original", "cls"):
            raise ValueError(f'enc_token is {self.enc_token!r}; expected "original", "cls" or a token id')
        if self.max_text_length < 2:
            raise ValueError(f"max_text_length is {self.max_text_length}; the two special tokens alone need 2")
        if self.pairs_per_chunk < 1:
            raise ValueError(f"pairs_per_chunk is {self.pairs_per_chunk}; expected at least 1")


@dataclass(frozen=True)
class Beside:
    """What ``save_beside`` wrote."""

    options: BlipOptions
    logit_scale: Tensor  # () logarithm of the contrastive scale


def save_beside(folder: Path, options: BlipOptions, logit_scale: Tensor) -> None:
    """Write the options and the learned scale, for which transformers' class has no place."""
    from safetensors.torch import save_file

    (folder / OPTIONS_FILE).write_text(json.dumps(asdict(options), indent=2) + "\n", encoding="utf-8")
    save_file({"logit_scale": logit_scale.detach().cpu().contiguous()}, folder / SCALE_FILE)


def load_beside(folder: Path) -> Beside | None:
    """What ``save_beside`` wrote in the folder; None where it wrote nothing there or the name is not a folder."""
    from safetensors.torch import load_file

    if not (folder / OPTIONS_FILE).is_file():
        return None
    options = json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
    known = set(BlipOptions.__dataclass_fields__)
    if set(options) - known:
        raise ValueError(f"{folder / OPTIONS_FILE} holds {sorted(set(options) - known)}; known are {sorted(known)}")
    return Beside(BlipOptions(**options), load_file(folder / SCALE_FILE)["logit_scale"])


def resolve_enc_token(enc_token: str | int, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int | None:
    """Id that replaces the first text token; None where the token stays as it is.

    "original" is the tokenizer's [ENC] or, for the checkpoints whose tokenizer does not name it, the last row of the
    30,524-row vocabulary. ValueError where neither is there, or where an id is outside the vocabulary.
    """
    if enc_token == "cls":
        return None
    if isinstance(enc_token, int):
        if not 0 <= enc_token < vocab_size:
            raise ValueError(f"enc_token is {enc_token}; the text encoder's vocabulary has ids 0..{vocab_size - 1}")
        return enc_token
    named = tokenizer.get_vocab().get("[ENC]")
    if named is not None and named < vocab_size:
        return int(named)
    if vocab_size == ORIGINAL_VOCABULARY:
        return vocab_size - 1
    raise ValueError(
        f'enc_token "original" asks for [ENC], but the tokenizer has no such token and the vocabulary has {vocab_size} '
        f'rows, not the {ORIGINAL_VOCABULARY} whose last is [ENC]; give the id, or "cls" to keep the first token'
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the text configuration's special tokens; ValueError where the tokenizer lacks one."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.get_vocab().get("[DEC]"),
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    there = {name: value for name, value in ids.items() if value is not None}
    if len(there) < len(ids):
        raise ValueError(
            f"the tokenizer gives no {', '.join(sorted(set(ids) - set(there)))}; it needs [PAD], [SEP], [DEC]"
        )
    return there


def check_fields(given: Mapping[str, Any], config: type[PreTrainedConfig], name: str) -> None:
    """Raise ValueError where a configuration has no such field: transformers would keep it and use the default."""
    own = {field.name for field in fields(config)} - {field.name for field in fields(config.__mro__[1])}
    unknown = sorted(set(given) - own)
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}; {config.__name__} has {', '.join(sorted(own))}")


def check_heads(text: BlipTextConfig, name: str) -> None:
    """Raise ValueError where a published BLIP-base would run with other than its 12 heads.

    The library's default is 8: a configuration that leaves the number out loads without complaint and scores wrongly.
    """
    if text.hidden_size == 768 and text.num_attention_heads != 12:
        raise ValueError(
            f"{name} gives its 768-wide text encoder {text.num_attention_heads} attention heads; BLIP was trained with "
            '12. Set "num_attention_heads": 12 under "text_config" of its config.json'
        )


def check_loaded(missing: Iterable[str], name: str) -> None:
    """Raise ValueError where the checkpoint lacked weights, which the library would leave random."""
    if names := ", ".join(sorted(missing)[:4]):
        raise ValueError(
            f"{name} lacks weights of an image-text retrieval BLIP ({names}, ...): a captioning or question-answering "
            "checkpoint cannot score pairs; use one such as blip-itm-base-coco"
        )


def check_fit(
    config: BlipConfig, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, options: BlipOptions
) -> None:
    """Raise ValueError where processors or options ask for what the model does not have."""
    size, made = config.vision_config.image_size, _size_made(image_processor)
    if made != (size, size):
        raise ValueError(f"the image processor makes images of {made}, the image tower reads ({size}, {size})")
    text = config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder only {text.vocab_size}")
    if options.max_text_length > text.max_position_embeddings:
        raise ValueError(
            f"max_text_length is {options.max_text_length}; "
            f"the text encoder has {text.max_position_embeddings} positions"
        )


def _size_made(image_processor: BaseImageProcessor) -> tuple[Any, Any]:
    size: Any = image_processor.size
    return size["height"], size["width"]
