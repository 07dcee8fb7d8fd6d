"""Volume <-> slices: exact inverses, orientation, intensity and plane geometry."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ofl_sam2.errors import InputError
from ofl_sam2.intensity import Intensity, intensity_for
from ofl_sam2.plane import PlaneGeometry
from ofl_sam2.volume import SliceStack, Volume, canonical_view, choose_axis

ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
orientations = st.sampled_from(ORIENTATIONS)
spacings = st.tuples(*[st.sampled_from([0.15, 0.7, 1.0, 3.3, 10.0])] * 3)
shapes = st.tuples(*[st.integers(1, 7)] * 3)
tilts = st.tuples(*[st.floats(-0.25, 0.25)] * 3)


def make_affine(order=(0, 1, 2), signs=(1, 1, 1), spacing=(1.0, 1.0, 1.0), tilt=(0.0, 0.0, 0.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*tilt) @ (np.eye(3)[list(order)].T * signs) * spacing
    affine[:3, 3] = (-12.5, 40.0, 7.0)
    return affine


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_canonical_view_agrees_with_nibabel_and_is_a_view(order, signs):
    affine = make_affine(order, signs, (0.5, 1.0, 3.0), (0.1, -0.1, 0.05))
    array = np.arange(2 * 3 * 5 * 2, dtype=np.int16).reshape(2, 3, 5, 2)
    view = canonical_view(array, affine)
    expected = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    np.testing.assert_array_equal(view, np.asarray(expected.dataobj))
    assert np.shares_memory(view, array)
    view[:] = 0
    assert not array.any()


@settings(max_examples=150, deadline=None)
@given(orientations, spacings, shapes, tilts, st.sampled_from([0, 1, 2]), st.sampled_from([None, 1, 3]))
def test_writing_every_slice_reproduces_the_array(orientation, spacing, shape, tilt, axis, times):
    shape = shape if times is None else (*shape, times)
    labels = np.random.default_rng(0).integers(0, 5, shape).astype(">u2")
    volume = Volume(np.zeros(shape, np.float32), make_affine(*orientation, spacing, tilt), "case")
    stack = SliceStack(volume, axis, 32)
    written = np.full(shape, 99, np.uint8)
    for index in range(len(stack)):
        view = stack.slice_of(written, index)
        assert view.shape == stack.shape
        assert (view == 99).all()
        view[:] = stack.slice_of(labels, index)
    np.testing.assert_array_equal(written, labels)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_do_not_depend_on_the_stored_orientation(order, signs, axis):
    stored = Volume(np.random.default_rng(1).random((4, 5, 6)), make_affine(order, signs, (1.0, 2.0, 5.0)), "stored")
    image = nib.as_closest_canonical(nib.Nifti1Image(stored.voxels, stored.affine))
    canonical = Volume(image.get_fdata(), image.affine, "canonical")
    one, other = SliceStack(stored, axis, 32), SliceStack(canonical, axis, 32)
    assert one.pixel_spacing == pytest.approx(other.pixel_spacing)
    assert one.spacing_between == pytest.approx(other.spacing_between)
    for index in range(len(one)):
        np.testing.assert_array_equal(one.slice_of(stored.voxels, index), other.slice_of(canonical.voxels, index))


def test_axial_slice_shows_anterior_up_and_right_on_the_left():
    labels = np.zeros((4, 5, 1), np.uint8)
    labels[3, :, 0] = 1
    labels[:, 4, 0] = 2
    plane = SliceStack(Volume(labels, np.eye(4), "case"), 2, 32).slice_of(labels, 0)
    assert plane[0].tolist() == [2, 2, 2, 2]
    assert plane[1:, 0].tolist() == [1, 1, 1, 1]


def test_time_runs_fastest_in_4d():
    voxels = np.zeros((2, 2, 3, 4))
    voxels[:] = np.arange(3)[:, None] * 10 + np.arange(4)
    stack = SliceStack(Volume(voxels, np.eye(4), "cine"), 2, 32)
    assert [stack.slice_of(voxels, index)[0, 0] for index in (0, 1, 4, 11)] == [0, 1, 10, 23]


def test_frames_keep_rows_columns_and_colour():
    voxels = np.zeros((6, 4, 3, 3), np.uint8)
    voxels[5, 0, 1] = (255, 128, 0)
    stack = SliceStack(Volume(voxels, np.eye(4), "video", frames=True, colour=True), 2, 6)
    assert (len(stack), stack.shape) == (3, (4, 6))
    assert stack.slice_of(voxels, 1)[0, 5].tolist() == [255, 128, 0]
    pixel = stack.images([0, 1])[1, :, 1, 5]
    assert pixel.tolist() == pytest.approx([1.0, 128 / 255, 0.0])
    labels = np.zeros((6, 4, 3), np.uint8)
    stack.slice_of(labels, 2)[0, 5] = 7
    assert labels[5, 0, 2] == 7


@pytest.mark.parametrize(
    ("spacing", "order", "axis"),
    [
        ((1, 1, 1), (0, 1, 2), 2),
        ((1.1, 1, 1), (0, 1, 2), 2),
        ((1, 3, 1), (0, 1, 2), 1),
        ((3, 1, 3), (0, 1, 2), 2),
        ((1, 1, 5), (2, 0, 1), 1),
        ((1, 1, 5), (1, 2, 0), 0),
    ],
)
def test_choose_axis_is_the_through_plane_direction(spacing, order, axis):
    affine = make_affine(order, spacing=spacing)
    assert choose_axis(Volume(np.zeros((3, 3, 3)), affine, "case")) == axis
    assert choose_axis(Volume(np.zeros((3, 3, 3, 2)), affine, "cine")) == axis


def test_choose_axis_of_frames_and_of_a_single_slice():
    assert choose_axis(Volume(np.zeros((4, 4, 2)), np.diag([9.0, 1, 1, 1]), "frames", frames=True)) == 2
    assert choose_axis(Volume(np.zeros((4, 1, 4)), np.eye(4), "slice")) == 1


def test_stack_reports_sizes_in_mm():
    stack = SliceStack(Volume(np.zeros((3, 4, 5)), np.diag([2.0, 3.0, 5.0, 1.0]), "case"), 2, 32)
    assert stack.pixel_spacing == (3.0, 2.0)
    assert stack.spacing_between == 5.0
    assert stack.voxel_volume_ml == pytest.approx(0.03)


@pytest.mark.parametrize("dtype", ["f8", ">f4", "i2", ">i2", "u1", "u2", "?", "f2", "i8"])
def test_images_of_every_dtype(dtype):
    voxels = np.random.default_rng(2).integers(0, 2, (5, 6, 4)).astype(dtype)
    images = SliceStack(Volume(voxels, np.eye(4), "case"), 2, 32).images([0, 3])
    assert images.dtype == torch.float32
    assert images.shape == (2, 3, 32, 32)
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_read_only_and_non_contiguous_voxels():
    voxels = np.broadcast_to(np.arange(6.0)[:, None, None], (6, 5, 4))
    assert SliceStack(Volume(voxels, make_affine((2, 0, 1), (-1, 1, -1)), "case"), 0, 32).images([0]).isfinite().all()


def test_masks_are_soft_and_match_the_images():
    labels = np.zeros((8, 8, 2), np.uint8)
    labels[2:5, 3:6, 1] = 3
    labels[0, 0, 1] = 1
    masks = SliceStack(Volume(labels, np.eye(4), "case"), 2, 32).masks(labels, 1, [1, 3, 9])
    assert masks.shape == (3, 32, 32)
    assert masks.sum(dim=(1, 2)).tolist() == pytest.approx([16, 9 * 16, 0], rel=0.25)
    assert (masks.min(), masks.max()) == (0.0, 1.0)


def test_labels_of_another_grid_are_refused():
    stack = SliceStack(Volume(np.zeros((3, 4, 5)), np.eye(4), "case"), 2, 32)
    with pytest.raises(InputError, match=r"case.*\(3, 4, 6\).*\(3, 4, 5\)"):
        stack.slice_of(np.zeros((3, 4, 6)), 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"voxels": np.zeros((3, 3))},
        {"voxels": np.zeros((3, 3, 0))},
        {"voxels": np.zeros((3, 3, 3, 2)), "frames": True},
        {"affine": np.diag([1.0, 1.0, 0.0, 1.0])},
        {"affine": np.full((4, 4), np.nan)},
    ],
)
def test_impossible_volumes_are_refused(arguments):
    with pytest.raises(InputError, match="case"):
        Volume(**{"voxels": np.zeros((3, 3, 3)), "affine": np.eye(4), "name": "case"} | arguments)


def test_impossible_axes_are_refused():
    volume = Volume(np.zeros((3, 4, 5)), np.eye(4), "case")
    with pytest.raises(InputError, match="axis 3"):
        SliceStack(volume, 3, 32)


def test_ct_is_recognised_by_its_values():
    ct = np.random.default_rng(3).integers(-1024, 1500, (20, 20, 20))
    assert intensity_for(Volume(ct.astype(np.float32), np.eye(4), "ct")) == Intensity("window", -160.0, 240.0)
    assert intensity_for(Volume(ct + 0.5, np.eye(4), "mr")).kind == "percentile"
    assert intensity_for(Volume(abs(ct), np.eye(4), "mr")).kind == "percentile"


def test_percentiles_ignore_outliers_and_non_finite_voxels():
    voxels = np.random.default_rng(4).random((110, 110, 110)).astype(np.float32) * 1e6
    voxels[0, 0, 0], voxels[0, 0, 1], voxels[0, 0, 2] = 1e30, np.nan, -np.inf
    intensity = intensity_for(Volume(voxels, np.eye(4), "mr"))
    assert intensity.low == pytest.approx(5e3, rel=0.1)
    assert intensity.high == pytest.approx(9.95e5, rel=0.01)
    assert np.isfinite(intensity.apply(voxels[0])).all()


@pytest.mark.parametrize("value", [0, -3.0, 1e20, np.nan])
def test_constant_images_are_black(value):
    images = SliceStack(Volume(np.full((4, 4, 2), value), np.eye(4), "case"), 2, 32).images([0, 1])
    assert not images.any()


def test_sparse_images_use_their_full_range():
    voxels = np.zeros((20, 20, 20), np.int16)
    voxels[3, 3, 3] = 50
    assert intensity_for(Volume(voxels, np.eye(4), "case")) == Intensity("percentile", 0.0, 50.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_masks_survive_integer_upsampling_exactly(height, width, factor, seed):
    geometry = PlaneGeometry((height, width), (0.8, 0.8), max(height, width) * factor)
    if any((geometry.size - side * factor) % 2 for side in (height, width)):
        geometry = PlaneGeometry((height, width), (0.8, 0.8), max(height, width) * factor * 2)
    mask = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (2, height, width)))
    restored = geometry.from_input(geometry.to_input(mask)[:, 0]) > 0.5
    assert torch.equal(restored, mask.bool())


@settings(max_examples=60, deadline=None)
@given(st.integers(12, 90), st.integers(12, 90), st.floats(0.3, 3.0), st.floats(0.3, 3.0), st.sampled_from([1, 2, 4]))
def test_blobs_survive_any_upsampling(height, width, row_mm, column_mm, stride):
    geometry = PlaneGeometry((height, width), (row_mm, column_mm), 288)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    disc = ((rows / height - 0.5) ** 2 + (columns / width - 0.4) ** 2 < 0.09).float()[None]
    maps = torch.nn.functional.avg_pool2d(geometry.to_input(disc), stride)[:, 0]
    restored = geometry.from_input(maps) > 0.5
    dice = 2 * (restored * disc).sum() / (restored.sum() + disc.sum())
    assert dice > 0.9


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_extreme_aspect_ratios_keep_at_least_one_pixel(height, width, row_mm, column_mm):
    geometry = PlaneGeometry((height, width), (row_mm, column_mm), 64)
    top, left, content_height, content_width = geometry.content
    assert 1 <= content_height <= 64 and 1 <= content_width <= 64
    assert 0 <= top <= 64 - content_height and 0 <= left <= 64 - content_width
    restored = geometry.from_input(torch.ones(1, 16, 16))
    assert restored.shape == (1, height, width)
    assert torch.allclose(restored, torch.ones(()))


def test_pixels_are_made_square_and_the_padding_is_zero():
    geometry = PlaneGeometry((10, 10), (1.0, 2.0), 64)
    inputs = geometry.to_input(torch.ones(1, 10, 10))[0, 0]
    assert inputs[:, 32].tolist() == [0.0] * 16 + [1.0] * 32 + [0.0] * 16
    assert (inputs[32] == 1).all()


def test_padding_does_not_bleed_into_the_edge_of_a_downsampled_slice():
    geometry = PlaneGeometry((200, 100), (1.0, 1.0), 32)
    full = geometry.from_input(geometry.to_input(torch.ones(1, 200, 100))[:, 0])
    assert torch.allclose(full, torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("signs", [(-1, 1, 1), (1, -1, -1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_window_of_a_large_volume_does_not_depend_on_the_stored_orientation(order, signs):
    voxels = np.random.default_rng(0).gamma(2, 100, (120, 100, 90)).astype(np.float32)
    stored = nib.Nifti1Image(voxels, np.eye(4)).as_reoriented(np.array([*zip(order, signs, strict=True)]))
    turned = Volume(np.asarray(stored.dataobj), stored.affine, "turned")
    assert intensity_for(turned) == intensity_for(Volume(voxels, np.eye(4), "as it was"))


def test_real_orientations_slice_the_same_way(data_dir):
    image = nib.load(data_dir / "totalsegmentator_examples/images/example_mr_sm.nii.gz")
    stored = Volume(np.asanyarray(image.dataobj), image.affine, "LPS")
    canonical = nib.as_closest_canonical(image)
    other = Volume(np.asanyarray(canonical.dataobj), canonical.affine, "RAS")
    one, two = SliceStack(stored, 2, 64), SliceStack(other, 2, 64)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert torch.equal(one.images([0, 10]), two.images([0, 10]))


def test_cine_short_axis_is_sliced_through_plane(data_dir):
    image = nib.load(data_dir / "sunnybrook_cine/cine4d/SC-HF-I-1_cine.nii.gz")
    volume = Volume(np.asanyarray(image.dataobj), image.affine, "cine")
    stack = SliceStack(volume, choose_axis(volume), 64)
    assert (len(stack), stack.shape) == (12 * 20, (256, 256))
    assert stack.spacing_between == pytest.approx(10, abs=0.01)
    through = canonical_view(np.arange(12).reshape(1, 1, 12), image.affine).ravel()
    np.testing.assert_array_equal(
        np.sort(stack.slice_of(volume.voxels, 5 * 20 + 3), axis=None),
        np.sort(volume.voxels[:, :, through[5], 3], axis=None),
    )
