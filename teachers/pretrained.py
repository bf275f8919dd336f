"""What teachers over a published checkpoint share: every weight accounted for, processors that fit, an identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from distill.protocols import ScoreKind, fingerprint, weights_fingerprint
from teachers.identified import Options, Prepared
from teachers.identity import config_state, image_processor_state, tokenizer_state
from teachers.processing import image_processor_from, pixel_values, tokenizer_from

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_options(options: Options, kinds: Sequence[ScoreKind]) -> None:
    """Raise ValueError where a number is too small or the teacher gives no such score."""
    if options.score_kind not in kinds:
        raise ValueError(f"score_kind is {options.score_kind!r}; this teacher gives {' or '.join(kinds)}")
    if options.max_text_length < 2:
        raise ValueError(f"max_text_length is {options.max_text_length}; the two special tokens alone need 2")
    if options.pairs_per_chunk < 1:
        raise ValueError(f"pairs_per_chunk is {options.pairs_per_chunk}; expected at least 1")


def load_model(
    model_class: type[PreTrainedModel], name: str, *, dtype: torch.dtype, revision: str | None = None
) -> PreTrainedModel:
    """A checkpoint (hub id or folder) of exactly this class, cast to ``dtype`` once; safetensors only, in eval mode.

    Raises:
        ValueError: the checkpoint is of another family, or lacks weights, which the library would leave random.
        OSError: there is no such checkpoint, or it has no safetensors.
    """
    revision = revision or "main"
    config_class = getattr(model_class, "config_class", None)  # an Auto class has none
    if config_class is not None:
        _check_family(config_class, name, revision)
    model, report = model_class.from_pretrained(
        name, dtype=dtype, revision=revision, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {model_class.__name__} ({', '.join(missing[:4])}, ...): it was "
            "made for another task; take a checkpoint that was trained to match images with texts"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _check_family(config_class: type[PreTrainedConfig], name: str, revision: str) -> None:
    found, _ = config_class.get_config_dict(name, revision=revision)
    if found.get("model_type") != config_class.model_type:
        raise ValueError(f"{name} is of type {found.get('model_type')!r}; expected {config_class.model_type!r}")


def image_size_made(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of every image that the processor makes, found by giving it a wide and a tall picture.

    ValueError where they differ: such images cannot be batched without padding.
    """
    from PIL import Image

    pictures = Image.new("RGB", (96, 64)), Image.new("RGB", (64, 96))
    wide, tall = (pixel_values(processor, [picture])["pixel_values"].shape[2:] for picture in pictures)
    if wide != tall:
        raise ValueError(
            f"the image processor makes images of {tuple(wide)} from wide and of {tuple(tall)} from tall pictures; "
            'expected one size: set its "size" to {"height": ..., "width": ...}, or have it crop to a square'
        )
    return wide[0], wide[1]


def check_image_size(processor: BaseImageProcessor, size: Any) -> None:
    """Raise ValueError where the processor makes other images than the tower (``image_size`` of its config) reads."""
    expected = (size, size) if isinstance(size, int) else tuple(size)
    made = image_size_made(processor)
    if made != expected:
        raise ValueError(f"the image processor makes images of {made}, the image tower reads {expected}")


def check_texts(options: Options, *, tokens: int, vocabulary: int, positions: int) -> None:
    """Raise ValueError where the tokenizer's ``tokens`` or the texts' length are beyond what the model embeds."""
    if tokens > vocabulary:
        raise ValueError(f"the tokenizer has {tokens} tokens, the model embeds only {vocabulary}")
    if options.max_text_length > positions:
        raise ValueError(f"max_text_length is {options.max_text_length}; the model has {positions} text positions")


class Published(Prepared):
    """A frozen model of one class of transformers, loaded from a checkpoint, that cannot be taught.

    ``kind`` and ``version`` (raised when the same weights would give other scores) are part of the identity, and so is
    precision, through the weights, whose dtype counts. ``library_class`` names the class.
    """

    trains = False
    kind: ClassVar[str]
    version: ClassVar[int | tuple[int, ...]]
    library_class: ClassVar[str]

    def __init__(
        self, model: Any, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, options: Any = None
    ) -> None:
        """Keep a model, which is frozen, and its processors. Subclasses check first that they fit each other."""
        super().__init__()
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.options = options
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        options: Any = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load a checkpoint of ``library_class`` (hub id or folder) with its processors, in ``dtype`` or float32.

        Raises:
            ValueError: a checkpoint for another task, which lacks the head that matches images with texts, or
                processors that do not fit.
            OSError: no such checkpoint.
        """
        import torch
        import transformers

        name, model_class = str(name_or_folder), getattr(transformers, cls.library_class)
        model = load_model(model_class, name, dtype=dtype or torch.float32, revision=revision)
        processors = image_processor_from(name, revision=revision), tokenizer_from(name, revision=revision)
        return cls(model, *processors, options)

    def _identity_now(self) -> str:
        chosen = asdict(self.options)  # type: ignore[call-overload]  # every options class is a dataclass
        del chosen["pairs_per_chunk"]  # changes no score
        return fingerprint(
            {"teacher": self.kind, "version": self.version, **chosen},
            weights_fingerprint(self.model),
            config_state(self.model.config),
            image_processor_state(self.image_processor),
            tokenizer_state(self.tokenizer),
        )
