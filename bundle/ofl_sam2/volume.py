"""Volume <-> slices, by numpy views: writing into a slice writes into the volume's own grid.

Conventions: arrays are indexed (i, j, k) like nibabel's, affines map voxel indices to RAS+ mm. Slices `(H, W)` of a
volume are shown the radiological way (anterior or superior up); frames are shown as stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from torch import Tensor

from ofl_sam2.errors import InputError
from ofl_sam2.intensity import Intensity, intensity_for
from ofl_sam2.plane import PlaneGeometry
from ofl_sam2.window import Window

_ANISOTROPIC = 1.2


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or a label with its place in space.

    Attributes:
        voxels: `(X, Y, Z)` volume, `(X, Y, Z, T)` sequence, `(X, Y, T)` grey or `(X, Y, T, 3)` colour frames;
            in frames X is the column and Y the row.
        affine: `(4, 4)`, voxel index -> RAS+ mm.
        name: case name.
        frames: True for 2D frames: no reorientation, the slices are the frames.
        colour: True for colour frames.
        path: file or folder it was read from.
        frame_names: file stems of the frames.
        labelled: of a label sequence, the frames that have a mask file; None means all.
        header: NIfTI header it was read with.

    Raises:
        InputError: wrong dimensions, no voxels, or an affine that is not invertible.
    """

    voxels: NDArray[Any] = field(repr=False)
    affine: NDArray[np.float64]
    name: str
    frames: bool = False
    colour: bool = False
    path: Path | None = None
    frame_names: tuple[str, ...] = field(default=(), repr=False)
    labelled: tuple[int, ...] | None = None
    header: nib.Nifti1Header | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        ndims = (4,) if self.colour else (3,) if self.frames else (3, 4)
        if self.voxels.ndim not in ndims or self.voxels.size == 0:
            raise InputError(
                f"{self.name}: an array of shape {self.voxels.shape} is no volume. "
                "Give a 3D volume, a 4D sequence or a folder of 2D frames."
            )
        linear = np.asarray(self.affine, dtype=np.float64)[:3, :3]
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all() or abs(np.linalg.det(linear)) < 1e-12:
            raise InputError(
                f"{self.name}: its affine is not invertible, so voxels have no size. "
                "Set a valid orientation and spacing in the file's header."
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of a label of this volume: `(X, Y, Z)`, `(X, Y, Z, T)` or `(X, Y, T)`."""
        return self.voxels.shape[:3] if self.colour else self.voxels.shape

    def cropped(self, window: Window) -> "Volume":
        """The part inside a window, as views; all frames of a sequence stay."""
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, : len(window.lower)] @ np.asarray(window.lower, float)
        return replace(self, voxels=self.voxels[window.slices], affine=affine, header=None)

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Voxels along the axes of space: three, or two of frames."""
        return self.grid[: 2 if self.frames else 3]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along the array axes in mm."""
        i, j, k = voxel_sizes(self.affine).tolist()
        return i, j, k

    @property
    def order(self) -> list[int]:
        """The array axes closest to R, A and S; of frames column, row and time, as stored.

        Example:
            >>> affine = np.array([[0, 0, -2, 0], [3, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
            >>> Volume(np.zeros((4, 5, 6)), affine, "case").order
            [2, 0, 1]
        """
        return [0, 1, 2] if self.frames else _orientation(self.affine)[0]

    def in_order(self, array: NDArray[Any]) -> NDArray[Any]:
        """View an array in this volume's grid along R, A, S; of frames as it is."""
        return array if self.frames else canonical_view(array, self.affine)


def canonical_view(array: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """View `array` `(X, Y, Z, ...)` in the closest RAS+ axis order, by transposing and flipping only.

    Example:
        >>> array = np.zeros((2, 3, 4))
        >>> canonical_view(array, np.diag([-1.0, 1.0, 1.0, 1.0]))[0, 0, 0] = 7
        >>> array[1, 0, 0]
        7.0
    """
    order, flips = _orientation(affine)
    return array[flips].transpose(*order, *range(3, array.ndim))


def choose_axis(volume: Volume) -> int:
    """Return the canonical axis to slice along: the through-plane direction of the scan.

    That is a direction of a single voxel, else the one of the largest spacing; 2 for frames and isotropic volumes.
    """
    if volume.frames:
        return 2
    order = volume.order
    flat = [axis for axis in (2, 1, 0) if volume.voxels.shape[order[axis]] == 1]
    if flat:
        return flat[0]
    spacing = [round(volume.spacing[axis], 3) for axis in order]
    if max(spacing) < _ANISOTROPIC * min(spacing):
        return 2
    return max(range(3), key=lambda axis: (spacing[axis], axis))


def is_nearly_isotropic(volume: Volume) -> bool:
    """Whether slices along every axis look alike: a volume whose largest spacing is below twice the smallest."""
    return not volume.frames and volume.voxels.ndim == 3 and max(volume.spacing) < 2 * min(volume.spacing)


def is_anisotropic(volume: Volume) -> bool:
    """Whether the slices are thick: the largest spacing is at least 1.2 times the smallest."""
    return not volume.frames and max(volume.spacing) >= _ANISOTROPIC * min(volume.spacing)


def _orientation(affine: NDArray[np.float64]) -> tuple[list[int], tuple[slice, ...]]:
    """The array axes closest to R, A and S, and for each array axis the step that makes it point there."""
    orientation = nib.orientations.io_orientation(affine)
    return np.argsort(orientation[:, 0]).tolist(), tuple(slice(None, None, int(step)) for step in orientation[:, 1])


class SliceStack:
    """The slices of a volume along one canonical axis, made into network inputs when asked for.

    Frames are the slices of a frame sequence. A 4D sequence has one slice for each (z, t): all times of the first
    position, then all times of the next.

    Args:
        volume: what to slice.
        axis: canonical axis (0 R, 1 A, 2 S), see `choose_axis`; 2 for frames.
        size: side of the square input in pixels.
        intensity: grey value window; None chooses one for the volume.
        ct_window: see `intensity_for`.

    Raises:
        InputError: no such axis.

    Example:
        >>> stack = SliceStack(Volume(np.ones((4, 5, 6)), np.eye(4), "case"), axis=2, size=32)
        >>> len(stack), stack.shape, stack.images([0, 5]).shape
        (6, (5, 4), torch.Size([2, 3, 32, 32]))
    """

    def __init__(
        self,
        volume: Volume,
        axis: int,
        size: int,
        intensity: Intensity | None = None,
        ct_window: tuple[float, float] | None = None,
    ) -> None:
        if axis not in ((2,) if volume.frames else (0, 1, 2)):
            raise InputError(f"{volume.name}: cannot slice along axis {axis}. Choose 0, 1 or 2; 2 for frames.")
        self.volume = volume
        self.axis = axis
        self._given_intensity, self._ct_window = intensity, ct_window
        row, column, self.through = self._array_axes()
        self.shape: tuple[int, int] = (volume.grid[row], volume.grid[column])
        self.pixel_spacing: tuple[float, float] = (volume.spacing[row], volume.spacing[column])
        self.spacing_between: float = volume.spacing[self.through]
        self.voxel_volume_ml: float = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
        self.times: int = volume.grid[3] if len(volume.grid) == 4 else 1
        self.geometry = PlaneGeometry(self.shape, self.pixel_spacing, size)
        self._count = volume.grid[self.through] * self.times

    def __len__(self) -> int:
        return self._count

    @cached_property
    def intensity(self) -> Intensity:
        """The grey value window of the images."""
        return self._given_intensity or intensity_for(self.volume, self._ct_window)

    def slice_of(self, array: NDArray[Any], index: int) -> NDArray[Any]:
        """View slice `index` `(H, W)` of an array in the volume's grid; `(H, W, 3)` of colour voxels.

        Writing into the view writes into the array.

        Raises:
            InputError: the array is not in the volume's grid.
        """
        grid = self.volume.grid
        if array.shape != grid and array.shape != self.volume.voxels.shape:
            raise InputError(
                f"{self.volume.name}: an array of shape {array.shape} does not fit the volume's grid {grid}. "
                "Use labels drawn on this volume."
            )
        if self.volume.frames:
            return array[:, :, index].swapaxes(0, 1)
        position, time = divmod(index, self.times)
        plane = np.moveaxis(self.volume.in_order(array), self.axis, 0)[position]
        plane = plane if plane.ndim == 2 else plane[..., time]
        return plane.T[::-1, ::-1]

    def images(self, indices: Sequence[int]) -> Tensor:
        """Return the slices `indices` as float32 inputs `(N, 3, size, size)` in [0, 1]."""
        planes = np.stack([self.intensity.apply(self.slice_of(self.volume.voxels, index)) for index in indices])
        channels = torch.from_numpy(planes if self.volume.colour else planes[..., None]).permute(0, 3, 1, 2)
        inputs = self.geometry.to_input(channels).clamp_(0, 1)
        return inputs if self.volume.colour else inputs.repeat(1, 3, 1, 1)

    def masks(self, labels: NDArray[Any], index: int, values: Sequence[int]) -> Tensor:
        """Return one soft mask for each label value in `values`, float32 `(K, size, size)` in [0, 1].

        Args:
            labels: integers in the volume's grid.
            index: slice.
            values: label values.
        """
        plane = self.slice_of(labels, index)
        indicators = torch.from_numpy(np.stack([plane == value for value in values]))
        drawn = indicators.flatten(1).any(1)
        masks = torch.zeros(len(values), self.geometry.size, self.geometry.size)
        if drawn.any():
            masks[drawn] = self.geometry.to_input(indicators[drawn])[:, 0].clamp_(0, 1)
        return masks

    def restore(self, maps: Tensor) -> Tensor:
        """Resample maps `(K, h, w)` that cover the input to the slice grid `(K, H, W)`; see `PlaneGeometry`."""
        return self.geometry.from_input(maps)

    def slices_before(self, window: Window) -> int:
        """How many slices come before those of a window."""
        if self.volume.frames:
            return 0
        _, flips = _orientation(self.volume.affine)
        positions = window.lower[self.through], self.volume.grid[self.through] - window.upper[self.through]
        return positions[flips[self.through].step < 0] * self.times

    def _array_axes(self) -> tuple[int, int, int]:
        """Array axes of the rows, of the columns and of the slicing direction."""
        order = self.volume.order
        column, row = (order[axis] for axis in range(3) if axis != self.axis)
        return row, column, order[self.axis]
