"""The learning rate over a training."""

import pytest

from ofl_sam2.training.schedule import learning_rate


def test_it_warms_up_and_decays_to_what_is_left():
    assert [learning_rate(2.0, step, 0.0, 4) for step in (0, 1, 3, 9)] == pytest.approx([0.5, 1.0, 2.0, 2.0])
    assert [learning_rate(2.0, 9, done, 4, 0.1) for done in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 1.1, 0.2])
