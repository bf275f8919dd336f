"""Any pair classifier as a teacher: a module of the user's, or a class of transformers, that reads a pair at once.

Nothing is known of the inside, so nothing is shared between pairs but the prepared pixels and token ids.

Shape key: ``N`` items, ``P`` pairs, ``L`` text tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.protocols import Image, Inputs, Memory, ScoreKind, Side, fingerprint, weights_fingerprint
from teachers import itm
from teachers.identified import Identified
from teachers.identity import config_state, image_processor_state, tokenizer_state
from teachers.pairwise import by_length, in_chunks
from teachers.pretrained import check_options, image_size_made, load_model
from teachers.processing import image_processor_from, tokenizer_from

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

SCORING_VERSION = 1  # part of every identity; raise it when the same weights would give other scores
WEIGHTS = "model.safetensors"
MASK = "attention_mask"


@dataclass(frozen=True)
class ClassifierOptions:
    """How a pair classifier is called, and what its output means.

    score_kind: "log_odds": of two logits their difference, of one logit itself, where it was trained by a logistic
        loss. "logit": the match's logit alone.
    output: name of the logits among the outputs of a model that returns more than a tensor.
    match: which of two logits means a match.
    image_inputs, text_inputs: what is passed to ``forward``, by name, of what the image processor and the tokenizer
        give. Without "attention_mask" every text is padded to ``max_text_length``.
    max_text_length: tokens kept of a text, special tokens included.
    prompt: put before every text.
    pairs_per_chunk: pairs that are scored at a time; bounds memory, changes no score.
    """

    score_kind: ScoreKind = "log_odds"
    output: str = "logits"
    match: int = 1
    image_inputs: tuple[str, ...] = ("pixel_values",)
    text_inputs: tuple[str, ...] = ("input_ids", MASK)
    max_text_length: int = 40
    prompt: str = ""
    pairs_per_chunk: int = 64

    def __post_init__(self) -> None:
        check_options(self, ("log_odds", "logit"))
        if self.match not in (0, 1):
            raise ValueError(f"match is {self.match}; expected 0 or 1, which of two logits means a match")
        if not self.image_inputs or not self.text_inputs:
            raise ValueError("image_inputs and text_inputs must name at least one input each")


class PairClassifierTeacher(Identified):
    """A ``Teacher``; it cannot be taught and stays in eval mode.

    Both memories hold the prepared inputs as they are, on the model's device and in its precision.
    """

    trains = False

    def __init__(
        self,
        model: nn.Module,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        options: ClassifierOptions | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap a module, which is frozen, and its processors.

        ``arguments``: what the module was built with; part of the identity, for what the weights do not show. The image
        processor must make every picture the same size, else ValueError.
        """
        super().__init__()
        self.options, self.arguments = options or ClassifierOptions(), dict(arguments or {})
        image_size_made(image_processor)
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        classifier: type[nn.Module],
        arguments: Mapping[str, Any] | None = None,
        processor: str | Path | None = None,
        options: ClassifierOptions | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> PairClassifierTeacher:
        """Load the weights of a class from a hub id or folder; in eval mode.

        A class with ``from_pretrained`` (transformers') is loaded by it. Any other is built with ``arguments`` and
        given the checkpoint's ``model.safetensors``, or the file that ``name_or_folder`` is.

        Raises:
            ValueError: weights that are missing or left over, or processors that do not fit.
            OSError: no such checkpoint.

        Args:
            name_or_folder: Where the weights are.
            classifier: The class; ``forward`` takes prepared images and texts by name.
            arguments: Keyword arguments of the class.
            processor: Hub id or folder of image processor and tokenizer; the checkpoint's own when None.
            options: How the class is called.
            dtype: Precision of the weights, cast once.
            revision: Of the checkpoint on the hub.
        """
        name = str(name_or_folder)
        model: Any
        if hasattr(classifier, "from_pretrained"):
            if arguments:
                raise ValueError(f"{classifier.__name__} is built from a config.json; leave out {', '.join(arguments)}")
            model = load_model(classifier, name, dtype=dtype, revision=revision)
        else:
            model = _load_plain(classifier(**(arguments or {})), name, revision).to(dtype)
        at = str(processor) if processor is not None else _home(name)
        own = revision if processor is None else None
        return cls(model, image_processor_from(at, revision=own), tokenizer_from(at, revision=own), options, arguments)

    def _identity_now(self) -> str:
        chosen = asdict(self.options)
        del chosen["pairs_per_chunk"]
        config = getattr(self.model, "config", None)
        return fingerprint(
            {"teacher": "classifier", "version": SCORING_VERSION, **chosen},
            _source_state(type(self.model)),
            {name: repr(value) for name, value in self.arguments.items()},
            weights_fingerprint(self.model),
            config_state(config) if hasattr(config, "to_dict") else None,
            image_processor_state(self.image_processor),
            tokenizer_state(self.tokenizer),
        )

    @property
    def score_kind(self) -> ScoreKind:
        """What ``score`` returns."""
        return self.options.score_kind

    def prepare_images(self, images: Sequence[Image]) -> Inputs:
        """What ``image_inputs`` names of the image processor's outputs, each (N, ...)."""
        if not images:
            raise ValueError("prepare_images was given no image")
        made = self.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return _chosen(made, self.options.image_inputs, "image processor", "image_inputs")

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """What ``text_inputs`` names of the tokenizer's outputs, each (N, L), padded on the right."""
        if not texts:
            raise ValueError("prepare_texts was given no text")
        options = self.options
        made: Any = self.tokenizer(
            [options.prompt + text for text in texts],
            # Padding that the model is not told of must be the same in every batch.
            padding="longest" if MASK in options.text_inputs else "max_length",
            padding_side="right",
            truncation=True,
            max_length=options.max_text_length,
            return_tensors="pt",
        )
        return _chosen(made, options.text_inputs, "tokenizer", "text_inputs")

    def prepare_identity(self, side: Side) -> str:
        """Fingerprint of what ``prepare_images`` or ``prepare_texts`` makes of an item."""
        options = self.options
        if side == "image":
            return fingerprint("classifier images", options.image_inputs, image_processor_state(self.image_processor))
        cut = {"prompt": options.prompt, "max_text_length": options.max_text_length}
        return fingerprint("classifier texts", options.text_inputs, tokenizer_state(self.tokenizer), cut)

    def encode_images(self, inputs: Inputs) -> Memory:
        """The prepared images on the model's device and in its precision."""
        return self._placed(inputs)

    def encode_texts(self, inputs: Inputs) -> Memory:
        """The prepared texts on the model's device."""
        return self._placed(inputs)

    def _placed(self, inputs: Inputs) -> Memory:
        weight = next(self.model.parameters(), torch.empty(0))
        return {
            name: tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in inputs.items()
        }

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Raw scores (P,) float32 of ``score_kind``; ValueError where the output is not one or two logits a pair."""
        itm.check_rows(images, texts, image_rows, text_rows)
        masked = MASK in texts
        return in_chunks(
            lambda chunk: self._scores(images, texts, image_rows[chunk], text_rows[chunk]),
            by_length(texts[MASK], text_rows) if masked else torch.arange(len(text_rows), device=text_rows.device),
            self.options.pairs_per_chunk,
        )

    def _scores(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        length = int(itm.take(texts[MASK], text_rows).sum(dim=1).max()) if MASK in texts else None
        asked = len(image_rows)
        count = max(3, asked)  # of two pairs, a matrix of similarities would pass for two logits a pair
        at = torch.arange(count, device=image_rows.device).clamp(max=asked - 1)
        output = self.model(
            **{name: itm.take(tensor, image_rows[at]) for name, tensor in images.items()},
            **{name: itm.take(tensor[:, :length], text_rows[at]) for name, tensor in texts.items()},
        )
        logits = self._logits(output).float()
        if logits.shape in ((count,), (count, 1)):
            return logits.flatten()[:asked]
        if logits.shape == (count, 2):
            yes, no = logits[:asked, self.options.match], logits[:asked, 1 - self.options.match]
            return yes - no if self.score_kind == "log_odds" else yes
        raise ValueError(
            f"{type(self.model).__name__} gave {tuple(logits.shape)} for {count} pairs; expected one or two logits a "
            "pair: (P,), (P, 1) or (P, 2)"
        )

    def _logits(self, output: Any) -> Tensor:
        if not isinstance(output, torch.Tensor):
            found = output.get(self.options.output) if isinstance(output, Mapping) else None
            output = getattr(output, self.options.output, None) if found is None else found
        if not isinstance(output, torch.Tensor):
            raise ValueError(
                f"{type(self.model).__name__} returned no tensor under {self.options.output!r}; name its logits in "
                "the option output"
            )
        return output


def _chosen(made: Mapping[str, Tensor], names: tuple[str, ...], maker: str, option: str) -> Inputs:
    lacking = [name for name in names if name not in made]
    if lacking:
        raise ValueError(f"{option} names {', '.join(lacking)}, but the {maker} gives {', '.join(sorted(made))}")
    return {name: made[name] for name in names}


def _source_state(found: type) -> Any:
    """Name of a class and the text of the file that defines it."""
    try:
        path = inspect.getsourcefile(found)
    except TypeError:  # made without a file, as in a notebook
        path = None
    source = Path(path).read_text(encoding="utf-8") if path is not None else None
    return {"class": f"{found.__module__}:{found.__qualname__}", "source": source}


def _home(name: str) -> str:
    """Where the processors of a checkpoint are: beside its weights."""
    return str(Path(name).parent) if Path(name).is_file() else name


def _load_plain(model: nn.Module, name: str, revision: str | None) -> nn.Module:
    from safetensors.torch import load_model as load_weights
    from transformers.utils import cached_file

    path = name if Path(name).is_file() else cached_file(name, WEIGHTS, revision=revision or "main")
    assert path is not None, "cached_file raises where it finds nothing"
    missing, left = load_weights(model, path, strict=False)
    if missing or left:
        raise ValueError(
            f"{name} does not fit {type(model).__name__}: missing {sorted(missing)[:4]}, left over {sorted(left)[:4]}"
        )
    return model
