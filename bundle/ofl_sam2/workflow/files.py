"""Files for MONAI's own LoadImage and SaveImage: read as the library reads, written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader, NibabelWriter
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from numpy.typing import NDArray

from ofl_sam2.atomic import atomic_path
from ofl_sam2.errors import InputError
from ofl_sam2.files import case_name, is_image, read_volume


class VolumeReader(ImageReader):
    """Reads NIfTI, NRRD, MetaImage and DICOM series with `read_volume`: the same voxels, affine and error messages."""

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return is_image(_only(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Path:
        """Leave the reading to `get_data`: LoadImage would answer an error here by trying other readers."""
        return _only(data)

    def get_data(self, img: Path) -> tuple[NDArray[Any], dict[str, Any]]:
        """Read voxels and their place in space.

        Raises:
            InputError: whatever `read_volume` refuses, and folders of frames.
        """
        volume = read_volume(img)
        if volume.frames:
            raise InputError(f"{img} is a folder of frames, which the bundle does not read. Use 'ofl-sam2 segment'.")
        meta = {
            MetaKeys.AFFINE: volume.affine,
            MetaKeys.ORIGINAL_AFFINE: volume.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(volume.grid),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
        }
        return volume.voxels, meta


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer, but all axes of the image stay, and a run that ends early leaves no half-written file."""

    def set_data_array(self, data_array: Any, channel_dim: int | None = 0, **kwargs: Any) -> None:
        """Take maps of one channel; MONAI's writer would keep the first time of a sequence only."""
        super().set_data_array(data_array, channel_dim, squeeze_end_dims=False, spatial_ndim=None)
        self.data_obj: Any = self.data_obj[..., 0]

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        with atomic_path(Path(str(filename))) as temporary:
            super().write(temporary, verbose, **kwargs)


def output_name(meta: dict[str, Any], saver: object) -> dict[str, str]:
    """Name a result by its case, dots included; a formatter for SaveImage."""
    return {"subject": f"{case_name(meta['filename_or_obj'])}.nii.gz"}


def _only(paths: Sequence[PathLike] | PathLike) -> Path:
    (path,) = ensure_tuple(paths)
    return Path(path)
