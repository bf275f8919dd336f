"""Pairs a second of the BLIP teacher against the ways in which BLIP is run elsewhere, weights and inputs the same.

Compared on one image with so many captions of 9 to 17 tokens:

- ``forward per pair``: ``BlipForImageTextRetrieval.forward``, image and text of one pair at a time;
- ``forward batched``: the same on batches of pairs, the image repeated;
- ``published loop``: as BLIP's published evaluation re-ranks: image tower once, its features repeated per caption,
  captions padded to 35, ``encoder_hidden_states`` passed in;
- ``ours``: image tower, keys and values, and the captions' own part all included.

Weights are random: time does not depend on them, and scores are compared all the same. Figures of the published loop
leave the image tower out on both sides; ``warm`` also keeps our keys and values, as scoring does.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer

from benchmarks.sidebyside import JsonFile, Quick, best_seconds, show, write_json
from teachers import BlipOptions, BlipTeacher

PADDED_TO = 35  # tokens, in the published evaluation
SHORTEST, LONGEST = 9, 17  # tokens of a caption, special ones included
BATCH_OF_FORWARD = 8
ROUNDS = 3


@dataclass(frozen=True)
class Shape:
    """A BLIP by its sizes."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    image_size: int = 384
    patch_size: int = 16
    vocabulary: int = 30_524

    @property
    def image_tokens(self) -> int:
        """Class token and patches."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def tower_gflop(self) -> float:
        """Image tower, once an image: dense layers and attention, a multiplication and an addition being two."""
        tokens, width = self.image_tokens, self.width
        return self.layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width) / 1e9

    def keys_values_gflop(self) -> float:
        """Keys and values of every cross-attention layer, once an image."""
        return self.layers * 4 * self.image_tokens * self.width**2 / 1e9

    def text_gflop(self, tokens: float) -> float:
        """What no image changes: the first layer's self-attention block, once a caption."""
        return (8 * tokens * self.width**2 + 4 * tokens**2 * self.width) / 1e9

    def pair_gflop(self, tokens: float) -> float:
        """The rest of a pair as every implementation before computes it: all layers for all tokens."""
        cross = 4 * self.width**2 + 4 * self.image_tokens * self.width
        own = 8 * self.width**2 + 4 * tokens * self.width
        return (self.layers * tokens * (16 * self.width**2 + cross) + (self.layers - 1) * tokens * own) / 1e9


def make_teacher(shape: Shape, device: torch.device) -> BlipTeacher:
    """A BLIP with random weights; its texts are made of ids, so that the tokenizer only has to fit."""
    from transformers import BertTokenizerFast

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(shape.vocabulary - 6)), "[DEC]", "[ENC]"]
    tokenizer = BertTokenizerFast(vocab={word: at for at, word in enumerate(words)})
    sizes = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
        "initializer_range": 0.04,
    }
    teacher = BlipTeacher.from_config(
        vision={**sizes, "patch_size": shape.patch_size},
        text={**sizes, "encoder_hidden_size": shape.width},
        embed_dim=256,
        image_size=shape.image_size,
        tokenizer=tokenizer,
        options=BlipOptions(),
    )
    return teacher.to(device)


