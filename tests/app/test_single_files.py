import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from lib.single_files import SingleFiles
from PIL import Image

from ofl_sam2.errors import InputError
from ofl_sam2.files import itk_places_alike, read_volume


def frames(folder: Path, dtype: type = np.uint8, colour: bool = False) -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 2 if dtype is bool else 200, (3, 8, 6, *([3] if colour else [])))
    for number, frame in enumerate(pixels.astype(dtype)):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def files(tmp_path: Path) -> SingleFiles:
    return SingleFiles(tmp_path / "copies", max_bytes=1 << 20)


def test_a_file_is_given_as_it_is(files: SingleFiles, tmp_path: Path) -> None:
    for image in (tmp_path / "a.nii.gz", tmp_path / "a.nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 3, 2), np.int16)), str(image))
        assert files.of(image) == image


@pytest.mark.parametrize("codes", [(0, 0), (1, 2), (1, 4)])
@pytest.mark.parametrize("size", [(4, 3, 2), (4, 3), (4, 3, 2, 2)])
def test_what_itk_would_place_elsewhere_is_copied(
    files: SingleFiles, tmp_path: Path, codes: tuple[int, int], size: tuple[int, ...]
) -> None:
    image = nib.Nifti1Image(np.arange(np.prod(size), dtype=np.int16).reshape(size), None)
    image.header.set_zooms((1.0, 2.0, 3.0, 1.0)[: len(size)])
    for code, place, shift in zip(codes, (image.set_qform, image.set_sform), (0, 7), strict=True):
        affine = np.array([[-1, 0, 0, shift], [0, 2, 0, 0], [0, 0, 3, shift], [0, 0, 0, 1.0]])
        place(affine if code else None, code)
    nib.save(image, tmp_path / "a.nii.gz")
    file = files.of(tmp_path / "a.nii.gz")
    assert file != tmp_path / "a.nii.gz" and file.suffixes == [".nii", ".gz"]
    copy, original = read_volume(file), read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(copy.voxels, original.voxels)
    np.testing.assert_allclose(copy.affine, original.affine, atol=1e-5)
    assert itk_places_alike(file)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_frames_become_a_volume_of_the_same_voxels(files: SingleFiles, tmp_path: Path, dtype: type) -> None:
    folder = frames(tmp_path / "frames", dtype)
    copy, original = read_volume(files.of(folder)), read_volume(folder)
    np.testing.assert_array_equal(copy.voxels, original.voxels)
    np.testing.assert_array_equal(copy.affine, original.affine)


def test_colour_frames_become_grey(files: SingleFiles, tmp_path: Path) -> None:
    folder = frames(tmp_path / "frames", colour=True)
    copy, original = read_volume(files.of(folder)), read_volume(folder)
    assert copy.voxels.shape == original.grid and copy.voxels.dtype == np.uint8
    np.testing.assert_allclose(copy.voxels, original.voxels @ [0.299, 0.587, 0.114], atol=0.51)


def test_header_with_data_elsewhere_is_joined(files: SingleFiles, tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    image.SetSpacing((1, 2, 3))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    copy, original = read_volume(files.of(tmp_path / "a.mhd")), read_volume(tmp_path / "a.mhd")
    np.testing.assert_array_equal(copy.voxels, original.voxels)
    np.testing.assert_allclose(copy.affine, original.affine)


def test_copy_is_kept_until_the_image_changes(files: SingleFiles, tmp_path: Path) -> None:
    folder = frames(tmp_path / "frames")
    first = files.of(folder)
    written = first.stat().st_ino
    assert files.of(folder) == first and first.stat().st_ino == written
    (folder / "2.png").unlink()
    assert files.of(folder) != first and read_volume(files.of(folder)).grid == (6, 8, 2)


def test_least_recently_used_copies_are_removed(tmp_path: Path) -> None:
    images = [frames(tmp_path / name) for name in "abc"]
    size = SingleFiles(tmp_path / "one", 0).of(images[0]).stat().st_size
    bounded = SingleFiles(tmp_path / "copies", max_bytes=int(2.5 * size), in_use_s=60)
    a, b = bounded.of(images[0]), bounded.of(images[1])
    os.utime(b, (1, 1))
    assert bounded.of(images[0]) == a
    c = bounded.of(images[2])
    assert a.exists() and c.exists() and not b.exists()


def test_copies_in_use_stay_whatever_the_bound(tmp_path: Path) -> None:
    bounded = SingleFiles(tmp_path / "copies", max_bytes=0)
    handed_out = bounded.of(frames(tmp_path / "a"))
    bounded.of(frames(tmp_path / "b"))
    assert handed_out.exists()
    os.utime(handed_out, (1, 1))
    bounded.of(frames(tmp_path / "c"))
    assert not handed_out.exists()


def test_unreadable_image_is_refused_and_leaves_nothing(files: SingleFiles, tmp_path: Path) -> None:
    folder = frames(tmp_path / "frames")
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="Cannot read"):
        files.of(folder)
    assert not (tmp_path / "copies").exists()
