import json

import pytest
import torch

from distill import feature_files
from distill.features import write_features

N = 23


def masked(rows):
    mask = torch.from_numpy(rows)[:, None] % 3 >= torch.arange(3)  # one to three tokens
    return {"tokens": torch.where(mask, 5, 9), "token_mask": mask.long()}


def test_full_disk_is_said_after_the_first_batch(tmp_path, monkeypatch):
    calls = []

    def produce(rows):
        calls.append(rows)
        return masked(rows)

    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(feature_files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="23 items need about"):
        write_features(tmp_path / "f", "id", N, produce, batch_size=2)
    assert len(calls) < 6


def test_manifest_is_written_last_and_says_all(tmp_path):
    write_features(tmp_path / "f", "id", N, masked)
    about = json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert about["rows"] == N
    assert about["identity"] == "id"
    assert set(about["sizes"]) == {path.name for path in (tmp_path / "f").glob("*.npy")}
    assert about["arrays"]["tokens"] == {
        "stored": "<i8", "restored": "int64", "tail": [], "mask": "token_mask", "fill": 9,
    }  # fmt: skip
