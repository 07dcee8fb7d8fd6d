"""A folder of studies whose labels survive crashes: journaled first, then written atomically."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.datastore.local import ImageLabelModel
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import LabelNotFoundException

from lib.datastores.files import ContentHashes, find_labels, remove, remove_leftovers, split_name, voxel_files
from lib.datastores.listing import ListedDatastore, label_entry
from lib.datastores.watcher import FolderWatcher, Repeater
from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.files import read_labels
from ofl_sam2.service.journal import Key, LabelEvent, LabelJournal, check_image_id, check_tag
from ofl_sam2.service.label_files import content_sha256, copy_label
from ofl_sam2.service.structures import MOST_UNNAMED

FINAL = DefaultLabelTag.FINAL.value
_LOOK_PERIOD_S = 10

logger = logging.getLogger(__name__)


class JournaledLocalDatastore(ListedDatastore):
    """MONAI Label's local datastore with a journal.

    Building the object repairs nothing and watches nothing: the server calls `reconcile` and `watch` when it is ready,
    other processes do not.

    Args:
        studies: folder of the images, with the labels in `labels/<tag>/`.
        journal: of all labels.

    Attributes:
        on_label: called with image id and event when a final label was saved, by whomever.
        on_delete: called with the image id when a final label is gone.
    """

    def __init__(self, studies: str | Path, journal: LabelJournal) -> None:
        self.on_label: Callable[[str, LabelEvent], None] = lambda image_id, event: None
        self.on_delete: Callable[[str], None] = lambda image_id: None
        self._hashes = ContentHashes()
        self._watcher: FolderWatcher | Repeater | None = None
        self._telling, self._told = threading.Lock(), journal.latest()
        super().__init__(studies, journal)

    def watch(self) -> None:
        """From now on see images and labels that others put into the folder, change or remove."""
        folder = Path(self._datastore_path)
        try:
            self._watcher = FolderWatcher(folder, self.refresh)
        except OSError as error:
            logger.warning("%s cannot be watched (%s); it is looked at every %d s", folder, error, _LOOK_PERIOD_S)
            self._watcher = Repeater(self.refresh, _LOOK_PERIOD_S)

    def close(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Journal a label, then put it in the place of the one before.

        Returns:
            The id of the label, which is that of the image.

        Raises:
            ImageNotFoundException: the studies hold no such image.
            InputError: an id or tag that is unfit for a path, or a file that cannot be a label.
            OFLError: it cannot be written; the label before is still there.
        """
        check_image_id(image_id)
        tag = _tag(label_tag)
        with self._saving:
            with self._lock:
                self._init_from_datastore_file()
                self._require_image(image_id)
            event = self._journal.record_save(image_id, tag, Path(label_filename), label_info or {})
            try:
                self._publish(event)
                with self._lock:
                    self._init_from_datastore_file()
                    self._commit(event)
            except Exception as error:  # the client learns of it, so whatever it is must not be completed later
                self._journal.record_failed(event, str(error))
                with self._lock:
                    self._put_back(event)
                raise
            try:
                self._journal.record_written(event)
            except OFLError as error:  # it is journaled and in its place; `refresh` completes it
                logger.error("That the label of '%s' was saved is noted later: %s", image_id, error)
        self._tell()
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label, also its content in the journal.

        Raises:
            LabelNotFoundException: there is no such label.
        """
        tag = _tag(label_tag)
        with self._saving, self._lock:
            self._init_from_datastore_file()
            if self._datastore.label(label_id, tag) is None:
                raise LabelNotFoundException(f"The studies hold no label '{tag}' of '{label_id}'.")
            for path in self._label_paths(label_id, tag):
                remove(path)
            self._journal.record_delete(label_id, tag)
            self._relist()
        self._tell()

    def remove_image(self, image_id: str) -> None:
        """Remove an image and its labels; of a link only the link.

        Raises:
            ImageNotFoundException: there is no such image.
        """
        with self._saving, self._lock:
            self._init_from_datastore_file()
            entry = self._require_image(image_id)
            path = self._images / f"{image_id}{entry.image.ext}"
            parts = [*voxel_files(path), path]
            for tag in list(entry.labels):
                self.remove_label(image_id, tag)
            for part in parts:
                remove(part)
            self._relist()

    def holds_a_journaled_label(self) -> bool:
        """Whether a label lies here as it is in the journal."""
        latest = self._journal.latest()
        labels = find_labels(self._labels) if self._labels.is_dir() else {}
        return any(key in latest and self._hashes.of(path) == latest[key].sha256 for key, path in labels.items())

    def reconcile(self) -> None:
        """Repair what a crash left, and take in what changed while no server was running.

        A save that was journaled but not finished is finished. A damaged label whose content is journaled is restored.
        """
        with self._saving:
            for folder in (self._images, *(path for path in self._labels.iterdir() if path.is_dir())):
                remove_leftovers(folder)
            self._bring_together(repair=True)

    def refresh(self) -> None:
        """Take in what others changed: a new label is journaled as saved, one that vanished as deleted.

        Several labels of a tag that vanish and leave none are put back: more likely somebody lost or moved the folder.
        """
        self._bring_together(repair=False)

    def _commit(self, event: LabelEvent) -> None:
        """Put a journaled label in its place, then the list that names it."""
        entry = self._require_image(event.image)
        label = label_entry(event)
        changed = ImageLabelModel(image=entry.image, labels={**entry.labels, event.tag: label})
        objects = {**self._datastore.objects, event.image: changed}
        with self._writing_config(objects):
            self._place(event)
        self._datastore.objects = objects

    def _publish(self, event: LabelEvent) -> None:
        """Send a journaled label where else it belongs, before it is put in its place; here nowhere."""

    def _place(self, event: LabelEvent) -> None:
        """Copy a journaled label to where it belongs, and remove one of another suffix."""
        target = self._labels / event.tag / f"{event.image}{event.ext}"
        copy_label(self._journal.blob(event), target)
        for path in self._label_paths(event.image, event.tag):
            if path != target:
                remove(path)

    def _label_paths(self, image_id: str, tag: str) -> list[Path]:
        """Files and folders that are labels of an image, whatever their suffix."""
        return [path for path in (self._labels / tag).iterdir() if split_name(path)[0] == image_id]

    def _put_back(self, failed: LabelEvent) -> None:
        """Restore the label before if the failed one has taken its place already."""
        path = self._labels / failed.tag / f"{failed.image}{failed.ext}"
        before = self._journal.latest().get(failed.key)
        replaced = before is None or before.blob != failed.blob
        if replaced and path.exists() and content_sha256(path) == failed.sha256:
            remove(path)
            if before is not None:
                self._placed(before)

    def _bring_together(self, repair: bool) -> None:
        try:
            with self._saving:
                with self._lock:
                    self._init_from_datastore_file()
                    images = self._find_images()
                self._complete(images)
                with self._lock:
                    if images:
                        self._labels.mkdir(exist_ok=True)
                    labels, latest = find_labels(self._labels), self._journal.latest()
                    for key, path in labels.items():
                        if key[0] in images:
                            self._take_in(key, path, latest.get(key), repair)
                    self._forget_without_image(images, labels)
                    here = [key for key in latest if key[0] in images]
                    self._settle_missing([key for key in here if key not in labels], here)
                    self._relist()
        finally:
            self._tell()

    def _complete(self, images: Container[str]) -> None:
        """Finish saves that were journaled but not finished; one that cannot be is left for later."""
        for event in self._journal.pending():
            if event.image in images and self._placed(event, publish=True):
                self._journal.record_written(event)

    def _forget_without_image(self, images: Container[str], labels: Container[Key]) -> None:
        """Journal labels as deleted that were listed and are gone together with their image."""
        latest = self._journal.latest()
        for image_id, entry in self._datastore.objects.items():
            for key in [(image_id, tag) for tag in entry.labels if image_id not in images]:
                if key in latest and key not in labels:
                    self._journal.record_delete(*key)

    def _settle_missing(self, missing: Sequence[Key], known: Sequence[Key]) -> None:
        """Journal labels whose file is missing as deleted; if it is all of several `known` of a tag, put them back."""
        counts = Counter(tag for _, tag in known)
        for tag, gone in Counter(tag for _, tag in missing).items():
            keys, folder = [key for key in missing if key[1] == tag], self._labels / tag
            if folder.is_dir() and (counts[tag] == 1 or gone < counts[tag]):
                for key in keys:
                    self._journal.record_delete(*key)
            else:
                logger.warning(
                    "All %d labels in %s were gone at once. They are put back from the journal; "
                    "remove labels that are not wanted with DELETE /datastore/label.",
                    gone,
                    folder,
                )
                self._put_in_place(keys)

    def _put_in_place(self, keys: Sequence[Key]) -> None:
        """Write labels as they are journaled."""
        latest = self._journal.latest()
        for key in keys:
            self._placed(latest[key])

    def _placed(self, event: LabelEvent, publish: bool = False) -> bool:
        """Whether a journaled label could be put in its place; the reason is logged where it could not."""
        try:
            if publish:
                self._publish(event)
            self._place(event)
        except Exception as error:  # one label that cannot be written must keep no other back
            logger.error("The label of '%s' is journaled, but could not be written: %s", event.image, error)
            return False
        return True

    def _take_in(self, key: Key, path: Path, known: LabelEvent | None, repair: bool) -> None:
        """Journal a label that somebody else wrote; with `repair`, restore a damaged one that was `known`."""
        try:
            if known is not None and self._hashes.of(path) == known.sha256:
                return
            labels, details = read_labels(path), dict[str, Any](source="external")
            if known is not None and key[1] == FINAL and (names := known.details.get("label_info")):
                details["label_info"] = _names_for(labels.voxels, names)
            self._journal.record_written(self._journal.record_save(*key, path, details))
        except InputError as error:
            logger.warning("A label that nobody saved here cannot be used: %s", error)
            if repair and known is not None and self._placed(known):
                logger.warning("The label saved at %s takes its place", known.time)
        except (OSError, OFLError) as error:
            logger.error("The label of '%s' could not be journaled: %s", key[0], error)

    def _tell(self) -> None:
        """Tell of all final labels that came, changed or went since the last time, whoever did it."""
        with self._telling:
            latest = self._journal.latest()
            changed = [key for key in self._told.keys() | latest.keys() if self._told.get(key) != latest.get(key)]
            self._told = latest
        for image_id in (image_id for image_id, tag in changed if tag == FINAL):
            if event := latest.get((image_id, FINAL)):
                self.on_label(image_id, event)
            else:
                self.on_delete(image_id)


def _names_for(labels: np.ndarray, names: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The names of a label before for one that takes its place; what it did not hold is named by its value."""
    named = {entry["idx"] for entry in names}
    new = [int(value) for value in np.unique(labels) if value and value not in named]
    if len(new) > MOST_UNNAMED:
        raise InputError(f"It holds {len(new)} values without a name. Is it an image instead of a label?")
    return [*names, *({"name": f"structure_{value}", "idx": value} for value in new)]


def _tag(tag: str) -> str:
    tag = tag.value if isinstance(tag, DefaultLabelTag) else tag
    check_tag(tag)
    return tag
