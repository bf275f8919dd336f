"""Measuring ways of doing the same thing in turn, and showing what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

Quick = Annotated[bool, typer.Option("--quick", help="small sizes: does it run; the ratios mean nothing")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="file for the figures")]


def best_seconds(
    ways: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device | None = None
) -> dict[str, float]:
    """Least seconds of each way over so many rounds, in which the ways take turns, each twice in a row.

    Twice, so that no way pays for the caches that the one before it left; the least, because whatever else runs on the
    machine only ever adds.
    """
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            for _ in range(2):
                began = time.perf_counter()
                way()
                if device is not None and device.type == "cuda":
                    import torch

                    torch.cuda.synchronize(device)
                found[name] = min(found[name], time.perf_counter() - began)
    return found


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers on the right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row))
    Console().print(table)


def write_json(path: Path | None, figures: Mapping[str, object]) -> None:
    """Write the figures where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
