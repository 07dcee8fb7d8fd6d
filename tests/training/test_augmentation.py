"""Augmented copies: shapes, range, labels and sides stay."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from ofl_sam2.training.augmentation import augment
from ofl_sam2.training.synthetic import Dice

SIZE = 64


def dice(seed):
    return Dice(Generator().manual_seed(seed))


def volume(slices=2):
    """Bright markers right of the middle (value 3) and above it (value 7) on a gradient."""
    labels = torch.zeros(slices, SIZE, SIZE, dtype=torch.uint8)
    labels[:, 28:36, 46:54] = 3
    labels[:, 10:18, 28:36] = 7
    images = torch.linspace(0, 0.5, SIZE).expand(slices, 3, SIZE, SIZE).clone()
    images[(labels > 0)[:, None].expand_as(images)] = 1.0
    return images, labels


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_a_copy_keeps_shape_range_labels_and_sides(seed):
    images, labels = volume()
    copied, moved = augment(dice(seed), images, labels)
    assert (copied.shape, moved.shape, moved.dtype) == (images.shape, labels.shape, labels.dtype)
    assert 0 <= copied.min() <= copied.max() <= 1
    assert set(moved.unique().tolist()) <= {0, 3, 7}
    right, top = ((moved[0] == value).nonzero().float().mean(0) - SIZE / 2 for value in (3, 7))
    assert right[1] > 0
    assert top[0] < 0
    assert right[1] * -top[0] + right[0] * top[1] > 0, "a mirrored pair has the other handedness"


def test_image_and_label_move_together():
    images, labels = volume(1)
    for seed in range(5):
        copied, moved = augment(dice(seed), images, labels)
        assert copied[0, 0][moved[0] > 0].mean() > copied[0, 0][moved[0] == 0].mean()


def test_all_slices_of_a_volume_move_alike_and_the_colours_stay_grey():
    copied, moved = augment(dice(3), *volume(3))
    assert torch.equal(moved[0], moved[2])
    assert torch.equal(copied[:, 0], copied[:, 2])


def test_a_seed_gives_the_same_copy_twice_and_another_one_after_it():
    again = [augment(dice(4), *volume()) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0])
    assert torch.equal(again[0][1], again[1][1])
    going_on = dice(4)
    first, second = (augment(going_on, *volume()) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_labels_beyond_255_survive():
    images, labels = volume()
    _, moved = augment(dice(0), images, labels.to(torch.int16) * 100)
    assert set(moved.unique().tolist()) == {0, 300, 700}
