"""DICOM SEG there and back: every voxel and every name in any orientation; what is no label is refused in words."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pytest
from lib.datastores.codes import structure_codes
from lib.datastores.segmentation import Prediction, is_draft, make_segmentation, read_segmentation
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

sys.path.append(str(Path(__file__).parent))
from dicom_series import ORIENTATIONS, make_series

from ofl_sam2.dicom import read_headers
from ofl_sam2.errors import InputError
from ofl_sam2.files import read_labels, read_volume

NAMES = {1: "liver", 2: "left kidney", 5: "Läsion 1"}


class Case:
    """A series on disk, its volume as NIfTI, and labels drawn in it; each value is in the image alone in its corner."""

    def __init__(self, folder: Path, **options) -> None:
        self.series, self.image = folder / "series", folder / "image.nii.gz"
        self.series.mkdir()
        for number, instance in enumerate(make_series(**options)):
            instance.save_as(self.series / f"{number}.dcm", write_like_original=False)
        volume = read_volume(self.series)
        nib.save(nib.Nifti1Image(volume.voxels, volume.affine), self.image)
        self.headers = read_headers(self.series)
        self.labels = np.zeros(volume.grid, np.uint8)
        self.labels[:3, :2, :4] = 1
        self.labels[7:, 1:9, 2:] = 5
        self.labels[8, 4, 3] = 1

    def make(self, names=NAMES, labels=None, **options):
        return make_segmentation(self.labels if labels is None else labels, self.headers, names, "1.2.3", **options)

    def back(self, dataset):
        """Labels and names as they are read from the dataset, which goes through a file."""
        path, target = self.image.with_name("seg.dcm"), self.image.with_name("back.nii.gz")
        dataset.save_as(path, write_like_original=False)
        names = read_segmentation(path, self.image, target)
        label = read_labels(target)
        np.testing.assert_array_equal(label.affine, read_volume(self.image).affine)
        return label.voxels, {entry["idx"]: entry["name"] for entry in names}


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


@pytest.mark.parametrize("tilt_mm", [0.0, 0.8])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_labels_come_back_voxel_for_voxel_with_their_names(tmp_path, orientation, tilt_mm):
    case = Case(tmp_path, orientation=orientation, tilt_mm=tilt_mm)
    voxels, names = case.back(case.make())
    np.testing.assert_array_equal(voxels, np.array([0, 1, 0, 0, 0, 3])[case.labels])
    assert names == {1: "liver", 2: "left kidney", 3: "Läsion 1"}


def test_names_belong_to_values_and_missing_structures_keep_their_segments(case):
    stored = case.make({0: "background", 5: "b", 2: "a", 7: "c"})
    assert [segment.SegmentLabel for segment in stored.SegmentSequence] == ["structure_1", "a", "b", "c"]
    frames = stored.PerFrameFunctionalGroupsSequence
    numbers = [frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber for frame in frames]
    assert set(numbers) == {1, 2, 3, 4} and len(numbers) == stored.NumberOfFrames
    assert not stored.pixel_array[-2:].any() and numbers[-2:] == [2, 4]
    np.testing.assert_array_equal(case.back(stored)[0], np.array([0, 1, 0, 0, 0, 3])[case.labels])
    assert not is_draft(stored) and stored.SeriesDescription == "OFL-SAM2 label"


def test_segments_are_described(case):
    liver, kidney, lesion = case.make().SegmentSequence
    assert {segment.SegmentAlgorithmType for segment in (liver, kidney, lesion)} == {"MANUAL"}
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == codes.SCT.Liver.value
    (kind,) = kidney.SegmentedPropertyTypeCodeSequence
    (side,) = kind.SegmentedPropertyTypeModifierCodeSequence
    assert (kind.CodeMeaning, side.CodeMeaning) == ("Kidney", "Left")
    assert lesion.SegmentedPropertyTypeCodeSequence[0].CodeValue == codes.SCT.Tissue.value
    again = case.make().SegmentSequence[0]
    assert liver.TrackingID == "liver" and liver.TrackingUID == again.TrackingUID != kidney.TrackingUID


def test_segments_have_colours_of_their_own(case):
    colours = [tuple(segment.RecommendedDisplayCIELabValue) for segment in case.make().SegmentSequence]
    assert len(set(colours)) == len(colours) == 3
    lightness, a, b = colours[0]  # the first one is red
    assert 0 < lightness < 65535 and min(a, b) > 65535 * 0.6


def test_a_prediction_says_what_made_it_and_is_a_draft(case):
    draft = case.make(prediction=Prediction("ofl_sam2", 12))
    assert is_draft(draft) and draft.SeriesDescription == "OFL-SAM2 draft of ofl_sam2, snapshot 12"
    (algorithm,) = draft.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert draft.SegmentSequence[0].SegmentAlgorithmType == "AUTOMATIC"
    assert algorithm.AlgorithmName == "OFL-SAM2" and algorithm.AlgorithmVersion.endswith("snapshot 12")
    np.testing.assert_array_equal(case.back(draft)[0] > 0, case.labels > 0)


@pytest.mark.parametrize(
    ("name", "category", "kind", "side"),
    [
        ("Right_Lung", "Anatomical Structure", "Lung", "Right"),
        ("kidney-left", "Anatomical Structure", "Kidney", "Left"),
        ("left ventricle", "Anatomical Structure", "Left Ventricle", None),
        ("Tumor", "Morphologically Abnormal Structure", "Neoplasm", None),
        ("left something", "Anatomical Structure", "Tissue", None),
        ("structure_1", "Anatomical Structure", "Tissue", None),
    ],
)
def test_codes_are_given_where_the_name_is_clear(name, category, kind, side):
    found = structure_codes(name)
    assert [code and code.meaning for code in found] == [category, kind, side]


def test_headers_without_what_dicom_demands_are_completed(case):
    for header in case.headers:
        for name in ("AccessionNumber", "StudyID", "StudyDate", "PatientSex", "SliceThickness"):
            delattr(header, name)
    np.testing.assert_array_equal(case.back(case.make())[0] > 0, case.labels > 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("PatientBirthDate", "00000000"), ("StudyDate", "unknown"), ("StudyTime", "25:61:00"), ("StudyTime", None)],
)
def test_dates_that_anonymisers_damaged_are_left_blank(case, name, value):
    for header in case.headers:
        setattr(header, name, value)
    stored = case.make()
    assert not stored[name].value
    np.testing.assert_array_equal(case.back(stored)[0] > 0, case.labels > 0)


def test_headers_that_a_segmentation_cannot_refer_to_are_said(case):
    for header in case.headers:
        del header.SOPClassUID
    with pytest.raises(InputError, match=r"cannot refer to series .* Repair its headers"):
        case.make()


@pytest.mark.parametrize("known", [True, False])
def test_slices_become_one_frame_of_reference(case, known):
    for header in case.headers:
        header.FrameOfReferenceUID = generate_uid()
        if not known:
            del header.FrameOfReferenceUID
    first = case.headers[0].get("FrameOfReferenceUID")
    stored = case.make()
    assert stored.FrameOfReferenceUID and stored.FrameOfReferenceUID == (first or case.make().FrameOfReferenceUID)
    np.testing.assert_array_equal(case.back(stored)[0] > 0, case.labels > 0)


def test_what_dicom_cannot_hold_is_refused(case):
    with pytest.raises(InputError, match="no labelled voxel"):
        case.make(labels=np.zeros_like(case.labels))
    for name in ("x" * 65, "a\\b"):
        with pytest.raises(InputError, match="cannot name a segment"):
            case.make({1: name})


def shuffled(dataset):
    """Frames in another order, as other programs write them."""
    pixels, order = dataset.pixel_array, np.random.default_rng(1).permutation(dataset.NumberOfFrames)
    groups = dataset.PerFrameFunctionalGroupsSequence
    dataset.PerFrameFunctionalGroupsSequence = [groups[int(index)] for index in order]
    dataset.PixelData = pack(pixels[order])
    return dataset


def pack(frames):
    packed = np.packbits(frames.ravel(), bitorder="little").tobytes()
    return packed + bytes(len(packed) % 2)


def cropped(dataset):
    """Frames of columns 0..8 and rows 0..8 only."""
    pixels = dataset.pixel_array[:, :9, :9]
    dataset.Rows = dataset.Columns = 9
    dataset.PixelData = pack(pixels)
    return dataset


def mirrored(dataset):
    """Frames whose rows run the other way."""
    pixels = dataset.pixel_array[:, :, ::-1]
    orientation = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    row = np.array(orientation.ImageOrientationPatient[:3])
    orientation.ImageOrientationPatient = [*(-row).tolist(), *orientation.ImageOrientationPatient[3:]]
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        place = copy.deepcopy(frame.PlanePositionSequence[0])
        position = np.array(place.ImagePositionPatient) + 0.9 * (dataset.Columns - 1) * row
        place.ImagePositionPatient = [round(float(value), 8) for value in position]
        frame.PlanePositionSequence = [place]
    dataset.PixelData = pack(pixels)
    return dataset


def with_shared_segment(dataset):
    """One segment, named where all frames share it, and each frame with an orientation of its own."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.SegmentIdentificationSequence = dataset.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.SegmentIdentificationSequence
        frame.PlaneOrientationSequence = shared.PlaneOrientationSequence
    del shared.PlaneOrientationSequence
    return dataset


