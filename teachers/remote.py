"""A teacher behind a URL: any that ``distill serve teacher`` serves, asked as if it were here.

Its identity and kind of score are the served teacher's, so that scores go into the same store. What travels are rows,
where both hold the same corpus, else texts and the bytes of picture files. Every answer says which teacher gave it.

Shape key: ``N`` items, ``P`` pairs, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distill.wire import Limits, read_embedded, read_scored
from teachers.remote_servers import OtherTeacherError, RemoteOptions, Servers, TooLargeError

if TYPE_CHECKING:
    from torch import Tensor

    from distill.protocols import Ids, Image, Inputs, Memory, ScoreKind, Side


class RemoteTeacher:
    """Satisfies ``distill.protocols.Teacher`` and ``Distant``; no torch module, and nothing of it is on a device."""

    images_at_once, files_at_once = 256, 32

    def __init__(
        self,
        urls: Sequence[str],
        *,
        identity: str | None = None,
        token: str | None = None,
        options: RemoteOptions | None = None,
        heed: Callable[[], object] = lambda: None,
    ) -> None:
        """Connect, and wait for a service that is still loading.

        Args:
            urls: servers of one and the same teacher.
            identity: that it must have; that of the first answer where absent.
            token: that the service asks for; ``DISTILL_TOKEN`` where absent.
            options: how it is asked.
            heed: called while waiting; raises where the process is to end.

        Raises:
            RemoteTeacherError: no server answers, or the token is wrong or no token.
            OtherTeacherError: servers have different teachers.
        """
        self.servers = Servers(urls, identity=identity, token=token, options=options or RemoteOptions(), heed=heed)
        self._info = self.servers.infos[0]
        self._corpora = [(info.get("corpus") or {}).get("fingerprint") for info in self.servers.infos]
        self.identity = self.servers.identity
        self.score_kind: ScoreKind = self._info["score_kind"]

    def __repr__(self) -> str:
        return f"{self._info['teacher']} at {self.servers}"

    def answer_within(self, seconds: float) -> None:
        """Give up after about so long from now on: somebody waits for every answer."""
        self.servers.answer_within(seconds)

    def close(self) -> None:
        """End the connections; who waits to ask again, does not."""
        self.servers.close()

    # --- a teacher ----------------------------------------------------------------------------------------------------

    def knows(self, corpus_fingerprint: str) -> bool:
        """Whether all servers have this corpus, so that rows are enough."""
        return set(self._corpora) == {corpus_fingerprint}

    def prepare_rows(self, side: Side, rows: Ids) -> Inputs:
        """{"row": (N, 1)}."""
        return {"row": torch.from_numpy(np.asarray(rows, np.int64))[:, None]}

    def prepare_files(self, contents: Sequence[bytes]) -> Inputs:
        """{"file": (N, L) uint8, "file_mask": (N, L)}."""
        return _padded("file", contents)

    def prepare_images(self, images: Sequence[Image]) -> Inputs:
        """As ``prepare_files``, of lossless files of the pixels."""
        return self.prepare_files([_as_png(image) for image in images])

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """{"text": (N, L) uint8 of UTF-8, "text_mask": (N, L)}."""
        return _padded("text", [text.encode() for text in texts])

    def encode_images(self, inputs: Inputs) -> Memory:
        """The inputs: the service encodes them, and keeps what it made of them."""
        return inputs

    def encode_texts(self, inputs: Inputs) -> Memory:
        """The inputs."""
        return inputs

    def score(self, images: Memory, texts: Memory, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """Raw scores (P,) float32, asked for in requests that overlap.

        Raises:
            RemoteTeacherError: the service gives none, with what it said last.
            OtherTeacherError: another teacher answers.
        """
        left, right = image_rows.cpu().numpy(), text_rows.cpu().numpy()
        order = np.argsort(left, kind="stable")  # an image's pairs travel together
        size = self.servers.options.pairs_per_request
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        found = np.empty(len(order), np.float32)

        def ask(part: Ids) -> None:
            self._check_bytes(images, left[part])
            found[part] = self._scored(images, texts, left[part], right[part])

        self.servers.each(partial(_in_halves, ask), parts)
        return torch.from_numpy(found).to(image_rows.device)

    @property
    def embed(self) -> Callable[[Side, Inputs], Tensor] | None:
        """Gives the unit vectors (N, D) of items by the teacher's contrastive head; None where it has none."""
        return self._embedded if self._info.get("dim") else None

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def _most_bytes(self) -> int:
        """Of the pictures of a request: the service's limit, less what else a request holds."""
        return int(self._info["limits"].get("body_bytes", Limits.body_bytes)) * 3 // 4

    def _check_bytes(self, items: Memory, rows: Ids) -> None:
        """Raise TooLargeError before pictures travel that would be refused on their arrival."""
        if "file" in items and (found := int(items["file_mask"][np.unique(rows)].sum())) > self._most_bytes:
            raise TooLargeError(f"a picture file of {found} bytes: {self.servers} take requests of {self._most_bytes}")

    def _scored(self, images: Memory, texts: Memory, left: Ids, right: Ids) -> np.ndarray[Any, np.dtype[np.float32]]:
        wanted_images, image_places = np.unique(left, return_inverse=True)
        wanted_texts, text_places = np.unique(right, return_inverse=True)
        body = {
            **self._named("image", images, wanted_images),
            **self._named("text", texts, wanted_texts),
            "image_rows": image_places.astype(np.int64),
            "text_rows": text_places.astype(np.int64),
        }

        def read(content: bytes) -> tuple[str, Any]:
            answer = read_scored(content, len(left))
            if answer.score_kind != self.score_kind:
                raise OtherTeacherError(f"it gives {answer.score_kind} where it gave {self.score_kind}")
            return answer.identity, answer.scores

        found: np.ndarray[Any, np.dtype[np.float32]] = self.servers.ask("/score", body, read)
        return found

    def _embedded(self, side: Side, inputs: Inputs) -> Tensor:
        count = len(next(iter(inputs.values())))
        size = max(1, min(self.servers.options.pairs_per_request, int(self._info["limits"]["images"])))
        found: list[Any] = [None] * count

        def ask(rows: Ids) -> None:
            self._check_bytes(inputs, rows)

            def read(content: bytes) -> tuple[str, Any]:
                answer = read_embedded(content, len(rows))
                return answer.identity, answer.vectors

            vectors = self.servers.ask("/embed", self._named(side, inputs, rows), read)
            for row, vector in zip(rows.tolist(), vectors, strict=True):
                found[row] = vector

        parts = [np.arange(start, min(count, start + size)) for start in range(0, count, size)]
        self.servers.each(partial(_in_halves, ask), parts)
        return torch.from_numpy(np.stack(found)).to(next(iter(inputs.values())).device)

    def _named(self, side: Side, items: Memory, rows: Ids) -> dict[str, Any]:
        """The items of these rows, as a request names them."""
        chosen = torch.from_numpy(rows)
        if "row" in items:
            return {f"{side}_ids": items["row"].cpu()[chosen, 0].numpy(), "corpus": self._corpora[0]}
        name = "file" if side == "image" else "text"
        contents = _unpadded(items[name].cpu()[chosen], items[f"{name}_mask"].cpu()[chosen])
        return {f"{side}s": contents if side == "image" else [content.decode() for content in contents]}


