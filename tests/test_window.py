"""Boxes around structures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofl_sam2.window import Window, around, close_ups

SHAPE, SPACING = (200, 200, 100), (1.0, 1.0, 2.0)


def ball(centre, radius, shape=SHAPE):
    grid = np.indices(shape)
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) < radius**2


def test_a_window_is_around_the_mask():
    mask = np.zeros((10, 20, 30), bool)
    mask[2:5, 7:8, 11:29] = True
    assert around(mask) == Window((2, 7, 11), (5, 8, 29))
    assert mask[Window((2, 7, 11), (5, 8, 29)).slices].all()


def test_stray_voxels_do_not_widen_it():
    mask = ball((60, 60, 50), 10)
    clean = around(mask)
    mask[190, 190, 90] = True
    assert around(mask) == clean


def test_nothing_has_no_window():
    assert around(np.zeros((3, 4, 5), bool)) is None
    assert close_ups([(1, np.zeros(SHAPE, bool))], SHAPE, SPACING) == []


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 59), st.floats(0.3, 5)), min_size=2, max_size=3), st.data()
)
def test_a_grown_window_holds_the_window_and_stays_inside(sides, data):
    shape = tuple(count for count, _, _ in sides)
    spacing = tuple(mm for _, _, mm in sides)
    lower = tuple(data.draw(st.integers(0, count - 1)) for count in shape)
    upper = tuple(data.draw(st.integers(a + 1, count)) for a, count in zip(lower, shape, strict=True))
    grown = Window(lower, upper).grown(shape, spacing)
    for a, b, c, d, count in zip(grown.lower, lower, upper, grown.upper, shape, strict=True):
        assert 0 <= a <= b < c <= d <= count
        assert d - a >= min(31, count) or a == 0 or d == count


def test_a_small_structure_gets_a_close_up_about_twice_its_size():
    ((window, focus),) = close_ups([(3, ball((100, 90, 40), 20))], SHAPE, SPACING)
    assert focus == (3,)
    sides = window.extent(SPACING)
    assert all(60 <= side <= 160 for side in sides)
    assert around(ball((100, 90, 40), 20)).union(window) == window


def test_a_large_structure_gets_none():
    assert close_ups([(1, ball((100, 100, 50), 70))], SHAPE, SPACING) == []


def test_neighbours_share_a_close_up_and_distant_structures_do_not():
    masks = [(1, ball((60, 60, 50), 15)), (2, ball((75, 65, 50), 15)), (3, ball((150, 150, 50), 15))]
    assert [focus for _, focus in close_ups(masks, SHAPE, SPACING)] == [(1, 2), (3,)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_of_structures_does_not_matter(order):
    masks = [(1, ball((60, 60, 50), 15)), (2, ball((75, 65, 50), 15)), (3, ball((150, 150, 50), 15))]
    assert close_ups([masks[i] for i in order], SHAPE, SPACING) == close_ups(masks, SHAPE, SPACING)


def test_frames_have_flat_windows():
    ((window, _),) = close_ups([(1, ball((50, 70), 10, (300, 200)))], (300, 200), (1.0, 1.0))
    assert len(window.lower) == 2
