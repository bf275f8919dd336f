"""The queue before the teacher: who waits, who is turned away, and what is scored together.

Two threads. The first takes what waits, oldest first, until a pack is full, and prepares it: decodes pictures, cuts
texts into tokens. The second scores packs. While it does, the next pack fills, so that many small requests cost the
teacher no more than one large one, and a lone request waits for nobody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from distill.data.pictures import DataError
from distill.embed import NoContrastiveHeadError, teacher_encoder
from distill.inference import evaluating, to_device
from distill.teacher_service.items import Items
from distill.teacher_service.memories import Memories
from distill.teacher_service.packs import KnownScores, Packs, Pairs
from distill.wire import Embedded, RefusedError, Scored

if TYPE_CHECKING:
    import torch

    from distill.protocols import Ids, Side, Teacher
    from distill.store import ScoreStore
    from distill.teacher_service.items import Item
    from distill.teacher_service.packs import Found
    from distill.teacher_service.requests import EmbedRequest, ScoreRequest

log = logging.getLogger(__name__)


IDLE_S = 0.5  # without requests, after which scores are written though they do not fill a file


class BusyError(Exception):
    """As much waits as may; come again after ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"try again in {seconds:.0f} s")
        self.seconds = seconds


class EndedError(Exception):
    """Nothing is taken any more."""


class TooLateError(Exception):
    """A request's deadline has passed before its turn."""


@dataclass(frozen=True)
class EngineSettings:
    """Sizes.

    pairs_per_pack: pairs scored together.
    images_per_batch: images encoded together.
    texts_per_batch: texts encoded together.
    image_memory_bytes: of encoded images that are kept.
    text_memory_bytes: of encoded texts that are kept.
    waiting_pairs: pairs that may wait or be worked on; more are turned away.
    pairs_per_unit: scores that go into one file of the store; fewer where nothing waits.
    remembered_pairs: scores of pairs without rows of the corpus that are kept in memory.
    """

    pairs_per_pack: int = 1024
    images_per_batch: int = 16
    texts_per_batch: int = 256
    image_memory_bytes: int = 1 << 30
    text_memory_bytes: int = 1 << 28
    waiting_pairs: int = 32_768
    pairs_per_unit: int = 4096
    remembered_pairs: int = 1 << 18


@dataclass
class Counts:
    """What was done so far."""

    asked: int = 0  # pairs that the teacher read
    served: int = 0  # pairs that it need not
    packs: int = 0
    embedded: int = 0  # items
    seconds: float = 0.0  # that packs took
    turned_away: int = 0  # requests


@dataclass(eq=False)
class _Job:
    """A request, or a part of one."""

    weight: int  # pairs, or items
    deadline: float  # on the monotonic clock
    future: Future[Any]
    prepare: Callable[[], Any]
    prepared: Any = None


