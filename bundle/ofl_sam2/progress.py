"""Progress and cancellation, the same for the command line and for servers."""

import threading
from collections.abc import Callable

from ofl_sam2.errors import Cancelled

Progress = Callable[[int, int], None]
"""Called with (done, total) after each unit of work."""


class CancelToken:
    """A flag one thread sets and another one checks.

    Example:
        >>> token = CancelToken()
        >>> token.cancel()
        >>> token.cancelled
        True
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop at the next slice."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to stop."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise `Cancelled` if somebody asked to stop."""
        if self.cancelled:
            raise Cancelled("Cancelled; what was finished before is kept.")


class Watch:
    """Reports progress of work whose amount becomes known on the way, and stops it when asked to."""

    def __init__(self, progress: Progress | None, cancel: CancelToken | None) -> None:
        self.progress, self.cancel = progress, cancel
        self.done = self.total = 0

    def expect(self, count: int) -> None:
        """More slices are to come."""
        self.total += count

    def advance(self, count: int = 1) -> None:
        """Slices are done."""
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)
        self.check()

    def check(self) -> None:
        """Stop here if asked to."""
        if self.cancel:
            self.cancel.check()
