"""Synthetic volumes of random anatomy: two or more "patients" that share a template and a palette of intensities.

Everything is torch with an explicit generator, so the same code runs on CPU and GPU and a seed gives the same volumes.
Shapes: a region map is `(Z, Y, X)` int64 with 0 outside the body; an image is `(Z, Y, X)` float32 in [0, 1].
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

_Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Anatomy:
    """A template: `regions (Z, Y, X)`, and the `tissues` (indices of background tissue) among them."""

    regions: Tensor
    tissues: int

    @property
    def count(self) -> int:
        """Number of region values, 0 included."""
        return int(self.regions.max()) + 1


@dataclass(frozen=True)
class Palette:
    """How regions look (mean intensity, texture strength and grain per region, each `(R,)`) and how images are taken.

    `blur` is in pixels of a 96-pixel image, `bias` and `speckle` are relative amplitudes, `noise` is absolute.
    """

    mean: Tensor
    texture: Tensor
    grain: Tensor
    blur: float
    bias: float
    noise: float
    speckle: float
    gamma: float
    inverted: bool


class Dice:
    """Random draws from one generator."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.device = generator.device

    def uniform(self, low: float, high: float) -> float:
        """One float in [low, high)."""
        return low + (high - low) * float(torch.rand((), generator=self.generator, device=self.device))

    def log_uniform(self, low: float, high: float) -> float:
        """One float in [low, high), uniform in its logarithm."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """One integer in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator, device=self.device))

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self.uniform(0, 1) < probability

    def normal(self, *shape: int) -> Tensor:
        """Standard normal tensor."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def smooth(self, shape: tuple[int, ...], cells: tuple[int, ...]) -> Tensor:
        """Smooth noise of unit order on `shape` (1 to 3 axes), interpolated from a coarse grid of `cells`."""
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
        coarse = self.normal(1, 1, *cells)
        return functional.interpolate(coarse, size=shape, mode=mode, align_corners=True)[0, 0]


def random_anatomy(dice: Dice, depth: int, side: int) -> Anatomy:
    """A random template of `depth` slices of `side` x `side` pixels: tissues, body, organs, shells, twins and tubes."""
    shape = (depth, side, side)
    grid = _grid(shape, dice.device)
    tissues, folds = dice.integer(3, 10), (7, 7, 14)[dice.integer(0, 2)]
    cells = [(dice.integer(2, 4), dice.integer(2, folds), dice.integer(2, folds)) for _ in range(tissues)]
    regions = torch.stack([dice.smooth(shape, counts) for counts in cells]).argmax(0) + 1
    if dice.chance(0.7):
        body = _ellipsoid(dice, grid, (0.0, 0.0, 0.0), (4.0, dice.uniform(0.6, 0.95), dice.uniform(0.6, 0.95)), 0.08)
        regions = torch.where(body < 1, regions, 0)
    value = tissues
    for _ in range(dice.integer(2, 8)):
        value = _add_organ(dice, grid, regions, value)
    for _ in range(dice.integer(0, 2)):
        value += 1
        regions[_tube(dice, grid)] = value
    return Anatomy(regions, tissues)


def random_palette(dice: Dice, anatomy: Anatomy) -> Palette:
    """Random looks; parts of one organ may share theirs, so that only their place tells them apart."""
    count = anatomy.count
    mean = torch.rand(count, generator=dice.generator, device=dice.device)
    mean[0] = dice.uniform(0, 0.05) if dice.chance(0.8) else dice.uniform(0, 1)
    for region in range(anatomy.tissues + 1, count):
        if dice.chance(0.3):
            mean[region] = mean[dice.integer(1, region)]
    texture = 0.12 * torch.rand(count, generator=dice.generator, device=dice.device) ** 2
    grain = torch.rand(count, generator=dice.generator, device=dice.device)
    return Palette(
        mean,
        texture,
        grain,
        blur=dice.uniform(0.2, 1.1),
        bias=dice.uniform(0, 0.35) if dice.chance(0.5) else 0.0,
        noise=dice.log_uniform(0.003, 0.08),
        speckle=dice.uniform(0.4, 1.5) if dice.chance(0.12) else 0.0,
        gamma=dice.log_uniform(0.6, 1.7),
        inverted=dice.chance(0.25),
    )


def deform(dice: Dice, regions: Tensor, strength: float = 1.0) -> Tensor:
    """Another patient of the same template: a random affine map and a smooth displacement, nearest sampling."""
    shape = tuple(regions.shape)
    angle = torch.tensor([0.06, 0.06, 0.2], device=dice.device) * dice.normal(3) * strength
    scale = 1 + 0.1 * strength * dice.normal(3)
    shift = torch.tensor([0.06, 0.06, 0.1], device=dice.device) * dice.normal(3) * strength
    matrix = rotation(angle) * scale
    theta = torch.cat([matrix, shift[:, None]], 1)[None]
    flow = functional.affine_grid(theta, [1, 1, *shape], align_corners=False)
    cells = (2, dice.integer(3, 6), dice.integer(3, 6))
    amplitude = strength * dice.uniform(0.01, 0.05)
    bend = torch.stack([dice.smooth(shape, cells) for _ in range(3)], -1)
    sample = functional.grid_sample(
        regions[None, None].float(), flow + amplitude * bend, mode="nearest", padding_mode="border", align_corners=False
    )
    return sample[0, 0].round().long()


def render(dice: Dice, regions: Tensor, palette: Palette, jitter: float = 0.03) -> Tensor:
    """Draw an image of a region map: intensities, texture, partial volume, bias field, noise or speckle, contrast."""
    shape = tuple(regions.shape)
    mean = palette.mean + jitter * dice.normal(len(palette.mean))
    image = mean[regions]
    fine, coarse = dice.normal(*shape), dice.smooth(shape, (shape[0], max(4, shape[1] // 6), max(4, shape[2] // 6)))
    grain = palette.grain[regions]
    image = image + palette.texture[regions] * (grain * fine + (1 - grain) * 2 * coarse)
    image = blur(image, palette.blur * dice.log_uniform(0.8, 1.25) * shape[-1] / 96)
    image = image * (1 + palette.bias * dice.smooth(shape, (2, 3, 3)))
    image = image * (1 + palette.speckle * blur(dice.normal(*shape), 0.8))
    image = image + palette.noise * dice.log_uniform(0.7, 1.4) * dice.normal(*shape)
    return exposed(dice, image, palette)


def exposed(dice: Dice, image: Tensor, palette: Palette) -> Tensor:
    """The image in [0, 1] with the contrast of a palette."""
    sample = image.flatten()[:: max(1, image.numel() // 20000)]
    low, high = torch.quantile(sample, torch.tensor([0.005, 0.995], device=image.device))
    image = ((image - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    image = image ** (palette.gamma * dice.log_uniform(0.9, 1.1))
    return 1 - image if palette.inverted else image


def blur(image: Tensor, sigma: float) -> Tensor:
    """In-plane Gaussian blur of `(Z, Y, X)` by `sigma` pixels."""
    if sigma < 0.2:
        return image
    radius = max(1, math.ceil(2.5 * sigma))
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=image.device) / sigma) ** 2)
    line = line / line.sum()
    padded = functional.pad(image[:, None], (radius, radius, radius, radius), mode="replicate")
    return functional.conv2d(functional.conv2d(padded, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))[:, 0]


def _grid(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    axes = [torch.linspace(-1, 1, size, device=device) if size > 1 else torch.zeros(1, device=device) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def rotation(angles: Tensor) -> Tensor:
    """Rotation matrix by `angles (3,)` in radians about the x, y and z axes of sampling coordinates."""
    generators = torch.tensor(
        [
            [[0.0, 0, 0], [0, 0, -1], [0, 1, 0]],
            [[0.0, 0, 1], [0, 0, 0], [-1, 0, 0]],
            [[0.0, -1, 0], [1, 0, 0], [0, 0, 0]],
        ],
        device=angles.device,
    )
    return torch.linalg.matrix_exp((angles[:, None, None] * generators).sum(0))


def _ellipsoid(dice: Dice, grid: Tensor, centre: _Triple, radii: _Triple, rough: float) -> Tensor:
    """Level function `(Z, Y, X)`, below 1 inside a rotated ellipsoid with an uneven surface."""
    local = grid - torch.tensor(centre, device=grid.device)
    turn = dice.uniform(0, math.pi)
    cos, sin = math.cos(turn), math.sin(turn)
    drift = torch.tensor([dice.uniform(-0.2, 0.2), dice.uniform(-0.2, 0.2)], device=grid.device)
    plane = local[..., 1:] - local[..., :1] * drift
    y, x = plane[..., 0] * cos - plane[..., 1] * sin, plane[..., 0] * sin + plane[..., 1] * cos
    level = ((local[..., 0] / radii[0]) ** 2 + (y / radii[1]) ** 2 + (x / radii[2]) ** 2).sqrt()
    lobes = dice.integer(4, 12)
    return level + rough * dice.smooth(tuple(grid.shape[:3]), (dice.integer(2, 4), lobes, lobes))


def _add_organ(dice: Dice, grid: Tensor, regions: Tensor, value: int) -> int:
    """Draw one organ into `regions` in place, perhaps with a shell, halves, a twin or copies; return the last value."""
    size = dice.log_uniform(0.06, 0.5)
    depth, height, width = (size * dice.log_uniform(0.6, 1.6) for _ in range(3))
    radii = (max(depth * dice.uniform(0.6, 3), 0.15), height, width)
    centre = (dice.uniform(-0.6, 0.6), dice.uniform(-0.7, 0.7), dice.uniform(-0.7, 0.7))
    level = _ellipsoid(dice, grid, centre, radii, dice.uniform(0, 0.3))
    inside = level < 1
    value += 1
    regions[inside] = value
    kind = dice.uniform(0, 1)
    if kind < 0.25:
        value += 1
        regions[level < dice.uniform(0.55, 0.85)] = value
    elif kind < 0.45:
        value += 1
        normal = dice.normal(3)
        offset = ((grid - torch.tensor(centre, device=grid.device)) * normal).sum(-1)
        regions[inside & (offset > dice.uniform(-0.3, 0.3) * size)] = value
    elif kind < 0.6:
        value += 1
        regions[inside.flip(2)] = value
    elif kind < 0.7:
        shift = (dice.integer(-1, 1), dice.integer(-regions.shape[1] // 3, regions.shape[1] // 3), 0)
        regions[inside.roll(shift, (0, 1, 2))] = value + 1
        value += 1
    return value


def _tube(dice: Dice, grid: Tensor) -> Tensor:
    """Mask `(Z, Y, X)` of a tube that runs through the slices."""
    depth = grid.shape[0]
    path = 0.5 * torch.stack([dice.smooth((depth,), (4,)) for _ in range(2)], -1)
    path = path + torch.tensor([dice.uniform(-0.5, 0.5), dice.uniform(-0.5, 0.5)], device=grid.device)
    radius = dice.log_uniform(0.03, 0.15) * (1 + 0.2 * dice.smooth((depth,), (4,)))
    return (grid[..., 1:] - path[:, None, None]).norm(dim=-1) < radius[:, None, None].abs()
