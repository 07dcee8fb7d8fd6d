"""Labels as DICOM SEG objects, and SEG objects of whatever program as labels, voxel for voxel.

A SEG holds one frame for each segment and slice. Where a frame lies in the image follows from its position and
orientation alone, so frames may be cropped, flipped, in any order, or left out where they are empty.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import highdicom
import numpy as np
import pydicom
from matplotlib import colormaps
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import DA, TM
from skimage.color import rgb2lab

from lib.datastores.codes import structure_codes
from ofl_sam2 import __version__
from ofl_sam2.dicom import LPS_TO_RAS
from ofl_sam2.errors import InputError
from ofl_sam2.files import read_volume, write_labels
from ofl_sam2.volume import Volume

_MAKER = "OFL-SAM2"
_DRAFT = "DRAFT"
_MAX_NAME = 64
_PALETTE = colormaps["Set1"]
_TOLERANCE = 0.25
_EXPECTED = ("PatientID", "PatientName", "PatientSex", "AccessionNumber", "StudyID")
_DATES: dict[str, Callable[[Any], Any]] = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
_OTHER_GRID = "The segmentation has another grid than the series it refers to. Resample it to that series."


@dataclass(frozen=True)
class Prediction:
    """Where labels that nobody drew come from."""

    model: str
    snapshot: int


def is_draft(header: Dataset) -> bool:
    """Whether a SEG is a prediction of this app as it was stored, which nobody has edited."""
    return header.get("Manufacturer") == _MAKER and header.get("ContentLabel") == _DRAFT


def make_segmentation(
    labels: NDArray[Any],
    headers: Sequence[Dataset],
    names: Mapping[int, str],
    series_uid: str,
    prediction: Prediction | None = None,
) -> Dataset:
    """Make a DICOM SEG with a segment for each name, in the order of the values and numbered from 1.

    Args:
        labels: unsigned integers `(X, Y, Z)` in the grid of the series.
        headers: of its slices, in the order of Z.
        names: label value -> structure; 0 is passed over. One that does not occur becomes a segment without voxels; a
            value without a name becomes `structure_<value>`.
        series_uid: SeriesInstanceUID of the result.
        prediction: makes the result a draft; without it the labels count as drawn by a person.

    Raises:
        InputError: no voxel is labelled, a name that DICOM cannot hold, or headers that a SEG cannot refer to.
    """
    found = [int(value) for value in np.unique(labels) if value]
    if not found:
        raise InputError("There is no labelled voxel, so there is nothing that DICOM SEG could hold.")
    _complete(headers)
    values = sorted({*found, *(value for value in names if value > 0)})
    named = {value: names.get(value) or f"structure_{value}" for value in values}
    lookup = np.zeros(max(named) + 1, np.min_scalar_type(len(named)))
    lookup[list(named)] = range(1, len(named) + 1)
    image = headers[0].SeriesInstanceUID
    segments = [_segment(number, name, image, prediction) for number, name in enumerate(named.values(), start=1)]
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=headers,
            pixel_array=np.ascontiguousarray(lookup[labels].transpose()),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            **_identity(series_uid, prediction),
        )
    except Exception as error:  # headers can lack or damage whatever highdicom copies from them
        raise InputError(f"DICOM SEG cannot refer to series {image}: {error}. Repair its headers.") from error
    segmentation.SpecificCharacterSet = "ISO_IR 192"
    segmentation.TimezoneOffsetFromUTC = time.strftime("%z")
    _add_blank_frames(segmentation, [number for number, value in enumerate(values, start=1) if value not in found])
    return segmentation


def read_segmentation(path: Path, image: Path, target: Path) -> list[dict[str, Any]]:
    """Write a DICOM SEG as a label file in the grid of `image`.

    Args:
        path: the DICOM file.
        image: what it segments, as an image file.
        target: label file to write; the numbers of the segments become its values.

    Returns:
        Names of the segments, `[{"name": ..., "idx": ...}, ...]`.

    Raises:
        InputError: no SEG, no voxel, overlapping or fractional segments, or voxels that are not those of the image.
    """
    volume = read_volume(image)
    try:
        dataset = pydicom.dcmread(path)
        names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in dataset.SegmentSequence}
        _check_kind(dataset)
        labels = np.zeros(volume.grid, np.min_scalar_type(max(names)))
        for frame in _frames(dataset):
            _draw(labels, frame, names, volume)
    except InputError:
        raise
    except Exception as error:  # damaged or foreign DICOM can raise anything that its parsers raise
        raise InputError(f"The segmentation cannot be read as a label: {error}.") from error
    if not labels.any():
        raise InputError("The segmentation is empty: no voxel belongs to a segment.")
    write_labels(target, labels, volume)
    return [{"name": name or f"structure_{number}", "idx": number} for number, name in names.items()]


@dataclass(frozen=True)
class _Frame:
    """A frame of a SEG.

    Attributes:
        number: of its segment.
        mask: `(rows, columns)`, booleans.
        affine: (column, row, 1) -> mm in RAS, `(3, 3)`.
    """

    number: int
    mask: NDArray[np.bool_]
    affine: NDArray[np.float64]


def _identity(series_uid: str, prediction: Prediction | None) -> dict[str, Any]:
    """What a SEG says about itself and its maker."""
    kind = f"draft of {prediction.model}, snapshot {prediction.snapshot}" if prediction else "label"
    description = f"{_MAKER} {kind}"
    return {
        "series_instance_uid": series_uid,
        "series_number": 1000,
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": _MAKER,
        "manufacturer_model_name": prediction.model if prediction else _MAKER,
        "software_versions": __version__,
        "device_serial_number": "1",
        "content_label": _DRAFT if prediction else "LABEL",
        "content_description": description,
        "series_description": description,
    }


def _complete(headers: Sequence[Dataset]) -> None:
    """Give headers what DICOM demands of the images of a SEG, where scanners and anonymisers left out or damaged it.

    The slices were read as one volume, so they get one frame of reference.
    """
    frame = headers[0].get("FrameOfReferenceUID") or _uid(headers[0].SeriesInstanceUID)
    for header in headers:
        header.FrameOfReferenceUID = frame
        for name in _EXPECTED:
            if name not in header:
                setattr(header, name, "")
        for name, kind in _DATES.items():
            if not _parses(header.get(name), kind):
                setattr(header, name, None)
        if not header.get("SliceThickness"):
            step = np.subtract(headers[1].ImagePositionPatient, headers[0].ImagePositionPatient)
            header.SliceThickness = round(float(np.linalg.norm(step)), 6)


def _parses(value: Any, kind: Callable[[Any], Any]) -> bool:
    try:
        return kind(value) is not None
    except (TypeError, ValueError):
        return False


def _add_blank_frames(segmentation: Dataset, numbers: Sequence[int]) -> None:
    """Give segments without voxels a frame: OHIF 3.10 cannot load a segment that has none."""
    frames = segmentation.PerFrameFunctionalGroupsSequence
    for number in numbers:
        frame = copy.deepcopy(frames[0])
        frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = number
        content = frame.FrameContentSequence[0]
        content.DimensionIndexValues = [number, *content.DimensionIndexValues[1:]]
        frames.append(frame)
    segmentation.NumberOfFrames = len(frames)
    bits = len(frames) * segmentation.Rows * segmentation.Columns
    segmentation.PixelData = segmentation.PixelData.ljust(-(-bits // 16) * 2, b"\0")


def _uid(*names: str) -> str:
    """The same UID for the same names."""
    return f"2.25.{uuid5(NAMESPACE_OID, ' '.join(names)).int}"


def _segment(number: int, name: str, image: str, prediction: Prediction | None) -> highdicom.seg.SegmentDescription:
    if len(name) > _MAX_NAME or "\\" in name:
        raise InputError(
            f"'{name}' cannot name a segment: DICOM holds {_MAX_NAME} characters and no backslash. Rename it."
        )
    category, kind, side = structure_codes(name)
    algorithm = prediction and highdicom.AlgorithmIdentificationSequence(
        name=_MAKER,
        family=codes.DCM.ArtificialIntelligence,
        version=f"{__version__}, snapshot {prediction.snapshot}",
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type="AUTOMATIC" if prediction else "MANUAL",
        algorithm_identification=algorithm,
        tracking_uid=_uid(image, name),
        tracking_id=name,
    )
    segment.RecommendedDisplayCIELabValue = _colour(number)
    if side is not None:
        modifier = highdicom.sr.CodedConcept.from_code(side)
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return segment


def _colour(number: int) -> list[int]:
    """CIELab of the colour that viewers show a segment in, as DICOM codes it."""
    lightness, a, b = rgb2lab(_PALETTE.colors[(number - 1) % _PALETTE.N])
    return [round(65535 * share) for share in (lightness / 100, (a + 128) / 255, (b + 128) / 255)]


def _check_kind(dataset: Dataset) -> None:
    if dataset.get("SegmentationType") != "BINARY":
        raise InputError(
            f"The segmentation is {str(dataset.get('SegmentationType', 'of no known type')).lower()}, but a label "
            "needs segments whose voxels are in or out. Export it as binary segments."
        )
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        raise InputError(
            f"The segmentation is compressed ({dataset.file_meta.TransferSyntaxUID.name}). Export it uncompressed."
        )


def _frames(dataset: Dataset) -> Iterator[_Frame]:
    """The frames in the order they are stored; their bits follow each other without gaps."""
    rows, columns, packed = dataset.Rows, dataset.Columns, np.frombuffer(dataset.PixelData, np.uint8)
    size = rows * columns
    for index, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        places = [groups, *dataset.SharedFunctionalGroupsSequence]
        start, first = index * size, index * size // 8
        bits = np.unpackbits(packed[first : (start + size + 7) // 8], bitorder="little")[start - 8 * first :][:size]
        spacing = _macro(places, "PixelMeasuresSequence").PixelSpacing
        orientation = np.reshape(_macro(places, "PlaneOrientationSequence").ImageOrientationPatient, (2, 3))
        position = _macro(places, "PlanePositionSequence").ImagePositionPatient
        lps = np.stack([orientation[0] * spacing[1], orientation[1] * spacing[0], position], axis=1).astype(float)
        number = int(_macro(places, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        yield _Frame(number, bits.reshape(rows, columns).astype(bool), LPS_TO_RAS[:3, :3] @ lps)


def _macro(places: Sequence[Dataset], name: str) -> Dataset:
    """The functional group of a frame, or the one that all frames share."""
    for place in places:
        if place.get(name):
            return place[name][0]
    raise InputError(f"The segmentation lacks {name}, so its frames have no place in space. Export it again.")


def _draw(labels: NDArray[Any], frame: _Frame, names: Mapping[int, str], volume: Volume) -> None:
    """Give the voxels of a frame the number of its segment."""
    rows, columns = np.nonzero(frame.mask)
    if not len(rows):
        return
    if frame.number not in names:
        raise InputError(f"The segmentation has voxels of a segment {frame.number} that it does not describe.")
    matrix, offset = np.linalg.inv(volume.affine)[:3, :3], np.linalg.inv(volume.affine)[:3, 3:]
    exact = matrix @ frame.affine + offset * [0, 0, 1]
    steps = np.rint(exact)
    pixels = np.stack([columns, rows, np.ones_like(rows)])
    voxels = (steps @ pixels).astype(int)
    size = np.reshape(labels.shape, (3, 1))
    aligned = np.abs(exact @ pixels - voxels).max() < _TOLERANCE
    if not aligned or not (np.abs(steps[:, :2]).sum(axis=0) == 1).all() or ((voxels < 0) | (voxels >= size)).any():
        raise InputError(_OTHER_GRID)
    before = labels[tuple(voxels)]
    if before.any():
        one, other = names[int(before[before > 0][0])], names[frame.number]
        raise InputError(f"The segments '{one}' and '{other}' overlap. Let each voxel belong to one segment.")
    labels[tuple(voxels)] = frame.number
