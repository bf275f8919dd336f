"""What asking a teacher costs: encoding, scoring a pair, vectors, maps; and teaching it."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.batches import Batches
from distill.inference import bytes_of, evaluating, to_device
from distill.planning.measured import StoreCost, TeacherCost, TeachingCost
from distill.planning.probe import repeated
from distill.planning.ranges import Range
from distill.planning.sample import StepClock
from distill.protocols import SIDES, MapsTeacher
from distill.sampler import BatchSampler
from distill.score import ScoreOptions, score_pairs
from distill.store import ScoreStore
from distill.timings import Timings

if TYPE_CHECKING:
    from distill.batches import Source
    from distill.planning.probe import Probe
    from distill.protocols import Side

_FEW = 4  # texts an image in the calls that tell what an image costs
_MANY = 64  # at most, in those that tell what a pair costs
_MOST_IMAGES = 64
_MAP_PAIRS = 128
_LEAST_STEPS, _MOST_STEPS = 4, 24


def probe_teaching(probe: Probe, teacher: Any, *, seconds: float) -> TeachingCost:
    """Some steps of ``distill teach``, as a run takes them; the teacher is changed by them."""
    from distill.teach import teach

    x, teaching = probe.x, probe.x.recipe.teach
    assert teaching is not None
    sources = {side: probe.ready(teacher, side, "teacher", seconds=seconds) for side in SIDES}
    pairs = x.corpus.split_pairs("train")
    batches = Batches(
        BatchSampler(pairs, teaching.batch_size, x.recipe.seed), sources["image"], sources["text"], x.corpus.matches
    )
    clock, saved, took = StepClock(probe.settle, probe.clock), list[float](), list[float]()
    steps = 2
    for part in range(2):  # the first two steps tell how many fit
        timings, folder = Timings(), probe.folder / f"teach-{part}"
        teach(
            teacher,
            batches,
            replace(x.teach_settings(), steps=steps),
            folder=folder,
            accelerator=x.accelerator,
            meaning="plan",
            timings=timings,
            profiler=clock,
        )
        saved.append(probe.so_far(timings, "checkpoint"))
        took = clock.steps(saved[-1])[1]
        steps = 1 + int(np.clip(seconds / max(took), _LEAST_STEPS, _MOST_STEPS))
    return TeachingCost(step=Range.of(took), checkpoint=Range.of(saved), checkpoint_bytes=bytes_in(folder))


def probe_teacher(probe: Probe, name: str, teacher: Any, *, texts_an_image: float, seconds: float) -> TeacherCost:
    """What each item and each pair costs, by calls of the real scoring at two numbers of texts an image."""
    sources = {side: probe.ready(teacher, side, "teacher", seconds=seconds) for side in SIDES}
    with evaluating(teacher):
        text, text_bytes, _ = _encoding(probe, teacher, "text", sources["text"], seconds=seconds / 6)
        _, image_bytes, first = _encoding(probe, teacher, "image", sources["image"], seconds=seconds / 12)
    many = int(np.clip(round(texts_an_image), 2 * _FEW, _MANY))
    image, pair = _scoring(probe, teacher, sources, many=many, text=text, seconds=seconds / 2)
    vectors = _vectors(probe, teacher, sources, seconds=seconds / 6)
    maps = _maps(probe, teacher, sources, seconds=seconds / 6) if probe.x.recipe.needs_maps else None
    return TeacherCost(
        name=name,
        image=image,
        text=text,
        pair=pair,
        vector=None if vectors is None else {side: each for side, (each, _) in vectors.items()},
        dim=0 if vectors is None else vectors["image"][1],
        map=maps[0] if maps is not None else None,
        map_bytes=maps[1] if maps is not None else 0,
        image_bytes=image_bytes,
        text_bytes=text_bytes,
        weight_bytes=weight_bytes(teacher),
        first_call=first,
    )


def _encoding(probe: Probe, teacher: Any, side: Side, source: Source, *, seconds: float) -> tuple[Range, float, float]:
    """Seconds an item, bytes of its memory, and what the first call took longer."""
    options = ScoreOptions()
    at_once = options.images_per_batch if side == "image" else options.texts_per_batch
    encode = teacher.encode_images if side == "image" else teacher.encode_texts
    rows = probe.sample.rows(side, at_once)
    held: dict[str, Any] = {}

    def work(number: int) -> None:
        held.update(encode(to_device(source(rows + number), probe.device)))

    first, took = repeated(work, seconds=seconds, probe=probe)
    each = Range.of([second / len(rows) for second in took])
    return each, bytes_of(held) / len(rows), max(0.0, first - each.mid * len(rows))


def _scoring(
    probe: Probe, teacher: Any, sources: dict[Side, Source], *, many: int, text: Range, seconds: float
) -> tuple[Range, Range]:
    """Seconds an image and a pair: ``score_pairs`` with few and with many texts an image, in turn."""
    number = count()

    def asked(images: int, texts: int) -> float:
        """Seconds of one call, without those of encoding its texts."""
        image_rows = probe.sample.rows("image", images, seed=next(number))
        text_rows = probe.sample.rows("text", texts, seed=next(number))
        store, began = _store(probe, teacher, f"scores-{next(number)}"), probe.clock()
        score_pairs(
            teacher,
            store,
            np.repeat(image_rows, len(text_rows)),
            np.tile(text_rows, len(image_rows)),
            image_source=sources["image"],
            text_source=sources["text"],
            options=ScoreOptions(**probe.x.recipe.score.model_dump(), device=probe.device, show_progress=False),
        )
        probe.settle()
        return max(1e-9, probe.clock() - began - text.mid * len(text_rows))

    asked(2, _FEW)  # compiles, fills caches
    one = max(asked(2, many) / 2, 1e-6)
    images = min(int(np.clip(seconds / 4 / one, 2, _MOST_IMAGES)), len(probe.sample.images))
    few, lots = list[float](), list[float]()
    while len(lots) < 3 or (len(lots) < 12 and sum(few) + sum(lots) < seconds):
        few.append(asked(images, _FEW))
        lots.append(asked(images, many))
    apart = [(b - a) / (images * (many - _FEW)) for a, b in zip(few, lots, strict=True)]
    pair = Range.of([max(0.0, each) for each in apart])
    image = Range.of([max(0.0, one / images - pair.mid * _FEW) for one in few])
    return image, pair


def _store(probe: Probe, teacher: Any, name: str) -> ScoreStore:
    return ScoreStore(
        probe.folder / name,
        teacher_identity=teacher.identity,
        corpus_fingerprint=probe.x.corpus.fingerprint,
        score_kind=teacher.score_kind,
        n_images=probe.x.corpus.n_images,
        n_texts=probe.x.corpus.n_texts,
    )


def probe_store(probe: Probe, teacher: Any, *, texts_an_image: float) -> StoreCost:
    """Bytes a pair, by a unit of the recipe's size with drawn scores, and by the table that is made of it."""
    x, rng = probe.x, np.random.default_rng(0)
    store = _store(probe, teacher, "bytes")
    pairs = min(x.recipe.score.pairs_per_unit, 4 * x.corpus.n_images * max(1, round(texts_an_image)))
    images = np.sort(rng.integers(0, x.corpus.n_images, pairs) % max(1, round(pairs / texts_an_image)))
    keys = np.unique(images * x.corpus.n_texts + rng.integers(0, x.corpus.n_texts, pairs))
    path = store.write_unit(*np.divmod(keys, x.corpus.n_texts), rng.normal(size=len(keys)).astype(np.float32))
    store.compact()
    table = bytes_in(store.folder) - path.stat().st_size
    return StoreCost(unit_bytes=path.stat().st_size / len(keys), table_bytes=table / len(keys))


