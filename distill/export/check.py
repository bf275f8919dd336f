"""A folder that was exported before, proven anew: every artefact that is there, as it is now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from distill.export import routes
from distill.export.layout import PRECISIONS, onnx_file
from distill.export.proof import NOTHING
from distill.export.write import Artefact
from distill.protocols import SIDES

if TYPE_CHECKING:
    from distill.export.items import Known
    from distill.export.write import Proof
    from distill.protocols import Side

log = logging.getLogger(__name__)
Opening = Callable[[], list[routes.Route]]


def judge_folder(proof: Proof, *, gone: Sequence[str] = (), items: Mapping[Side, Known]) -> list[Artefact]:
    """Measure every artefact of the proof's folder; what cannot be loaded at all is judged too, with the reason.

    Args:
        proof: Of the folder as it is.
        gone: Files that were exported and are there no more.
        items: By side what the indexes have to hold; empty where none was exported.
    """
    folder = proof.folder
    if gone:
        proof.judged.append(Artefact("files", None, "fp32", NOTHING, [f"gone: {', '.join(gone)}"]))
    openings: dict[str, Opening] = {}
    if (folder / "model.safetensors").is_file():
        openings["transformers"] = partial(routes.transformers_routes, folder)
    if (folder / "modules.json").is_file():
        openings["sentence-transformers"] = partial(routes.sentence_transformers_routes, folder)
    for precision in PRECISIONS:
        if any(onnx_file(folder, side, precision).is_file() for side in SIDES):
            openings[f"onnx {precision}"] = partial(routes.onnx_routes, folder, precision)
    openings["torch.export"] = partial(routes.program_routes, folder)
    openings["openvino"] = partial(routes.openvino_routes, folder)
    for name, opened in openings.items():
        try:
            for route in opened():
                proof.judge(route)
        except Exception as error:  # whatever a loader raises, its users would meet
            log.info("%s: cannot be used: %s", name, error)
            proof.judged.append(Artefact(name, None, "fp32", NOTHING, [f"cannot be used: {error}"]))
    for precision in PRECISIONS[1:]:
        proof.judge_pair(f"onnx {precision}", precision)
    proof.judged += _index(proof, items)
    return proof.judged


def _index(proof: Proof, items: Mapping[Side, Known]) -> list[Artefact]:
    from distill.export.items import item_faults

    found = []
    for side, known in items.items():
        try:
            said = item_faults(proof.folder, side, known, corpus=proof.sample.corpus)
        except Exception as error:  # as above
            said = [f"cannot be used: {error}"]
        log.info("index, %ss: %s", side, "; ".join(said) or "passes")
        found.append(Artefact("index", side, "fp32", NOTHING, said))
    return found