@pytest.mark.parametrize("change", [shuffled, cropped, mirrored, with_shared_segment])
def test_segmentations_of_other_programs_are_read_exactly(case, change):
    labels = np.where(case.labels == 1, case.labels, 0) if change is with_shared_segment else case.labels.copy()
    if change is cropped:
        labels[9:], labels[:, 9:] = 0, 0
    voxels, _ = case.back(change(case.make({1: "a"}, labels=labels)))
    np.testing.assert_array_equal(voxels > 0, labels > 0)


def overlapping(dataset):
    for frame in dataset.PerFrameFunctionalGroupsSequence[-4:]:
        frame.PlanePositionSequence = dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    dataset.PixelData = b"\xff" * len(dataset.PixelData)


def fractional(dataset):
    dataset.SegmentationType = "FRACTIONAL"


def moved(dataset):
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        place = frame.PlanePositionSequence[0]
        place.ImagePositionPatient = [float(value) + 40 for value in place.ImagePositionPatient]


def shifted(dataset):
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        place = frame.PlanePositionSequence[0]
        place.ImagePositionPatient = [float(value) + 0.4 for value in place.ImagePositionPatient]


def coarse(dataset):
    dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1.4, 1.8]


def empty(dataset):
    dataset.PixelData = bytes(len(dataset.PixelData))


