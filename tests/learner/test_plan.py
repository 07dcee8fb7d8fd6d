"""Grid, patch and pooling of 3D networks."""

import numpy as np
import pytest

from ofl_sam2.learner.plan import Plan

TURNED = np.array([[0.0, 0, -4, 30], [-1, 0, 0, 20], [0, 2, 0, 10], [0, 0, 0, 1]])


def test_plan_is_in_canonical_axes(make_case):
    plan = Plan.of([make_case(grid=(24, 20, 6), affine=TURNED).volume])
    assert plan.spacing == (4.0, 1.0, 2.0)
    assert plan.shape == (6, 24, 20)
    assert plan.thick_axis == 0


def test_pooling_keeps_thick_slices_until_pixels_are_as_wide():
    strides, kernels = Plan((1.4, 1.4, 10.0), (96, 96, 9)).pooling((96, 96, 9))
    assert strides[:4] == [[1, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 2]]
    assert kernels[0] == [3, 3, 1]
    assert len(kernels) == len(strides)


def test_patch_is_bounded_and_divisible():
    plan = Plan((1.0, 1.0, 1.0), (200, 180, 150))
    patch = plan.patch(most_voxels=160_000)
    factors = np.prod(plan.pooling(patch)[0], axis=0)
    assert not np.any(np.array(patch) % factors)
    assert np.prod(patch) < 2 * 160_000


SIZES = [(5, 3.0), (10, 3.0), (20, 4.0)]


def test_spacing_and_shape_are_medians(make_case):
    volumes = [make_case(grid=(8, 8, size), affine=np.diag([1.0, 1, step, 1])).volume for size, step in SIZES]
    plan = Plan.of(volumes)
    assert plan.spacing == (1, 1, 3)
    assert plan.shape == (8, 8, 10)


def test_frames_are_thick_slices_in_their_own_axes(make_case):
    plan = Plan.of([make_case(grid=(24, 20, 6), affine=TURNED, frames=True).volume])
    assert plan.spacing == (1, 2, 6)
    assert plan.shape == (24, 20, 6)
    assert plan.thick_axis == 2


def test_a_sequence_has_the_plan_of_one_of_its_volumes(make_case):
    assert Plan.of([make_case(grid=(24, 20, 6, 5)).volume]) == Plan.of([make_case(grid=(24, 20, 6)).volume])


@pytest.mark.parametrize(("spacing", "shape"), [((1.0, 1.0, 1.0), (200, 200, 200)), ((0.5, 0.5, 5.0), (900, 900, 40))])
def test_a_large_grid_is_coarsened_from_its_finest_axes(spacing, shape):
    plan = Plan(spacing, shape).coarsened(2_000_000)
    assert 1_000_000 < np.prod(plan.shape) <= 2_000_000
    assert plan.spacing[2] == max(spacing[2], plan.spacing[0])
    extents = np.array([spacing, plan.spacing]) * np.array([shape, plan.shape])
    np.testing.assert_allclose(extents[1], extents[0], rtol=0.05)
    assert Plan(spacing, (20, 20, 20)).coarsened(8000) == Plan(spacing, (20, 20, 20))


@pytest.mark.parametrize("slices", [1, 5])
def test_few_slices_of_a_large_image_stay(slices):
    plan = Plan((1.0, 1.0, 1.0), (3000, 3000, slices)).coarsened(2_000_000)
    assert plan.shape[2] == max(1, int(slices / plan.spacing[2])) and np.prod(plan.shape) <= 2_000_000
    assert min(plan.patch(320_000)) > 0
