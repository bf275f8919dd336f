"""Images that lie as files below one folder, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from distill.data.corpus import DataError
from distill.data.pictures import pictures_of_paths
from distill.data.verify import VerdictFile, verdicts_of_files

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from distill.data.pictures import Pictures
    from distill.data.reading import ReadOptions
    from distill.data.verify import Verdict


class FolderImages:
    """Image files named relative to a root folder; nothing outside it is ever opened.

    Raises:
        DataError: There is no such folder.
    """

    def __init__(self, root: str | Path, options: ReadOptions) -> None:
        given = Path(root)
        if not given.is_dir():
            raise DataError(
                f"image folder {str(given)!r} does not exist or is no folder; point image_root at the images"
            )
        self._root = Path(os.path.realpath(given))
        self._options = options

    def locate(self, image: object) -> str:
        """Path of an image relative to the root, with forward slashes.

        Raises:
            DataError: No text, absolute, upward, or (through a link) outside the root.
        """
        if not isinstance(image, str) or not image.strip() or "\0" in image:
            raise DataError(f"caption for no image: the image path is empty or no text ({image!r})")
        foreign = PureWindowsPath(image)  # understands both kinds of slash and drive letters
        if foreign.anchor or ".." in foreign.parts:
            raise DataError(
                f"image path {image!r} is absolute or leads upward; "
                "give paths relative to the image folder, without '..'"
            )
        real = os.path.realpath(self._root / image)
        if not real.startswith(f"{self._root}{os.sep}".replace(os.sep * 2, os.sep)):
            raise DataError(
                f"image path {image!r} leads outside the image folder through a link; copy the file into it"
            )
        return Path(image).as_posix()

    def verdicts(self, keys: Sequence[str]) -> Generator[Verdict, None, None]:
        """Whether each file can be decoded, from the cache where it has not changed."""
        limit = self._options.max_pixels
        known = VerdictFile(self._options.cache, f"files below {self._root}", max_pixels=limit)
        paths = [self._root / key for key in keys]
        return verdicts_of_files(paths, known, max_pixels=limit, workers=self._options.workers)

    def pictures(self, keys: Sequence[str], names: Sequence[str], fingerprints: Sequence[str]) -> Pictures:
        """The files, by absolute path."""
        paths = [self._root / key for key in keys]
        return pictures_of_paths(paths, names=names, fingerprints=fingerprints, max_pixels=self._options.max_pixels)
