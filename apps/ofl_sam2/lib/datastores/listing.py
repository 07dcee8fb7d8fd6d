"""MONAI Label's local datastore with a list that is made from the files, and never half of it is seen or written."""

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from zipfile import ZipFile

import numpy as np
from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.exception import ImageNotFoundException

from lib.datastores.files import find_images, find_labels, split_name
from ofl_sam2.atomic import atomic_path
from ofl_sam2.errors import InputError
from ofl_sam2.files import IMAGE_SUFFIXES, image_suffix, read_volume
from ofl_sam2.service.journal import LabelEvent, LabelJournal, check_image_id
from ofl_sam2.service.label_files import copy_label

logger = logging.getLogger(__name__)


class ListedDatastore(LocalDatastore):
    """Images and labels of a folder, listed in `datastore_v2.json`; images may also be folders.

    The list is replaced in one step, in memory and on disk. Whatever changes it holds `_lock`, a lock file of the
    studies, so threads and processes take turns; whatever changes labels holds `_saving` around it, which may take
    long. Building the object changes nothing on disk but for missing folders.

    Args:
        studies: folder of the images (files, DICOM series, frames), with the labels in `labels/<tag>/`.
        journal: knows what the labels are.
    """

    def __init__(self, studies: str | Path, journal: LabelJournal) -> None:
        self._journal = journal
        self._config_seen: tuple[int, int] | None = None
        self._lock, self._saving = FileLock(Path(studies) / ".lock"), FileLock(Path(studies) / ".saving.lock")
        Path(studies).mkdir(parents=True, exist_ok=True)
        LocalDatastore.__init__(self, str(studies), auto_reload=False, read_only=True)
        if self._config_seen is None:
            self._datastore.objects = self._listed()

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Copy an image file into the studies, unless it is there already.

        Returns:
            The id; that of the file where `image_id` is empty.

        Raises:
            InputError: no image file, an id that is unfit for a path, or one that another image has.
            OFLError: it cannot be written.
        """
        source = Path(image_filename)
        name, suffix = split_name(source)
        if not image_suffix(source):
            raise InputError(f"'{source.name}' is no image file. Use {', '.join(IMAGE_SUFFIXES)}.")
        image_id = image_id or name
        check_image_id(image_id)
        with self._lock:
            self._init_from_datastore_file()
            if image_id in self._datastore.objects:
                if _same_image(source, Path(self.get_image_uri(image_id))):
                    return image_id
                raise InputError(f"The studies hold another image '{image_id}' already. Choose another id.")
            copy_label(source, self._images / f"{image_id}{suffix}")
            self._relist()
            self.update_image_info(image_id, image_info or {})
        return image_id

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add entries to what is known about an image."""
        with self._lock:
            self._init_from_datastore_file()
            super().update_image_info(image_id, info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add entries to what is known about a label."""
        with self._lock:
            self._init_from_datastore_file()
            super().update_label_info(label_id, label_tag, info)

    def json(self) -> dict[str, Any]:
        """The list of images and labels."""
        with self._lock:
            return super().json()

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """Write images and final labels into a ZIP archive in the folder for temporary files.

        Raises:
            InputError: there is no final label yet.
        """
        cases = self.datalist()[: limit_cases or None]
        if not cases:
            raise InputError("The studies hold no final label yet, so there is nothing to download. Save one first.")
        with NamedTemporaryFile(suffix=".zip", delete=False) as file, ExitStack() as unless_whole:
            unless_whole.callback(os.unlink, file.name)
            with ZipFile(file, "w") as archive:
                for kind, path in ((kind, Path(path)) for case in cases for kind, path in case.items()):
                    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
                        archive.write(part, Path(kind) / part.relative_to(path.parent))
                archive.writestr("metadata.json", json.dumps(self.json(), default=str))
            unless_whole.pop_all()
        return file.name

    @property
    def _images(self) -> Path:
        return Path(self._datastore.image_path())

    @property
    def _labels(self) -> Path:
        return Path(self._datastore.label_path(None))

    def _find_images(self) -> dict[str, Path]:
        known = {image_id: f"{image_id}{entry.image.ext}" for image_id, entry in self._datastore.objects.items()}
        return find_images(self._images, self._labels, known)

    def _require_image(self, image_id: str) -> ImageLabelModel:
        if image_id not in self._datastore.objects:
            raise ImageNotFoundException(f"The studies hold no image '{image_id}'. Refresh the list of images.")
        return self._datastore.objects[image_id]

    def _relist(self) -> None:
        """List the images and labels that are there, and write the list if it changed."""
        objects = self._listed()
        if objects != self._datastore.objects or not Path(self._datastore_config_path).exists():
            with self._writing_config(objects):
                pass
            self._datastore.objects = objects

    def _listed(self) -> dict[str, ImageLabelModel]:
        latest = self._journal.latest()
        labels: dict[str, dict[str, DataModel]] = defaultdict(dict)
        for (image_id, tag), path in find_labels(self._labels).items():
            before = self._datastore.label(image_id, tag)
            labels[image_id][tag] = _same_or_new(before, path, latest.get((image_id, tag)))
        objects = {}
        for image_id, path in self._find_images().items():
            entry = self._datastore.objects.get(image_id)
            image = _same_or_new(entry.image if entry else None, path, None)
            objects[image_id] = ImageLabelModel(image=image, labels=labels[image_id])
        return objects

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Read the list again if another process wrote it; a damaged one is put aside, and made from the files."""
        config = Path(self._datastore_config_path)
        with self._lock:
            if not config.exists() or _signature(config) == self._config_seen:
                return
            try:
                content = LocalDatastoreModel.model_validate_json(config.read_bytes())
            except ValueError as error:
                logger.warning("%s is damaged and made anew: %s", config, error)
                os.replace(config, f"{config}.damaged")
                return
            content.base_path = self._datastore_path
            self._datastore = content
            self._config_seen = _signature(config)

    def _update_datastore_file(self, lock: bool = True) -> None:
        with self._writing_config(self._datastore.objects):
            pass

    @contextmanager
    def _writing_config(self, objects: dict[str, ImageLabelModel]) -> Iterator[None]:
        """Write the list with `objects`; it takes the place of the old one when the context is left without error."""
        config = Path(self._datastore_config_path)
        content = self._datastore.model_copy(update={"objects": objects})
        with self._lock:
            with atomic_path(config) as temporary:
                temporary.write_text(json.dumps(content.model_dump(exclude={"base_path"}), indent=2, default=str))
                yield
            self._config_seen = _signature(config)


def label_entry(event: LabelEvent) -> DataModel:
    """What the list says about a label that is being saved."""
    return DataModel(ext=event.ext, info={**_info(f"{event.image}{event.ext}", event), "ts": int(time.time())})


def _same_or_new(before: DataModel | None, path: Path, event: LabelEvent | None) -> DataModel:
    """The entry there was, unless file or content are others."""
    _, ext = split_name(path)
    if before is not None and before.ext == ext and (event is None or before.info.get("sha256") == event.sha256):
        return before
    changed = path.stat().st_mtime if path.exists() else time.time()
    return DataModel(ext=ext, info={**_info(path.name, event), "ts": int(changed)})


def _info(name: str, event: LabelEvent | None) -> dict[str, Any]:
    return {"name": name} if event is None else {**event.details, "name": name, "sha256": event.sha256}


def _signature(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def _same_image(one: Path, other: Path) -> bool:
    """Whether two files hold the same voxels at the same place; Slicer writes what it read anew."""
    first, second = read_volume(one), read_volume(other)
    at_one_place = first.grid == second.grid and np.allclose(first.affine, second.affine, atol=1e-3)
    return at_one_place and np.array_equal(first.voxels, second.voxels)
