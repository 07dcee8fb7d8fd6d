"""Synthetic anatomy: reproducible, in range, shared between patients."""

from dataclasses import replace

import pytest
import torch
from torch import Generator

from ofl_sam2.training.synthetic import Dice, blur, deform, random_anatomy, random_palette, render


def dice(seed=0):
    return Dice(Generator().manual_seed(seed))


def patient(seed, depth=6, side=32):
    draws = dice(seed)
    anatomy = random_anatomy(draws, depth, side)
    palette = random_palette(draws, anatomy)
    regions = deform(draws, anatomy.regions)
    return anatomy, regions, render(draws, regions, palette)


@pytest.mark.parametrize("seed", range(4))
def test_a_seed_gives_the_same_volume_twice_and_another_seed_another_one(seed):
    (anatomy, regions, image), (again, regions_again, image_again) = patient(seed), patient(seed)
    assert torch.equal(anatomy.regions, again.regions)
    assert torch.equal(regions, regions_again)
    assert torch.equal(image, image_again)
    assert not torch.equal(image, patient(seed + 100)[2])


@pytest.mark.parametrize("seed", range(12))
def test_images_are_finite_and_in_range_under_all_palettes(seed):
    anatomy, regions, image = patient(seed)
    assert image.shape == regions.shape == anatomy.regions.shape == (6, 32, 32)
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert image.std() > 0.01


@pytest.mark.parametrize(
    "extreme",
    [
        {"speckle": 1.5, "inverted": True},
        {"bias": 0.35, "noise": 0.08},
        {"blur": 0.0, "noise": 0.0, "gamma": 1.7},
        {"blur": 1.1, "gamma": 0.6},
    ],
)
def test_extreme_palettes_stay_finite(extreme):
    draws = dice(5)
    anatomy = random_anatomy(draws, 4, 32)
    palette = replace(random_palette(draws, anatomy), **extreme)
    image = render(draws, anatomy.regions, palette)
    assert 0 <= image.min() <= image.max() <= 1


def test_a_uniform_region_does_not_divide_by_zero():
    draws = dice(1)
    anatomy = random_anatomy(draws, 3, 32)
    palette = random_palette(draws, anatomy)
    flat = replace(palette, texture=torch.zeros_like(palette.texture), noise=0.0, speckle=0.0, bias=0.0)
    assert torch.isfinite(render(draws, torch.zeros(3, 32, 32, dtype=torch.long), flat)).all()


@pytest.mark.parametrize("depth", [1, 8, 15])
def test_an_anatomy_has_its_depth_tissues_and_organs(depth):
    anatomy = random_anatomy(dice(depth), depth, 48)
    assert anatomy.regions.shape == (depth, 48, 48)
    assert anatomy.count == int(anatomy.regions.max()) + 1
    assert 3 <= anatomy.tissues <= 10
    assert (anatomy.regions > anatomy.tissues).any()
    assert anatomy.regions.min() >= 0


def test_organs_reach_through_several_slices():
    anatomy = random_anatomy(dice(2), 12, 48)
    organs = [anatomy.regions == value for value in range(anatomy.tissues + 1, anatomy.count)]
    assert max(int(organ.flatten(1).any(1).sum()) for organ in organs) >= 3


@pytest.mark.parametrize("seed", range(6))
def test_two_patients_share_their_structures(seed):
    draws = dice(seed)
    anatomy = random_anatomy(draws, 10, 48)
    one, other = (deform(draws, anatomy.regions, 0.7) for _ in range(2))
    assert not torch.equal(one, other)
    large = [v for v in range(1, anatomy.count) if (anatomy.regions == v).sum() > 500]
    assert large
    for patient_regions in (one, other):
        assert set(patient_regions.unique().tolist()) <= set(anatomy.regions.unique().tolist())
        assert set(large) <= set(patient_regions.unique().tolist())


def test_no_deformation_at_zero_strength_keeps_the_slices():
    regions = random_anatomy(dice(3), 8, 48).regions
    assert (deform(dice(0), regions, 0.0) == regions).float().mean() > 0.99


def test_blurring_keeps_the_mean_and_lowers_the_contrast():
    image = torch.rand(2, 24, 24, generator=Generator().manual_seed(0))
    soft = blur(image, 1.5)
    assert soft.shape == image.shape
    assert soft.mean().item() == pytest.approx(image.mean().item(), abs=0.02)
    assert soft.std() < 0.5 * image.std()
    assert blur(image, 0.1) is image


def test_dice_stay_within_their_bounds():
    draws = dice(9)
    assert {draws.integer(-1, 2) for _ in range(200)} == {-1, 0, 1, 2}
    assert all(0.1 <= draws.log_uniform(0.1, 10) <= 10 for _ in range(100))
    assert all(-2 <= draws.uniform(-2, 3) < 3 for _ in range(100))
    assert not any(draws.chance(0.0) for _ in range(50))
    assert all(draws.chance(1.0) for _ in range(50))
    assert draws.smooth((5, 8, 8), (2, 3, 3)).shape == (5, 8, 8)
