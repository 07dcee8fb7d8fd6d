"""The linear map in closed form."""

import torch

from ofl_sam2.training.closed_form import linear_map


def test_it_is_the_weighted_ridge_regression():
    features, classes = torch.randn(3, 50), torch.randint(3, (50,))
    found = linear_map(features, classes, 4, 0.5).double()
    rows = torch.cat([features, torch.ones(1, 50)]).double()
    truth = torch.nn.functional.one_hot(classes, 4).T.double()
    weights = classes.bincount().double().rsqrt()[classes]
    weights = weights / weights.sum()

    def energy(solution):
        residual = ((solution.T @ rows - truth) ** 2).sum(0) @ weights
        return residual + 0.5 * (solution[:-1] ** 2).sum()

    best = energy(found)
    for _ in range(20):
        assert energy(found + 1e-2 * torch.randn_like(found)) > best
    assert not found[:, 3].any()
