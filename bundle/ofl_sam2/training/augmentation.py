"""Augmented copies of labelled slices: small deformations and intensity changes, no flips (there are paired organs)."""

import torch
from torch import Tensor
from torch.nn import functional

from ofl_sam2.training.synthetic import Dice, blur


def augment(dice: Dice, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Deform and recolour all slices of a volume alike.

    Args:
        dice: random draws.
        images: `(S, 3, size, size)` in [0, 1].
        labels: `(S, size, size)` integers.

    Returns:
        The same shapes.
    """
    grid = _deformation(dice, images.shape[-1]).expand(len(images), -1, -1, -1)
    images = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    warped = functional.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    return _recolour(dice, images), warped[:, 0].to(labels.dtype)


def _deformation(dice: Dice, size: int) -> Tensor:
    """Sampling grid `(1, size, size, 2)`: rotation, scaling, shift and a smooth bend."""
    angle, shear = dice.uniform(-0.25, 0.25), dice.uniform(-0.08, 0.08)
    scale = torch.tensor([dice.log_uniform(0.85, 1.18), dice.log_uniform(0.85, 1.18)])
    cos, sin = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    matrix = torch.stack([torch.stack([cos, -sin + shear]), torch.stack([sin, cos])]) * scale
    shift = torch.tensor([[dice.uniform(-0.1, 0.1)], [dice.uniform(-0.1, 0.1)]])
    grid = functional.affine_grid(torch.cat([matrix, shift], 1)[None], [1, 1, size, size], align_corners=False)
    cells = dice.integer(3, 6)
    bend = torch.stack([dice.smooth((size, size), (cells, cells)) for _ in range(2)], -1)
    return grid + dice.uniform(0, 0.03) * bend


def _recolour(dice: Dice, images: Tensor) -> Tensor:
    """Contrast, brightness, gamma, blur, bias field and noise, within [0, 1]."""
    size = images.shape[-1]
    images = (images * dice.log_uniform(0.75, 1.3) + dice.uniform(-0.1, 0.1)).clamp(0, 1)
    images = images ** dice.log_uniform(0.7, 1.4)
    if dice.chance(0.3):
        images = blur(images.flatten(0, 1), dice.uniform(0.3, 1.2) * size / 128).view_as(images)
    bias = 1 + dice.uniform(0, 0.2) * dice.smooth((size, size), (3, 3))
    noise = dice.log_uniform(0.002, 0.05) * dice.normal(len(images), 1, size, size)
    return (images * bias + noise).clamp(0, 1)