def nowhere(dataset):
    del dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence


def undescribed(dataset):
    dataset.SegmentSequence = dataset.SegmentSequence[:1]


def truncated(dataset):
    dataset.PixelData = dataset.PixelData[:20]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (overlapping, "'liver' and 'Läsion 1' overlap"),
        (fractional, "is fractional"),
        (moved, "another grid"),
        (shifted, "another grid"),
        (coarse, "another grid"),
        (empty, "is empty"),
        (nowhere, "lacks PlanePositionSequence"),
        (undescribed, "does not describe"),
        (truncated, "cannot be read as a label"),
    ],
)
def test_what_is_no_label_is_refused(case, change, sentence):
    dataset = case.make()
    change(dataset)
    with pytest.raises(InputError, match=sentence):
        case.back(dataset)


def test_a_file_that_is_no_segmentation_is_refused(case, tmp_path):
    (tmp_path / "zeros.dcm").write_bytes(bytes(200))
    for path in (tmp_path / "zeros.dcm", case.series / "0.dcm"):
        with pytest.raises(InputError, match="cannot be read as a label"):
            read_segmentation(path, case.image, tmp_path / "label.nii.gz")


def test_highdicom_reads_the_same(case):
    path = case.image.with_name("seg.dcm")
    case.make().save_as(path, write_like_original=False)
    segmentation = highdicom.seg.segread(path)
    uids = [header.SOPInstanceUID for header in case.headers]
    voxels = segmentation.get_pixels_by_source_instance(
        uids, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(voxels.transpose(), np.array([0, 1, 0, 0, 0, 3])[case.labels])


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed: apt-get install dicom3tools")
@pytest.mark.parametrize("prediction", [None, Prediction("ofl_sam2", 3)])
def test_dciodvfy_finds_no_error(case, prediction):
    path = case.image.with_name("seg.dcm")
    case.make({**NAMES, 3: "missing here"}, prediction=prediction).save_as(path, write_like_original=False)
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60)
    lines = f"{said.stdout}\n{said.stderr}".splitlines()
    assert "SegmentationImage" in lines or "Segmentation" in lines, lines
    assert [line for line in lines if line.startswith("Error")] == []
