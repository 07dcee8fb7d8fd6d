"""DICOM SEG objects and labels in the grid of an image, voxel for voxel."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from monailabel.datastore.utils.convert import dicom_seg_to_itk_image, nifti_to_dicom_seg
from pydicom.dataset import Dataset

from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.files import read_labels, read_volume, write_labels

_ANATOMY = {"CodeValue": "123037004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Anatomical Structure"}
_TISSUE = {"CodeValue": "85756007", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Tissue"}


def read_segmentation(path: Path, image: Path, target: Path) -> list[dict[str, Any]]:
    """Write a DICOM SEG as a label file in the grid of `image`.

    Args:
        path: the DICOM file.
        image: what it segments, as an image file.
        target: label file to write.

    Returns:
        Names of the label's values, `[{"name": ..., "idx": ...}, ...]`.

    Raises:
        InputError: no SEG, overlapping or fractional segments, or voxels that are not those of the image.
    """
    try:
        dataset = pydicom.dcmread(path)
        cropped = Path(dicom_seg_to_itk_image(str(path)))
        segments = sitk.ReadImage(str(cropped))
        cropped.unlink()
        inside = sitk.Resample(segments, sitk.ReadImage(str(image)), sitk.Transform(), sitk.sitkNearestNeighbor)
        names = [{"name": str(s.SegmentLabel), "idx": int(s.SegmentNumber)} for s in dataset.SegmentSequence]
    except Exception as error:  # damaged or foreign DICOM can raise anything that its parsers raise
        raise InputError(f"The segmentation cannot be read as a label: {error}") from error
    labels = sitk.GetArrayFromImage(inside).transpose()
    counts = [np.bincount(np.ravel(array), minlength=256)[1:] for array in (labels, sitk.GetArrayFromImage(segments))]
    if not np.array_equal(*counts):
        raise InputError("The segmentation has another grid than the series it refers to. Resample it to that series.")
    write_labels(target, labels, read_volume(image))
    return names


def write_segmentation(
    label: Path, series: Path, label_info: Sequence[dict[str, Any]] | None, series_uid: str
) -> Dataset:
    """Make a DICOM SEG of a label file.

    Args:
        label: in the grid of the series.
        series: folder of the DICOM files that were segmented.
        label_info: names of the label's values.
        series_uid: SeriesInstanceUID of the result.

    Raises:
        OFLError: it cannot be converted.
    """
    names = {entry.get("idx"): entry.get("name") for entry in label_info or ()}
    values = [int(value) for value in np.unique(read_labels(label).voxels) if value]
    segments = [{"segmentAttribute": _segment(value, names.get(value) or f"structure_{value}")} for value in values]
    file = nifti_to_dicom_seg(str(series), str(label), segments)
    if not file or not os.path.exists(file):
        raise OFLError("The label cannot be converted to DICOM SEG; the log of itkimage2segimage says why.")
    dataset = pydicom.dcmread(file)
    os.unlink(file)
    dataset.SeriesInstanceUID = series_uid
    return dataset


def _segment(value: int, name: str) -> dict[str, Any]:
    return {
        "labelID": value,
        "SegmentLabel": name,
        "SegmentDescription": name,
        "SegmentAlgorithmType": "SEMIAUTOMATIC",
        "SegmentAlgorithmName": "OFL-SAM2",
        "SegmentedPropertyCategoryCodeSequence": _ANATOMY,
        "SegmentedPropertyTypeCodeSequence": _TISSUE,
    }
