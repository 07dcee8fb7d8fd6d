"""Scores of label maps against references: Dice, 95th percentile Hausdorff distance, surface Dice.

Dice counts voxels. HD95 and surface Dice are MONAI's, in mm, on masks cropped to the box both fill: the surfaces lie
inside it, so the crop changes nothing but the time. The edge of the image counts as a surface.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from ofl_sam2.errors import InputError

METRICS: Mapping[str, str] = {"dice": "Dice", "hd95": "HD95 (mm)", "surface_dice": "surface Dice"}

Spacing = tuple[float, float, float]
Scores = dict[str, dict[str, float]]
"""{structure: {metric: value}}; NaN where a value is undefined."""


class EmptyConvention(Enum):
    """Dice of a structure the reference does not contain.

    STANDARD: 0 where something is predicted (a false positive), NaN where nothing is; NaN stays out of all means.
    SAMED: 1 where something is predicted, 0 where nothing is, as the SAMed family counts; to compare with its papers.

    Under both, HD95 is NaN where either mask is empty (SAMed's code counts 0 there), and surface Dice follows STANDARD.
    """

    STANDARD = "standard"
    SAMED = "samed"


def score(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Spacing,
    structures: Mapping[int, str],
    metrics: Sequence[str] = ("dice",),
    slices: tuple[int, Sequence[int]] | None = None,
    empty: EmptyConvention = EmptyConvention.STANDARD,
    tolerance: float = 1.0,
) -> Scores:
    """Score one label map.

    Args:
        prediction: integer labels `(X, Y, Z)`; for Dice alone any shape.
        reference: integer labels of the same shape.
        spacing: voxel size along the array axes, mm.
        structures: {label value: name}.
        metrics: of "dice", "hd95" (mm) and "surface_dice".
        slices: (axis, indices) to score only those slices. Distances need consecutive ones.
        empty: what Dice is where the reference is empty.
        tolerance: distance up to which surfaces agree in surface Dice, mm; less than a voxel means they coincide.

    Raises:
        InputError: shapes differ, an unknown metric, or distances where there are none.

    Example:
        >>> labels = np.zeros((4, 4, 4), np.uint8)
        >>> labels[:2] = 1
        >>> score(labels, labels, (1.0, 1.0, 1.0), {1: "organ"}, ("dice", "hd95"))
        {'organ': {'dice': 1.0, 'hd95': 0.0}}
    """
    if prediction.shape != reference.shape:
        raise InputError(f"Prediction {prediction.shape} and reference {reference.shape} differ in shape.")
    if not structures:
        raise InputError("There is no structure to score; name at least one, such as {1: 'liver'}.")
    _check(metrics, prediction.ndim, spacing, slices)
    if slices is not None:
        prediction, reference = (labels.take(slices[1], axis=slices[0]) for labels in (prediction, reference))
    scorers: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "dice": lambda p, r: _dice(p, r, empty),
        "hd95": lambda p, r: _hd95(p, r, spacing),
        "surface_dice": lambda p, r: _surface_dice(p, r, spacing, tolerance),
    }
    scores: Scores = {}
    for value, name in structures.items():
        masks = crop_to_union(prediction == value, reference == value)
        scores[name] = {metric: scorers[metric](*masks) for metric in metrics}
    return scores


def crop_to_union(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of two boolean masks on the smallest box that holds both, plus a voxel where the image has it."""
    union = prediction | reference
    if not union.any():
        return prediction, reference
    box = []
    for axis in range(union.ndim):
        filled = np.flatnonzero(union.any(axis=tuple(other for other in range(union.ndim) if other != axis)))
        box.append(slice(max(int(filled[0]) - 1, 0), int(filled[-1]) + 2))
    return prediction[tuple(box)], reference[tuple(box)]


def _dice(prediction: np.ndarray, reference: np.ndarray, empty: EmptyConvention) -> float:
    predicted, expected = np.count_nonzero(prediction), np.count_nonzero(reference)
    if expected:
        return 2.0 * np.count_nonzero(prediction & reference) / (predicted + expected)
    if empty is EmptyConvention.SAMED:
        return 1.0 if predicted else 0.0
    return 0.0 if predicted else math.nan


def _hd95(prediction: np.ndarray, reference: np.ndarray, spacing: Spacing) -> float:
    if not (prediction.any() and reference.any()):
        return math.nan
    masks = _one_hot(prediction), _one_hot(reference)
    return compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing).item()


def _surface_dice(prediction: np.ndarray, reference: np.ndarray, spacing: Spacing, tolerance: float) -> float:
    if not (prediction.any() and reference.any()):
        return 0.0 if prediction.any() or reference.any() else math.nan
    masks = _one_hot(prediction), _one_hot(reference)
    return compute_surface_dice(
        *masks, class_thresholds=[tolerance], include_background=True, spacing=spacing, use_subvoxels=True
    ).item()


def _one_hot(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]


def _check(metrics: Sequence[str], ndim: int, spacing: Spacing, slices: tuple[int, Sequence[int]] | None) -> None:
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise InputError(f"Unknown metrics {unknown}; choose from {', '.join(METRICS)}.")
    if set(metrics) == {"dice"}:
        return
    if ndim != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise InputError(
            f"Distances in mm need a volume with three axes and positive spacings, got {ndim} axes and the spacing "
            f"{spacing}; score this one by 'dice' alone."
        )
    if slices is not None and np.any(np.diff(slices[1]) != 1):
        raise InputError("Distances need consecutive slices; score separate slices by 'dice' alone.")
