"""Confidence of slices and quality of volumes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ofl_sam2.backbone.frozen import Decoded
from ofl_sam2.quality import ExpectedDice, confidence


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


def test_certain_probabilities_let_expect_a_perfect_dice_and_open_ones_a_poor_one():
    expected = ExpectedDice(2)
    probabilities = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.525, 0.525], [0.475, 0.475]]])
    expected.add([0, 1], probabilities, probabilities > 0.5)
    certain, open_ = expected.quality(torch.zeros(1, 2)).tolist()
    assert certain == pytest.approx(1)
    assert open_ == pytest.approx(2 * 2 * 0.525 / (2 + 2), abs=0.01)


def test_parts_of_a_volume_count_together_until_they_are_forgotten():
    whole, parts = ExpectedDice(1), ExpectedDice(1)
    probabilities = torch.rand(1, 6, 5)
    whole.add([0], probabilities, probabilities > 0.5)
    parts.add([0], torch.full((1, 3), 0.9), torch.ones(1, 3, dtype=torch.bool))
    parts.forget([0])
    for part in probabilities.split(2, dim=1):
        parts.add([0], part, part > 0.5)
    assert torch.allclose(whole.quality(torch.zeros(1, 1)), parts.quality(torch.zeros(1, 1)))


def test_a_structure_that_was_not_drawn_has_the_confidence_of_its_absence():
    expected = ExpectedDice(2)
    expected.add([0, 1], torch.tensor([[0.05], [0.95]]), torch.tensor([[False], [True]]))
    assert expected.quality(torch.tensor([[0.9, 0.0], [0.7, 0.0]]))[0].item() == pytest.approx(0.8)
