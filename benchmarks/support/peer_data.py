"""What networks trained from scratch see of labelled volumes: samples, a common grid, a patch, and the way back."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from ofl_sam2.dataset import LabelledCase, choose_axis
from ofl_sam2.errors import InputError
from ofl_sam2.volume import SliceStack, Volume
from ofl_sam2.window import Window

THICK = 3.0


@dataclass(frozen=True)
class Plan:
    """Grid and patch for some labelled volumes, along the axes R, A, S.

    Attributes:
        spacing: their median, mm.
        shape: median size on that grid, voxels.
    """

    spacing: tuple[float, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, cases: Sequence[LabelledCase]) -> "Plan":
        """The medians over the cases."""
        spacings, extents = [], []
        for volume in (case.volume for case in cases):
            order = np.argsort(nib.orientations.io_orientation(volume.affine)[:, 0])
            spacing = np.array(volume.spacing)[order]
            spacings.append(spacing)
            extents.append(spacing * np.array(volume.grid)[order])
        spacing = np.median(spacings, axis=0)
        shape = np.rint(np.median(extents, axis=0) / spacing).astype(int)
        return cls(tuple(spacing.tolist()), tuple(shape.tolist()))

    @property
    def thick_axis(self) -> int | None:
        """Axis across thick slices, at least three times as thick as a pixel is wide."""
        widest = int(np.argmax(self.spacing))
        return widest if self.spacing[widest] >= THICK * min(self.spacing) else None

    def pooling(self, shape: Sequence[int], deepest: int = 5) -> tuple[list[list[int]], list[list[int]]]:
        """Strides and kernels of each level as nnU-Net chooses them for a patch of `shape`.

        Only axes of nearly the finest spacing are convolved and halved, and only while they have eight voxels.
        """
        strides, kernels = [[1, 1, 1]], []
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

    def patch(self, most_voxels: int) -> tuple[int, ...]:
        """The median shape, shrunk along its longest axes to `most_voxels`, rounded up to what pooling divides."""
        sizes = list(self.shape)
        while math.prod(sizes) > most_voxels:
            sizes[sizes.index(max(sizes))] = math.floor(0.9 * max(sizes))
        strides, _ = self.pooling(sizes)
        factors = np.prod(strides, axis=0).tolist()
        return tuple(rounded_up(*pair) for pair in zip(sizes, factors, strict=True))


def rounded_up(size: int, factor: int) -> int:
    """The next multiple of `factor`."""
    return math.ceil(size / factor) * factor


def labelled_part(case: LabelledCase) -> LabelledCase:
    """A case cut to its labelled slices.

    Raises:
        InputError: an unlabelled slice between labelled ones.
    """
    if case.labelled_slices is None:
        return case
    stack = SliceStack(case.volume, choose_axis(case.volume), size=32)
    marks = np.zeros(case.volume.grid, bool)
    for index in case.labelled_slices:
        stack.slice_of(marks, index)[...] = True
    ends = [(int(filled.min()), int(filled.max()) + 1) for filled in np.nonzero(marks)]
    window = Window(tuple(a for a, _ in ends), tuple(b for _, b in ends))
    if not marks[window.slices].all():
        raise InputError(f"{case.volume.name}: networks trained from scratch need labelled slices without gaps.")
    return LabelledCase(case.volume.cropped(window), case.labels[window.slices], case.values)


def image_sample(volume: Volume) -> dict[str, MetaTensor]:
    """`{"image": (1, X, Y, Z)}`, float32, with the affine."""
    voxels = np.ascontiguousarray(volume.voxels, dtype=np.float32)[None]
    return {"image": MetaTensor(torch.from_numpy(voxels), affine=torch.from_numpy(volume.affine))}


def labelled_sample(case: LabelledCase, values: Iterable[int]) -> dict[str, MetaTensor]:
    """`{"image", "label"}`; the label holds 0 for background and 1, 2, ... for `values` in this order."""
    classes = np.zeros(case.labels.shape, np.float32)
    for number, value in enumerate(values, start=1):
        classes[case.labels == value] = number
    label = MetaTensor(torch.from_numpy(classes)[None], affine=torch.from_numpy(case.volume.affine))
    return {**image_sample(case.volume), "label": label}


def restored(probability: MetaTensor, volume: Volume, structures: Mapping[int, str]) -> np.ndarray:
    """Label values `(X, Y, Z)` in the volume's grid from probabilities `(1 + K, ...)` on any grid."""
    resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float32)
    resampled = resample(probability, dst_affine=torch.from_numpy(volume.affine), spatial_size=volume.grid)
    return np.array([0, *structures], np.uint8)[resampled.argmax(0).numpy()]
