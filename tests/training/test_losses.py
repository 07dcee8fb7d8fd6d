"""Losses on the decoder's own logits."""

import pytest
import torch

from ofl_sam2.backbone.frozen import ABSENT_LOGIT, Decoded
from ofl_sam2.training.losses import segmentation_loss, shrink_masks, soft_iou


def decoded(logits, presence=5.0, iou=1.0):
    count = len(logits)
    return Decoded(logits, torch.full((count,), iou), torch.full((count,), presence), torch.zeros(count, 8))


def square(size=16):
    masks = torch.zeros(1, size, size)
    masks[:, size // 4 : size // 2, size // 4 : size // 2] = 1
    return masks


def test_shrinking_averages_by_area():
    masks = torch.tensor([[[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]])
    assert shrink_masks(masks, 2).tolist() == [[[0.5, 0.0], [0.0, 1.0]]]


def test_soft_iou_counts_thresholded_pixels_and_is_1_for_two_empty_masks():
    masks = square(8)
    logits = torch.stack([masks[0] * 2 - 1, masks[0].roll(1, 0) * 2 - 1, torch.full((8, 8), -1.0)])
    assert soft_iou(logits, masks.expand(3, -1, -1)).tolist() == pytest.approx([1.0, 1 / 3, 0.0])
    assert soft_iou(logits[2:], torch.zeros(1, 8, 8)).item() == 1


def test_a_perfect_segmentation_costs_almost_nothing_and_a_wrong_one_much():
    masks = square()
    logits = 20 * (2 * shrink_masks(masks, 4) - 1)
    assert segmentation_loss(decoded(logits, presence=20.0), masks).item() < 1e-3
    assert segmentation_loss(decoded(-logits, presence=20.0), masks).item() > 10


def test_where_the_object_is_absent_only_its_presence_counts():
    logits = torch.randn(2, 4, 4, requires_grad=True)
    nothing = torch.zeros(2, 16, 16)
    loss = segmentation_loss(decoded(logits, presence=3.0), nothing, presence=1.0)
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(3.0)).item())
    loss.backward()
    assert not logits.grad.any()


def test_the_mask_loss_is_taken_before_absent_masks_are_overwritten():
    logits = torch.randn(1, 4, 4, requires_grad=True)
    judged_absent = decoded(logits, presence=-4.0)
    assert (judged_absent.masks() == ABSENT_LOGIT).all()
    loss = segmentation_loss(judged_absent, square())
    loss.backward()
    assert 0 < loss.item() < 10
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad != 0).all()


def test_objects_do_not_dilute_one_another_when_some_are_absent():
    masks = torch.cat([square(), torch.zeros(3, 16, 16)])
    logits = torch.randn(4, 4, 4)
    both = segmentation_loss(decoded(logits), masks, presence=0.0)
    alone = segmentation_loss(decoded(logits[:1]), masks[:1], presence=0.0)
    assert both.item() == pytest.approx(alone.item())


@pytest.mark.parametrize("term", ["cross_entropy", "dice", "presence", "iou"])
def test_every_term_has_its_weight(term):
    logits, masks = torch.randn(1, 4, 4), square()
    off = dict.fromkeys(["cross_entropy", "dice", "presence", "iou"], 0.0)
    assert segmentation_loss(decoded(logits, iou=0.9), masks, **off).item() == 0
    once, twice = (segmentation_loss(decoded(logits, iou=0.9), masks, **{**off, term: w}).item() for w in (1.0, 2.0))
    assert twice == pytest.approx(2 * once)
    assert once > 0


def test_the_predicted_iou_learns_the_iou_of_its_own_mask():
    iou = torch.tensor([0.2], requires_grad=True)
    masks = square()
    logits = 20 * (2 * shrink_masks(masks, 4) - 1)
    output = Decoded(logits, iou, torch.tensor([20.0]), torch.zeros(1, 8))
    segmentation_loss(output, masks, cross_entropy=0.0, dice=0.0, presence=0.0, iou=1.0).backward()
    assert iou.grad.item() == pytest.approx(2 * (0.2 - 1.0))
