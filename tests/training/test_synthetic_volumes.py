"""Synthetic volumes without a stack direction: reproducible, in range, shared between patients."""

import pytest
import torch
from torch import Generator

from ofl_sam2.training.synthetic import Dice
from ofl_sam2.training.synthetic_volumes import patients

CUBE, FLAT = ((20, 20, 20), 1.0), ((32, 24, 8), 4.0)


def draw(seed, shape, thickness):
    tissues, pair = patients(Dice(Generator().manual_seed(seed)), shape, thickness)
    assert 3 <= tissues <= 10
    return pair


@pytest.mark.parametrize("form", [CUBE, FLAT])
def test_a_seed_gives_the_same_patients_twice_and_another_seed_others(form):
    one, again, other = (draw(seed, *form) for seed in (0, 0, 1))
    for (image, regions), (image_again, regions_again) in zip(one, again, strict=True):
        assert torch.equal(image, image_again)
        assert torch.equal(regions, regions_again)
    assert not torch.equal(one[0][0], other[0][0])


@pytest.mark.parametrize("form", [CUBE, FLAT])
@pytest.mark.parametrize("seed", range(8))
def test_images_are_standardised_and_regions_whole_numbers(form, seed):
    for image, regions in draw(seed, *form):
        assert image.shape == regions.shape == form[0]
        assert (image.dtype, regions.dtype) == (torch.float32, torch.int64)
        assert image.mean() == pytest.approx(0, abs=1e-4)
        assert image.std() == pytest.approx(1, abs=1e-3)
        assert 0 <= regions.min() <= regions.max() < 64


def test_patients_share_an_anatomy_but_not_its_place():
    agreement, chance = [], []
    for seed in range(10):
        (_, one), (_, other) = draw(seed, *CUBE)
        (_, stranger), _ = draw(seed + 100, *CUBE)
        assert not torch.equal(one, other)
        agreement.append((one == other).float().mean())
        chance.append((one == stranger).float().mean())
    assert sum(agreement) / 10 > sum(chance) / 10 + 0.3


def test_structures_are_visible():
    """Of two neighbouring voxels those of two regions differ more than those of one."""
    across, within = [], []
    for seed in range(10):
        image, regions = draw(seed, *CUBE)[0]
        step, border = (image[1:] - image[:-1]).abs(), regions[1:] != regions[:-1]
        across.append(step[border].mean())
        within.append(step[~border].mean())
    assert sum(across) > 2 * sum(within)
