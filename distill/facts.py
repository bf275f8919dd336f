"""What a run was, for a model card: data, teacher, losses, settings, and its figures with intervals."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.evaluate import Evaluation
from distill.results import TEACHER
from distill.significance import Clusters, Resampling, recall_intervals
from distill.teacher_note import noted_teacher

if TYPE_CHECKING:
    from distill.experiment import Experiment
    from distill.protocols import Ids

_NOT_SAID = {"trackers", "workers", "log_every", "checkpoint_every", "keep_checkpoints"}


def run_facts(x: Experiment, arm: str) -> dict[str, Any]:
    """Plain values; what a run of an earlier version did not note is None."""
    recipe = x.recipe
    split = x.corpus.split(recipe.evaluate.split)
    summary = _json(x, "summary.json") or {}
    teacher = recipe.teacher.model_dump(mode="json", exclude_defaults=True)
    return {
        "name": recipe.name,
        "arm": arm,
        "seed": recipe.seed,
        "data": {
            "name": x.corpus.name,
            "source": recipe.data.source,
            "fingerprint": x.corpus.fingerprint,
            "splits": {name: (len(one.images), len(one.texts)) for name, one in x.corpus.splits.items()},
            "evaluated": split.name,
        },
        "teacher": {
            "kind": recipe.teacher.kind,
            "taught": recipe.teach is not None,
            # a folder on some machine says nothing to others
            "checkpoint": _hub_id(teacher.get("checkpoint")),
            **(
                noted_teacher(x.folder) or {"identity": None, "score_kind": getattr(recipe.teacher, "score_kind", None)}
            ),
        },
        "student": _student(recipe.student.model_dump(mode="json", exclude_defaults=True)),
        "losses": [part.model_dump(mode="json", exclude_defaults=True) for part in recipe.arms[arm].losses],
        "distils": recipe.arms[arm].distils,
        "train": {
            key: value
            for key, value in recipe.train.model_dump(mode="json", exclude_none=True).items()
            if key not in _NOT_SAID
        },
        "figures": _figures(x, arm, split.images, split.texts),
        "beside": {name: found for name, found in summary.items() if name in (TEACHER, *recipe.arms) and name != arm},
    }


def _figures(x: Experiment, arm: str, images: Ids, texts: Ids) -> dict[str, Any] | None:
    """Each recall with its 95 % interval; None where the arm was not evaluated."""
    folder = x.folder / "evaluation" / arm
    if not (folder / "metrics.json").is_file():
        return None
    evaluation = Evaluation.load(folder)
    first = np.array([x.corpus.matches.images_of(int(text))[0] for text in evaluation.text_ids], np.int64)
    clusters = Clusters.of(evaluation.image_ids, first)
    intervals = recall_intervals(evaluation, clusters, Resampling(resamples=2000))
    found = evaluation.retrieval.as_dict()
    recalls = {name: {"value": found[name], "interval": intervals.get(name)} for name in found if "_r" in name}
    return {"recalls": recalls, "rsum": found["rsum"], "images": len(images), "texts": len(texts)}


def _student(told: dict[str, Any]) -> dict[str, Any]:
    return {key: _hub_id(value) if key in ("checkpoint", "vision", "text") else value for key, value in told.items()}


def _hub_id(value: Any) -> Any:
    """A hub id as it is; of a folder the last name."""
    if isinstance(value, str) and (value.startswith((".", "/", "~")) or value.count("/") > 1):
        return value.rstrip("/").rsplit("/", 1)[-1]
    return value


def _json(x: Experiment, name: str) -> dict[str, Any] | None:
    path = x.folder / name
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
