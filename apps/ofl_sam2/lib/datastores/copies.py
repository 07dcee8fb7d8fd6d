"""Copies of series from a DICOMweb server, within a bound on their size."""

import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
from pydicom.dataset import Dataset

from lib.datastores.files import remove
from ofl_sam2.atomic import atomic_path
from ofl_sam2.errors import InputError
from ofl_sam2.files import nifti_image, read_volume

_SUFFIX = ".nii.gz"


class SeriesCopies:
    """Each series as DICOM files in the folder `<uid>`, and as NIfTI in the same grid in `<uid>.nii.gz`.

    Whoever adds must take turns. A crash leaves no folder without its NIfTI file, by which a copy is known.

    Args:
        folder: of the copies.
        max_bytes: what they may take; the least recently used go first.
        in_use_s: seconds after its last use in which a copy stays, whatever the bound; the newest always stays.
    """

    def __init__(self, folder: Path, max_bytes: int, in_use_s: float = 600.0) -> None:
        self._folder, self._max_bytes, self._in_use_s = folder, max_bytes, in_use_s

    def files(self, uid: str) -> Path:
        """Folder of the DICOM files of a series."""
        return self._folder / uid

    def volume(self, uid: str) -> Path:
        """NIfTI file of a series."""
        return self._folder / f"{uid}{_SUFFIX}"

    def uids(self) -> list[str]:
        """Series that are here."""
        return sorted(path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"[!.]*{_SUFFIX}"))

    def has(self, uid: str, instances: int | None = None) -> bool:
        """Whether a whole copy is here, of as many instances if their number is known."""
        if not (self.volume(uid).exists() and self.files(uid).is_dir()):
            return False
        return instances is None or len(list(self.files(uid).iterdir())) == instances

    def use(self, uid: str) -> None:
        """Note that a copy is used now."""
        os.utime(self.volume(uid))

    def add(self, uid: str, instances: Iterable[Dataset]) -> None:
        """Copy a series in place of an older copy, then remove what exceeds the bound.

        Args:
            uid: of the series.
            instances: may be a generator that downloads; what it raises is passed on, and no part of the series stays.

        Raises:
            InputError: no volume of at least two slices.
        """
        partial = self._folder / f".{secrets.token_hex(6)}.partial.{uid}"
        files, volume = partial / self.files(uid).name, partial / self.volume(uid).name
        files.mkdir(parents=True)
        try:
            for number, instance in enumerate(instances):
                instance.save_as(files / f"{number:06d}.dcm", write_like_original=False)
            self._convert(uid, files, volume)
            for new, old in ((volume, self.volume(uid)), (files, self.files(uid))):
                if old.exists():
                    remove(old)
                os.replace(new, old)
            self._make_room()
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _convert(self, uid: str, files: Path, target: Path) -> None:
        """Write DICOM files as NIfTI."""
        try:
            volume = read_volume(files)
        except InputError as error:
            raise InputError(str(error).replace(str(files), f"Series {uid}")) from error
        if volume.grid[2] < 2:
            raise InputError(f"Series {uid} has a single slice. Choose a series that is a volume.")
        with atomic_path(target) as temporary:
            nib.save(nifti_image(volume, volume.voxels), temporary)

    def _make_room(self) -> None:
        used = {uid: self.volume(uid).stat().st_mtime for uid in self.uids()}
        sizes = {uid: _size(self.files(uid)) + self.volume(uid).stat().st_size for uid in used}
        for uid in sorted(used, key=used.__getitem__)[:-1]:
            if sum(sizes.values()) <= self._max_bytes or time.time() - used[uid] < self._in_use_s:
                return
            del sizes[uid]
            for path in (self.files(uid), self.volume(uid)):
                if path.exists():
                    remove(path)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))
