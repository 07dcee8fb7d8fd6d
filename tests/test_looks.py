"""Which stacks of slices are looked at."""

from dataclasses import replace

import numpy as np
import pytest

from ofl_sam2.intensity import intensity_for
from ofl_sam2.looks import MAX_SIDE_SLICES, Viewpoint
from ofl_sam2.memory.pool import MAIN, View
from ofl_sam2.settings import Settings
from ofl_sam2.window import Window

ISOTROPIC = np.eye(4)
SMALL = (60, 60, 60)


def viewpoint(case, **switches):
    return Viewpoint.of(case.volume, 64, Settings(**switches))


def small_structure(make_case, grid=SMALL, affine=ISOTROPIC, **options):
    """A case whose structure fills a tenth of each side."""
    case = make_case(grid=grid, affine=affine, **options)
    labels = np.zeros_like(case.labels)
    labels[tuple(slice(n // 2, n // 2 + max(1, n // 10)) for n in grid[:3])] = 1
    return replace(case, labels=labels, values=(1,))


def test_nearly_isotropic_volumes_are_seen_along_all_axes(make_case):
    case = make_case(grid=(30, 30, 30), affine=ISOTROPIC)
    views = [look.view for look in viewpoint(case).looks(case)]
    assert set(views) == {MAIN, View(0), View(1)}
    assert views[0] == MAIN
    assert [look.view for look in viewpoint(case, side_views=False).looks(case)] == [MAIN]


@pytest.mark.parametrize(
    ("grid", "affine", "frames"),
    [((30, 30, 6), np.diag([1.0, 1, 4, 1]), False), ((30, 30, 8), np.eye(4), True), ((30, 30, 6, 2), np.eye(4), False)],
)
def test_thick_slices_frames_and_cine_are_seen_along_one(make_case, grid, affine, frames):
    case = make_case(grid=grid, affine=affine, frames=frames)
    assert [look.view for look in viewpoint(case, close_ups=False).looks(case)] == [MAIN]


@pytest.mark.parametrize(("depth", "sides"), [(1, set()), (7, set()), (8, {View(0), View(1)})])
def test_side_views_of_what_is_nearly_flat_are_left_out(make_case, depth, sides):
    case = make_case(grid=(32, 32, depth), affine=ISOTROPIC)
    seen = viewpoint(case).stacks(case.volume, intensity_for(case.volume, None))
    assert set(seen) == {MAIN} | sides


def test_partly_labelled_volumes_have_no_side_views(make_case):
    case = make_case(grid=(30, 30, 30), affine=ISOTROPIC, labelled_slices=(12, 14))
    looks = list(viewpoint(case).looks(case))
    assert [(look.view, look.slices) for look in looks] == [(MAIN, (12, 14))]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((20, 24, 28), (1, 1, 1)), ((8, 30, 26), (3, 1, 1))),
        (((24, 20, 6), (1, 1, 5)), ((6, 20, 24), (5, 1, 1))),
        (((6, 20, 24), (5, 1, 1)), ((20, 24, 28), (1, 1, 1))),
    ],
)
def test_empty_slices_are_ignored_along_the_slices_that_are_learned(make_case, first, second):
    (grid, spacing), (other_grid, other_spacing) = first, second
    point = viewpoint(make_case(grid=grid, affine=np.diag([*spacing, 1.0])))
    case = replace(make_case("b", grid=other_grid, affine=np.diag([*other_spacing, 1.0])), ignore_empty_slices=True)
    look, *others = point.looks(case)
    filled = [bool(look.stack.slice_of(case.labels, index).any()) for index in range(len(look.stack))]
    assert look.slices == tuple(np.flatnonzero(filled)) and not all(filled) and not others


def test_empty_frames_are_ignored_by_a_model_of_any_axis(make_case):
    point = viewpoint(make_case(grid=(6, 20, 24), affine=np.diag([5.0, 1, 1, 1])))
    case = replace(make_case("b", grid=(24, 20, 8), frames=True), ignore_empty_slices=True)
    assert next(point.looks(case)).slices == (2, 3, 4, 5)


def test_side_views_of_very_large_volumes_are_left_out(make_case):
    case = make_case(grid=(MAX_SIDE_SLICES + 1, 100, 100), affine=ISOTROPIC)
    assert {look.view for look in viewpoint(case, close_ups=False).looks(case)} == {MAIN, View(1)}


def test_side_views_keep_slices_with_structures_and_as_many_without(make_case):
    case = make_case(grid=(40, 40, 40), affine=ISOTROPIC)
    side = next(look for look in viewpoint(case).looks(case) if look.view == View(0))
    filled = [bool(side.stack.slice_of(side.labels, index).any()) for index in range(len(side.stack))]
    assert sum(filled) <= len(side.slices) <= 2 * sum(filled)
    assert {index for index, has in enumerate(filled) if has} <= set(side.slices)


def test_a_small_structure_is_magnified_from_every_side(make_case):
    case = small_structure(make_case)
    close = [look for look in viewpoint(case).looks(case) if look.view.close]
    assert {look.view.axis for look in close} == {None, 0, 1}
    for look in close:
        assert look.focus == (1,)
        assert look.labels.shape == look.stack.volume.grid < case.volume.grid
        assert look.labels.sum() == case.labels.sum()
    assert not [look for look in viewpoint(case, close_ups=False).looks(case) if look.view.close]


def test_slices_of_a_partly_labelled_close_up_keep_their_numbers(make_case):
    case = replace(small_structure(make_case), labelled_slices=(31, 33))
    close = [look for look in viewpoint(case).looks(case) if look.view.close]
    assert [look.slices for look in close] == [(31, 33)]
    assert len(close[0].stack) == SMALL[2]


def test_what_is_drawn_in_unlabelled_slices_frames_no_close_up(make_case):
    case = replace(small_structure(make_case), labelled_slices=(31, 33))
    spoilt = case.labels.copy()
    spoilt[5:10, 5:10, 40:50] = 1
    looks, others = (list(viewpoint(case).looks(replace(case, labels=labels))) for labels in (case.labels, spoilt))
    for look, other in zip(looks, others, strict=True):
        assert np.array_equal(look.stack.volume.affine, other.stack.volume.affine)
        assert np.array_equal(look.labels, other.labels) and look.stack.shape == other.stack.shape


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (1, -1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_close_up_shows_the_same_voxels_as_the_whole(make_case, signs, order):
    affine = np.zeros((4, 4))
    affine[order, range(3)], affine[3, 3] = signs, 1
    case = make_case(grid=(20, 24, 30), affine=affine)
    point, grey = viewpoint(case), intensity_for(case.volume)
    window = Window((3, 5, 7), (12, 20, 22))
    cropped = case.volume.cropped(window)
    corner = cropped.affine @ [0, 0, 0, 1]
    np.testing.assert_allclose(corner, affine @ [3, 5, 7, 1])
    for view, whole in point.stacks(case.volume, grey).items():
        part = point.stacks(case.volume, grey, window)[View(view.axis, close=True)]
        numbers = np.arange(case.volume.voxels.size).reshape(case.volume.grid)
        offset = whole.slices_before(window)
        for index in range(len(part)):
            small = part.slice_of(numbers[window.slices], index)
            assert np.isin(small, whole.slice_of(numbers, offset + index)).all()


def test_frames_are_cropped_in_the_plane_alone(make_case):
    case = small_structure(make_case, grid=(100, 100, 7), frames=True)
    close = next(look for look in viewpoint(case).looks(case) if look.view.close)
    assert close.stack.volume.grid[2] == 7
    assert max(close.stack.volume.grid[:2]) < 60
