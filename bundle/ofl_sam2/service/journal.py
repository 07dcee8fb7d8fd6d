"""Who saved which label when, and the content of the labels there are, so that no crash loses one.

A label is saved in two steps. `record_save` stores its content as a blob and the intent as a line; the caller then puts
the label where it belongs and says so with `record_written`. A save without that is `pending`: it can be completed from
its blob. Each line is on disk before the call returns. Lines stay for ever; a blob that no label needs any more goes.
Any number of processes may read; those that write take turns.
"""

import errno
import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from ofl_sam2.atomic import atomic_path
from ofl_sam2.errors import InputError, ModelError, OFLError
from ofl_sam2.files import image_suffix
from ofl_sam2.service.label_files import check_label_file, content_sha256, copy_label

_IMAGE_ID = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]+")
_MOST_BYTES = 200
_TAG = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BLOB = re.compile(r"[0-9a-f]{64}(\.[A-Za-z0-9]+)*")

Key = tuple[str, str]
"""An image id and a tag: what a label belongs to."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelEvent:
    """A label that somebody saved.

    Attributes:
        id: unique in the journal.
        image, tag: what it is a label of.
        sha256: of its content, see `content_sha256`.
        ext: suffix of the file; empty for a folder of masks.
        time: when, in UTC.
        details: names of the structures, parameters and user, as the client gave them.

    Raises:
        InputError: an image id, tag, sha256 or suffix that is unfit for a path.
    """

    id: str
    image: str
    tag: str
    sha256: str
    ext: str
    time: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_image_id(self.image)
        check_tag(self.tag)
        if not _BLOB.fullmatch(self.blob):
            raise InputError(f"'{self.blob[:100]}' is no name of a journaled label.")

    @property
    def blob(self) -> str:
        """Name of the file or folder that holds its content."""
        return self.sha256 + self.ext

    @property
    def version(self) -> str:
        """See `label_version`."""
        return label_version(self.sha256, self.details.get("label_info"))

    @property
    def key(self) -> Key:
        """What it is a label of."""
        return self.image, self.tag


class LabelJournal:
    """The journal in `folder`: `journal.jsonl` with one JSON object a line, and `blobs/<sha256><suffix>`.

    Args:
        folder: created if absent. A line that a crash left unfinished is cut off by the next write.

    Raises:
        OFLError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._path = folder / "journal.jsonl"
        self._guard = threading.RLock()
        self._file_lock = FileLock(folder / "journal.lock")
        self._forget()
        if not self._path.exists():
            with atomic_path(self._path) as temporary:
                temporary.touch()

    def record_save(self, image: str, tag: str, source: Path, details: dict[str, Any]) -> LabelEvent:
        """Store the content of a label and the intent to save it.

        Args:
            image, tag: what it is a label of.
            source: file or folder of masks; its suffix becomes that of the label.
            details: whatever the client said about the label; must fit into JSON.

        Raises:
            InputError: a name that is unfit for a path, or a file that cannot be a label.
            OFLError: it cannot be written; the journal is as before.
        """
        check_label_file(source)
        return self._record({"event": "save"}, image, tag, source, details)

    def record_refused(self, image: str, tag: str, source: Path, details: dict[str, Any], reason: str) -> LabelEvent:
        """Keep the content of a label that is not taken, and why; the label saved before stays the latest.

        The content is kept until another label of the same image and tag is written or deleted.

        Raises:
            InputError, OFLError: as `record_save`.
        """
        return self._record({"event": "refused", "reason": reason}, image, tag, source, details)

    def record_written(self, event: LabelEvent) -> None:
        """Note that the label of a save is in its place: it is the latest from now on."""
        self._append({"event": "written", "id": event.id, "time": _now()})

    def record_failed(self, event: LabelEvent, reason: str) -> None:
        """Note that a save was given up and the client knows: it is not completed later."""
        self._append({"event": "failed", "id": event.id, "reason": reason, "time": _now()})

    def record_delete(self, image: str, tag: str) -> None:
        """Note that a label is gone."""
        self._append({"event": "delete", "image": image, "tag": tag, "time": _now()})

    def latest(self) -> dict[Key, LabelEvent]:
        """The labels there are: of each image and tag the newest that was written and not deleted."""
        with self._guard:
            self._read_new()
            return dict(self._latest)

    def pending(self) -> list[LabelEvent]:
        """Saves that were neither completed nor given up, oldest first; at most one of an image and tag."""
        with self._guard:
            self._read_new()
            return list(self._pending.values())

    def history(self) -> list[LabelEvent]:
        """Every label that somebody ever saved, also in vain, oldest first; most have no blob any more."""
        with self._guard:
            self._read_new()
            return list(self._history)

    def refusals(self) -> list[tuple[LabelEvent, str]]:
        """Every label that was refused and the reason, oldest first."""
        with self._guard:
            self._read_new()
            return list(self._refusals)

    def blob(self, event: LabelEvent) -> Path:
        """File or folder with the content of a label.

        Raises:
            ModelError: it is missing or damaged.
        """
        path = self._blobs / event.blob
        if not path.exists() or content_sha256(path) != event.sha256:
            raise ModelError(
                f"{path}, the journaled label of '{event.image}', is missing or damaged. Restore it from a backup."
            )
        return path

    def prune(self) -> None:
        """Remove the blobs that no label needs; one that resists is tried again. A damaged journal removes none."""
        with self._guard, self._file_lock:
            self._read_new()
            if self._damaged:
                return
            needed = {event.blob for event in (*self._latest.values(), *self._pending.values())}
            needed |= {event.blob for refused in self._refused.values() for event in refused}
            for path in [path for path in self._blobs.glob("*") if path.name not in needed]:
                try:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                except OSError as error:
                    logger.warning("%s, a label that nothing needs, stays for now: %s", path, error)

    def _record(self, line: dict[str, str], image: str, tag: str, source: Path, details: dict[str, Any]) -> LabelEvent:
        """Store a label and append a line about it, while nobody removes blobs."""
        with self._guard, self._file_lock:
            event = self._store(image, tag, source, details)
            self._append({**line, **vars(event)})
        return event

    def _store(self, image: str, tag: str, source: Path, details: dict[str, Any]) -> LabelEvent:
        ext = "" if source.is_dir() else image_suffix(source)
        event = LabelEvent(secrets.token_hex(8), image, tag, content_sha256(source), ext, _now(), details)
        copy_label(source, self._blobs / event.blob)
        if content_sha256(self._blobs / event.blob) != event.sha256:
            raise OFLError(f"{source} changed while it was being saved. Save it again.")
        return event

    def _append(self, line: dict[str, Any]) -> None:
        content = json.dumps(line, default=str).encode() + b"\n"
        with self._guard, self._file_lock:
            self._read_new()
            with self._path.open("r+b", buffering=0) as file:
                _write_at(file, self._end, content)
            self.prune()

    def _read_new(self) -> None:
        """Take in the whole lines that were added since, by this process or another."""
        size = self._path.stat().st_size
        if size == self._end:
            return
        if size < self._end:
            self._forget()
        with self._path.open("rb") as file:
            file.seek(self._end)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.split(b"\n")[:-1]:
            try:
                self._apply(json.loads(line))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s holds a damaged line, which is passed over: %s", self._path, error)
                self._damaged = True
        self._end += len(whole)

    def _forget(self) -> None:
        self._end, self._damaged = 0, False
        self._latest: dict[Key, LabelEvent] = {}
        self._pending: dict[Key, LabelEvent] = {}
        self._refused: defaultdict[Key, list[LabelEvent]] = defaultdict(list)
        self._refusals: list[tuple[LabelEvent, str]] = []
        self._history: list[LabelEvent] = []

    def _apply(self, line: dict[str, Any]) -> None:
        kind = line.pop("event")
        if kind == "save":
            event = LabelEvent(**line)
            self._pending.pop(event.key, None)
            self._pending[event.key] = event
            self._history.append(event)
        elif kind == "delete":
            for labels in (self._latest, self._pending, self._refused):
                labels.pop((line["image"], line["tag"]), None)
        elif kind in ("written", "failed"):
            for event in [event for event in self._pending.values() if event.id == line["id"]]:
                del self._pending[event.key]
                if kind == "written":
                    self._latest[event.key] = event
                    self._refused.pop(event.key, None)
        elif kind == "refused":
            reason, event = line.pop("reason"), LabelEvent(**line)
            self._refused[event.key].append(event)
            self._refusals.append((event, reason))
            self._history.append(event)


