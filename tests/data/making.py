"""Small images and sources on disk for the tests of this folder."""

import json
from io import BytesIO

import numpy as np
from PIL import Image


def pixels(seed, size=(12, 10)):
    """Random RGB pixels (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def encoded(seed, size=(12, 10), kind="PNG"):
    target = BytesIO()
    Image.fromarray(pixels(seed, size)).save(target, format=kind)
    return target.getvalue()


def image_folder(root, count=6):
    """``count`` PNG files img0.png, img1.png, ... below ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (root / f"img{number}.png").write_bytes(encoded(number))
    return root


def bomb(width=30_000, height=30_000):
    """A PNG of few bytes whose header claims very many pixels."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


class Source:
    """The same small data set written as any of the three kinds of source, with one thing made wrong.

    ``rows`` are dicts with image, captions, split; change them, then ask for a corpus.
    """

    def __init__(self, folder, kind):
        self.folder, self.kind = folder, kind
        self.images = image_folder(folder / "images")
        self.rows = [
            {"image": f"img{n}.png", "captions": [f"picture {n} one", f"picture {n} two"], "split": split}
            for n, split in enumerate(["train", "train", "train", "train", "val", "test"])
        ]

    def load(self, **options):
        from distill.data.reading import ReadOptions

        chosen = ReadOptions(**options)
        return {"karpathy": self._karpathy, "jsonl": self._jsonl, "csv": self._csv, "hub": self._hub}[self.kind](chosen)

    def _karpathy(self, options):
        from distill.data.karpathy import load_karpathy

        images = [
            {"filename": row["image"], "split": row["split"], "sentences": [{"raw": c} for c in row["captions"]]}
            for row in self.rows
        ]
        path = self.folder / "dataset.json"
        path.write_text(json.dumps({"images": images}))
        return load_karpathy(path, self.images, options=options)

    def _jsonl(self, options):
        from distill.data.manifest import load_manifest

        path = self.folder / "dataset.jsonl"
        lines = [{"image": row["image"], "caption": row["captions"], "split": row["split"]} for row in self.rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return load_manifest(path, self.images, options=options)

    def _csv(self, options):
        import csv

        from distill.data.manifest import load_manifest

        path = self.folder / "dataset.csv"
        with path.open("w", newline="") as target:
            table = csv.writer(target)
            table.writerow(["image", "caption", "split"])
            for row in self.rows:
                table.writerows([row["image"], caption, row["split"]] for caption in row["captions"])
        return load_manifest(path, self.images, options=options)

    def _hub(self, options):
        import datasets

        from distill.data.hub import load_hub

        features = datasets.Features(
            {
                "image": datasets.Image(decode=False),
                "caption": datasets.List(datasets.Value("string")),
                "split": datasets.Value("string"),
            }
        )
        cells = [
            {"image": self._content(row["image"]), "caption": row["captions"], "split": row["split"]}
            for row in self.rows
        ]
        made = datasets.Dataset.from_list(cells, features=features)
        path = self.folder / "saved"
        made.save_to_disk(str(path))
        return load_hub(path, options=options)

    def _content(self, image):
        file = self.images / image if image else None
        return None if file is None else {"bytes": file.read_bytes(), "path": None}
