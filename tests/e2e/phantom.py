"""CT series of a made-up patient: a body with one bright ball in it, and the ball as truth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE, SPACING = (96, 96, 24), (2.0, 2.0, 4.0)
AFFINE = np.array([[-2.0, 0, 0, 96], [0, -2, 0, 96], [0, 0, 4, 0], [0, 0, 0, 1]])  # (column, row, slice) to RAS+ mm
_BODY_HU, _BALL_HU, _NOISE_HU = 40, 240, 12


@dataclass(frozen=True)
class Phantom:
    """A patient on disk.

    Attributes:
        name: PatientName.
        study: StudyInstanceUID.
        series: SeriesInstanceUID, which is also the id of the image for MONAI Label.
        centre: voxel in the middle of the ball, (column, row, slice).
        radius_mm: of the ball.
        files: one DICOM file a slice.
    """

    name: str
    study: str
    series: str
    centre: tuple[int, int, int]
    radius_mm: float
    files: tuple[Path, ...]

    @property
    def truth(self) -> np.ndarray:
        """Mask of the ball, (column, row, slice)."""
        return _distance_mm(self.centre) <= self.radius_mm

    @property
    def height_mm(self) -> float:
        """Where the slice through the middle of the ball lies, as ImagePositionPatient has it."""
        return self.centre[2] * SPACING[2]


def write_phantom(
    folder: Path,
    name: str,
    centre: tuple[int, int, int],
    radius_mm: float,
    seed: int,
    upwards: bool = True,
    study: str | None = None,
    series_number: int = 2000,
) -> Phantom:
    """Write an axial CT series of `SHAPE` voxels and `SPACING` mm into a new folder, numbered upwards or downwards.

    It is the only one of a new study unless a study is given.
    """
    folder.mkdir()
    study, series, frame = study or generate_uid(), generate_uid(), generate_uid()
    middle = (SHAPE[0] // 2, SHAPE[1] // 2, SHAPE[2] // 2)
    x, y, _ = (np.abs(axis - half) * step for axis, half, step in zip(_axes(), middle, SPACING, strict=True))
    hu = np.where((x / 84) ** 2 + (y / 70) ** 2 <= 1, _BODY_HU, -1000) + np.zeros(SHAPE)
    hu[_distance_mm(centre) <= radius_mm] = _BALL_HU
    hu += np.random.default_rng(seed).normal(0, _NOISE_HU, SHAPE)
    files = []
    for number in range(SHAPE[2]):
        dataset = _slice(hu[..., number].T, number)
        dataset.InstanceNumber = number + 1 if upwards else SHAPE[2] - number
        dataset.PatientName, dataset.PatientID = name, name.replace("^", "-")
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
        dataset.SeriesNumber = series_number
        files.append(folder / f"{number:03d}.dcm")
        dataset.save_as(files[-1], write_like_original=False)
    return Phantom(name, study, series, centre, radius_mm, tuple(files))


def _axes() -> tuple[np.ndarray, ...]:
    return tuple(np.ogrid[tuple(slice(size) for size in SHAPE)])


def _distance_mm(centre: tuple[int, int, int]) -> np.ndarray:
    steps = ((axis - middle) * step for axis, middle, step in zip(_axes(), centre, SPACING, strict=True))
    return np.sqrt(sum(step**2 for step in steps))


def _slice(hu: np.ndarray, number: int) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientBirthDate, dataset.PatientSex = "", "O"
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "20260101", "120000", "1", ""
    dataset.SeriesDate, dataset.SeriesTime, dataset.SeriesDescription = "20260101", "120000", "Phantom"
    dataset.Manufacturer, dataset.ReferringPhysicianName = "phantom", ""
    dataset.AcquisitionNumber = 1
    dataset.KVP, dataset.PositionReferenceIndicator = 120, ""
    column, row, thickness = SPACING
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-SHAPE[0] * column / 2, -SHAPE[1] * row / 2, number * thickness]
    dataset.PixelSpacing, dataset.SliceThickness = [row, column], thickness
    dataset.Rows, dataset.Columns = hu.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, 1, "HU"
    dataset.WindowCenter, dataset.WindowWidth = 100, 500
    dataset.PixelData = hu.round().astype("<i2").tobytes()
    return dataset
