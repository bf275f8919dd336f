"""A folder that was exported before, proven anew: every artefact that is there, as it is now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from distill.export import routes
from distill.export.layout import PRECISIONS, onnx_file
from distill.export.proof import Agreement
from distill.export.write import Artefact
from distill.protocols import SIDES

if TYPE_CHECKING:
    from distill.export.write import Proof

log = logging.getLogger(__name__)
Opening = Callable[[], list[routes.Route]]
_NOTHING = Agreement(float("nan"), float("nan"), float("nan"), 0.0, 0.0, {}, float("nan"))


def judge_folder(proof: Proof, *, indexed: bool) -> list[Artefact]:
    """Measure every artefact of the proof's folder; what cannot be loaded at all is judged too, with the reason."""
    folder = proof.folder
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
            proof.judged.append(Artefact(name, None, "fp32", _NOTHING, [f"cannot be used: {error}"]))
    if indexed:
        proof.judged += _index(proof)
    return proof.judged


def _index(proof: Proof) -> list[Artefact]:
    from distill.export.items import item_faults

    found = []
    for side in SIDES:
        known = dict(zip(proof.sample.ids[side].tolist(), proof.sample.reference[side], strict=True))
        try:
            said = item_faults(proof.folder, side, known)
        except Exception as error:  # as above
            said = [f"cannot be used: {error}"]
        log.info("index, %ss: %s", side, "; ".join(said) or "passes")
        whole = proof.sample.agreement({side: np.stack(list(known.values()))})
        found.append(Artefact("index", side, "fp32", whole if not said else replace(_NOTHING), said))
    return found