def _in_halves(ask: Callable[[Ids], object], rows: Ids) -> None:
    """Ask about all at once, else about either half: how much a request may hold is for the service to say."""
    try:
        ask(rows)
    except TooLargeError:
        if len(rows) == 1:
            raise
        _in_halves(ask, rows[: len(rows) // 2])
        _in_halves(ask, rows[len(rows) // 2 :])


def _as_png(image: Image) -> bytes:
    out = BytesIO()
    image.convert("RGB").save(out, "PNG", compress_level=1)
    return out.getvalue()


def _padded(name: str, contents: Sequence[bytes]) -> Inputs:
    longest = max((len(content) for content in contents), default=0)
    numbers = torch.zeros((len(contents), longest), dtype=torch.uint8)
    mask = torch.zeros((len(contents), longest), dtype=torch.bool)
    for row, content in enumerate(contents):
        numbers[row, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        mask[row, : len(content)] = True
    return {name: numbers, f"{name}_mask": mask}


def _unpadded(numbers: Tensor, mask: Tensor) -> list[bytes]:
    lengths = mask.sum(dim=1).tolist()
    return [row[:length].numpy().tobytes() for row, length in zip(numbers, lengths, strict=True)]


def read_token(file: str | Path | None) -> str | None:
    """The content of a file; None where no file is given."""
    return None if file is None else Path(file).expanduser().read_text(encoding="utf-8")
