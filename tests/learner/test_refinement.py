"""The light branch that corrects masks below stride 16."""

import pytest
import torch
from torch.testing import assert_close

from ofl_sam2.backbone.frozen import Decoded, ImageFeatures
from ofl_sam2.learner.refinement import Refinement

FEATURES = ImageFeatures(torch.randn(1, 16, 16, 16), torch.randn(1, 32, 8, 8), torch.randn(1, 128, 4, 4))


def decoded(count, presence=1.0):
    torch.manual_seed(count)
    scores = torch.full((count,), float(presence))
    return Decoded(3 * torch.randn(count, 16, 16).clamp(-1.4, 1.4), scores, scores, torch.zeros(count, 128))


def fitted(values):
    torch.manual_seed(0)
    refinement = Refinement(128, values)
    torch.nn.init.normal_(refinement.change.weight)
    return refinement


@pytest.mark.parametrize("values", [(1,), (2, 1), (1, 2, 7)])
def test_before_it_is_fitted_masks_stay_as_they_are(values):
    drawn = decoded(len(values))
    assert_close(Refinement(128, (1, 2, 7))(FEATURES, drawn, values), drawn.masks())


def test_absent_structures_become_certainly_absent_ones_that_it_can_bring_back():
    drawn = decoded(2, presence=-1)
    assert_close(Refinement(128, (1, 2))(FEATURES, drawn, (1, 2)), torch.full((2, 16, 16), -4.6))
    assert (fitted((1, 2))(FEATURES, drawn, (1, 2)) > -4.6).any()


def test_structures_it_does_not_know_come_back_as_the_decoder_drew_them():
    drawn = decoded(3)
    refined = fitted((1, 2))(FEATURES, drawn, (1, 9, 2))
    assert torch.equal(refined[1], drawn.masks()[1])
    assert not torch.allclose(refined[0], drawn.masks()[0])
    assert torch.equal(fitted((5,))(FEATURES, drawn, (1, 9, 2)), drawn.masks())


def test_the_order_of_structures_does_not_matter():
    drawn, refinement = decoded(3), fitted((1, 2, 3))
    straight = refinement(FEATURES, drawn, (1, 2, 3))
    assert_close(refinement(FEATURES, drawn[[2, 0, 1]], (3, 1, 2)), straight[[2, 0, 1]])


def test_a_mask_is_corrected_in_view_of_the_others():
    drawn, refinement = decoded(2), fitted((1, 2))
    alone = refinement(FEATURES, drawn[:1], (1,))
    assert not torch.allclose(alone[0], refinement(FEATURES, drawn, (1, 2))[0])
