"""A tokenizer learnt from captions, for text towers that start from a config and not from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FIRST_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Ids 0 to 4."""
LAST_TOKENS = ("[DEC]", "[ENC]")
"""The last two ids, in this order, as in BLIP's vocabulary."""


def learn_tokenizer(
    texts: Iterable[str], *, size: int = 2000, min_frequency: int = 1, max_length: int = 64
) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer whose words come from the texts; the same texts give the same ids.

    Texts are framed as ``[CLS] text [SEP]``; ``[CLS]`` is also the begin and ``[SEP]`` also the end token. Saved with
    ``save_pretrained``, it is loaded with ``AutoTokenizer``.

    Args:
        texts: Captions to learn from: those of the train split, no others.
        size: Largest number of ids, special ones included.
        min_frequency: How often a piece must occur to become one token.
        max_length: Tokens a text is cut to where truncation is asked for.

    Raises:
        ValueError: No texts, or a size that cannot hold the special tokens and the letters of the texts.
    """
    from transformers import PreTrainedTokenizerFast

    held = sorted(texts)  # the order of texts must not change the ids
    if not held:
        raise ValueError("learn_tokenizer needs at least one text; give it the captions of the train split")
    pieces = _learn_pieces(held, size - len(LAST_TOKENS), min_frequency)
    if len(pieces) + len(LAST_TOKENS) > size:
        raise ValueError(
            f"size={size} cannot hold the {len(FIRST_TOKENS) + len(LAST_TOKENS)} special tokens and the letters of the "
            f"texts; it takes at least {len(pieces) + len(LAST_TOKENS)}"
        )
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *LAST_TOKENS])}
    return PreTrainedTokenizerFast(
        tokenizer_object=_assembled(vocabulary),
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        additional_special_tokens=list(LAST_TOKENS),
    )


def _learn_pieces(texts: list[str], size: int, min_frequency: int) -> list[str]:
    """Special tokens, then pieces in the order of their ids."""
    from tokenizers.trainers import WordPieceTrainer

    learner = _assembled({token: number for number, token in enumerate(FIRST_TOKENS)})
    # The trainer numbers letters within words in the order of a hash map, and breaks ties between pieces by number.
    # Naming all of them first makes both the same every time.
    letters = _letters(texts, learner)
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[*FIRST_TOKENS, *letters, *(f"##{letter}" for letter in letters)],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    ids = learner.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def _letters(texts: list[str], tokenizer: Tokenizer) -> list[str]:
    """Every character that a word of the texts can have once normalised, in order."""
    return sorted({letter for text in texts for letter in tokenizer.normalizer.normalize_str(text) if letter.strip()})


def _assembled(vocabulary: dict[str, int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer
