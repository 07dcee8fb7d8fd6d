"""Confidence of slices and quality of volumes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ofl_sam2.backbone.frozen import Decoded
from ofl_sam2.quality import confidence, volume_quality


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


def test_the_quality_of_a_structure_counts_the_slices_that_hold_it():
    confidences = torch.tensor([[0.9, 0.1], [0.5, 0.3], [0.1, 0.8]])
    present = torch.tensor([[True, False], [True, False], [False, False]])
    assert volume_quality(confidences, present).tolist() == pytest.approx([0.7, 0.4])
