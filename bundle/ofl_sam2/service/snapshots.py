"""Published states of the model: ordinary model folders that never change, one of them current.

    000012/    written by `store.save_model`; what did not change is hard-linked from the snapshot before
    current    the version that is served and learned on
    .lock      held while a snapshot is made from the current one

A snapshot is written into a hidden folder and renamed once all of it is on disk; then `current` is replaced. A crash
leaves the old or the new state, and at most hidden rubbish that the next `publish` removes. Loaded models map their
files into memory: on Linux they outlive the removal of a snapshot; Windows refuses to remove it, and the next `publish`
tries again.
"""

import logging
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from ofl_sam2.atomic import atomic_path, atomic_write_text, fsync_folder
from ofl_sam2.errors import InputError, ModelError, OFLError
from ofl_sam2.model_index import INDEX, is_model, read_index
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.store import save_model

_log = logging.getLogger(__name__)

_CURRENT = "current"
_LOCK = ".lock"
_VERSION = re.compile(r"\d{6,}", re.ASCII)
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Snapshot:
    """One published state.

    Attributes:
        version: rises by one with each snapshot and is never given twice.
        folder: the model folder.
        notes: what the publisher wrote down.
        created: UTC, ISO 8601.
    """

    version: int
    folder: Path
    notes: dict[str, Any] = field(repr=False)
    created: str


class SnapshotStore:
    """The snapshots of one folder; several threads and processes may use it at once. Opening it writes nothing.

    Args:
        folder: created when something is published.
        keep: snapshots to keep; older ones are removed, but never the current one.
    """

    def __init__(self, folder: Path, keep: int = 10) -> None:
        if keep < 1:
            raise InputError(f"Cannot keep {keep} snapshots. Keep at least one.")
        self.folder, self.keep = folder, keep
        self._lock = FileLock(folder / _LOCK)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let nobody else publish or roll back meanwhile: to make a snapshot from the current one. Reentrant.

        Raises:
            OFLError: the folder cannot be written.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def publish(self, segmenter: VolumeSegmenter, notes: dict[str, Any]) -> Snapshot:
        """Make what a segmenter has learned the current snapshot.

        Args:
            segmenter: has learned.
            notes: JSON values to keep with it.

        Raises:
            InputError: nothing has been learned yet.
            OFLError: the folder cannot be written; the current snapshot stays.
        """
        with self.lock():
            version = max(self._versions(), default=0) + 1
            partial = self.folder / f".partial-{version:06d}-{secrets.token_hex(4)}"
            created = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            self._sweep()
            try:
                with self._writing():
                    save_model(segmenter, partial, {"created": created, **notes}, reuse=self._path(version - 1))
                    os.rename(partial, self._path(version))
                    fsync_folder(self.folder)
                self._point_to(version)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            self._prune()
            return self._read(version)

    def current(self) -> Snapshot | None:
        """The snapshot to serve and to learn on; None before the first one and after `withdraw`.

        Raises:
            ModelError: it is damaged.
        """
        while (version := self._current_version()) is not None:
            try:
                return self._read(version)
            except ModelError:
                if version == self._current_version():  # else it was removed between the two reads
                    raise
        return None

    def list(self) -> tuple[Snapshot, ...]:
        """All readable snapshots, oldest first."""
        found = []
        for version in self._versions():
            try:
                found.append(self._read(version))
            except ModelError as error:
                _log.warning("Snapshot %d is left out of the list: %s", version, error)
        return tuple(found)

    def rollback(self, version: int) -> Snapshot:
        """Make an older (or a newer) snapshot the current one; a later `publish` still gets a higher version.

        Raises:
            InputError: no such snapshot.
            ModelError: it is damaged.
            OFLError: the folder cannot be written.
        """
        with self.lock():
            snapshot = self._known(version)
            self._point_to(version)
        return snapshot

    def withdraw(self) -> None:
        """Let no snapshot be current: nothing is learned any more. The old ones can still be rolled back to.

        Raises:
            OFLError: the folder cannot be written.
        """
        with self.lock(), self._writing():
            (self.folder / _CURRENT).unlink(missing_ok=True)
            fsync_folder(self.folder)

    def remove(self, version: int) -> None:
        """Remove a snapshot, and with it the features of labels that were deleted since.

        Raises:
            InputError: no such snapshot; or the current or the newest one, whose number must not be given again.
            OFLError: the folder cannot be written.
        """
        with self.lock(), self._writing():
            self._known(version)
            if version in (self._current_version(), max(self._versions())):
                raise InputError(f"Snapshot {version} is the current or the newest one, which stays.")
            os.rename(self._path(version), self._discarded(version))
            fsync_folder(self.folder)
            self._sweep()

    def export(self, version: int, target: Path, with_pool: bool = False) -> None:
        """Write a snapshot into a zip file, by default without anything that comes from a patient.

        Args:
            version: which snapshot.
            target: the zip file.
            with_pool: include features and labels of the labelled slices and the notes (image names): then the content
                is a model folder that `load_model` reads. Without, there is what was fitted, for `read_learner` and
                `read_unet`, and `model.json` with an empty pool.

        Raises:
            InputError: no such snapshot (any more).
            ModelError: it is damaged.
            OFLError: the target cannot be written.
        """
        folder = self._known(version).folder
        index = read_index(folder)
        stored = [index.learner, index.unet, *(index.pool if with_pool else ())]
        files = [entry.file for entry in stored if entry]
        shown = index if with_pool else replace(index, pool=(), notes={})
        with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            archive.writestr(zipfile.ZipInfo(INDEX, _ZIP_TIME), shown.to_json())
            for name in dict.fromkeys(files):
                try:
                    content = (folder / name).read_bytes()
                except FileNotFoundError as error:
                    raise ModelError(f"Snapshot {version} is not complete (any more): {name} is missing.") from error
                archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), content)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OFLError(f"Cannot write to {self.folder}: {error.strerror}. The current snapshot stays.") from error

    def _path(self, version: int) -> Path:
        return self.folder / f"{version:06d}"

    def _discarded(self, version: int) -> Path:
        return self.folder / f".removed-{version:06d}-{secrets.token_hex(4)}"

    def _versions(self) -> tuple[int, ...]:
        if not self.folder.is_dir():
            return ()
        return tuple(sorted(int(path.name) for path in self.folder.iterdir() if _VERSION.fullmatch(path.name)))

    def _read(self, version: int) -> Snapshot:
        folder = self._path(version)
        notes = dict(read_index(folder).notes)
        return Snapshot(version, folder, notes, created=str(notes.pop("created", "")))

    def _known(self, version: int) -> Snapshot:
        if not is_model(self._path(version)):
            known = ", ".join(map(str, self._versions())) or "none"
            raise InputError(f"There is no snapshot {version}. Choose one of: {known}.")
        return self._read(version)

    def _current_version(self) -> int | None:
        path = self.folder / _CURRENT
        try:
            return int(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ModelError(f"{path} is damaged: it names no version. Roll back to a snapshot.") from error

    def _point_to(self, version: int) -> None:
        atomic_write_text(self.folder / _CURRENT, f"{version}\n")

    def _prune(self) -> None:
        for version in self._versions()[: -self.keep]:
            with suppress(OSError):  # mapped by a reader on Windows
                os.rename(self._path(version), self._discarded(version))
        self._sweep()

    def _sweep(self) -> None:
        """Remove what crashed publishers left behind, and snapshots that are no more."""
        for path in self.folder.glob(".*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                with suppress(OSError):
                    path.unlink()
