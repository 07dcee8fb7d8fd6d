"""Figures of the calibration benchmark on estimates whose answer is known."""

import numpy as np
import pytest
from calibration import Estimates


def test_perfect_estimates_have_no_error():
    dice = np.linspace(0, 1, 21)
    figures = Estimates(dice, dice).summary()
    assert figures["calibration_error"] == pytest.approx(0)
    assert figures["spearman"] == pytest.approx(1)


def test_calibration_error_weighs_bins_by_their_size():
    estimates = Estimates(np.array([0.95, 0.95, 0.95, 0.15]), np.array([0.75, 0.65, 0.7, 0.15]))
    assert estimates.calibration_error() == pytest.approx(0.75 * 0.25)


def test_gamma_accepts_what_reaches_it():
    accepted = Estimates(np.array([0.2, 0.8, 0.9]), np.array([0.1, 0.5, 0.9])).accepted()
    assert accepted["0.8"] == {"share": pytest.approx(2 / 3, abs=1e-4), "dice": pytest.approx(0.7)}
    assert accepted["0.95"] == {"share": 0.0, "dice": None}
