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
