"""What the command line shows: progress bars on a terminal, plain lines elsewhere, one line for an error."""

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from tqdm import tqdm

from ofl_sam2.atomic import atomic_write_text
from ofl_sam2.errors import InputError
from ofl_sam2.progress import CancelToken, Progress

out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)
_LINE_SECONDS = 10.0
_MOST_COLUMNS = 10_000


@contextmanager
def progress(title: str, unit: str = "slice") -> Iterator[Progress]:
    """Show the progress of one task: a bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines(title, unit)
        return
    with tqdm(desc=title, unit=unit, leave=False, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


class _Lines:
    """Plain progress lines for logs, at most one in ten seconds."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit, self.last = title, unit, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last >= _LINE_SECONDS:
            self.last = time.monotonic()
            err.print(f"{self.title}: {done}/{total} {self.unit}")


@contextmanager
def cancel_on_interrupt() -> Iterator[CancelToken]:
    """A token that the first Ctrl-C (or SIGTERM) cancels; the second one interrupts at once."""
    token = CancelToken()

    def handle(number: int, frame: FrameType | None) -> None:
        if token.cancelled:
            raise KeyboardInterrupt
        err.print("Stopping after the current step; finished work is kept. Press Ctrl-C again to stop at once.")
        token.cancel()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield token
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_whole(table: Table) -> None:
    """Print a table with all it says, be it wider than the terminal."""
    wanted = Measurement.get(out, out.options.update(max_width=_MOST_COLUMNS), table).maximum
    Console(file=out.file, width=max(out.width, wanted), highlight=False, markup=False, emoji=False).print(table)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write a result for machines, if a path is given."""
    if path is not None:
        atomic_write_text(path, json.dumps(content, indent=1) + "\n")


def read_results(path: Path | None) -> dict[str, Any]:
    """The entry `results` of what `write_json` wrote; empty where there is no such file.

    Raises:
        InputError: the file holds something else.
    """
    if path is None or not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        if not isinstance(results, dict):
            raise TypeError("no results by name")
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not hold results ({type(error).__name__}: {error}). Choose another --json."
        ) from error
    return results


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
