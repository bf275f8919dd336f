import numpy as np

from distill import pairtable


def test_write_table_in_many_buckets_equals_sorting_all(tmp_path):
    rng = np.random.default_rng(1)
    parts = []
    for _ in range(7):
        keys = np.unique(rng.integers(0, 5000, 400) if rng.random() < 0.5 else rng.integers(0, 10**9, 400))
        parts.append((keys, rng.normal(size=len(keys)).astype(np.float32)))
    kept = pairtable.write_table(tmp_path, lambda: parts, key_end=10**9, block_pairs=100)
    expected = {key: score for keys, scores in parts for key, score in zip(keys.tolist(), scores, strict=True)}
    keys, scores = (np.load(tmp_path / name)[:kept] for name in ("keys.npy", "scores.npy"))
    assert kept == len(expected) < sum(len(keys) for keys, _ in parts)
    assert keys.tolist() == sorted(expected)
    assert scores.tolist() == [expected[key] for key in sorted(expected)]
