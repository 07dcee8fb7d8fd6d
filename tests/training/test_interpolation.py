"""Weights between those before and after a training."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ofl_sam2.training.interpolation import move_towards


@given(share=st.floats(0, 1), before=st.floats(-5, 5), after=st.floats(-5, 5))
def test_parameters_move_by_the_share(share, before, after):
    module, trained = nn.Linear(2, 1), nn.Linear(2, 1).double()
    for own, other in zip(module.parameters(), trained.parameters(), strict=True):
        nn.init.constant_(own, before)
        nn.init.constant_(other, after)
    move_towards(module, trained, share)
    for own, other in zip(module.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(own, torch.full_like(own, before + share * (after - before)), rtol=1e-4, atol=1e-5)
        assert bool((other == after).all()) and own.requires_grad


def test_modules_of_other_shape_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        move_towards(nn.Linear(2, 1), nn.Linear(2, 1, bias=False), 0.5)
