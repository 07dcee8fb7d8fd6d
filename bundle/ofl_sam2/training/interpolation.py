"""Weights between those before and after a training."""

import torch
from torch import nn


@torch.no_grad()
def move_towards(module: nn.Module, trained: nn.Module, share: float) -> None:
    """Replace the parameters of a module by `share` of the trained ones and the rest of its own.

    Weights between both ends often do better on other data than either (Wortsman et al., CVPR 2022, WiSE-FT).
    """
    for value, target in zip(module.parameters(), trained.parameters(), strict=True):
        value.lerp_(target.to(value), share)