def make_inputs(shape: Shape, texts: int, teacher: BlipTeacher) -> tuple[dict[str, torch.Tensor], ...]:
    """Pixels of one image; ids and mask of the captions."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, shape.image_size, shape.image_size, generator=draw)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (texts,), generator=draw)
    ids = torch.randint(4, shape.vocabulary - 2, (texts, LONGEST), generator=draw)
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    ids[:, 0] = teacher.enc_token_id if teacher.enc_token_id is not None else 2
    ids[torch.arange(texts), lengths - 1] = 3
    device = teacher.model.device
    return (
        {"pixel_values": pixels.to(device)},
        {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)},
    )


@dataclass(frozen=True)
class Ways:
    """The ways of scoring one image with some captions. Each gives log-odds (P,)."""

    teacher: BlipTeacher
    image: dict[str, torch.Tensor]
    texts: dict[str, torch.Tensor]

    @property
    def count(self) -> int:
        """Pairs."""
        return len(self.texts["input_ids"])

    def forward_per_pair(self, pairs: int) -> torch.Tensor:
        """The library's forward, the first ``pairs`` one by one and without padding."""
        lengths = self.texts["attention_mask"].sum(dim=1).tolist()
        ids = [self.texts["input_ids"][at : at + 1, : lengths[at]] for at in range(pairs)]
        return torch.cat([self._forward(one, torch.ones_like(one)) for one in ids])

    def forward_batched(self, pairs: int) -> torch.Tensor:
        """The library's forward on one batch of the first ``pairs``."""
        return self._forward(self.texts["input_ids"][:pairs], self.texts["attention_mask"][:pairs])

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pixels = self.image["pixel_values"].to(self.teacher.model.dtype).expand(len(ids), -1, -1, -1)
        out = self.teacher.model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
        return log_odds(out.itm_score)

    def tower(self) -> torch.Tensor:
        """The library's image tower, once."""
        pixels = self.image["pixel_values"].to(self.teacher.model.dtype)
        features: torch.Tensor = self.teacher.model.vision_model(pixel_values=pixels).last_hidden_state
        return features

    def loop(self, features: torch.Tensor) -> torch.Tensor:
        """The published loop for one image, after its image tower."""
        model, spare = self.teacher.model, PADDED_TO - LONGEST
        ids, mask = (torch.nn.functional.pad(self.texts[name], (0, spare)) for name in ("input_ids", "attention_mask"))
        repeated = features.repeat(self.count, 1, 1)
        seen = torch.ones(repeated.shape[:2], dtype=torch.long, device=ids.device)
        states = model.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=repeated, encoder_attention_mask=seen
        ).last_hidden_state
        return log_odds(model.itm_head(states[:, 0]))

    def ours(self) -> torch.Tensor:
        """Everything, from pixels and ids."""
        return self.scored(self.teacher.encode_images(self.image))

    def keys_values(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Our image memory but for the tower."""
        from teachers.crossattention import keys_and_values

        blocks = [layer.crossattention.self for layer in self.teacher.model.text_encoder.encoder.layer]
        return keys_and_values([(block.key, block.value) for block in blocks], features)

    def scored(self, memory: Any) -> torch.Tensor:
        """Ours with the image memory at hand; the captions' own part included."""
        return self.paired(memory, self.teacher.encode_texts(self.texts))

    def paired(self, memory: Any, texts: Any) -> torch.Tensor:
        """Ours with both memories at hand."""
        rows = torch.arange(self.count, device=self.teacher.model.device)
        return self.teacher.score(memory, texts, torch.zeros_like(rows), rows)


def log_odds(logits: torch.Tensor) -> torch.Tensor:
    """(P, 2) -> (P,)."""
    return (logits[:, 1] - logits[:, 0]).float()


def agreement(ways: Ways) -> dict[str, Any]:
    """Largest difference of our scores from the library's forward, and whether the ranking is the same."""
    ours, theirs = ways.ours(), ways.forward_per_pair(ways.count)
    return {
        "largest_difference": float((ours - theirs).abs().max()),
        "spread": float(theirs.std()),
        "ranking_identical": bool(torch.equal(ours.argsort(), theirs.argsort())),
    }


def compare(ways: Ways, rounds: int) -> dict[str, float]:
    """Seconds of each way for all pairs of the image; what is the same for every pair is measured on a few."""
    features = ways.tower()
    memory = ways.teacher.encode_images(ways.image)
    few, batch = min(2, ways.count), min(BATCH_OF_FORWARD, ways.count)
    runs: dict[str, Callable[[], object]] = {
        "forward per pair": lambda: ways.forward_per_pair(few),
        "forward batched": lambda: ways.forward_batched(batch),
        "loop": lambda: ways.loop(features),
        "ours": ways.ours,
        "ours without tower": lambda: ways.scored(ways.keys_values(features)),
        "ours warm": lambda: ways.scored(memory),
    }
    seconds = best_seconds(runs, rounds=rounds, device=ways.teacher.model.device)
    seconds["forward per pair"] *= ways.count / few
    seconds["forward batched"] *= ways.count / batch
    return seconds


def parts(ways: Ways, shape: Shape, rounds: int) -> list[tuple[str, float, float]]:
    """(part, seconds, GFLOP) of our way."""
    features, memory = ways.tower(), ways.teacher.encode_images(ways.image)
    texts = ways.teacher.encode_texts(ways.texts)
    tokens = float(ways.texts["attention_mask"].sum())
    vision = ways.teacher.model.vision_model
    from teachers.layers import image_tower

    pixels = ways.image["pixel_values"].to(ways.teacher.model.dtype)
    seconds = best_seconds(
        {
            "image tower": lambda: image_tower(vision, pixels),
            "keys and values": lambda: ways.keys_values(features),
            "captions": lambda: ways.teacher.encode_texts(ways.texts),
            "pairs": lambda: ways.paired(memory, texts),
        },
        rounds=rounds,
        device=ways.teacher.model.device,
    )
    mean = tokens / ways.count
    gflop = {
        "image tower": shape.tower_gflop(),
        "keys and values": shape.keys_values_gflop(),
        "captions": ways.count * shape.text_gflop(mean),
        "pairs": ways.count * shape.pair_gflop(mean),
    }
    return [(name, seconds[name], gflop[name]) for name in gflop]


def matmul_peak(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP a second of the largest dense layer on 4,096 rows: what this machine's library reaches at best."""
    rows = torch.randn(4096, shape.width, dtype=dtype, device=device)
    weight = torch.randn(4 * shape.width, shape.width, dtype=dtype, device=device)
    seconds = best_seconds({"matmul": lambda: torch.nn.functional.linear(rows, weight)}, rounds=5, device=device)
    return 2 * 4096 * 4 * shape.width**2 / 1e9 / seconds["matmul"]


def run(
    quick: Quick = False,
    json: JsonFile = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    rounds: Annotated[int, typer.Option(help="rounds of each measurement")] = ROUNDS,
) -> None:
    """Measure, print tables, write figures."""
    shape = Shape(layers=2, width=64, heads=4, image_size=64, vocabulary=400) if quick else Shape()
    counts = (1, 4) if quick else (1, 8, 32, 128)
    main = counts[-1] if quick else 32
    where = torch.device(device)
    with torch.inference_mode():
        figures = measure(make_teacher(shape, where), shape, counts, main=main, rounds=rounds)
    figures["machine"] = {
        "processor": torch.cuda.get_device_name() if where.type == "cuda" else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_json(json, figures)


def measure(teacher: BlipTeacher, shape: Shape, counts: tuple[int, ...], *, main: int, rounds: int) -> dict[str, Any]:
    """All figures; the ratios of the first level are those of ``main`` captions an image in float32."""
    figures: dict[str, Any] = {"by_captions": {}}
    device = teacher.model.device
    for count in counts:
        ways = Ways(teacher, *make_inputs(shape, count, teacher))
        seconds = compare(ways, rounds)
        ratios = ratios_of(seconds)
        figures["by_captions"][str(count)] = {"pairs_per_second": {k: count / v for k, v in seconds.items()}, **ratios}
        rows = [(name, count / value, seconds["ours"] / value) for name, value in seconds.items()]
        show(f"{count} captions an image, float32", ("way", "pairs/s", "against ours"), rows)
        if count == main:
            figures |= ratios | {"agreement": agreement(ways)}
            figures["parts"] = show_parts(ways, shape, torch.float32, rounds)
    seconds32 = main / figures["by_captions"][str(main)]["pairs_per_second"]["ours"]
    half = teacher.to(torch.bfloat16)
    ways = Ways(half, *make_inputs(shape, main, half))
    seconds16 = best_seconds({"bfloat16": ways.ours}, rounds=rounds, device=device)["bfloat16"]
    figures["ratio_bfloat16"] = seconds32 / seconds16
    figures["parts_bfloat16"] = show_parts(ways, shape, torch.bfloat16, rounds)
    show(
        f"ratios, {main} captions an image",
        ("ratio", "times"),
        [(name, figures[name]) for name in figures if name.startswith("ratio")],
    )
    show("against the library's forward", ("measure", "value"), [(k, str(v)) for k, v in figures["agreement"].items()])
    return figures


def ratios_of(seconds: dict[str, float]) -> dict[str, float]:
    """How many times faster ours is."""
    return {
        "ratio_per_pair": seconds["forward per pair"] / seconds["ours"],
        "ratio_batched": seconds["forward batched"] / seconds["ours"],
        "ratio_loop": seconds["loop"] / seconds["ours without tower"],
        "ratio_loop_warm": seconds["loop"] / seconds["ours warm"],
    }


def show_parts(ways: Ways, shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Where the time goes, against the time that the arithmetic alone would take at the measured peak."""
    peak = matmul_peak(shape, dtype, ways.teacher.model.device)
    rows, figures = [], {}
    for name, seconds, gflop in parts(ways, shape, rounds):
        floor = gflop / peak
        rows.append((name, seconds * 1e3, gflop, floor * 1e3, 100 * floor / seconds))
        figures[name] = {"ms": seconds * 1e3, "gflop": gflop, "floor_ms": floor * 1e3, "percent_of_peak": rows[-1][-1]}
    title = f"where ours spends its time: {ways.count} captions, {dtype}, matmul peak {peak:,.0f} GFLOP/s"
    show(title, ("part", "ms", "GFLOP", "floor ms", "% of peak"), rows)
    return {"peak_gflop_per_second": peak, **figures}


if __name__ == "__main__":
    typer.run(run)
