"""Tiny students of every family, and a tokenizer for them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from students import DualEncoder, DualOptions
from tests.students.small_texts import N_IMAGES, N_TEXTS, TEXTS, TOWER, WORDS


@pytest.fixture(scope="session")
def tokenizer():
    """Word-level, [CLS] … [SEP]; the end token is 3, not the 2 that CLIP misreads."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=20,
    )


@pytest.fixture
def pictures():
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30 + seed, 50, 3), dtype=np.uint8))
        for seed in range(3)
    ]


@pytest.fixture
def make_config(tokenizer):
    """A CLIP or SigLIP student from a config."""

    def make(family="clip", seed=0, dim=None, **options):
        torch.manual_seed(seed)
        return DualEncoder.from_config(
            vision={**TOWER, "patch_size": 8},
            text={**TOWER, "max_position_embeddings": 16},
            projection_dim=dim or (24 if family == "clip" else 32),
            tokenizer=tokenizer,
            image_size=32,
            family=family,
            options=DualOptions(**options),
        )

    return make


@pytest.fixture(scope="session")
def tower_folders(tmp_path_factory, tokenizer):
    """Folders of a ViT, a small MobileNetV2 (no hidden_size in its config) and a BERT."""
    from transformers import BertConfig, BertModel, MobileNetV2Config, MobileNetV2Model, ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(7)
    sizes = {**TOWER, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    made = {
        "vit": ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)),
        "mobilenet": MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, finegrained_output=False, image_size=64)),
        "bert": BertModel(BertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=20, pad_token_id=0)),
    }
    for module in made["mobilenet"].modules():  # its own first weights let almost nothing through
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    for name, size in (("vit", 32), ("mobilenet", 64)):
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(root / name)
    tokenizer.save_pretrained(root / "bert")
    for name, tower in made.items():
        tower.save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.fixture
def make_towers(tower_folders):
    """A VisionTextDualEncoder student over tiny towers."""

    def make(vision="vit", seed=0, **options):
        torch.manual_seed(seed)
        return DualEncoder.from_towers(
            tower_folders[vision], tower_folders["bert"], projection_dim=24, options=DualOptions(**options)
        )

    return make


@pytest.fixture
def make(make_config, make_towers):
    """A student of a family by name: clip, siglip, vit (+ BERT) or mobilenet (+ BERT)."""

    def make_one(family, **options):
        return (make_config if family in ("clip", "siglip") else make_towers)(family, **options)

    return make_one


@pytest.fixture
def embed(pictures):
    """Embeddings of the test's pictures and texts from prepared inputs, without gradient."""

    def run(student, **more):
        with torch.no_grad():
            return student(student.prepare_images(pictures), student.prepare_texts(TEXTS), **more)

    return run


@pytest.fixture
def step(tokenizer):
    """Inputs of a step: pictures, and texts of several lengths padded together."""
    g = torch.Generator().manual_seed(0)
    length = torch.randint(4, 12, (N_TEXTS, 1), generator=g)
    places = torch.arange(12)
    ids = torch.randint(4, len(tokenizer), (N_TEXTS, 12), generator=g)
    ids = torch.where(places < length, ids, 0).masked_fill(places == 0, 2).masked_fill(places == length - 1, 3)
    return (
        {"pixel_values": torch.randn(N_IMAGES, 3, 32, 32, generator=g)},
        {"input_ids": ids, "attention_mask": (places < length).long()},
    )


@pytest.fixture
def shared():
    """Folder of real weights; the test is skipped where there is none."""
    named = os.environ.get("CROSS2DUAL_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"no models in {folder}: set CROSS2DUAL_SHARED")
    return folder