def label_version(sha256: str, label_info: Any) -> str:
    """What differs when the content of a label does, or the names of its structures."""
    named = json.dumps(label_info, sort_keys=True, default=str) if label_info else ""
    return hashlib.sha256(f"{sha256} {named}".encode()).hexdigest() if named else sha256


def check_image_id(image: str) -> None:
    """Refuse an image id that could leave its folder.

    Raises:
        InputError: empty, hidden, longer than 200 bytes, with separators or control characters.
    """
    if not _IMAGE_ID.fullmatch(image) or len(image.encode(errors="surrogatepass")) > _MOST_BYTES:
        raise InputError(
            f"{image[:80]!r} is no image id. Use 1 to {_MOST_BYTES} bytes (letters beyond English take two to four) "
            "without slashes, no dot in front."
        )


def check_tag(tag: str) -> None:
    """Refuse a label tag that is unfit for the name of a folder.

    Raises:
        InputError: anything but letters, digits, "-" and "_".
    """
    if not _TAG.fullmatch(tag):
        raise InputError(f"{tag[:80]!r} is no label tag. Use letters, digits, '-' and '_', for example 'final'.")


def _write_at(file: io.FileIO, end: int, content: bytes) -> None:
    """Write `content` at `end`, where whatever follows is cut off; nothing stays of a write that fails."""
    file.truncate(end)
    file.seek(end)
    try:
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        file.truncate(end)
        raise OFLError(
            f"Cannot write {file.name}: {error.strerror}. Nothing was saved; free some space and save again."
        ) from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
