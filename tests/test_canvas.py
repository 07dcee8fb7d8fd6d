"""Painting label maps."""

import numpy as np
import pytest
import torch

from ofl_sam2.canvas import Canvas

GRID = (4, 5, 6)


def logits(*maps):
    return torch.stack([torch.as_tensor(m, dtype=torch.float32).expand(GRID) for m in maps])


def everything(array):
    return array[()]


def test_the_likeliest_structure_wins_and_the_background_where_none_is_likely():
    canvas = Canvas(GRID, (3, 7), overlap=False, repaint=False)
    drawn = canvas.paint(everything, logits(2.0, 1.0), (3, 7))
    assert (canvas.labels == 3).all()
    assert drawn.tolist() == [True, False]
    canvas.paint(everything, logits(-2.0, -1.0), (3, 7))
    assert not canvas.labels.any()


def test_what_is_painted_again_must_be_likelier_than_what_is_there():
    canvas = Canvas(GRID, (1, 2), overlap=False, repaint=True)
    canvas.paint(everything, logits(2.0), (1,))
    canvas.paint(everything, logits(1.0), (2,))
    assert (canvas.labels == 1).all()
    canvas.paint(everything, logits(3.0), (2,))
    assert (canvas.labels == 2).all()


def test_erasing_makes_room_for_any_likelihood():
    canvas = Canvas(GRID, (1, 2), overlap=False, repaint=True)
    canvas.paint(everything, logits(9.0), (1,))
    canvas.erase((1,))
    assert not canvas.labels.any()
    canvas.paint(everything, logits(0.5), (2,))
    assert (canvas.labels == 2).all()


def test_only_the_part_is_painted():
    canvas = Canvas(GRID, (1,), overlap=False, repaint=True)
    canvas.paint(lambda array: array[1:3, 0, :], torch.full((1, 2, 6), 4.0), (1,))
    assert canvas.labels.sum() == 12
    assert canvas.labels[1:3, 0].all()


def test_overlapping_structures_have_a_map_each():
    canvas = Canvas(GRID, (3, 7), overlap=True, repaint=True)
    canvas.paint(everything, logits(2.0, 1.0), (3, 7))
    assert canvas.labels.shape == (2, *GRID)
    assert canvas.mask(3).all() and canvas.mask(7).all()
    canvas.erase((7,))
    assert canvas.mask(3).all() and not canvas.mask(7).any()


@pytest.mark.parametrize(("value", "dtype"), [(1, np.uint8), (255, np.uint8), (256, np.uint16)])
def test_labels_are_as_small_as_their_values_allow(value, dtype):
    assert Canvas(GRID, (value,), overlap=False, repaint=False).labels.dtype == dtype
