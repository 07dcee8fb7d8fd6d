"""Tensors by key, the last ones used."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping

from torch import Tensor


class RecentTensors:
    """The most recently used entries, up to `max_bytes` of tensor values; safe to share between threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> dict[str, Tensor] | None:
        """An entry, which is then the last one used; None if it is not there."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, tensors: dict[str, Tensor]) -> None:
        """Add an entry, or replace it; one larger than everything is not kept."""
        if _size(tensors) > self._max_bytes:
            return
        with self._lock:
            self._bytes += _size(tensors) - _size(self._entries.pop(key, {}))
            self._entries[key] = tensors
            while self._bytes > self._max_bytes:
                self._bytes -= _size(self._entries.popitem(last=False)[1])


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
