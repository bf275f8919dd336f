"""Teachers small enough to run in milliseconds, with weights large enough that every part of them shows in a score."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    ElectraConfig,
    ElectraModel,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViTConfig,
    ViTModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.bridgetower.image_processing_pil_bridgetower import BridgeTowerImageProcessorPil
from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from teachers import (
    Blip2Options,
    Blip2Teacher,
    BlipOptions,
    BlipTeacher,
    BridgeTowerOptions,
    BridgeTowerTeacher,
    ClassifierOptions,
    FusionDesign,
    FusionOptions,
    FusionTeacher,
    PairClassifierTeacher,
    ViltOptions,
    ViltTeacher,
)

TEXTS = ("w1 w2", "w3 w4 w5 w6 w7 w8 w9", "w7", "w1 w9 w9 w2 w30", "w11 w12 w13")
LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.2}


def tokenizer(*, special: tuple[str, ...] = ("[DEC]", "[ENC]"), words: int = 40) -> PreTrainedTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(words)), *special]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def pictures(count: int, size: int = 24) -> list[Image.Image]:
    draw = np.random.default_rng(7)
    return [Image.fromarray(draw.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def blip(**options: object) -> BlipTeacher:
    torch.manual_seed(0)
    teacher = BlipTeacher.from_config(
        vision={**LAYER, "num_hidden_layers": 2, "patch_size": 8},
        text={**LAYER, "num_hidden_layers": 3, "max_position_embeddings": 40},
        embed_dim=16,
        image_size=24,
        tokenizer=tokenizer(),
        options=BlipOptions(**options),
    )
    _shake(teacher)
    return teacher


def text_model(family: str = "bert", layers: int = 4) -> torch.nn.Module:
    torch.manual_seed(1)
    size = {**LAYER, "num_hidden_layers": layers, "vocab_size": 46, "max_position_embeddings": 40}
    if family == "bert":
        return BertModel(BertConfig(**size)).eval()
    if family == "electra":
        return ElectraModel(ElectraConfig(**size, embedding_size=16)).eval()
    return RobertaModel(RobertaConfig(**size, pad_token_id=0)).eval()


def cnn() -> tuple[torch.nn.Module, object]:
    torch.manual_seed(2)
    config = MobileNetV2Config(depth_multiplier=0.1, finegrained_output=False, output_stride=8, initializer_range=0.2)
    model = MobileNetV2Model(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # the library's first weights let every picture fade to the same zeros
            torch.nn.init.kaiming_normal_(module.weight)
    return model, MobileNetV2ImageProcessorPil(size={"height": 24, "width": 32}, do_center_crop=False)


def vit() -> tuple[torch.nn.Module, object]:
    torch.manual_seed(2)
    config = ViTConfig(**LAYER, num_hidden_layers=2, image_size=24, patch_size=8)
    return ViTModel(config).eval(), ViTImageProcessorPil(size={"height": 24, "width": 24})


def fusion(
    design: FusionDesign | None = None,
    *,
    family: str = "bert",
    eye: str = "cnn",
    shaken: bool = True,
    **options: object,
) -> FusionTeacher:
    vision, processor = cnn() if eye == "cnn" else vit()
    text = text_model(family)
    torch.manual_seed(3)
    teacher = FusionTeacher(
        vision, text, processor, tokenizer(), design or FusionDesign(embed_dim=16), FusionOptions(**options)
    )
    if shaken:
        _shake(teacher)
    return teacher


def _shake(teacher: torch.nn.Module) -> None:
    """Fresh heads and zero-initialised projections would hide mistakes behind scores that are all alike."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if parameter.requires_grad and name != "logit_scale":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def memories(teacher: BlipTeacher | FusionTeacher, images: int = 3, texts: tuple[str, ...] = TEXTS):
    with torch.no_grad():
        return (
            teacher.encode_images(teacher.prepare_images(pictures(images))),
            teacher.encode_texts(teacher.prepare_texts(texts)),
        )


