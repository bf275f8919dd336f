"""Published peak figures of GPUs, for a plan on a machine that has none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What its maker publishes: dense arithmetic, without sparsity.

    Attributes:
        words: The model as its driver names it, for people.
        marks: Of which all stand in the driver's name of it, in small letters.
        float32: TFLOP/s of float32 by its ordinary units, which is what torch uses unless told otherwise.
        half: TFLOP/s of its matrix units at bfloat16, or at float16 where it has no bfloat16.
        memory_gib: Of the card.
    """

    words: str
    marks: tuple[str, ...]
    float32: float
    half: float
    memory_gib: float


GPUS = {
    "t4": Gpu("Tesla T4", ("t4",), 8.1, 65, 16),
    "v100": Gpu("Tesla V100 SXM2 32 GB", ("v100",), 15.7, 125, 32),
    "a10g": Gpu("A10G", ("a10g",), 31.2, 70, 24),
    "l4": Gpu("L4", (" l4",), 30.3, 121, 24),
    "l40s": Gpu("L40S", ("l40s",), 91.6, 362, 48),
    "rtx4090": Gpu("GeForce RTX 4090", ("4090",), 82.6, 165, 24),
    "a100": Gpu("A100 SXM 80 GB", ("a100",), 19.5, 312, 80),
    "h100": Gpu("H100 SXM", ("h100",), 67, 989, 80),
    "h200": Gpu("H200 SXM", ("h200",), 67, 989, 141),
    "b200": Gpu("B200", ("b200",), 75, 2250, 180),
}
"""By the name that ``--gpu`` takes; from the makers' data sheets."""


def gpu_named(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ValueError: it holds none of that name; lists those it holds.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise ValueError(
            f"--gpu {name}: not in the table, which has {', '.join(GPUS)}; for any other GPU give the nearest of these "
            "and how many times as fast as this machine it is: --speedup X"
        )
    return found


def is_that(gpu: Gpu, driver_name: str | None) -> bool:
    """Whether the card that a driver names so is this one."""
    return driver_name is not None and all(mark in f" {driver_name.lower()}" for mark in gpu.marks)
