"""Reading and writing every format, and the refusal of damaged files."""

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from ofl_sam2.dicom import read_headers
from ofl_sam2.errors import InputError
from ofl_sam2.files import case_name, data_files, nifti_image, read_labels, read_volume, write_labels
from ofl_sam2.volume import Volume

OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-0.5, -0.7, 2.5]), (10, -20, 30))
SUFFIXES = [".nii", ".nii.gz", ".nrrd", ".mha"]


def random_voxels(shape=(5, 6, 4), high=200, dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    nib.save(nib.Nifti1Image(voxels, affine, dtype=voxels.dtype), path)
    return path


def save_frames(folder: Path, frames: np.ndarray, names=None, suffix=".png") -> Path:
    """Save `frames` `(T, H, W)` or `(T, H, W, 3)`."""
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{names[index] if names else index}{suffix}")
    return folder


def save_series(folder: Path, positions=(0.0, 2.0, 4.0, 6.0), series="1", **changes) -> Path:
    """Save a CT series whose stored value is the slice number + 10 x column + row; HU = stored - 1000."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, position in enumerate(positions):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = folder / f"{series}_{9 - index}.dcm"
        slice_ = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.is_little_endian, slice_.is_implicit_VR = True, False
        slice_.SOPClassUID, slice_.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        slice_.Modality, slice_.SeriesInstanceUID = "CT", f"1.2.3.{series}"
        slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        slice_.Rows, slice_.Columns, slice_.PixelSpacing = 3, 5, [0.5, 0.8]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient = [-10, 20, position]
        slice_.SliceThickness, slice_.RescaleSlope, slice_.RescaleIntercept = 2, 1, -1000
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 0
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        rows, columns = np.mgrid[:3, :5]
        slice_.PixelData = (index + 10 * columns + rows).astype("<u2").tobytes()
        for name, value in changes.items():
            setattr(slice_, name, value)
        slice_.save_as(file)
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b/x.nii.gz", "x"),
        ("x.NII.GZ", "x"),
        ("x.y.mha", "x.y"),
        ("folder", "folder"),
        ("p.01", "p.01"),
        (".nii", ".nii"),
    ],
)
def test_case_name(name, expected):
    assert case_name(name) == expected


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "u2", "i4", "f4", "f8", "i8"])
def test_nifti_of_every_dtype(tmp_path, dtype):
    voxels = random_voxels(dtype=dtype)
    volume = read_volume(save_nifti(tmp_path / "case.nii.gz", voxels))
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-6)
    assert (volume.name, volume.frames) == ("case", False)


def test_scaled_nifti_is_read_in_its_units_as_float32(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "ct.nii")
    volume = read_volume(tmp_path / "ct.nii")
    assert volume.voxels.dtype == np.float32
    assert volume.voxels.ravel().tolist() == list(range(-1024, -1000))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_itk_formats_agree_with_nifti_of_the_same_image(tmp_path, suffix):
    voxels = random_voxels()
    image = sitk.ReadImage(str(save_nifti(tmp_path / "case.nii", voxels)))
    sitk.WriteImage(image, str(tmp_path / f"case{suffix}"))
    volume = read_volume(tmp_path / f"case{suffix}")
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 6), (5, 6, 1)), ((5, 6, 4, 1), (5, 6, 4)), ((5, 6, 4, 1, 1), (5, 6, 4))]
)
def test_single_axes_are_dropped(tmp_path, shape, expected):
    voxels = random_voxels(shape)
    volume = read_volume(save_nifti(tmp_path / "case.nii", voxels))
    np.testing.assert_array_equal(volume.voxels, voxels.reshape(expected))


def test_a_2d_itk_image_becomes_one_slice(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(random_voxels((6, 5))), str(tmp_path / "case.mha"))
    np.testing.assert_array_equal(read_volume(tmp_path / "case.mha").voxels[:, :, 0], random_voxels((6, 5)).T)


@pytest.mark.parametrize("source", [".nii.gz", ".nrrd"])
@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 6, 4, 3)])
def test_labels_come_back_in_the_grid_of_the_image(tmp_path, source, target, shape):
    nifti = save_nifti(tmp_path / "image.nii.gz", random_voxels(shape, dtype=np.float32))
    image = read_volume(nifti)
    if source == ".nrrd":
        write_labels(tmp_path / "image.nrrd", random_voxels(shape), image)
        image = read_volume(tmp_path / "image.nrrd")
    labels = random_voxels(shape, high=3, dtype=np.int64)
    write_labels(tmp_path / "out" / f"label{target}", labels, image)
    read = read_labels(tmp_path / "out" / f"label{target}")
    assert read.voxels.dtype == np.uint8
    np.testing.assert_array_equal(read.voxels, labels)
    np.testing.assert_allclose(read.affine, image.affine, atol=1e-5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"label{target}"]


@pytest.mark.parametrize(("high", "dtype"), [(255, "uint8"), (256, "uint16"), (70000, "uint32")])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_use_the_smallest_type(tmp_path, suffix, high, dtype):
    labels = np.zeros((2, 3, 4), np.int64)
    labels[0, 0, 0] = high
    write_labels(tmp_path / f"label{suffix}", labels, Volume(labels, np.eye(4), "case"))
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"label{suffix}")))
    assert (stored.dtype, stored.max()) == (dtype, high)


def test_nifti_header_of_the_image_is_kept(tmp_path):
    image = nib.Nifti1Image(random_voxels((4, 5, 3, 2)), OBLIQUE)
    image.set_qform(OBLIQUE, code=1)
    image.set_sform(OBLIQUE, code=3)
    image.header.set_zooms((0.5, 0.7, 2.5, 37.5))
    image.header.set_xyzt_units("mm", "msec")
    image.header.set_slope_inter(2.0, 5.0)
    image.header["cal_max"] = 400
    nib.save(image, tmp_path / "cine.nii.gz")
    volume = read_volume(tmp_path / "cine.nii.gz")
    write_labels(tmp_path / "label.nii.gz", np.ones(volume.grid, bool), volume)
    header, original = nib.load(tmp_path / "label.nii.gz").header, nib.load(tmp_path / "cine.nii.gz").header
    assert (header["sform_code"], header["qform_code"], header["cal_max"]) == (3, 1, 0)
    assert header.get_xyzt_units() == ("mm", "msec")
    np.testing.assert_array_equal(header.get_zooms(), original.get_zooms())
    np.testing.assert_array_equal(header.get_sform(), original.get_sform())
    np.testing.assert_array_equal(header.get_qform(), original.get_qform())
    assert read_labels(tmp_path / "label.nii.gz").voxels.min() == 1


def test_nifti_from_another_format_has_sform_and_qform(tmp_path):
    volume = Volume(random_voxels(), OBLIQUE, "case")
    write_labels(tmp_path / "label.nii.gz", volume.voxels, volume)
    header = nib.load(tmp_path / "label.nii.gz").header
    assert (header["sform_code"], header["qform_code"]) == (1, 1)
    np.testing.assert_allclose(header.get_sform(), OBLIQUE, atol=1e-5)
    np.testing.assert_allclose(header.get_qform(), OBLIQUE, atol=1e-5)


def test_a_sheared_grid_is_kept_in_the_sform(tmp_path):
    sheared = np.eye(4)
    sheared[1, 2] = 0.3
    volume = Volume(random_voxels(), sheared, "tilted")
    write_labels(tmp_path / "label.nii.gz", volume.voxels, volume)
    header = nib.load(tmp_path / "label.nii.gz").header
    assert (header["sform_code"], header["qform_code"]) == (1, 0)
    np.testing.assert_allclose(read_labels(tmp_path / "label.nii.gz").affine, sheared, atol=1e-6)


def test_nifti2_and_big_endian_sources(tmp_path):
    voxels = random_voxels()
    nib.save(nib.Nifti2Image(voxels, OBLIQUE), tmp_path / "two.nii")
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(voxels, OBLIQUE, header), tmp_path / "big.nii")
    for name in ("two", "big"):
        volume = read_volume(tmp_path / f"{name}.nii")
        write_labels(tmp_path / f"{name}_label.nii", voxels, volume)
        np.testing.assert_array_equal(read_labels(tmp_path / f"{name}_label.nii").voxels, voxels)
    assert isinstance(nib.load(tmp_path / "two_label.nii"), nib.Nifti2Image)


def test_integers_stored_as_float_are_labels(tmp_path):
    labels = read_labels(save_nifti(tmp_path / "label.nii", random_voxels(high=41, dtype=np.float32)))
    assert labels.voxels.dtype == np.uint8


@pytest.mark.parametrize(
    ("value", "message"), [(0.5, r"fractional labels such as 0\.5"), (-1, "-1"), (1e25, "an image"), (np.nan, "NaN")]
)
def test_values_that_are_no_labels(tmp_path, value, message):
    voxels = np.ones((3, 3, 3), np.float32)
    voxels[1, 1, 1] = value
    with pytest.raises(InputError, match=message) as error:
        read_labels(save_nifti(tmp_path / "label.nii", voxels))
    assert "label.nii" in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels_are_counted(tmp_path, bad):
    voxels = np.zeros((3, 3, 3), np.float32)
    voxels[0, :2, 0] = bad
    with pytest.raises(InputError, match=r"case\.nii holds 2 voxels that are NaN or infinite"):
        read_volume(save_nifti(tmp_path / "case.nii", voxels))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("kept", [0, 10, 200, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path, suffix, kept):
    path = tmp_path / f"case{suffix}"
    volume = Volume(random_voxels((20, 20, 20)), np.eye(4), "case")
    write_labels(path, volume.voxels, volume)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=f"case{suffix}"):
        read_volume(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_damaged_nifti_headers_are_read_or_refused(tmp_path, changes, zipped):
    content = bytearray(nib.Nifti1Image(random_voxels((3, 3, 3)), np.eye(4)).to_bytes())
    for position, value in changes:
        content[position] = value
    path = tmp_path / ("case.nii.gz" if zipped else "case.nii")
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    try:
        assert np.isfinite(read_volume(path).voxels).all()
    except InputError as error:
        assert "case" in str(error)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "fake.nii.gz").write_text("text")
    (tmp_path / "alone.mhd").write_text("ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "absent.nii": "does not exist",
        "notes.txt": "no known image file",
        "fake.nii.gz": "Cannot read",
        "alone.mhd": "Cannot read",
        "empty": "neither frames",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            read_volume(tmp_path / name)
        assert name in str(error.value)


META = "NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
NRRD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n"


@pytest.mark.parametrize(
    ("name", "header", "named"),
    [
        ("a.mhd", META + "ElementDataFile = a.raw\n", ["a.raw"]),
        ("a.mha", META + "ElementDataFile = ../other/a.raw\n", ["../other/a.raw"]),
        ("a.mhd", META + "  elementdatafile = /etc/passwd\n", ["/etc/passwd"]),
        ("a.mhd", META + "ElementDataFile = LIST\nx/1.raw\n2.raw\n", ["x/1.raw", "2.raw"]),
        ("a.mha", META + "ElementDataFile = LOCAL\nElementDataFile = x", []),
        ("a.nrrd", NRRD + "data file: a.raw\n\n", ["a.raw"]),
        ("a.nrrd", NRRD + "datafile: C:\\x\\a.raw\r\n\r\n", ["C:/x/a.raw"]),
        ("a.nrrd", NRRD + "\ndata file: /etc/passwd\n", []),
    ],
)
def test_voxels_come_from_beside_the_header_only(tmp_path, name, header, named):
    folder = tmp_path / "here"
    for place in (folder, tmp_path / "other", folder / "x"):
        place.mkdir(exist_ok=True)
        (place / "a.raw").write_bytes(bytes(range(8)))
    path = folder / name
    path.write_bytes(header.encode())
    assert data_files(path) == named
    if any("/" in entry for entry in named):
        with pytest.raises(InputError, match="keeps its voxels in another folder"):
            read_volume(path)
    elif named:
        assert read_volume(path).voxels.ravel(order="F").tolist() == list(range(8))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.mha", META + "ElementDataFile : /etc/passwd\nElementDataFile = LOCAL\n"),
        ("a.mha", META + "Comment = ElementDataFile = x\nElementDataFile = LOCAL\n"),
        ("a.mha", META + "\vElementDataFile = /etc/passwd\nElementDataFile = LOCAL\n"),
        ("a.mha", META + "\fElementDataFile = /etc/passwd\nElementDataFile = LOCAL\n"),
        ("a.mha", META + "ElementDataFile\0 = /etc/passwd\nElementDataFile = LOCAL\n"),
        ("a.mha", META + "Element\0DataFile = /etc/passwd\nElementDataFile = LOCAL\n"),
        ("a.mha", META + "Comment = x\rElementDataFile = /etc/passwd\nElementDataFile = LOCAL\n"),
        ("a.mha", META + "ElementDataFile = LIST\nx\r/etc/passwd\n\n"),
        ("a.nrrd", NRRD + "content: x\rdata file: /etc/passwd\n\n"),
        ("a.nrrd", NRRD + "data file: a.raw\ndata file: /etc/passwd\n\n"),
        ("a.nrrd", NRRD + "data file: a.raw\n" + "# padding\n" * 200_000 + "data file: /etc/passwd\n\n"),
    ],
)
def test_a_header_that_can_be_read_in_two_ways_is_refused(tmp_path, name, header):
    (tmp_path / name).write_bytes(header.encode() + bytes(8))
    (tmp_path / "a.raw").write_bytes(bytes(8))
    for read in (data_files, read_volume):
        with pytest.raises(InputError, match="does not say where its voxels are"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_a_header_without_end_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"# a comment\n" * 100_000 + b"ElementDataFile = /etc/passwd\n\n")
    with pytest.raises(InputError, match="does not say where its voxels are"):
        read_volume(path)


def test_wrong_kinds_of_voxels_are_refused(tmp_path):
    colour = np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(InputError, match="colour"):
        read_volume(save_nifti(tmp_path / "colour.nii", colour))
    with pytest.raises(InputError, match="complex"):
        read_volume(save_nifti(tmp_path / "complex.nii", np.zeros((3, 3, 3), np.complex64)))
    with pytest.raises(InputError, match="5 dimensions"):
        read_volume(save_nifti(tmp_path / "five.nii", np.zeros((3, 3, 3, 2, 2), np.float32)))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 3, 3, 2)), isVector=True), str(tmp_path / "vector.mha"))
    with pytest.raises(InputError, match="2 values a voxel"):
        read_volume(tmp_path / "vector.mha")


def test_writing_refuses_what_does_not_fit(tmp_path):
    image = read_volume(save_nifti(tmp_path / "image.nii.gz", random_voxels()))
    good = np.zeros(image.grid, np.uint8)
    for path, labels, message in [
        ("label.nii.gz", good[1:], "shape"),
        ("label.nii.gz", good.astype(float), "float64"),
        ("label.nii.gz", good.astype(int) - 1, "from 0 to"),
        ("label.png", good, "unknown suffix"),
        ("folder", good, "unknown suffix"),
        ("image.nii.gz", good, "the image itself"),
    ]:
        with pytest.raises(InputError, match=message):
            write_labels(tmp_path / path, labels, image)
    assert [path.name for path in tmp_path.iterdir()] == ["image.nii.gz"]


def test_a_failed_write_leaves_the_old_label(tmp_path, monkeypatch):
    volume = Volume(random_voxels(), np.eye(4), "case")
    write_labels(tmp_path / "label.nii.gz", volume.voxels, volume)
    before = (tmp_path / "label.nii.gz").read_bytes()

    def full_disk(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(Exception, match="disk is full"):
        write_labels(tmp_path / "label.nii.gz", volume.voxels * 0, volume)
    assert (tmp_path / "label.nii.gz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_grey_frames_in_natural_order(tmp_path):
    frames = random_voxels((12, 4, 6), dtype=np.uint8)
    volume = read_volume(save_frames(tmp_path / "video", frames))
    assert volume.frame_names == tuple(map(str, range(12)))
    assert (volume.frames, volume.colour, volume.grid) == (True, False, (6, 4, 12))
    np.testing.assert_array_equal(volume.voxels.transpose(2, 1, 0), frames)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_colour_frames(tmp_path, suffix):
    frames = np.full((3, 4, 6, 3), 100, np.uint8)
    frames[..., 0] = 200
    volume = read_volume(save_frames(tmp_path / "video", frames, suffix=suffix))
    assert (volume.voxels.shape, volume.grid, volume.colour) == ((6, 4, 3, 3), (6, 4, 3), True)
    assert volume.voxels[0, 0, 0].tolist() == pytest.approx([200, 100, 100], abs=3)


def test_16_bit_frames_and_transparency(tmp_path):
    deep = random_voxels((2, 4, 6), high=60000, dtype=np.uint16)
    np.testing.assert_array_equal(read_volume(save_frames(tmp_path / "deep", deep)).voxels.transpose(2, 1, 0), deep)
    transparent = np.full((2, 4, 6, 4), 7, np.uint8)
    assert read_volume(save_frames(tmp_path / "rgba", transparent)).voxels.shape == (6, 4, 2, 3)


def test_frames_that_do_not_match_are_refused(tmp_path):
    folder = save_frames(tmp_path / "video", np.zeros((2, 4, 6), np.uint8))
    Image.fromarray(np.zeros((4, 7), np.uint8)).save(folder / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png is 7 x 4 pixels"):
        read_volume(folder)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "odd.png")
    with pytest.raises(InputError, match="colour"):
        read_volume(folder)
    (folder / "odd.png").write_bytes((folder / "0.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"Cannot read .*odd\.png"):
        read_volume(folder)
    (folder / "odd.png").unlink()
    shutil.copy(folder / "1.png", folder / "1.PNG")
    with pytest.raises(InputError, match="several frames of one name: 1"):
        read_volume(folder)


def test_masks_are_matched_to_frames_by_name(tmp_path):
    volume = read_volume(save_frames(tmp_path / "video", np.zeros((4, 3, 5), np.uint8)))
    masks = random_voxels((2, 3, 5), high=4, dtype=np.uint8)
    labels = read_labels(save_frames(tmp_path / "masks", masks, names=["3", "1"]), volume)
    assert labels.labelled == (1, 3)
    assert labels.voxels.dtype == np.uint8
    np.testing.assert_array_equal(labels.voxels[:, :, 3].T, masks[0])
    np.testing.assert_array_equal(labels.voxels[:, :, 1].T, masks[1])
    assert not labels.voxels[:, :, [0, 2]].any()


def test_palette_and_bilevel_masks_hold_label_values(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    palette = Image.fromarray(np.full((3, 5), 2, np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(folder / "0.png")
    Image.fromarray(np.ones((3, 5), bool)).save(folder / "1.png")
    labels = read_labels(folder)
    assert (labels.voxels[0, 0].tolist(), labels.labelled) == ([2, 1], None)


def test_masks_that_do_not_match_are_refused(tmp_path):
    volume = read_volume(save_frames(tmp_path / "video", np.zeros((2, 3, 5), np.uint8)))
    for name, masks, names, suffix, message in [
        ("strangers", np.zeros((2, 3, 5), np.uint8), ["1", "9"], ".png", "without a frame .*: 9"),
        ("sizes", np.zeros((1, 3, 4), np.uint8), ["1"], ".png", r"1\.png is 4 x 3 pixels"),
        ("colour", np.zeros((1, 3, 5, 3), np.uint8), ["1"], ".png", "colour image"),
        ("jpeg", np.zeros((1, 3, 5), np.uint8), ["1"], ".jpg", "no PNG masks"),
    ]:
        with pytest.raises(InputError, match=message):
            read_labels(save_frames(tmp_path / name, masks, names, suffix), volume)


@pytest.mark.parametrize("high", [3, 300])
def test_masks_are_written_like_the_frames_and_replace_old_ones(tmp_path, high):
    volume = read_volume(save_frames(tmp_path / "video", np.zeros((3, 4, 6), np.uint8), ["a2", "a10", "b"]))
    save_frames(tmp_path / "out", np.zeros((1, 4, 6), np.uint8), ["old"])
    labels = random_voxels(volume.grid, high=high)
    write_labels(tmp_path / "out", labels, volume)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a10.png", "a2.png", "b.png"]
    np.testing.assert_array_equal(read_labels(tmp_path / "out", volume).voxels, labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "video"]


def test_masks_never_replace_other_files(tmp_path):
    volume = read_volume(save_frames(tmp_path / "video", np.zeros((3, 4, 6), np.uint8)))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.docx").write_text("years of work")
    with pytest.raises(InputError, match="other files than masks"):
        write_labels(tmp_path / "home", np.zeros(volume.grid, np.uint8), volume)
    with pytest.raises(InputError, match="the image itself"):
        write_labels(tmp_path / "video", np.zeros(volume.grid, np.uint8), volume)
    with pytest.raises(InputError, match="65535"):
        write_labels(tmp_path / "out", np.full(volume.grid, 70000), volume)
    assert (tmp_path / "home" / "thesis.docx").read_text() == "years of work"


def test_a_failed_write_leaves_the_old_masks(tmp_path, monkeypatch):
    volume = Volume(np.zeros((6, 4, 3), np.uint8), np.eye(4), "video", frames=True)
    write_labels(tmp_path / "out", np.ones(volume.grid, np.uint8), volume)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(Exception, match="disk is full"):
        write_labels(tmp_path / "out", np.zeros(volume.grid, np.uint8), volume)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_labels(tmp_path / "out").voxels.min() == 1


def test_dicom_series_is_sorted_and_rescaled(tmp_path):
    volume = read_volume(save_series(tmp_path / "series" / "nested").parent)
    columns, rows, slices = np.mgrid[:5, :3, :4]
    np.testing.assert_array_equal(volume.voxels, slices + 10 * columns + rows - 1000)
    np.testing.assert_allclose(volume.affine, [[-0.8, 0, 0, 10], [0, -0.5, 0, -20], [0, 0, 2, 0], [0, 0, 0, 1]])
    assert volume.name == "series"


def test_headers_are_those_of_the_slices_in_their_order(tmp_path):
    save_series(tmp_path, positions=np.arange(9.0), series="2", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    headers = read_headers(save_series(tmp_path / "series").parent)
    assert [header.ImagePositionPatient[2] for header in headers] == [0, 2, 4, 6]


def test_dicom_with_a_fractional_slope_is_float32(tmp_path):
    volume = read_volume(save_series(tmp_path / "pet", RescaleSlope=0.25, RescaleIntercept=0))
    assert volume.voxels.dtype == np.float32
    assert volume.voxels[1, 2, 3] == 3.75


def test_a_single_dicom_slice_has_its_thickness(tmp_path):
    volume = read_volume(save_series(tmp_path / "one", positions=[5.0], SliceThickness=3))
    assert volume.voxels.shape == (5, 3, 1)
    assert volume.spacing == pytest.approx((0.8, 0.5, 3.0))


def test_the_largest_series_is_taken_and_localisers_are_passed_over(tmp_path):
    save_series(tmp_path, positions=[0.0, 2.0], series="2")
    save_series(tmp_path, positions=np.arange(6.0), series="3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    save_series(tmp_path, series="1")
    (tmp_path / "README.txt").write_text("not DICOM")
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "preview.png")
    assert read_volume(tmp_path).voxels.shape == (5, 3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": [0, 2, 6, 8]}, r"usual distance is 2 mm, but 4 mm after 2\.0 mm"),
        ({"positions": [0, 2, 4, 5]}, "not evenly spaced"),
        ({"positions": [0, 0, 2, 4]}, "several images of one slice position"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localiser only"),
        ({"NumberOfFrames": 2}, "multi-frame"),
        ({"PixelSpacing": None}, "lacks PixelSpacing"),
        ({"SamplesPerPixel": 3}, "colour"),
    ],
)
def test_unusable_dicom_series_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_volume(save_series(tmp_path / "series", **changes))
    assert "series" in str(error.value)


def test_dicom_series_that_mix_stacks_are_refused(tmp_path):
    save_series(tmp_path)
    path = sorted(tmp_path.iterdir())[1]
    odd = pydicom.dcmread(path)
    odd.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    odd.save_as(path)
    with pytest.raises(InputError, match="another size, pixel spacing or orientation"):
        read_volume(tmp_path)


def test_two_dicom_series_of_one_size_are_refused_by_name(tmp_path):
    save_series(tmp_path, series="1", SeriesDescription="T1")
    save_series(tmp_path, series="2", SeriesDescription="T2")
    with pytest.raises(InputError, match=r"2 DICOM series of 4 .*'T1', 'T2'"):
        read_volume(tmp_path)


def test_damaged_dicom_is_refused(tmp_path):
    path = sorted(save_series(tmp_path / "series").iterdir())[2]
    content = path.read_bytes()
    for kept in (len(content) - 8, 300, 140):
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match="series"):
            read_volume(tmp_path / "series")


def test_dicom_with_an_unknown_compression_is_refused(tmp_path):
    for path in save_series(tmp_path / "series").iterdir():
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
        header.PixelData = pydicom.encaps.encapsulate([header.PixelData])
        header.save_as(path)
    with pytest.raises(InputError, match="cannot be decoded"):
        read_volume(tmp_path / "series")


def test_real_implicit_vr_series_lies_on_its_label(data_dir):
    volume = read_volume(data_dir / "dicom_lidc_0314_ct/dicom/CT")
    labels = read_labels(data_dir / "dicom_lidc_0314_ct/labels_derived/lungs_threshold.nii.gz")
    assert volume.voxels.shape == labels.voxels.shape == (512, 512, 99)
    np.testing.assert_allclose(volume.affine, labels.affine, atol=1e-3)
    assert np.median(volume.voxels[labels.voxels == 1]) < -500


def test_real_jpeg_2000_series(data_dir):
    volume = read_volume(data_dir / "totalsegmentator_examples/dicom/example_ct_dicom")
    assert volume.voxels.shape == (512, 512, 20)
    assert volume.voxels.min() >= -1024 and volume.voxels.max() > 500


def test_real_4d_cine_keeps_its_grid(data_dir, tmp_path):
    source = data_dir / "sunnybrook_cine/cine4d/SC-HF-I-1_cine.nii.gz"
    volume = read_volume(source)
    write_labels(tmp_path / "label.nii.gz", (volume.voxels > 100).astype(np.uint8), volume)
    written, original = nib.load(tmp_path / "label.nii.gz"), nib.load(source)
    assert written.shape == original.shape == (256, 256, 12, 20)
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.header.get_zooms() == original.header.get_zooms()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_real_oblique_image_keeps_its_grid_in_every_format(data_dir, tmp_path, suffix):
    volume = read_volume(data_dir / "sunnybrook_cine/images/SC-HF-I-1_ED.nii.gz")
    labels = read_labels(data_dir / "sunnybrook_cine/labels/SC-HF-I-1_ED.nii.gz").voxels
    write_labels(tmp_path / f"label{suffix}", labels, volume)
    written = read_labels(tmp_path / f"label{suffix}")
    np.testing.assert_array_equal(written.voxels, labels)
    np.testing.assert_allclose(written.affine, volume.affine, atol=1e-4)


def sheared(tilt_mm):
    """Slices of 2 mm, each moved by `tilt_mm` along the columns."""
    affine = np.diag([0.7, 0.7, 2.0, 1.0])
    affine[1, 2] = tilt_mm
    return affine


@pytest.mark.parametrize(("tilt_mm", "readable"), [(0.0, True), (0.0004, True), (0.8, False)])
def test_itk_reads_written_volumes_at_their_place_unless_the_gantry_was_tilted(tmp_path, tilt_mm, readable):
    volume = Volume(np.zeros((20, 20, 8), np.uint8), sheared(tilt_mm), "case")
    nib.save(nifti_image(volume, volume.voxels), tmp_path / "image.nii.gz")
    write_labels(tmp_path / "label.nii.gz", volume.voxels, volume)
    for name in ("image.nii.gz", "label.nii.gz"):
        np.testing.assert_allclose(read_volume(tmp_path / name).affine, volume.affine, atol=1e-6)
        if not readable:
            with pytest.raises(RuntimeError, match="orthonormal"):
                sitk.ReadImage(str(tmp_path / name))
            continue
        found = sitk.ReadImage(str(tmp_path / name)).TransformIndexToPhysicalPoint((19, 19, 7))
        np.testing.assert_allclose(np.array(found) * (-1, -1, 1), (volume.affine @ (19, 19, 7, 1))[:3], atol=0.01)


@pytest.mark.parametrize("scale", [2 / 255, 1.00000012])
def test_labels_that_are_off_by_rounding_are_rounded(tmp_path, scale):
    voxels = np.zeros((3, 3, 3), np.float32)
    voxels[0], voxels[1] = 1.0000001, 1.996
    read = read_labels(save_nifti(tmp_path / "a.nii", voxels))
    assert read.voxels.dtype == np.uint8 and sorted(np.unique(read.voxels)) == [0, 1, 2]
    stored = np.rint(np.arange(3) / scale)[:, None, None] * np.ones((1, 3, 3)) * scale
    assert read_labels(save_nifti(tmp_path / "b.nii", stored.astype(np.float32))).voxels[:, 0, 0].tolist() == [0, 1, 2]


def test_a_preview_beside_a_folder_of_dicom_files_is_no_sequence(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "thumb.png")
    save_series(tmp_path / "SE001")
    assert not read_volume(tmp_path).frames


def test_slices_with_rescales_of_their_own_do_not_wrap_around(tmp_path):
    folder = save_series(tmp_path / "pet")
    before = read_volume(folder).voxels
    for number, path in enumerate(
        sorted(folder.glob("*.dcm"), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])
    ):
        slice_ = pydicom.dcmread(path)
        slice_.RescaleSlope, slice_.RescaleIntercept = 1000 * (number + 1), -1024 * number
        slice_.save_as(path)
    after = read_volume(folder).voxels
    assert after.dtype == np.float32
    for number in range(after.shape[2]):
        np.testing.assert_array_equal(
            after[..., number], (before[..., number] + 1000.0) * 1000 * (number + 1) - 1024 * number
        )


def test_series_of_several_studies_are_not_chosen_from(tmp_path):
    save_series(tmp_path / "one", StudyInstanceUID="1.2")
    save_series(tmp_path / "two", StudyInstanceUID="1.3")
    with pytest.raises(InputError, match="2 studies"):
        read_volume(tmp_path)
