"""Captions in the layout of Karpathy's files (Flickr8k, Flickr30k, COCO): one JSON file beside a folder of images.

Layout: ``{"images": [{"filename", "filepath"?, "split", "imgid"?, "sentences": [{"raw", "sentid"?, "imgid"?}]}]}``.
Source: Karpathy and Fei-Fei, Deep Visual-Semantic Alignments, CVPR 2015.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data.corpus import BadItem, Corpus, DataError
from distill.data.folder import FolderImages
from distill.data.reading import Caption, ReadOptions, Row, read_corpus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.data.verify import Progress


def load_karpathy(
    json_path: str | Path,
    image_root: str | Path,
    *,
    options: ReadOptions | None = None,
    merge_restval: bool = True,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus of a Karpathy file.

    Args:
        json_path: The JSON file.
        image_root: Folder that ``filepath/filename`` (or ``filename``) is relative to.
        options: What to do about bad items and splits.
        merge_restval: COCO's ``restval`` images join ``train``; else they are left out. ``split_names`` may
            say otherwise.
        progress: Told how many images are checked.

    Raises:
        DataError: Anything wrong with the file, its entries or the images.
    """
    options = options or ReadOptions()
    names = {"restval": "train" if merge_restval else None, **options.split_names}
    options = replace(options, split_names=names)
    path = Path(json_path)
    images = FolderImages(image_root, options)
    return read_corpus(path.stem, _rows(path), images=images, options=options, progress=progress)


def _rows(path: Path) -> Iterator[Row | BadItem]:
    seen: dict[tuple[str, Any], str] = {}
    for number, image in enumerate(_images(path)):
        where = f"{path.name}: images[{number}]"
        if not isinstance(image, dict):
            yield BadItem(where, f"an image must be an object, found {type(image).__name__}")
            continue
        file, sentences = _file(image), image.get("sentences")
        where = f"{where} ({image.get('filename')})"
        again = _again(seen, where, ("file", file), ("imgid", image.get("imgid")))
        if again is not None:
            yield BadItem(where, again)
        elif not isinstance(sentences, list):
            yield BadItem(where, "'sentences' must be a list of captions")
        elif not image.get("split"):
            yield BadItem(where, "no 'split'; expected one such as train, val, test")
        else:
            captions: list[Caption] = []
            for place, sentence in enumerate(sentences):
                found = _caption(f"{where}.sentences[{place}]", sentence, image, seen)
                if isinstance(found, BadItem):
                    yield found
                else:
                    captions.append(found)
            yield Row(where, file, image["split"], captions)


def _images(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}; check the path") from error
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not valid JSON: {error}") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise DataError(f"{str(path)!r} is no Karpathy file: expected an object with a non-empty list 'images'")
    return images


def _file(image: dict[str, Any]) -> object:
    folder, file = image.get("filepath"), image.get("filename")
    return f"{folder}/{file}" if isinstance(folder, str) and folder and isinstance(file, str) else file


def _caption(
    where: str, sentence: object, image: dict[str, Any], seen: dict[tuple[str, Any], str]
) -> Caption | BadItem:
    if not isinstance(sentence, dict) or "raw" not in sentence:
        return BadItem(where, "a sentence must be an object with 'raw'", "caption")
    again = _again(seen, where, ("sentid", sentence.get("sentid")))
    if again is not None:
        return BadItem(where, again, "caption")
    owner = sentence.get("imgid", image.get("imgid"))
    if owner != image.get("imgid"):
        return BadItem(
            where, f"caption for no image: its imgid is {owner!r}, its image's {image.get('imgid')!r}", "caption"
        )
    return Caption(where, sentence["raw"])


def _again(seen: dict[tuple[str, Any], str], where: str, *ids: tuple[str, Any]) -> str | None:
    """Why an id is a duplicate, or None; remembers the new ones."""
    for name, value in ids:
        if value is None or not isinstance(value, str | int):
            continue
        first = seen.setdefault((name, value), where)
        if first != where:
            return f"duplicate id: {name} {value!r} is also that of {first}"
    return None
