"""Perceptual hashes: 64 bits of what a picture looks like, alike for near-duplicates, kept on disk for a corpus."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from distill.durable import write_atomically
from distill.protocols import fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distill.data.corpus import Corpus
    from distill.protocols import Ids, Image

Bits: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
Flags: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

UNLIKE = 65
"""Distance of pictures that cannot be compared: more than any two hashes have."""
_VERSION = 1  # of the arithmetic below: another one makes other files
_SIDE = 32
_BLOCK = 256  # pictures in memory together
_FLAT = 2.0  # grey levels of 255: root mean square of the hashed frequencies below which there is nothing to see
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Hashes:
    """Of some rows of a corpus."""

    rows: Ids  # (N,) image rows, ascending
    bits: Bits  # (N,)
    flat: Flags  # (N,) bool: so even a picture that its bits say nothing

    def distance(self, one: Ids, other: Ids) -> Ids:
        """Bits in which the pictures one[p] and other[p] differ, (P,); ``UNLIKE`` where one is flat or has no hash."""
        places = [np.minimum(np.searchsorted(self.rows, ids), max(len(self.rows) - 1, 0)) for ids in (one, other)]
        if not len(self.rows):
            return np.full(len(one), UNLIKE, np.int64)
        known = (self.rows[places[0]] == one) & (self.rows[places[1]] == other)
        known &= ~(self.flat[places[0]] | self.flat[places[1]])
        differing = np.bitwise_count(self.bits[places[0]] ^ self.bits[places[1]]).astype(np.int64)
        return np.where(known, differing, UNLIKE)


def perceptual_hashes(images: Sequence[Image]) -> tuple[Bits, Flags]:
    """DCT hash (N,) of each picture and whether it is too flat (N,) to have one.

    Grey, 32 x 32, two-dimensional DCT-II; of the 64 lowest frequencies apart from the mean, a bit says which lie above
    their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"). Colour is not
    seen. A picture without contrast in these frequencies has bits that rounding decides: it is called flat, and is
    nobody's near-duplicate by its hash.
    """
    import PIL.Image
    from scipy.fft import dctn

    if not images:
        return np.zeros(0, np.uint64), np.zeros(0, np.bool_)
    box = PIL.Image.Resampling.BOX
    small = [np.asarray(image.convert("L").resize((_SIDE, _SIDE), box), np.float64) for image in images]
    spectra = dctn(np.stack(small), axes=(1, 2), norm="ortho")  # (N, 32, 32)
    low = spectra[:, *_lowest(64)]  # (N, 64)
    above = low > np.median(low, axis=1, keepdims=True)
    bits = (above.astype(np.uint64) << np.arange(64, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    contrast = np.sqrt(np.square(low).sum(axis=1)) / _SIDE  # in grey levels, since the transform is orthonormal
    return bits, contrast < _FLAT


def _lowest(count: int) -> tuple[Ids, Ids]:
    """(rows, columns) of the lowest frequencies of a spectrum, the mean left out."""
    row, column = np.indices((_SIDE, _SIDE)).reshape(2, -1)
    order = np.lexsort((row, row + column))[1 : count + 1]
    return row[order], column[order]


def corpus_hashes(corpus: Corpus, rows: Ids, cache: Path) -> Hashes:
    """Hashes of the rows (N,), ascending; computed once and kept in ``cache/hashes``, whatever else the corpus holds.

    Pictures are decoded in blocks and never all in memory.
    """
    from distill.progress import Progress

    contents = [corpus.image_fingerprints[row] for row in rows.tolist()]
    path = cache / "hashes" / f"{fingerprint('perceptual hash', _VERSION, contents)}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            return Hashes(rows, kept["bits"], kept["flat"])
    bits, flat = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.bool_)
    with Progress(len(rows), "perceptual hashes", unit="images") as progress:
        for start in range(0, len(rows), _BLOCK):
            part = slice(start, start + _BLOCK)
            bits[part], flat[part] = perceptual_hashes(corpus.load_images(rows[part]))
            progress.advance(len(rows[part]))
    write_atomically(path, partial(_save, bits, flat))
    if flat.any():
        log.info("%d of %d pictures are too flat for a perceptual hash: near nobody by it", flat.sum(), len(rows))
    return Hashes(rows, bits, flat)


def _save(bits: Bits, flat: Flags, file: Any) -> None:
    np.savez(file, bits=bits, flat=flat)
