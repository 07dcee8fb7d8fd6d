"""Read images and labels, write labels: NIfTI, NRRD, MetaImage, DICOM series, folders of frames."""

import dataclasses
import math
import os
import re
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from ofl_sam2.atomic import atomic_path
from ofl_sam2.dicom import LPS_TO_RAS, is_dicom, read_series
from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.frames import frame_files, frame_names, read_frames, read_masks, write_masks
from ofl_sam2.volume import Volume

NIFTI_SUFFIXES = (".nii.gz", ".nii")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha", ".mhd")
_WRITE_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".mha")
_MAX_LABEL = np.iinfo(np.uint32).max
_ROUNDING = 0.01
_MOST_HEADER = 1 << 20
_MOST_MOVED = 0.1
_META_FIELD = re.compile(rb"ElementDataFile", re.IGNORECASE)
_META_DATA = re.compile(rb"^[ \t]*ElementDataFile[ \t]*=[ \t]*(.*)", re.MULTILINE | re.IGNORECASE)
_NRRD_DATA = re.compile(rb"^data ?file[ \t]*:[ \t]*(.*)", re.MULTILINE | re.IGNORECASE)
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
)


def case_name(path: Path | str) -> str:
    """Return the file or folder name without image suffix.

    Example:
        >>> case_name("images/patient.01.nii.gz")
        'patient.01'
    """
    name = Path(path).name
    return name[: len(name) - len(image_suffix(path))]


def image_suffix(path: Path | str) -> str:
    """Return the image suffix as written in the name (".nii.gz" as one); empty where there is none."""
    name = Path(path).name
    return next((name[-len(s) :] for s in IMAGE_SUFFIXES if name.lower().endswith(s) and len(name) > len(s)), "")


def is_image(path: Path) -> bool:
    """Whether `path` looks like something `read_volume` reads; content is only looked at in folders."""
    if path.name.startswith("."):
        return False
    if not path.is_dir():
        return image_suffix(path) != ""
    return is_sequence(path) or any(file.is_file() and is_dicom(file) for file in path.rglob("*"))


def is_sequence(path: Path) -> bool:
    """Whether `path` is a folder of frames; beside DICOM files they are previews."""
    if not path.is_dir() or not frame_files(path):
        return False
    return not any(file.is_file() and is_dicom(file) for file in path.rglob("*"))


def read_volume(path: Path | str) -> Volume:
    """Read an image file, a folder with a DICOM series, or a folder of PNG or JPEG frames.

    Raises:
        InputError: whatever keeps the image from being read as finite numbers on a regular grid.
    """
    volume = _guarded_read(Path(path))
    with np.errstate(invalid="ignore"):
        limits = float(volume.voxels.min()), float(volume.voxels.max())
    if not all(map(math.isfinite, limits)):
        bad = int(volume.voxels.size - np.isfinite(volume.voxels).sum())
        raise InputError(f"{path} holds {bad} voxels that are NaN or infinite. Replace them with numbers first.")
    return volume


def read_labels(path: Path | str, volume: Volume | None = None) -> Volume:
    """Read a label map in its own grid, with the smallest unsigned integer type that holds it.

    Values that are off by less than 0.01, as scale factors and resampling leave them, are rounded.

    Args:
        path: image file, or folder of PNG masks.
        volume: the frames that PNG masks belong to; then `labelled` of the result tells which have a mask.

    Raises:
        InputError: unreadable, fractions or negative values, masks that do not match the frames.
    """
    path = Path(path)
    if is_sequence(path):
        labels = read_masks(path, volume if volume is not None and volume.frames else None)
    else:
        labels = read_volume(path)
    low, high = labels.voxels.min(), labels.voxels.max()
    if low < -_ROUNDING or high > _MAX_LABEL:
        raise InputError(f"{path} holds values from {low:g} to {high:g}. Labels are integers from 0. Is it an image?")
    fractional = labels.voxels.dtype.kind == "f"
    whole = np.rint(labels.voxels) if fractional else labels.voxels
    if fractional and (off := np.abs(labels.voxels - whole)).max() > _ROUNDING:
        fraction = labels.voxels.flat[int(off.argmax())]
        raise InputError(
            f"{path} holds fractional labels such as {fraction:g}. Labels are integers from 0. "
            "Resample labels with nearest-neighbour interpolation."
        )
    return dataclasses.replace(labels, voxels=whole.astype(np.min_scalar_type(int(whole.max()))))


