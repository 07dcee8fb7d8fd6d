"""Synthetic volumes without a stack direction: two "patients" that share a random anatomy and how it looks.

Shapes: a region map is `(x, y, z)` int64 with 0 outside the body; an image is `(x, y, z)` float32, standardised.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ofl_sam2.training.synthetic import Anatomy, Dice, Palette, exposed, random_palette, rotation

_BENDS = ((3, 4, 0.08), (5, 8, 0.03))


def patients(dice: Dice, shape: tuple[int, ...], thickness: float = 1.0) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """How many of the regions are tissues, the first ones, and image and regions of two patients.

    Args:
        dice: draws.
        shape: of a volume.
        thickness: of the slices along z, in pixels.
    """
    anatomy = _anatomy(dice, shape, thickness)
    palette = random_palette(dice, anatomy)
    strength, jitter = dice.uniform(0.3, 1.5), dice.uniform(0.01, 0.08)
    both = []
    for _ in range(2):
        regions = _deformed(dice, anatomy.regions, strength)
        image = _rendered(dice, regions, palette, jitter, thickness)
        both.append(((image - image.mean()) / image.std().clamp_min(1e-6), regions))
    return anatomy.tissues, both


def _anatomy(dice: Dice, shape: tuple[int, ...], thickness: float) -> Anatomy:
    """Tissues that fill the volume, or only a body in it, and organs."""
    axes = [torch.linspace(-1, 1, size, device=dice.device) for size in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    tissues = value = dice.integer(3, 10)
    finest = (5, 8, 12)[dice.integer(0, 2)]
    cells = [dice.integer(2, finest) for _ in range(3)]
    regions = _blurred(_fields(dice, tissues, shape, cells), dice.uniform(0.5, 1.5), thickness).argmax(0) + 1
    if dice.chance(0.5):
        radii = torch.tensor([dice.uniform(0.6, 1.3) for _ in range(3)], device=dice.device)
        body = grid @ rotation(3.0 * dice.normal(3)) / radii
        regions = torch.where(_rough(dice, body, 0.08, 6) < 1, regions, 0)
    for _ in range(dice.integer(3, 9)):
        value = _add_organ(dice, grid, regions, value)
    return Anatomy(regions, tissues)


def _add_organ(dice: Dice, grid: Tensor, regions: Tensor, value: int) -> int:
    """Draw a bent ellipsoid into `regions` in place, perhaps with a core, a part or a twin; return the last value."""
    bend = dice.uniform(0, 0.25) * _fields(dice, 3, tuple(regions.shape), (3, 3, 3)).permute(1, 2, 3, 0)
    size = dice.log_uniform(0.1, 0.5)
    radii = torch.tensor([size * dice.log_uniform(0.5, 2) for _ in range(3)], device=dice.device)
    centre = torch.tensor([dice.uniform(-0.7, 0.7) for _ in range(3)], device=dice.device)
    local = (grid - centre + bend) @ rotation(3.0 * dice.normal(3)) / radii
    level = _rough(dice, local, dice.uniform(0, 0.3), dice.integer(3, 9))
    inside, kind = level < 1, dice.uniform(0, 1)
    regions[inside] = value + 1
    if kind < 0.35:
        further = level < dice.uniform(0.5, 0.9)
    elif kind < 0.55:
        direction = functional.normalize(dice.normal(3), dim=0)
        further = inside & (local @ direction > dice.uniform(-0.4, 0.4))
    elif kind < 0.7:
        further = inside.flip(dice.integer(0, 2))
    else:
        return value + 1
    regions[further] = value + 2
    return value + 2


def _deformed(dice: Dice, regions: Tensor, strength: float) -> Tensor:
    """Another patient: turned, scaled, moved, and bent coarsely and finely."""
    shape = tuple(regions.shape)
    matrix = rotation(0.12 * strength * dice.normal(3)) * (1 + 0.08 * strength * dice.normal(3))
    shift = 0.06 * strength * dice.normal(3)
    flow = functional.affine_grid(torch.cat([matrix, shift[:, None]], 1)[None], [1, 1, *shape], align_corners=False)
    for least, most, amplitude in _BENDS:
        cells = 3 * (dice.integer(least, most),)
        flow = flow + strength * amplitude * dice.uniform(0.2, 1) * _fields(dice, 3, shape, cells).permute(1, 2, 3, 0)
    volume = regions[None, None].float()
    sampled = functional.grid_sample(volume, flow, mode="nearest", padding_mode="border", align_corners=False)
    return sampled[0, 0].round().long()


def _rendered(dice: Dice, regions: Tensor, palette: Palette, jitter: float, thickness: float) -> Tensor:
    """Intensities, texture, partial volume, bias field, noise or speckle, contrast."""
    shape = tuple(regions.shape)
    image = (palette.mean + jitter * dice.normal(len(palette.mean)))[regions]
    grain, coarse = palette.grain[regions], dice.smooth(shape, (10, 10, 10))
    image = image + palette.texture[regions] * (grain * dice.normal(*shape) + (1 - grain) * 2 * coarse)
    image = _blurred(image[None], 0.8 * palette.blur * dice.log_uniform(0.8, 1.25), thickness)[0]
    image = image * (1 + palette.bias * dice.smooth(shape, (3, 3, 3)))
    if palette.speckle:
        image = image * (1 + palette.speckle * _blurred(dice.normal(1, *shape), 0.8, thickness)[0])
    image = image + palette.noise * dice.log_uniform(0.7, 1.4) * dice.normal(*shape)
    return exposed(dice, image, palette)


def _fields(dice: Dice, count: int, shape: tuple[int, ...], cells: Sequence[int]) -> Tensor:
    """Independent smooth noise `(count, x, y, z)`."""
    return torch.stack([dice.smooth(shape, tuple(cells)) for _ in range(count)])


def _rough(dice: Dice, local: Tensor, rough: float, lobes: int) -> Tensor:
    """Below 1 inside a unit sphere with an uneven surface."""
    return local.norm(dim=-1) + rough * dice.smooth(tuple(local.shape[:3]), 3 * (lobes,))


def _blurred(maps: Tensor, sigma: float, thickness: float) -> Tensor:
    """Gaussian of `sigma` pixels, of maps `(C, x, y, z)`."""
    maps = maps[:, None]
    for axis, width in enumerate((sigma, sigma, sigma / thickness)):
        if width < 0.2:
            continue
        radius = max(1, math.ceil(2.5 * width))
        line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=maps.device) / width) ** 2)
        sizes, ends = [1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]
        sizes[2 + axis], ends[4 - 2 * axis], ends[5 - 2 * axis] = -1, radius, radius
        padded = functional.pad(maps, ends, mode="replicate")
        maps = functional.conv3d(padded, (line / line.sum()).view(sizes))
    return maps[:, 0]
