"""A DICOM series as one volume: the slices are checked before their pixels are read."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import FileDataset

from ofl_sam2.errors import InputError
from ofl_sam2.volume import Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_PIXELS = ("RescaleSlope", "RescaleIntercept", "PixelRepresentation", "BitsStored")
_GRID_TOLERANCE = 0.15
_CONVERT = "Convert the series with dcm2niix and use the NIfTI file."


def is_dicom(path: Path) -> bool:
    """Whether the file has the DICOM preamble."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_series(folder: Path) -> Volume:
    """Read the largest DICOM series in `folder` and its subfolders, rescaled to its units (HU for CT).

    Localisers and objects that are no images are passed over.

    Raises:
        InputError: no series, several studies, two series of the same size, missing or repeated slices, uneven
            geometry, or pixels that cannot be decoded.
    """
    series, affine = _stack(folder)
    return Volume(_read_pixels(folder, series), affine, folder.name, path=folder)


def read_headers(folder: Path) -> list[FileDataset]:
    """Headers of the series that `read_series` reads, in the order of its slices.

    Raises:
        InputError: as `read_series`, but for the pixels.
    """
    return _stack(folder)[0]


def _stack(folder: Path) -> tuple[list[FileDataset], NDArray[np.float64]]:
    """Headers in the order of the slices, and voxel -> RAS mm."""
    series = _largest_series(folder)
    first = series[0]
    _check_single_geometry(folder, series)
    along = np.cross(first.ImageOrientationPatient[:3], first.ImageOrientationPatient[3:])
    series.sort(key=lambda header: float(np.dot(along, header.ImagePositionPatient)))
    return series, LPS_TO_RAS @ _lps_affine(folder, series, along)


def _largest_series(folder: Path) -> list[FileDataset]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    headers = [_read_header(path) for path in files if is_dicom(path)]
    images = [header for header in headers if "Rows" in header and "Columns" in header]
    if not images:
        raise InputError(f"{folder} holds neither frames (PNG, JPEG) nor DICOM images. Check the folder.")
    groups: dict[str, list[FileDataset]] = defaultdict(list)
    for header in images:
        if "LOCALIZER" not in header.get("ImageType", ()):
            groups[header.get("SeriesInstanceUID", "")].append(header)
    if not groups:
        raise InputError(f"{folder} holds a localiser only. Export the series with the image slices.")
    studies = {(header.get("PatientID", ""), header.get("StudyInstanceUID", "")) for header in images}
    if len(studies) > 1:
        raise InputError(f"{folder} holds DICOM series of {len(studies)} studies. Give the folder of one of them.")
    size = max(map(len, groups.values()))
    largest = [series for series in groups.values() if len(series) == size]
    if len(largest) > 1:
        names = ", ".join(f"'{s[0].get('SeriesDescription', s[0].get('SeriesInstanceUID', '?'))}'" for s in largest)
        raise InputError(
            f"{folder} holds {len(largest)} DICOM series of {size} file(s): {names}. Put each into a folder of its own."
        )
    return largest[0]


def _read_header(path: Path) -> FileDataset:
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as error:  # a damaged header can raise anything that pydicom's parsers raise
        raise InputError(f"Cannot read {path}: {error}. The DICOM file looks damaged; export it again.") from error


def _check_single_geometry(folder: Path, series: Sequence[FileDataset]) -> None:
    first = series[0]
    for header in series:
        missing = [name for name in _GEOMETRY if header.get(name) is None]
        if header.get("NumberOfFrames", 1) not in (None, 1):
            raise InputError(f"{header.filename} is a multi-frame DICOM file, which cannot be read here. {_CONVERT}")
        if missing:
            raise InputError(f"{header.filename} lacks {', '.join(missing)}, so it has no place in space. {_CONVERT}")
        if header.get("SamplesPerPixel", 1) != 1:
            raise InputError(f"{header.filename} is a colour image. Export the original grey series.")
        same = (header.Rows, header.Columns) == (first.Rows, first.Columns) and all(
            np.allclose(header[name].value, first[name].value, atol=1e-3) for name in _GEOMETRY[1:]
        )
        if not same:
            raise InputError(
                f"{folder}: {Path(str(header.filename)).name} has another size, pixel spacing or orientation than "
                f"{Path(str(first.filename)).name}. Keep only the slices of one stack."
            )


def _lps_affine(folder: Path, series: Sequence[FileDataset], along: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel (column, row, slice) -> LPS mm, from positions that must lie on one regular line (a tilt is allowed)."""
    first = series[0]
    row_spacing, column_spacing = (float(spacing) for spacing in first.PixelSpacing)
    positions = np.array([header.ImagePositionPatient for header in series], dtype=np.float64)
    if len(series) == 1:
        step = along * float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0)
    else:
        step = (positions[-1] - positions[0]) / (len(series) - 1)
        _check_regular(folder, positions, step, along)
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(first.ImageOrientationPatient[:3], column_spacing)
    affine[:3, 1] = np.multiply(first.ImageOrientationPatient[3:], row_spacing)
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return affine


def _check_regular(
    folder: Path, positions: NDArray[np.float64], step: NDArray[np.float64], along: NDArray[np.float64]
) -> None:
    gaps = np.diff(positions @ along)
    if gaps.min() < 1e-3:
        raise InputError(f"{folder} holds several images of one slice position (times or echoes). {_CONVERT}")
    deviation = np.linalg.norm(positions - positions[0] - np.arange(len(positions))[:, None] * step, axis=1)
    if deviation.max() > _GRID_TOLERANCE * np.median(gaps):
        widest = int(np.argmax(gaps))
        raise InputError(
            f"{folder}: the slices are not evenly spaced; the usual distance is {np.median(gaps):.3g} mm, but "
            f"{gaps[widest]:.3g} mm after {positions[widest] @ along:.1f} mm. Slices are missing or from several "
            "stacks: export the whole series again."
        )


def _read_pixels(folder: Path, series: Sequence[FileDataset]) -> NDArray[np.generic]:
    """Voxels `(X, Y, Z)` in the order of `series`; float32 unless all slices share one rescale to integers."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(header.filename) for header in series])
    kinds = {tuple(float(header.get(tag) or 0) for tag in _PIXELS) for header in series}
    if len(kinds) > 1 or not all(value.is_integer() for value in next(iter(kinds))):
        reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        return sitk.GetArrayFromImage(reader.Execute()).transpose()
    except RuntimeError as error:
        syntax = series[0].file_meta.TransferSyntaxUID.name  # pydicom reads no file without it
        raise InputError(
            f"{folder}: the pixels ({syntax}) cannot be decoded; a file is damaged or its compression is not "
            "supported. Export the series again, uncompressed."
        ) from error