def write_labels(path: Path | str, labels: NDArray[Any], like: Volume) -> None:
    """Write `labels` in the grid of `like`, atomically, with the smallest unsigned integer type.

    Args:
        path: .nii.gz, .nii, .nrrd or .mha file; for frames also a folder, which gets one PNG a frame.
        labels: non-negative integers in the grid of `like`.
        like: the volume that was segmented; the header of a NIfTI source is kept.

    Raises:
        InputError: labels that do not fit, an unknown suffix, or a path that would overwrite the image.
        OFLError: the file cannot be written.
    """
    path = Path(path)
    fits = labels.shape == like.grid and labels.dtype.kind in "uib"
    if not fits or labels.min() < 0 or labels.max() > _MAX_LABEL:
        raise InputError(
            f"Cannot write {path}: expected integer labels from 0 to {_MAX_LABEL} of shape {like.grid}, "
            f"got {labels.dtype} of shape {labels.shape}."
        )
    if like.path is not None and path.resolve() == like.path.resolve():
        raise InputError(f"Cannot write {path}: it is the image itself. Choose another path for the labels.")
    labels = labels.astype(np.min_scalar_type(int(labels.max())), copy=False)
    suffix = image_suffix(path).lower()
    if suffix == "" and like.frames:
        write_masks(path, labels, frame_names(like))
    elif suffix in NIFTI_SUFFIXES:
        with atomic_path(path) as temporary:
            nib.save(_to_nifti(labels, like), temporary)
    elif suffix in _WRITE_SUFFIXES:
        _write_itk(path, labels, like)
    else:
        folder = " or a folder without suffix" if like.frames else ""
        raise InputError(f"Cannot write {path}: unknown suffix. Use one of {', '.join(_WRITE_SUFFIXES)}{folder}.")


def _guarded_read(path: Path) -> Volume:
    if not path.exists():
        raise InputError(f"{path} does not exist. Check the path.")
    try:
        return _read(path)
    except InputError:
        raise
    except _READ_ERRORS as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        raise InputError(f"Cannot read {path}: {reason}. Is it complete and readable? Export it again.") from error


def _read(path: Path) -> Volume:
    if path.is_dir():
        return read_frames(path) if is_sequence(path) else read_series(path)
    suffix = image_suffix(path).lower()
    if suffix in NIFTI_SUFFIXES:
        return _read_nifti(path)
    if suffix:
        return _read_itk(path)
    raise InputError(
        f"{path} is no known image file. Use {', '.join(IMAGE_SUFFIXES)}, "
        "or a folder with a DICOM series or with PNG or JPEG frames."
    )


def _read_nifti(path: Path) -> Volume:
    image = nib.load(path, mmap=False)
    kind = image.get_data_dtype().kind
    if kind not in "iuf":
        raise InputError(f"{path} holds {'colour' if kind == 'V' else 'complex'} voxels. Export a grey image.")
    if (image.dataobj.slope, image.dataobj.inter) == (1, 0):
        voxels = np.asarray(image.dataobj)
    else:
        voxels = np.asarray(image.dataobj, dtype=np.float32)
    voxels = _drop_single_axes(path, voxels)
    return Volume(voxels, image.affine, case_name(path), path=path, header=image.header)


def _read_itk(path: Path) -> Volume:
    if any(name != Path(name).name for name in data_files(path)):
        raise InputError(f"{path} keeps its voxels in another folder. Put them beside it, or save it as one file.")
    image = sitk.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(f"{path} holds {image.GetNumberOfComponentsPerPixel()} values a voxel. Export a grey image.")
    if image.GetDimension() == 2:
        image = sitk.JoinSeries(image)
    voxels = _drop_single_axes(path, sitk.GetArrayFromImage(image).transpose())
    return Volume(voxels, _itk_affine(image), case_name(path), path=path)


def _itk_affine(image: sitk.Image | sitk.ImageFileReader) -> NDArray[np.float64]:
    """Affine `(4, 4)` to RAS+ mm of an image of two or more dimensions, or of the header that was read last."""
    ndim = image.GetDimension()
    spatial, affine = min(3, ndim), np.eye(4)
    directions = np.reshape(image.GetDirection(), (ndim, ndim)) * image.GetSpacing()
    affine[:spatial, :spatial] = directions[:spatial, :spatial]
    affine[:spatial, 3] = image.GetOrigin()[:spatial]
    return np.asarray(LPS_TO_RAS @ affine)


