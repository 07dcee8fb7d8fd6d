"""What runs at the moment, for status and cancellation; other processes see only whether anything does."""

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ofl_sam2.progress import CancelToken


class ServerToken(CancelToken):
    """For tasks in processes of their own: cancelled, too, when the process that started this one is gone."""

    def __init__(self) -> None:
        super().__init__()
        self._parent = os.getppid()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to stop, or the server is gone."""
        return super().cancelled or os.getppid() != self._parent


@dataclass
class Job:
    """One running task: `done` of `total` slices of an image; `started` in seconds since the epoch."""

    id: str
    kind: str
    image: str
    done: int = 0
    total: int = 0
    cancel: CancelToken = field(default_factory=CancelToken)
    started: float = field(default_factory=time.time)

    def progress(self, done: int, total: int) -> None:
        """Report progress; fits `ofl_sam2.progress.Progress`."""
        self.done, self.total = done, total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        fields = ("id", "kind", "image", "done", "total", "started")
        return {name: getattr(self, name) for name in fields} | {"cancelled": self.cancel.cancelled}


class Jobs:
    """The running jobs of this process. Any thread may call it.

    While there is a job of kind "infer" a lock file is held, so that background work of other processes can stop.

    Args:
        lock_file: that file.
    """

    def __init__(self, lock_file: Path) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._busy = FileLock(lock_file, thread_local=False)

    def start(self, kind: str, image: str) -> Job:
        """Register a new job."""
        token = CancelToken() if kind == "infer" else ServerToken()
        job = Job(secrets.token_hex(8), kind, image, cancel=token)
        with self._lock:
            self._jobs[job.id] = job
            self._show()
        return job

    def list(self) -> list[Job]:
        """The running jobs, oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def cancel(self, job_id: str) -> bool:
        """Ask a job to stop at its next slice; False if no such job runs."""
        with self._lock:
            job = self._jobs.get(job_id)
        if job is not None:
            job.cancel.cancel()
        return job is not None

    def finish(self, job_id: str) -> None:
        """Take a job off the list."""
        with self._lock:
            self._jobs.pop(job_id, None)
            self._show()

    @contextmanager
    def running(self, kind: str, image: str) -> Iterator[Job]:
        """A job for as long as the context lasts."""
        job = self.start(kind, image)
        try:
            yield job
        finally:
            self.finish(job.id)

    def user_waits(self) -> bool:
        """Whether any process of this model root, this one included, segments for a user."""
        with self._lock:
            if self._busy.is_locked:
                return True
            try:
                with self._busy.acquire(timeout=0):
                    return False
            except Timeout:
                return True

    def _show(self) -> None:
        """Hold the lock file while a user waits."""
        waits = any(job.kind == "infer" for job in self._jobs.values())
        if waits and not self._busy.is_locked:
            with suppress(Timeout):  # another process shows it already
                self._busy.acquire(timeout=0.2)
        elif not waits and self._busy.is_locked:
            self._busy.release()
