"""Boxes of voxels around structures: where a close-up looks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARGIN = 0.5
SMALL = 0.6
_LEAST_VOXELS = 32
_STRAY = 0.03
_NEAR = 1.5


@dataclass(frozen=True)
class Window:
    """A box of voxels along the array axes: `lower` (i, j, k), `upper` exclusive."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """For indexing arrays whose first axes are the spatial ones."""
        return tuple(slice(*ends) for ends in zip(self.lower, self.upper, strict=True))

    def union(self, other: "Window") -> "Window":
        """The smallest window around both."""
        lower = tuple(map(min, self.lower, other.lower))
        return Window(lower, tuple(map(max, self.upper, other.upper)))

    def extent(self, spacing: Iterable[float]) -> list[float]:
        """Sides in mm."""
        return [(b - a) * mm for a, b, mm in zip(self.lower, self.upper, spacing, strict=True)]

    def grown(self, shape: Iterable[int], spacing: Iterable[float]) -> "Window":
        """With a margin of half its middle side, at least 32 voxels a side where the volume of `shape` has them."""
        sides = list(spacing)
        margin = MARGIN * sorted(self.extent(sides))[len(sides) // 2]
        ends = [
            _grown(a, b, max(margin / mm, (_LEAST_VOXELS - b + a) / 2), count)
            for a, b, mm, count in zip(self.lower, self.upper, sides, shape, strict=True)
        ]
        return Window(tuple(a for a, _ in ends), tuple(b for _, b in ends))


def _grown(lower: int, upper: int, margin: float, count: int) -> tuple[int, int]:
    return max(0, lower - round(margin)), min(count, upper + round(margin))


def around(mask: NDArray[Any]) -> Window | None:
    """The window around the bulk of a mask `(X, Y[, Z])`: stray voxels do not widen it. None if the mask is empty."""
    lower, upper = [], []
    for axis in range(mask.ndim):
        share = mask.sum(axis=tuple(other for other in range(mask.ndim) if other != axis)).cumsum()
        if not share[-1]:
            return None
        lower.append(int(np.searchsorted(share, _STRAY * share[-1], side="right")))
        upper.append(int(np.searchsorted(share, (1 - _STRAY) * share[-1])) + 1)
    return Window(tuple(lower), tuple(upper))


def close_ups(
    masks: Iterable[tuple[int, NDArray[Any]]], shape: tuple[int, ...], spacing: tuple[float, ...]
) -> list[tuple[Window, tuple[int, ...]]]:
    """Windows around small structures; neighbours share one.

    Args:
        masks: label values and their masks in the grid of `shape`.
        shape: spatial grid, 2 or 3 axes.
        spacing: voxel size in mm.

    Returns:
        Each window with the label values it is made for. Structures that fill most of the field of view are left out.
    """
    field_of_view = max(n * mm for n, mm in zip(shape, spacing, strict=True))
    found = {value: window for value, mask in masks if (window := around(mask))}
    groups: list[tuple[Window, tuple[int, ...]]] = []
    for value, window in found.items():
        groups = _joined(groups, (window.grown(shape, spacing), (value,)), spacing, SMALL * field_of_view)
    return sorted(groups, key=lambda group: group[1])


def _joined(
    groups: list[tuple[Window, tuple[int, ...]]],
    new: tuple[Window, tuple[int, ...]],
    spacing: tuple[float, ...],
    limit: float,
) -> list[tuple[Window, tuple[int, ...]]]:
    """Add a group, and join it with each one whose union with it is hardly larger than the larger of both."""
    side = max(new[0].extent(spacing))
    if side >= limit:
        return groups
    for position, (window, values) in enumerate(groups):
        union = window.union(new[0])
        if max(union.extent(spacing)) <= min(_NEAR * max(side, *window.extent(spacing)), limit):
            others = groups[:position] + groups[position + 1 :]
            return _joined(others, (union, tuple(sorted(values + new[1]))), spacing, limit)
    return [*groups, new]
