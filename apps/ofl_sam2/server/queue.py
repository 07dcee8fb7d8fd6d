"""A bounded queue in front of the inference: one runs, a few wait, the others are told that the server is busy."""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import HTTPException


@dataclass(frozen=True)
class QueueStatus:
    """How many inferences run and wait, and how many may wait."""

    running: int
    waiting: int
    limit: int


class InferenceQueue:
    """Lets one inference run at a time.

    Any thread may call it. Those that wait get their turn in no promised order.

    Args:
        limit: inferences that may wait.
    """

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self._state = threading.Lock()
        self._turn = threading.Lock()
        self._admitted = 0
        self._seconds: deque[float] = deque([5.0], maxlen=8)

    def status(self) -> QueueStatus:
        """How long the queue is now."""
        with self._state:
            running = int(self._turn.locked())
            return QueueStatus(running, max(self._admitted - running, 0), self.limit)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one's turn and hold it.

        Raises:
            HTTPException: 503 with Retry-After; the queue is full.
        """
        self._admit()
        try:
            with self._turn:
                started = time.monotonic()
                yield
                self._seconds.append(time.monotonic() - started)
        finally:
            with self._state:
                self._admitted -= 1

    def _admit(self) -> None:
        with self._state:
            if self._admitted <= self.limit:
                self._admitted += 1
                return
            seconds = math.ceil(sum(self._seconds) / len(self._seconds))
        raise HTTPException(
            503,
            f"The server is busy: one segmentation runs and {self.limit} wait. Try again in {seconds} s.",
            {"Retry-After": str(seconds)},
        )