def every_pair(images: int = 3, texts: int = len(TEXTS)) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.cartesian_prod(torch.arange(images), torch.arange(texts))
    return grid[:, 0], grid[:, 1]


def unlike_pictures() -> list[Image.Image]:
    """Pictures of unlike sizes: square, wide, tall, and small."""
    draw = np.random.default_rng(11)
    sizes = ((24, 24), (24, 40), (60, 36), (10, 9))
    return [Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def blip2_model(**config: object) -> Blip2ForImageTextRetrieval:
    torch.manual_seed(4)
    text = {**LAYER, "num_hidden_layers": 3, "vocab_size": 46, "max_position_embeddings": 40}
    model = Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config={**LAYER, "num_hidden_layers": 2, "image_size": 24, "patch_size": 8},
            qformer_config={**text, "use_qformer_text_input": True},
            num_query_tokens=4,
            image_text_hidden_size=16,
            **config,
        )
    )
    _shake(model)
    return model.eval()


def blip2(**options: object) -> Blip2Teacher:
    processor = BlipImageProcessorPil(size={"height": 24, "width": 24})
    return Blip2Teacher(blip2_model(), processor, tokenizer(), Blip2Options(**options))


def vilt_model(**config: object) -> ViltForImageAndTextRetrieval:
    torch.manual_seed(5)
    text = {**LAYER, "num_hidden_layers": 3, "vocab_size": 46, "max_position_embeddings": 40, "pad_token_id": 0}
    model = ViltForImageAndTextRetrieval(ViltConfig(**text, image_size=24, patch_size=8, **config))
    _shake(model)
    return model.eval()


def vilt(**options: object) -> ViltTeacher:
    processor = ViltImageProcessorPil(size={"shortest_edge": 24}, size_divisor=8)
    return ViltTeacher(vilt_model(), processor, tokenizer(), ViltOptions(**{"max_text_length": 35, **options}))


def bridgetower_model(**config: object) -> BridgeTowerForImageAndTextRetrieval:
    torch.manual_seed(6)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    model = BridgeTowerForImageAndTextRetrieval(
        BridgeTowerConfig(
            text_config={**text, "vocab_size": 46, "max_position_embeddings": 60, "pad_token_id": 0},
            vision_config={"hidden_size": 64, "num_hidden_layers": 3, "image_size": 24, "patch_size": 8},
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            **config,
        )
    )
    _shake(model)
    return model.eval()


def bridgetower(**options: object) -> BridgeTowerTeacher:
    side = {"shortest_edge": 24}
    processor = BridgeTowerImageProcessorPil(size=side, crop_size=side, size_divisor=8)
    return BridgeTowerTeacher(bridgetower_model(), processor, tokenizer(), BridgeTowerOptions(**options))


class TinyClassifier(torch.nn.Module):
    """A module as a user would write it: the product of a picture's and a text's vectors, then logits."""

    def __init__(self, outputs: int = 2, width: int = 16) -> None:
        super().__init__()
        self.eye = torch.nn.Linear(3 * 24 * 24, width)
        self.words = torch.nn.Embedding(46, width)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(width, outputs)

    def forward(self, pixel_values, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.unsqueeze(-1).to(self.words.weight.dtype)
        text = (self.words(input_ids) * mask).sum(dim=1) / mask.sum(dim=1)
        return self.head(self.dropout(torch.tanh(self.eye(pixel_values.flatten(1)) * text)))


def classifier(model: torch.nn.Module | None = None, **options: object) -> PairClassifierTeacher:
    torch.manual_seed(7)
    model = model or TinyClassifier()
    _shake(model)
    processor = BlipImageProcessorPil(size={"height": 24, "width": 24})
    return PairClassifierTeacher(model, processor, tokenizer(), ClassifierOptions(**options))


def save_checkpoint(teacher: torch.nn.Module, folder: object) -> None:
    """Write the folder that transformers' own classes would have written for the teacher's model and processors."""
    teacher.model.save_pretrained(folder)
    teacher.image_processor.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
