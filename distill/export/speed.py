"""How fast an exported folder's towers are beside the student in torch, in paired rounds on this processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.bench.rounds import Stage, State, Task, costs, ratio_of, time_rounds
from distill.cores import own_threads
from distill.export.layout import PRECISIONS, onnx_file
from distill.export.runtime import ImagePreparation, TextPreparation, onnx_tower
from distill.protocols import SIDES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill.export.proof import Sample
    from distill.protocols import Side

_BATCHES = (1, 32)
_TORCH = "torch"


def tower_times(student: Any, folder: Path, sample: Sample, *, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds an item of every tower file, preparation left out, on the sample's own items; none in 0 seconds.

    A row: side, batch, name, threads, ``ms`` (median), ``p95``, and ``times_torch``: how many times as fast as the
    student in torch, the median over rounds that both took part in, with its 95 % interval where there is one.
    """
    from distill.bench.surroundings import limited_threads

    rows: list[dict[str, Any]] = []
    if not seconds:
        return rows
    with limited_threads(own_threads()):
        for side in SIDES:
            for batch in _BATCHES:
                tasks = _tasks(student, folder, sample, side=side, batch=batch)
                timed = time_rounds(tasks, base=_TORCH, seconds=seconds, label=f"timing {side}s by {batch}")
                for name, one in timed.items():
                    whole, ratio = costs(one)[0], ratio_of(timed[_TORCH], one)
                    rows.append(
                        {
                            "side": side,
                            "batch": batch,
                            "name": name,
                            "threads": own_threads(),
                            "ms": whole.median,
                            "p95": whole.p95,
                            "times_torch": ratio.median,
                            "interval": None if ratio.low is None else [ratio.low, ratio.high],
                        }
                    )
    return rows


def _tasks(student: Any, folder: Path, sample: Sample, *, side: Side, batch: int) -> list[Task]:
    """Every call takes the next items of the sample, so that texts are of their real lengths."""
    prepare: Any = TextPreparation(folder) if side == "text" else ImagePreparation(folder)
    ids = sample.ids[side]
    batches: list[Any] = []
    for start in range(0, min(len(ids), 8 * batch), batch):
        rows = ids[start : start + batch]
        if len(rows) == batch or not batches:
            batches.append(prepare(sample.items(side, rows)))
    ways = {_TORCH: _by_torch(student, side)}
    for precision in PRECISIONS:
        path = onnx_file(folder, side, precision)
        if path.is_file():
            ways[f"onnx {precision}"] = onnx_tower(path)
    return [Task(name, (Stage("tower", _in_turn(run, batches)),), batch) for name, run in ways.items()]


def _in_turn(run: Callable[[Any], object], batches: Sequence[Any]) -> Callable[[State], object]:
    return lambda state: run(batches[state["number"] % len(batches)])


def _by_torch(student: Any, side: Side) -> Callable[[Any], object]:
    import torch

    tower = student.standalone(side)

    @torch.inference_mode()
    def run(inputs: Any) -> object:
        return tower(*(torch.from_numpy(inputs[name]) for name in tower.input_names))

    return run
