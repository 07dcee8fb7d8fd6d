"""What networks trained from scratch see of labelled volumes: samples, and the way back."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.errors import InputError
from ofl_sam2.volume import SliceStack, Volume, choose_axis
from ofl_sam2.window import Window


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
