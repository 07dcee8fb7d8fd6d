"""Confidence of slices and quality of volumes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from ofl_sam2.backbone.frozen import Decoded
from ofl_sam2.quality import Quality, confidence


def decoded(presence, iou):
    presence, iou = torch.tensor(presence), torch.tensor(iou)
    return Decoded(torch.zeros(len(iou), 4, 4), iou, presence, torch.zeros(len(iou), 8))


def test_a_present_object_is_trusted_by_score_times_iou_an_absent_one_by_its_score():
    trust = confidence(decoded([2.0, -2.0, 0.0], [0.5, 0.5, 0.5]))
    sigmoid = 1 / (1 + torch.e**-2)
    assert trust.tolist() == pytest.approx([0.5 * sigmoid, sigmoid, 0.5])


@given(st.floats(-200, 200), st.floats(0, 1))
def test_confidence_stays_between_0_and_1(presence, iou):
    assert 0 <= confidence(decoded([presence], [iou])).item() <= 1


WIDTHS = (1.0, 1.0)


def quality(probabilities, masks, confidences=None):
    counted = Quality(len(masks))
    counted.add(list(range(len(masks))), probabilities, masks, WIDTHS)
    return counted.of(torch.zeros(1, len(masks)) if confidences is None else confidences).tolist()


def test_a_large_structure_drawn_for_sure_is_good_an_open_or_a_small_one_is_not():
    masks = torch.zeros(3, 80, 80, dtype=torch.bool)
    masks[:2, 5:75, 5:75] = masks[2, 40:42, 40:42] = True
    probabilities = masks * torch.tensor([1.0, 0.49, 1.0])[:, None, None]
    large, open_, small = quality(probabilities, masks)
    assert large == pytest.approx(1, abs=0.02)
    assert open_ == pytest.approx(0.7 * large)
    assert small < 0.7


@pytest.mark.parametrize(
    "part", [(slice(8, 20), slice(9, 22)), (slice(0, 3), slice(25, 30)), (slice(2, 3), slice(5, 6))]
)
def test_every_voxel_counts_as_far_as_the_gaussian_of_the_whole_mask_covers_it(part):
    masks = torch.zeros(1, 30, 30, dtype=torch.bool)
    masks[0][part] = True
    masks[0, 14, 14] = True
    blurred = torch.from_numpy(gaussian_filter(masks[0].float().numpy(), WIDTHS, mode="nearest"))
    assert quality(masks.float(), masks)[0] == pytest.approx(blurred[masks[0]].mean().sqrt().item(), abs=1e-6)


def test_an_uncertain_surface_leaves_the_dice_of_the_blurred_mask():
    masks = torch.zeros(1, 30, 30, dtype=torch.bool)
    masks[0, 8:20, 9:22] = True
    blurred = torch.from_numpy(gaussian_filter(masks[0].float().numpy(), WIDTHS))
    dice = 2 * (blurred * masks[0]).sum() / (blurred.sum() + masks.sum())
    assert quality(masks.float(), masks)[0] == pytest.approx(dice.sqrt().item(), abs=1e-4)


@given(st.integers(0, 2**32 - 1))
def test_quality_stays_between_0_and_1(seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities, masks = torch.rand(2, 9, 7, generator=generator), torch.rand(2, 9, 7, generator=generator) > 0.5
    assert all(0 <= value <= 1 for value in quality(probabilities, masks))


def test_structures_are_counted_by_themselves_until_they_are_forgotten():
    probabilities, masks = torch.rand(2, 6, 5), torch.rand(2, 6, 5) > 0.5
    counted = Quality(2)
    counted.add([0, 1], torch.full((2, 3, 3), 0.9), torch.ones(2, 3, 3, dtype=torch.bool), WIDTHS)
    counted.forget([1])
    counted.forget([0])
    for row in (1, 0):
        counted.add([row], probabilities[[row]], masks[[row]], WIDTHS)
    assert counted.of(torch.zeros(1, 2)).tolist() == quality(probabilities, masks)


def test_slices_count_together():
    masks = torch.ones(1, 4, 4, dtype=torch.bool)
    counted = Quality(1)
    for probability in (1.0, 0.5):
        counted.add([0], torch.full((1, 4, 4), probability), masks, WIDTHS)
    assert counted.of(torch.zeros(1, 1)).item() == pytest.approx(0.75**0.5)


def test_a_structure_that_was_not_drawn_has_the_confidence_of_its_absence():
    masks = torch.zeros(2, 3, 3, dtype=torch.bool)
    masks[1] = True
    assert quality(masks * 0.95, masks, torch.tensor([[0.9, 0.0], [0.7, 0.0]]))[0] == pytest.approx(0.8)
