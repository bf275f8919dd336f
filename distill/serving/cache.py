"""Things kept while they fit into a number of bytes; what was used longest ago goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class ByteCache(Generic[Key, Value]):
    """Threads may share one."""

    def __init__(self, limit: int) -> None:
        """``limit``: bytes of all values together; a value above it is not kept."""
        self.limit, self.used = limit, 0
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Value | None:
        """The value, which counts as used now; None where it is not kept."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Key, value: Value, *, size: int) -> None:
        """Keep a value of ``size`` bytes, in place of what has its key."""
        with self._lock:
            if key in self._kept:
                self.used -= self._kept.pop(key)[1]
            if size > self.limit:
                return
            self._kept[key] = value, size
            self.used += size
            while self.used > self.limit:
                self.used -= self._kept.popitem(last=False)[1][1]

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()
            self.used = 0