def _vectors(
    probe: Probe, teacher: Any, sources: dict[Side, Source], *, seconds: float
) -> dict[Side, tuple[Range, int]] | None:
    """Seconds a vector of each side, and its width; None where there is no contrastive head."""
    from distill.embed import NoContrastiveHeadError, embed_with_teacher

    found: dict[Side, tuple[Range, int]] = {}
    for side in SIDES:
        rows, width = probe.sample.rows(side, probe.x.recipe.evaluate.batch_size), [0]

        def work(number: int, side: Side = side, rows: Any = rows, width: list[int] = width) -> None:
            made = embed_with_teacher(
                teacher, sources[side], rows + number, side, batch_size=len(rows), device=probe.device
            )
            width[0] = made.shape[1]

        try:
            _, took = repeated(work, seconds=seconds / 2, probe=probe)
        except NoContrastiveHeadError:
            return None
        found[side] = Range.of([second / len(rows) for second in took]), width[0]
    return found


def _maps(probe: Probe, teacher: Any, sources: dict[Side, Source], *, seconds: float) -> tuple[Range, float] | None:
    """Seconds and bytes a labelled pair, written to disk as a run does it."""
    from distill.maps import write_maps

    if not isinstance(teacher, MapsTeacher):
        return None
    x = probe.x
    pairs = x.corpus.split_pairs("train")
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))

    def work(number: int) -> None:
        start = (number * _MAP_PAIRS) % max(1, len(pairs) - _MAP_PAIRS)
        write_maps(
            probe.folder / f"maps-{number}",
            teacher,
            pairs[order[start : start + _MAP_PAIRS]],
            images=sources["image"],
            texts=sources["text"],
            corpus=x.corpus,
            device=probe.device,
        )

    with evaluating(teacher):
        _, took = repeated(work, seconds=seconds, probe=probe)
    count = min(_MAP_PAIRS, len(pairs))
    return Range.of([second / count for second in took]), bytes_in(probe.folder / "maps-0") / count


def bytes_in(folder: Any) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weight_bytes(model: Any) -> int:
    """Of a model's weights; 0 of one that has none."""
    import torch

    return bytes_of(model.state_dict()) if isinstance(model, torch.nn.Module) else 0
