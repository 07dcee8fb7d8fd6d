"""The linear map from features to classes in closed form (ridge regression, Bertinetto et al., ICLR 2019)."""

import torch
from torch import Tensor

SCALE, RIDGE = 8.0, 0.01


def linear_map(features: Tensor, classes: Tensor, count: int, ridge: Tensor | float = RIDGE) -> Tensor:
    """The linear map `(C + 1, count)` that is nearest to 1 for a voxel's class and 0 for the others.

    A class counts by the root of its voxels. The constant, its last row, is not shrunk. Times `SCALE` it gives logits.

    Args:
        features: `(C, N)` of N > 0 voxels.
        classes: `(N,)`, int64 in [0, count).
        count: how many classes.
        ridge: > 0.
    """
    rows = torch.cat([features, torch.ones_like(features[:1])])
    weights = classes.bincount(minlength=count).clamp(min=1).rsqrt()[classes]
    weighted = rows * (weights / weights.sum())
    shrunk = torch.ones(len(rows), device=rows.device)
    shrunk[-1] = 0
    sums = rows.new_zeros(len(rows), count).index_add(1, classes, weighted)
    return torch.linalg.solve(weighted @ rows.T + ridge * shrunk.diag(), sums)
