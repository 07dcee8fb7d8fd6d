"""Call a function when files in a folder change, or at regular times."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
from watchdog.events import (
    EVENT_TYPE_CLOSED,
    EVENT_TYPE_CREATED,
    EVENT_TYPE_DELETED,
    EVENT_TYPE_MODIFIED,
    EVENT_TYPE_MOVED,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.polling import PollingObserver

_CHANGES = (EVENT_TYPE_CREATED, EVENT_TYPE_DELETED, EVENT_TYPE_MOVED, EVENT_TYPE_MODIFIED, EVENT_TYPE_CLOSED)

_POLL_PERIOD_S = 10
_REMOTE = ("9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse", "lustre", "nfs", "smb", "vboxsf", "virtiofs")

logger = logging.getLogger(__name__)


class Repeater:
    """A thread that calls `action` each time it is woken, or every `period_s` seconds; errors are logged.

    Args:
        action: what to do.
        period_s: seconds between calls that nobody asked for; None waits for `wake`.
        settle_s: seconds to wait after `wake`, so that many changes in a row make one call.
    """

    def __init__(self, action: Callable[[], None], period_s: float | None = None, settle_s: float = 0.3) -> None:
        self._action, self._period_s, self._settle_s = action, period_s, settle_s
        self._woken, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="datastore", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Ask for a call soon."""
        self._woken.set()

    def close(self) -> None:
        """End the thread; a call under way is finished."""
        self._stopped.set()
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            if self._woken.wait(self._period_s):
                self._stopped.wait(self._settle_s)
                self._woken.clear()
            if self._stopped.is_set():
                return
            try:
                self._action()
            except Exception:  # whatever happens to one call, the next change must be seen
                logger.exception("The studies could not be brought up to date; the next change tries again")


class FolderWatcher(FileSystemEventHandler):
    """Calls `action` soon after a file below `folder` was created, changed, moved or deleted; hidden ones do not count.

    Args:
        folder: watched with all subfolders.
        action: called in a thread of its own.

    File systems of other machines report no changes made there, so their files are looked at every 10 s.

    Raises:
        OSError: the system watches no more folders.
    """

    def __init__(self, folder: Path, action: Callable[[], None]) -> None:
        self._repeater = Repeater(action)
        self._observer = PollingObserver(_POLL_PERIOD_S) if is_remote(folder) else Observer()
        self._observer.schedule(self, str(folder), recursive=True)
        try:
            self._observer.start()
        except OSError:
            self._repeater.close()
            raise

    def close(self) -> None:
        """Stop watching."""
        self._observer.stop()
        self._observer.join()
        self._repeater.close()

    def on_any_event(self, event: FileSystemEvent) -> None:
        content_of_folder = event.is_directory and event.event_type == EVENT_TYPE_MODIFIED
        paths = (Path(str(path)) for path in (event.src_path, event.dest_path) if path)
        visible = any(not path.name.startswith(".") for path in paths)
        if event.event_type in _CHANGES and visible and not content_of_folder:
            self._repeater.wake()


def is_remote(folder: Path) -> bool:
    """Whether a folder lies on a network share, or in what a virtual machine or FUSE shows of another file system."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kinds = [mounts[parent] for parent in (folder.resolve(), *folder.resolve().parents) if parent in mounts]
    return bool(kinds) and kinds[0].lower().startswith(_REMOTE)
