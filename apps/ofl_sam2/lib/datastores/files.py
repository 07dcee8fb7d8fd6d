"""Which images and labels a studies folder holds."""

import logging
import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from ofl_sam2.errors import InputError
from ofl_sam2.files import data_files, image_suffix, is_image, is_sequence
from ofl_sam2.frames import natural_key
from ofl_sam2.service.journal import Key, check_image_id, check_tag
from ofl_sam2.service.label_files import LABEL_SUFFIXES, content_sha256

_LEFTOVERS = (".*.partial.*", ".*.old.*")
_LEFTOVER_AGE_S = 3600

logger = logging.getLogger(__name__)


def split_name(path: Path) -> tuple[str, str]:
    """Id and suffix of an image or label; a folder has no suffix."""
    suffix = "" if path.is_dir() else image_suffix(path)
    return path.name[: len(path.name) - len(suffix)], suffix


def find_images(folder: Path, labels: Path, known: Mapping[str, str]) -> dict[str, Path]:
    """Images in `folder` by id, in natural order: files, and subfolders with a DICOM series or frames.

    Args:
        folder: studies; hidden entries are passed over.
        labels: folder of the labels, which may lie inside.
        known: id -> name of the images listed before. They keep their id, and their folders are not looked into again.
    """
    found: dict[str, Path] = {}
    listed_before = set(known.values())
    entries = (path for path in folder.iterdir() if not path.name.startswith(".") and path != labels)
    for path in sorted(entries, key=lambda path: (path.name not in listed_before, natural_key(path.name))):
        image_id, _ = split_name(path)
        listed = known.get(image_id) == path.name and path.is_dir()
        if not (listed or _looks_like_image(path)):
            continue
        if image_id in found:
            logger.warning("%s is left out: %s has the same id. Rename one of them.", path, found[image_id].name)
        elif fits(check_image_id, image_id, path):
            found[image_id] = path
    return {image_id: found[image_id] for image_id in sorted(found, key=natural_key)}


def find_labels(folder: Path) -> dict[Key, Path]:
    """Labels in the subfolders of `folder`, one for each tag, by image id and tag; of several files the newest."""
    found: dict[Key, list[Path]] = defaultdict(list)
    for tag in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not fits(check_tag, tag.name, tag):
            continue
        for path in tag.iterdir():
            image_id, suffix = split_name(path)
            is_label = is_sequence(path) if path.is_dir() else suffix.lower() in LABEL_SUFFIXES
            if is_label and not path.name.startswith(".") and fits(check_image_id, image_id, path):
                found[image_id, tag.name].append(path)
    return {key: max(paths, key=lambda path: (path.stat().st_mtime_ns, path.name)) for key, paths in found.items()}


def voxel_files(path: Path) -> list[Path]:
    """Files beside an image that hold its voxels.

    Raises:
        InputError: its header cannot be read.
    """
    if path.is_dir() or image_suffix(path).lower() not in (".mhd", ".mha", ".nrrd"):
        return []
    beside = [path.with_name(name) for name in data_files(path) if name == Path(name).name]
    return [file for file in beside if file.is_file()]


def remove(path: Path) -> None:
    """Remove a file, link or folder; a folder is gone as a whole."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{secrets.token_hex(6)}.old.{path.name}")
        os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in `folder`: hidden temporary files that nobody has touched for an hour."""
    for path in [path for pattern in _LEFTOVERS for path in folder.glob(pattern)]:
        if time.time() - path.lstat().st_mtime > _LEFTOVER_AGE_S:
            remove(path)


class ContentHashes:
    """Content hashes of labels, computed again only for files that look changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[list[tuple[str, int, int, int]], str]] = {}

    def of(self, path: Path) -> str:
        """The hash, as in the journal."""
        files = [path, *path.iterdir()] if path.is_dir() else [path]
        stats = [(file.name, file.stat()) for file in sorted(files)]
        signature = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        if path not in self._known or self._known[path][0] != signature:
            self._known[path] = signature, content_sha256(path)
        return self._known[path][1]


def fits(check: Callable[[str], None], name: str, source: Path) -> bool:
    """Whether a name passes a check for names in paths; what it is a name of is logged where it does not."""
    try:
        check(name)
    except InputError as error:
        logger.warning("%s is left out: %s", source, error)
        return False
    return True


def _looks_like_image(path: Path) -> bool:
    try:
        return is_image(path)
    except OSError as error:
        logger.warning("%s is left out: %s", path, error)
        return False
