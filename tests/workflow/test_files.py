"""Reading and writing through MONAI's own transforms."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged, SaveImage

from ofl_sam2.errors import InputError
from ofl_sam2.files import read_volume
from ofl_sam2.workflow.files import AtomicNibabelWriter, VolumeReader, output_name

READER = "ofl_sam2.workflow.files.VolumeReader"
OBLIQUE = np.array([[0.0, -1.5, 0.2, 7], [2.0, 0, 0, -3], [0.1, 0, 3.0, 11], [0, 0, 0, 1]])


def load(path: Path) -> MetaTensor:
    return LoadImaged("image", reader=READER, ensure_channel_first=True)({"image": str(path)})["image"]


def save(folder: Path, labels: MetaTensor) -> Path:
    saver = SaveImage(
        folder,
        "",
        output_dtype=None,
        separate_folder=False,
        writer=AtomicNibabelWriter,
        output_name_formatter=output_name,
    )
    saver(labels)
    (written,) = folder.iterdir()
    return written


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_voxels_and_affine_are_those_of_the_library(tmp_path, suffix):
    import SimpleITK as sitk

    path = tmp_path / f"a.b{suffix}"
    sitk.WriteImage(
        sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)), str(path)
    )
    image, volume = load(path), read_volume(path)
    assert image.shape == (1, *volume.grid)
    assert np.array_equal(image[0].numpy(), volume.voxels)
    assert np.array_equal(image.affine.numpy(), volume.affine)


def test_a_label_map_lies_where_its_image_does(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, OBLIQUE), tmp_path / "patient.1.nii.gz")
    image = load(tmp_path / "patient.1.nii.gz")
    labels = MetaTensor(image.as_tensor().to(torch.uint8)).copy_meta_from(image)
    written = save(tmp_path / "out", labels)
    assert written.name == "patient.1.nii.gz"
    read = nib.load(written)
    assert read.get_data_dtype() == np.uint8
    assert np.array_equal(read.get_fdata(), voxels)
    assert np.allclose(read.affine, OBLIQUE, atol=1e-6)


def test_a_writer_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(image: nib.Nifti1Image, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("unplugged")

    monkeypatch.setattr("monai.data.image_writer.nib.save", fail)
    labels = MetaTensor(torch.zeros(1, 4, 4, 4, dtype=torch.uint8), meta={"filename_or_obj": "a.nii.gz"})
    with pytest.raises(RuntimeError, match="unplugged"):
        save(tmp_path / "out", labels)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bad_image_is_no_reason_to_try_other_readers(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match="Cannot read"):
        load(tmp_path / "a.nii.gz")


def test_frames_are_left_to_the_command_line(tmp_path):
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "1.png")
    with pytest.raises(InputError, match="ofl-sam2 segment"):
        VolumeReader().get_data(tmp_path)


@pytest.mark.parametrize("shape", [(6, 7, 4, 5), (6, 7, 1), (6, 7, 1, 3)])
def test_every_time_and_slice_is_written(tmp_path, shape):
    voxels = np.random.default_rng(0).integers(0, 3, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, OBLIQUE), tmp_path / "cine.nii.gz")
    image = load(tmp_path / "cine.nii.gz")
    written = nib.load(save(tmp_path / "out", MetaTensor(image.as_tensor().to(torch.uint8)).copy_meta_from(image)))
    assert np.array_equal(written.get_fdata(), voxels)
    assert np.allclose(written.affine, OBLIQUE, atol=1e-6)