def data_files(path: Path) -> list[str]:
    """Other files that the header of a MetaImage or NRRD file names as holding its voxels; none if it holds them.

    Raises:
        InputError: there is no such header, or one that ITK might read in another way.
    """
    nrrd = image_suffix(path).lower() == ".nrrd"
    with path.open("rb") as file:
        head = file.read(_MOST_HEADER + 1)
    whole, head = len(head) <= _MOST_HEADER, head.replace(b"\r\n", b"\n")
    if nrrd:
        head, end, _ = head.partition(b"\n\n")
        found, count = _NRRD_DATA.search(head), len(_NRRD_DATA.findall(head))
        clear, header = count < 2 and bool(end or (count and whole)), head
    else:
        field, found = _META_FIELD.search(head), _META_DATA.search(head)
        clear = field is not None and found is not None and found.start() <= field.start() < found.start(1)
        header = head[: found.end()] if found else head
    first, *others = head[found.start(1) :].split(b"\n") if found else [b"LOCAL"]
    names = others if first.startswith(b"LIST") else [] if first.strip().upper() == b"LOCAL" else [first]
    if not clear or any(map(_CONTROL.search, (header, *names))):
        raise InputError(f"Cannot read {path}: its header does not say where its voxels are. Export it again.")
    return [os.fsdecode(name.strip().replace(b"\\", b"/")) for name in names if name.strip()]


def _drop_single_axes(path: Path, voxels: NDArray[Any]) -> NDArray[Any]:
    """Make `(X, Y)` a one-slice volume and drop trailing axes of length 1."""
    shape = voxels.shape + (1,) * (3 - voxels.ndim)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 4:
        raise InputError(f"{path} has {len(shape)} dimensions {shape}. Use a 3D volume or a 4D sequence.")
    return voxels.reshape(shape, order="F")


def _to_nifti(labels: NDArray[Any], like: Volume) -> nib.Nifti1Image:
    image_class = nib.Nifti2Image if isinstance(like.header, nib.Nifti2Header) else nib.Nifti1Image
    image = image_class(labels, like.affine, header=like.header)
    image.set_data_dtype(labels.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0
    if like.header is None:
        image.header.set_xyzt_units("mm", "sec" if labels.ndim == 4 else "unknown")
        _place(image, like.affine)
    return image


def itk_places_alike(path: Path) -> bool:
    """Whether ITK takes the same affine from the header of a NIfTI file as nibabel; False if it takes none.

    Sform and qform may differ, or both be missing.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        affine = nib.load(path).affine
    except _READ_ERRORS:
        return False
    size = (*reader.GetSize(), 1)[:3]
    corners = np.array([[*corner, 1] for corner in product(*({0, extent - 1} for extent in size))])
    apart = np.abs(corners @ (_itk_affine(reader) - affine).T).max()
    return bool(apart <= _MOST_MOVED * min(reader.GetSpacing()[:3]))


def nifti_image(volume: Volume, voxels: NDArray[Any]) -> nib.Nifti1Image:
    """Voxels in the grid of a volume as NIfTI, which other programs read at the same place."""
    image = nib.Nifti1Image(voxels, volume.affine)
    _place(image, volume.affine)
    return image


def _place(image: nib.Nifti1Image, affine: NDArray[np.float64]) -> None:
    """Set sform and qform. ITK takes no sform with a shear, be it of rounding; then it asks for the qform.

    The gantry may be tilted: a qform cannot hold that, so it is left out.
    """
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner", strip_shears=True)
    corner = np.array(image.shape[:3]) / 2
    moved = np.linalg.norm((image.get_qform() - affine)[:3, :3] * corner, axis=0).sum()
    if moved > _MOST_MOVED * min(image.header.get_zooms()[:3]):
        image.set_qform(None, code="unknown")


def _write_itk(path: Path, labels: NDArray[Any], like: Volume) -> None:
    affine = LPS_TO_RAS @ like.affine
    ndim = labels.ndim
    spacing, direction, origin = np.ones(ndim), np.eye(ndim), np.zeros(ndim)
    spacing[:3], origin[:3] = like.spacing, affine[:3, 3]
    direction[:3, :3] = affine[:3, :3] / like.spacing
    image = sitk.GetImageFromArray(labels.transpose(), isVector=False)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(origin.tolist())
    image.SetDirection(direction.ravel().tolist())
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise OFLError(f"Cannot write {path}: {str(error).strip().splitlines()[-1]}.") from error
