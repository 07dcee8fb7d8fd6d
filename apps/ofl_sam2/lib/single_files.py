"""Images as single files, for clients that load no folders."""

import glob
import hashlib
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from ofl_sam2.atomic import atomic_path
from ofl_sam2.files import NIFTI_SUFFIXES, image_suffix, itk_places_alike, nifti_image, read_volume
from ofl_sam2.volume import Volume

_LUMINANCE = np.array([0.299, 0.587, 0.114])
_SUFFIX = ".nii.gz"


class SingleFiles:
    """Gives an image as one file: DICOM series, frames and MetaImage headers as NIfTI in the image's own grid.

    So is NIfTI whose header says two places, of which ITK (3D Slicer) takes another than nibabel.

    Labels drawn on such a file fit the image voxel for voxel. Any thread may call it.

    Args:
        folder: where the NIfTI files are kept.
        max_bytes: bound on them; the least recently used go first.
        in_use_s: seconds after its last use in which a file stays, whatever the bound; the newest always stays.
    """

    def __init__(self, folder: Path, max_bytes: int, in_use_s: float = 600.0) -> None:
        self._folder, self._max_bytes, self._in_use_s = folder, max_bytes, in_use_s
        self._lock = threading.Lock()

    def of(self, image: Path) -> Path:
        """The image itself where it is one file, else a copy of it, written if its files changed since the last time.

        Raises:
            InputError: it cannot be read.
            OFLError: the copy cannot be written.
        """
        if image.is_file() and not _needs_copy(image):
            return image
        with self._lock:
            copy = self._folder / f"{_fingerprint(image)}{_SUFFIX}"
            if copy.exists():
                copy.touch()
            else:
                _write(copy, read_volume(image))
                self._remove_oldest(copy)
        return copy

    def _remove_oldest(self, newest: Path) -> None:
        others = [path for path in self._folder.glob(f"*{_SUFFIX}") if path != newest]
        left = self._max_bytes - newest.stat().st_size
        for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            left -= path.stat().st_size
            if left < 0 and time.time() - path.stat().st_mtime >= self._in_use_s:
                path.unlink()


def _needs_copy(image: Path) -> bool:
    suffix = image_suffix(image).lower()
    return suffix == ".mhd" or (suffix in NIFTI_SUFFIXES and not itk_places_alike(image))


def _fingerprint(image: Path) -> str:
    """Changes with the place, names, sizes and times of an image's files."""
    files = image.rglob("*") if image.is_dir() else image.parent.glob(f"{glob.escape(image.stem)}.*")
    stats = [(str(path), path.stat()) for path in sorted(files)]
    said = [str(image), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)]
    return hashlib.sha256("\n".join(said).encode(errors="surrogateescape")).hexdigest()


def _write(target: Path, volume: Volume) -> None:
    """Write a volume as NIfTI, colour frames in grey."""
    voxels = volume.voxels
    if volume.colour:
        voxels = np.rint(voxels @ _LUMINANCE).astype(voxels.dtype)
    elif voxels.dtype == bool:
        voxels = voxels.astype(np.uint8)
    with atomic_path(target) as temporary:
        nib.save(nifti_image(volume, voxels), temporary)