@dataclass(eq=False)
class _Parts:
    """The parts of a request and what came of them so far."""

    scores: np.ndarray[Any, Any]
    waiting: int
    answer: Future[Scored] = field(default_factory=Future)
    asked: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Engine:
    """A teacher for many clients. Threads may share one."""

    def __init__(
        self,
        teacher: Teacher,
        items: dict[Side, Items],
        store: ScoreStore | None,
        settings: EngineSettings,
        device: torch.device | None = None,
    ) -> None:
        """A frozen teacher on ``device``; ``store``: of its scores on the corpus that ``items`` know, if any."""
        self.teacher, self.items, self.settings = teacher, items, settings
        sizes: dict[Side, tuple[int, int]] = {
            "image": (settings.images_per_batch, settings.image_memory_bytes),
            "text": (settings.texts_per_batch, settings.text_memory_bytes),
        }
        self.memories = {
            side: Memories(items[side], teacher, batch=batch, kept_bytes=kept, device=device)
            for side, (batch, kept) in sizes.items()
        }
        self._known = KnownScores(store, pairs_per_unit=settings.pairs_per_unit, remembered=settings.remembered_pairs)
        images, texts = self.memories["image"], self.memories["text"]
        self._packs = Packs(teacher, images, texts, self._known, pairs_per_call=settings.pairs_per_pack)
        self._device = device
        self.counts = Counts()
        self._waiting: deque[_Job] = deque()
        self._open: set[_Job] = set()  # that wait or are worked on
        self._state = threading.Condition()
        self._closing = False
        self._ready: list[_Job] | None = None  # the next pack, prepared
        self._prepared_all = self._failed = False
        self._rate = 0.0  # pairs a second, lately
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("preparing", self._prepare_packs), ("scoring", self._score_packs))
        ]
        for thread in self._threads:
            thread.start()

    # --- asking -------------------------------------------------------------------------------------------------------

    def score(self, request: ScoreRequest, deadline: float) -> Future[Scored]:
        """The answer to a request, to come; cancelling it takes back what has not begun.

        Raises:
            BusyError: too much waits.
            EndedError: the engine takes nothing any more.
            RefusedError: a row is outside the corpus.
        """
        image_items = self._named(request, "image")
        text_items = self._named(request, "text")
        image_rows, text_rows = cast("Ids", request.image_rows), cast("Ids", request.text_rows)
        order = np.argsort(image_rows, kind="stable")  # an image's pairs go into one part
        cuts = range(0, len(order), self.settings.pairs_per_pack)
        parts = [order[start : start + self.settings.pairs_per_pack] for start in cuts]
        whole = _Parts(np.empty(len(order), np.float32), len(parts))
        jobs = []
        for part in parts:
            pairs = _part(image_items, text_items, image_rows[part], text_rows[part])
            job = _Job(len(part), deadline, Future(), partial(self._prepared, pairs))
            job.future.add_done_callback(partial(self._join, whole, part))
            jobs.append(job)
        self._enqueue(jobs)
        whole.answer.add_done_callback(lambda _: [job.future.cancel() for job in jobs])  # what has not begun need not
        return whole.answer

    def embed(self, request: EmbedRequest, deadline: float) -> Future[Embedded]:
        """Unit vectors of items by the teacher's contrastive head, to come.

        Raises:
            BusyError: too much waits.
            EndedError: the engine takes nothing any more.
            RefusedError: a row is outside the corpus.
        """
        side: Side = "image" if request.images is not None or request.image_ids is not None else "text"
        items = self._named(request, side)
        job = _Job(len(items), deadline, Future(), partial(self._embedded, side, items))
        self._enqueue([job])
        return job.future

    @property
    def waiting(self) -> int:
        """Pairs that wait or are worked on."""
        return sum(job.weight for job in list(self._open))

    @property
    def alive(self) -> bool:
        """Whether requests would be answered."""
        return not self._closing and all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Answer what waits, keep all scores, end the threads."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        for thread in self._threads:
            thread.join()
        for memories in self.memories.values():
            memories.close()

    def _named(self, request: Any, side: Side) -> list[Item]:
        ids, contents = getattr(request, f"{side}_ids"), getattr(request, f"{side}s")
        return self.items[side].of_rows(ids) if ids is not None else self.items[side].of_contents(contents)

    def _enqueue(self, jobs: list[_Job]) -> None:
        with self._state:
            if not self.alive:
                raise EndedError
            waiting = self.waiting
            # a request that is larger than all that may wait is taken where nothing else waits
            if waiting and waiting + sum(job.weight for job in jobs) > self.settings.waiting_pairs:
                self.counts.turned_away += 1
                raise BusyError(min(30.0, max(1.0, waiting / self._rate if self._rate else 1.0)))
            if len(self._waiting) > 2 * len(self._open):  # most of them were taken back
                self._waiting = deque(job for job in self._waiting if not job.future.cancelled())
            self._open.update(jobs)
            self._waiting += jobs
            self._state.notify_all()
        for job in jobs:
            job.future.add_done_callback(partial(self._leave, job))

    def _leave(self, job: _Job, _: Future[Any]) -> None:
        self._open.discard(job)
        job.prepare = _nothing  # with the pictures in it: a job that was taken back stays in the queue for a while

    def _join(self, whole: _Parts, part: Ids, done: Future[Found]) -> None:
        """One part of a request has come to its end."""
        if done.cancelled() or whole.answer.done():
            return
        error = done.exception()
        with whole.lock:
            if error is None:
                whole.scores[part] = done.result().scores
                whole.asked += done.result().asked
                whole.waiting -= 1
            last = whole.waiting == 0
        if error is not None:
            _settle(whole.answer, error=error)
        elif last:
            count, teacher = len(whole.scores), self.teacher
            answer = Scored(whole.scores, teacher.score_kind, teacher.identity, whole.asked, count - whole.asked)
            _settle(whole.answer, answer)

    # --- the first thread ---------------------------------------------------------------------------------------------

    def _prepare_packs(self) -> None:
        while True:
            with self._state:
                # not before the last pack is taken: whatever comes until then can be scored together
                self._state.wait_for(self._may_prepare)
                if self._failed or not self._waiting:
                    self._prepared_all = True
                    self._state.notify_all()
                    return
                pack: list[_Job] = []
                weight = 0
                while self._waiting and (not pack or weight + self._waiting[0].weight <= self.settings.pairs_per_pack):
                    pack.append(self._waiting.popleft())
                    weight += pack[-1].weight
            begun = [job for job in pack if self._begun(job)]
            with self._state:
                self._ready = begun
                self._state.notify_all()

    def _begun(self, job: _Job) -> bool:
        """Prepare a job; False where it has ended, in whatever way."""
        if job.future.done():
            return False
        if self._is_late(job) or not job.future.set_running_or_notify_cancel():
            return False
        try:
            job.prepared = job.prepare()
        except (RefusedError, DataError) as error:
            _settle(job.future, error=error)
            return False
        except Exception as error:
            log.exception("a request could not be prepared")
            _settle(job.future, error=error)
            return False
        return True

    def _prepared(self, pairs: Pairs) -> Pairs:
        images, texts = (self.memories[side] for side in ("image", "text"))
        prepared = images.prepare(pairs.images), texts.prepare(pairs.texts)
        return Pairs(pairs.images, pairs.texts, pairs.image_rows, pairs.text_rows, prepared)

    # --- the second thread --------------------------------------------------------------------------------------------

    def _score_packs(self) -> None:
        try:
            with evaluating(self.teacher):
                while (pack := self._next()) is not None:
                    began = time.perf_counter()
                    pairs = [job for job in pack if isinstance(job.prepared, Pairs)]
                    self._answer(pairs)
                    for job in pack:
                        if not isinstance(job.prepared, Pairs):
                            self._run(job)
                    self._note(sum(job.weight for job in pairs), time.perf_counter() - began)
        finally:
            self._known.flush()

    def _next(self) -> list[_Job] | None:
        with self._state:
            idle = not self._state.wait_for(self._has_next, timeout=IDLE_S)
        if idle:  # without the lock: who comes meanwhile need not wait for the disk
            self._known.flush()
        with self._state:
            self._state.wait_for(self._has_next)
            pack, self._ready = self._ready, None
            self._state.notify_all()
        return None if pack is None else [job for job in pack if not self._is_late(job)]

    def _may_prepare(self) -> bool:
        return self._failed or (self._ready is None and (bool(self._waiting) or self._closing))

    def _has_next(self) -> bool:
        return self._ready is not None or self._prepared_all or self._failed

    @staticmethod
    def _is_late(job: _Job) -> bool:
        if time.monotonic() <= job.deadline:
            return False
        _settle(job.future, error=TooLateError())
        return True

    def _answer(self, jobs: list[_Job]) -> None:
        """Score jobs together; where that fails, each by itself, so that one cannot spoil the others.

        Where the device has failed for good, the error is raised.
        """
        if not jobs:
            return
        try:
            found = self._scored([job.prepared for job in jobs])
        except Exception as error:
            if self._is_lost(error):
                raise
            if len(jobs) == 1:
                if not isinstance(error, RefusedError | DataError):
                    log.exception("pairs could not be scored")
                _settle(jobs[0].future, error=error)
                return
            log.warning("a pack of %d requests failed (%s); each is tried by itself", len(jobs), type(error).__name__)
            for job in jobs:
                self._answer([job])
            return
        for job, one in zip(jobs, found, strict=True):
            self.counts.asked += one.asked
            self.counts.served += job.weight - one.asked
            _settle(job.future, one)
        self.counts.packs += 1

    def _scored(self, requests: list[Pairs]) -> list[Found]:
        """Where the device runs out of memory: with nothing kept, and fewer images at a time."""
        import torch

        images = self.memories["image"]
        while True:
            try:
                return self._packs.answer(requests)
            except torch.OutOfMemoryError:
                if images.batch == self._packs.pairs_per_call == 1:
                    raise
                images.forget()
                self.memories["text"].forget()
                images.batch = max(1, images.batch // 2)
                self._packs.pairs_per_call = max(1, self._packs.pairs_per_call // 2)
                log.warning(
                    "the device is out of memory; going on with %d images and %d pairs at a time",
                    images.batch,
                    self._packs.pairs_per_call,
                )
            torch.cuda.empty_cache()  # outside the handler, so that the failed call's tensors are free

    def _embedded(self, side: Side, items: list[Item]) -> Callable[[], Embedded]:
        """Inputs now; the vectors when it is called."""
        prepared = self.memories[side].prepare(items, anew=True)
        encode = teacher_encoder(self.teacher, side)

        def vectors() -> Embedded:
            row = {item.key: place for place, item in enumerate(items)}
            places = np.array([row[item.key] for item in items])
            found: np.ndarray[Any, Any] | None = None
            for some, inputs in prepared:
                made = encode(to_device(inputs, self._device)).float().cpu().numpy()
                if found is None:
                    found = np.empty((len(items), made.shape[1]), np.float32)
                found[[row[item.key] for item in some]] = made
            assert found is not None
            return Embedded(found[places], self.teacher.identity)

        return vectors

    def _run(self, job: _Job) -> None:
        try:
            _settle(job.future, job.prepared())
            self.counts.embedded += job.weight
        except NoContrastiveHeadError as error:
            _settle(job.future, error=RefusedError(422, str(error)))
        except Exception as error:
            if self._is_lost(error):
                raise
            log.exception("items could not be embedded")
            _settle(job.future, error=error)

    def _is_lost(self, error: Exception) -> bool:
        """Whether the device computes nothing more in this process, as after an illegal access to its memory."""
        import torch

        return isinstance(error, torch.AcceleratorError) and not _computes(self._device)

    def _note(self, pairs: int, seconds: float) -> None:
        self.counts.seconds += seconds
        if pairs and seconds:
            self._rate = pairs / seconds if not self._rate else 0.8 * self._rate + 0.2 * pairs / seconds

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread that ends before its time is a fault of ours: whoever waits hears of it, and so does /health."""
        try:
            work()
        except BaseException:
            log.exception("the engine has ended")
            with self._state:
                self._closing = self._failed = self._prepared_all = True
                self._state.notify_all()
            for job in list(self._open):
                _settle(job.future, error=EndedError())


def _computes(device: torch.device | None) -> bool:
    import torch

    try:
        return bool(torch.ones(2, device=device).sum().item() == 2)
    except RuntimeError:
        return False


def _nothing() -> None:
    """What is left to prepare of a job that has ended."""


def _settle(future: Future[Any], result: object = None, *, error: BaseException | None = None) -> None:
    """Set what comes of a future, unless whoever waited has gone."""
    try:
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
    except InvalidStateError:
        return


def _part(images: list[Item], texts: list[Item], image_rows: Ids, text_rows: Ids) -> Pairs:
    """Some pairs of a request, with the items that are in them."""
    own_images, image_places = np.unique(image_rows, return_inverse=True)
    own_texts, text_places = np.unique(text_rows, return_inverse=True)
    named = [images[row] for row in own_images.tolist()], [texts[row] for row in own_texts.tolist()]
    return Pairs(*named, image_places, text_places, ([], []))
