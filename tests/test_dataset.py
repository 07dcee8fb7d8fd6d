"""Pairing of images and labels, and the checks of a pair."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ofl_sam2.dataset import Case, LazyCases, default_structures, find_cases, load_case, parse_structures
from ofl_sam2.errors import InputError
from ofl_sam2.files import read_volume
from ofl_sam2.looks import Viewpoint
from ofl_sam2.settings import Settings
from ofl_sam2.volume import canonical_view

AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])


def save(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def told(case):
    """The slices that a model which begins with this case learns from."""
    return Viewpoint.of(case.volume, 64, Settings()).labelled_slices(case)


def save_frames(folder, names, value=0):
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(np.full((4, 6), value, np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def folders(tmp_path):
    """Three images in three formats, two labels, and files that are neither."""
    voxels = np.zeros((4, 5, 3), np.int16)
    save(tmp_path / "images/case10.nii.gz", voxels)
    save(tmp_path / "images/case2.nii", voxels)
    save_frames(tmp_path / "images/video", ["0", "1"])
    save(tmp_path / "labels/case2.nii.gz", voxels)
    save_frames(tmp_path / "labels/video", ["1"], value=1)
    (tmp_path / "images/README.md").write_text("notes")
    (tmp_path / "images/._case2.nii").write_text("left by a Mac")
    (tmp_path / "images/plots").mkdir()
    return tmp_path / "images", tmp_path / "labels"


@pytest.fixture
def pair(tmp_path):
    """A good image and label, to be spoilt."""
    labels = np.zeros((4, 5, 3), np.uint8)
    labels[1:3, 1:3, 1] = 2
    labels[0, 0, 2] = 1
    return Case("a", save(tmp_path / "image.nii", np.ones((4, 5, 3), np.int16)), save(tmp_path / "label.nii", labels))


def test_cases_are_paired_by_name_in_natural_order(folders):
    images, labels = folders
    cases = find_cases(images, labels)
    assert [case.name for case in cases] == ["case2", "case10", "video"]
    assert [case.label for case in cases] == [labels / "case2.nii.gz", None, labels / "video"]
    assert [case.label for case in find_cases(images)] == [None] * 3


def test_chosen_cases_must_exist_and_have_labels(folders):
    images, labels = folders
    assert [case.name for case in find_cases(images, labels, ["video", "case2", "video"])] == ["case2", "video"]
    assert [case.name for case in find_cases(images, None, ["case10"])] == ["case10"]
    with pytest.raises(InputError, match=r"no case named a, b\. It holds: case2, case10, video"):
        find_cases(images, labels, ["b", "case2", "a"])
    with pytest.raises(InputError, match="no label for case10"):
        find_cases(images, labels, ["case2", "case10"])


def test_stray_and_double_files_are_named(folders):
    images, labels = folders
    save(labels / "other.nii", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(InputError, match=r"without an image in .*: other"):
        find_cases(images, labels)
    save(images / "video.nii.gz", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(InputError, match=r"several files of one case: video, video\.nii\.gz"):
        find_cases(images, labels)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        find_cases(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(InputError, match="holds no images"):
        find_cases(tmp_path)


def test_a_good_pair(pair):
    case = load_case(pair)
    assert (case.values, case.labels.dtype, case.labelled_slices) == ((1, 2), np.uint8, None)
    assert case.labels.shape == case.volume.grid


def test_empty_slices_can_be_ignored(pair):
    case = load_case(pair, ignore_empty_slices=True)
    assert (case.labelled_slices, case.ignore_empty_slices) == (None, True)
    assert told(case) == (1, 2)
    assert told(load_case(pair)) == (0, 1, 2)


def test_values_that_no_model_can_hold_are_refused(pair):
    save(pair.label, np.full((4, 5, 3), 65535, np.int32), AFFINE)
    assert load_case(pair).values == (65535,)
    save(pair.label, np.full((4, 5, 3), 65536, np.int32), AFFINE)
    with pytest.raises(InputError, match=r"holds the value 65536\. Use values from 1 to 65535"):
        load_case(pair)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "SRP", "IPL"])
def test_a_label_in_another_axis_order_is_brought_into_the_image_grid(pair, codes):
    expected = load_case(pair).labels
    image = nib.load(pair.label, mmap=False)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes)))
    )
    nib.save(turned, pair.label)
    np.testing.assert_array_equal(load_case(pair).labels, expected)


def test_small_differences_of_the_affine_are_tolerated(pair):
    save(pair.label, np.ones((4, 5, 3), np.uint8), AFFINE + np.eye(4, k=3) * 0.005)
    assert load_case(pair).values == (1,)


@pytest.mark.parametrize(
    ("labels", "affine", "message"),
    [
        (np.zeros((4, 5, 3)), AFFINE, "is empty"),
        (np.ones((4, 5, 2)), AFFINE, r"shape \(4, 5, 2\).*\(4, 5, 3\)"),
        (np.ones((4, 5, 3, 2)), AFFINE, "shape"),
        (np.ones((4, 5, 3)), AFFINE + np.eye(4, k=3), "different places"),
        (np.ones((4, 5, 3)), AFFINE * [1, 1, 1.1, 1], "different places"),
        (np.full((4, 5, 3), 0.5), AFFINE, "fractional"),
        (np.full((4, 5, 3), -1.0), AFFINE, "Labels are integers from 0"),
    ],
)
def test_labels_that_do_not_belong_are_refused(pair, labels, affine, message):
    save(pair.label, labels.astype(np.float32), affine)
    with pytest.raises(InputError, match=message) as error:
        load_case(pair)
    assert "label.nii" in str(error.value)


def test_an_image_in_place_of_a_label_is_refused(tmp_path):
    voxels = np.arange(20 * 20 * 2).reshape(20, 20, 2).astype(np.int16)
    case = Case("a", save(tmp_path / "image.nii", voxels), save(tmp_path / "label.nii", voxels))
    with pytest.raises(InputError, match="799 different values"):
        load_case(case)


def test_a_case_without_label_is_refused(pair):
    with pytest.raises(InputError, match="has no label"):
        load_case(Case("a", pair.image))


@pytest.mark.parametrize(("room", "read_again"), [(0, 2), (200, 1), (10_000, 0)])
def test_images_that_do_not_fit_into_memory_are_read_each_time(pair, room, read_again):
    read, lazy = [], LazyCases(room)
    cases = [load_case(replace(pair, name=name), ignore_empty_slices=name == "b") for name in "ab"]
    cases = [replace(case, volume=replace(case.volume, name=name)) for name, case in zip("ab", cases, strict=True)]
    for case in cases:
        lazy.add(case, lambda: read.append(pair.image) or read_volume(pair.image))
    pair.label.unlink()
    assert len(lazy) == 2 and not read
    for one, other in zip(lazy, cases, strict=True):
        assert np.array_equal(one.volume.voxels, other.volume.voxels) and one.volume.name == other.volume.name
        assert np.array_equal(one.labels, other.labels) and one.labels.dtype == other.labels.dtype
        assert one.values == other.values and one.ignore_empty_slices == other.ignore_empty_slices
        assert one.labelled_slices == other.labelled_slices
    assert len(read) == read_again


def test_frames_with_a_mask_file_are_the_labelled_slices(tmp_path):
    images = save_frames(tmp_path / "images/video", [str(index) for index in range(12)])
    masks = save_frames(tmp_path / "labels/video", ["10"], value=3)
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(masks / "2.png")
    case = Case("video", images, masks)
    assert load_case(case).labelled_slices == (2, 10)
    assert told(load_case(case, ignore_empty_slices=True)) == (10,)
    assert load_case(case).values == (3,)


def test_frames_take_labels_of_any_format_with_their_shape(tmp_path):
    frames = save_frames(tmp_path / "video", ["0", "1"])
    label = save(tmp_path / "label.nii", np.ones((6, 4, 2), np.uint8))
    assert load_case(Case("video", frames, label)).labels.shape == (6, 4, 2)
    save(label, np.ones((4, 6, 2), np.uint8))
    with pytest.raises(InputError, match="shape"):
        load_case(Case("video", frames, label))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1=anterior,2=posterior", {1: "anterior", 2: "posterior"}), (" 7 = left kidney ", {7: "left kidney"})],
)
def test_parse_structures(text, expected):
    assert parse_structures(text) == expected


@pytest.mark.parametrize(
    "text", ["", "1", "1=", "=a", "0=a", "-1=a", "1.5=a", "x=a", "1=a,", "1=a,1=b", "1=a,2=A", "²=a"]
)
def test_structures_that_clash_or_cannot_be_read(text):
    with pytest.raises(InputError, match="in '"):
        parse_structures(text)


def test_default_structures():
    assert default_structures(np.array([1, 7])) == {1: "structure_1", 7: "structure_7"}


def test_real_hippocampus_cases(data_dir):
    folder = data_dir / "msd_hippocampus"
    names = json.loads((folder / "splits.json").read_text())["unit_test"]
    cases = find_cases(folder / "images", folder / "labels", names)
    assert [case.name for case in cases] == sorted(names)
    assert all(load_case(case).values == (1, 2) for case in cases)


def test_real_mouse_labels_stored_as_float(data_dir):
    case = find_cases(data_dir / "mouse_brain_fvb/images", data_dir / "mouse_brain_fvb/labels")[0]
    loaded = load_case(case)
    assert (loaded.labels.dtype, len(loaded.values), max(loaded.values)) == (np.uint8, 37, 40)


def test_real_dicom_with_a_label_flipped_by_its_converter(data_dir):
    folder = data_dir / "totalsegmentator_examples"
    case = Case("ct", folder / "dicom/example_ct_dicom", folder / "labels/example_ct_dicom.nii.gz")
    loaded = load_case(case)
    stored = read_volume(case.label)
    np.testing.assert_array_equal(
        canonical_view(loaded.labels, loaded.volume.affine), canonical_view(stored.voxels, stored.affine)
    )
    assert np.median(loaded.volume.voxels[loaded.labels == 5]) == pytest.approx(80, abs=60)


def test_real_cine_sequence_has_two_labelled_frames(data_dir):
    folder = data_dir / "sunnybrook_cine/sequences"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest.items():
        case = load_case(Case(name, folder / name / "frames", folder / name / "masks"))
        assert case.labelled_slices == tuple(sorted((entry["ed"], entry["es"])))
        assert case.volume.grid == (256, 256, entry["frames"])


def test_real_basal_and_apical_slices_are_unlabelled(data_dir):
    folder = data_dir / "sunnybrook_cine"
    slices = json.loads((folder / "cases.json").read_text())["SC-HF-I-2"]["ed_slices"]
    case = Case("ed", folder / "images/SC-HF-I-2_ED.nii.gz", folder / "labels/SC-HF-I-2_ED.nii.gz")
    assert told(load_case(case, ignore_empty_slices=True)) == tuple(slices)
