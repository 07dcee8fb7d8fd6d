"""Grid, patch and pooling of a 3D network, chosen from the labelled volumes as nnU-Net does (Isensee et al., 2021)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ofl_sam2.volume import Volume

THICK, DEEPEST = 3.0, 5


@dataclass(frozen=True)
class Plan:
    """Grid and patch for some volumes, along the axes R, A, S; of frames along column, row and time.

    Attributes:
        spacing: their median, mm; frames are as far apart as thick slices.
        shape: median size on that grid, voxels.
    """

    spacing: tuple[float, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, volumes: Iterable[Volume]) -> "Plan":
        """The medians over the volumes."""
        spacings, extents = [], []
        for volume in volumes:
            spacing, size = ordered_spacing(volume), ordered_grid(volume)
            spacings.append(spacing)
            extents.append(spacing * size)
        spacing = np.median(spacings, axis=0)
        shape = np.rint(np.median(extents, axis=0) / spacing).astype(int)
        return cls(tuple(spacing.tolist()), tuple(shape.tolist()))

    def coarsened(self, most_voxels: int) -> "Plan":
        """Of a median shape of at most `most_voxels`, the finest axes coarsened first."""
        plan = self
        while math.prod(plan.shape) > most_voxels:
            finest = 1.1 * min(plan.spacing)
            spacing = tuple(max(step, finest) for step in plan.spacing)
            sizes = zip(self.shape, self.spacing, spacing, strict=True)
            shape = tuple(max(1, math.floor(n * old / new)) for n, old, new in sizes)
            plan = replace(self, spacing=spacing, shape=shape)
        return plan

    @property
    def thick_axis(self) -> int | None:
        """Axis across thick slices, at least three times as thick as a pixel is wide."""
        widest = int(np.argmax(self.spacing))
        return widest if self.spacing[widest] >= THICK * min(self.spacing) else None

    def pooling(self, shape: Sequence[int], deepest: int = DEEPEST) -> tuple[list[list[int]], list[list[int]]]:
        """Strides and kernels of each level as nnU-Net chooses them for a patch of `shape`.

        Only axes of nearly the finest spacing are convolved and halved, and only while they have eight voxels, at most
        `deepest` times.
        """
        strides: list[list[int]] = [[1, 1, 1]]
        kernels: list[list[int]] = []
        sizes, spacing = list(shape), list(self.spacing)
        while True:
            fine = [step <= 2 * min(spacing) for step in spacing]
            stride = [2 if is_fine and size >= 8 else 1 for is_fine, size in zip(fine, sizes, strict=True)]
            if len(strides) > deepest or max(stride) == 1:
                return strides, [*kernels, [3, 3, 3]]
            kernels.append([3 if is_fine else 1 for is_fine in fine])
            strides.append(stride)
            sizes = [math.ceil(size / step) for size, step in zip(sizes, stride, strict=True)]
            spacing = [width * step for width, step in zip(spacing, stride, strict=True)]

    def patch(self, most_voxels: int, deepest: int = DEEPEST) -> tuple[int, ...]:
        """The median shape, shrunk along its longest axes to `most_voxels`, rounded up to what pooling divides."""
        sizes = list(self.shape)
        while math.prod(sizes) > most_voxels:
            sizes[sizes.index(max(sizes))] = math.floor(0.9 * max(sizes))
        strides, _ = self.pooling(sizes, deepest)
        factors = np.prod(strides, axis=0).tolist()
        return tuple(rounded_up(*pair) for pair in zip(sizes, factors, strict=True))


def rounded_up(size: int, factor: int) -> int:
    """The next multiple of `factor`."""
    return math.ceil(size / factor) * factor


def ordered_spacing(volume: Volume) -> np.ndarray:
    """Voxel size `(3,)` along R, A, S in mm; of frames along column and row, and thrice the larger in time."""
    spacing = np.array(volume.spacing)
    return np.array([*spacing[:2], THICK * spacing[:2].max()]) if volume.frames else spacing[volume.order]


def ordered_grid(volume: Volume) -> np.ndarray:
    """Voxels `(3,)` along the same axes."""
    return np.array(volume.grid)[volume.order]
