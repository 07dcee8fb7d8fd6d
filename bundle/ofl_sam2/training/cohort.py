"""A small synthetic study: patients that share an anatomy, as images and label maps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofl_sam2.atomic import atomic_path
from ofl_sam2.files import write_labels
from ofl_sam2.training.synthetic import Dice, deform, random_anatomy, random_palette, render
from ofl_sam2.volume import Volume

STRUCTURES = {1: "synthetic organ A", 2: "synthetic organ B"}
_DEPTH, _SIDE = 24, 96
_AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
_SMALLEST, _LARGEST = 0.004, 0.15


@dataclass(frozen=True)
class Patient:
    """One synthetic patient: `image (X, Y, Z)` float32 and `labels (X, Y, Z)` uint8, voxels of 1 x 1 x 2 mm."""

    name: str
    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]


def cohort(count: int, seed: int = 0) -> list[Patient]:
    """Draw `count` patients of one random anatomy with two labelled organs."""
    dice = Dice(torch.Generator().manual_seed(seed))
    while True:
        anatomy = random_anatomy(dice, _DEPTH, _SIDE)
        share = torch.bincount(anatomy.regions.flatten()).float() / anatomy.regions.numel()
        organs = [v for v in range(anatomy.tissues + 1, len(share)) if _SMALLEST < share[v] < _LARGEST]
        if len(organs) >= len(STRUCTURES):
            break
    organs = sorted(organs, key=lambda value: -float(share[value]))[: len(STRUCTURES)]
    palette = random_palette(dice, anatomy)
    patients = []
    for number in range(count):
        regions = deform(dice, anatomy.regions, 0.6)
        image = 1000 * render(dice, regions, palette)
        labels = torch.zeros_like(regions, dtype=torch.uint8)
        for value, organ in zip(STRUCTURES, organs, strict=True):
            labels[regions == organ] = value
        patients.append(Patient(f"synthetic_{number:03d}", _as_xyz(image), _as_xyz(labels), _AFFINE))
    return patients


def _as_xyz(voxels: Tensor) -> NDArray[Any]:
    """`(D, H, W)` as `(X, Y, Z)`."""
    return np.ascontiguousarray(voxels.permute(2, 1, 0).numpy())


def write_cohort(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Write a cohort as `images/` and `labels/` of .nii.gz files; return the case names."""
    patients = cohort(count, seed)
    for patient in patients:
        volume = Volume(patient.image, patient.affine, patient.name)
        with atomic_path(folder / "images" / f"{patient.name}.nii.gz") as temporary:
            nib.save(nib.Nifti1Image(patient.image, patient.affine), temporary)
        write_labels(folder / "labels" / f"{patient.name}.nii.gz", patient.labels, volume)
    return [patient.name for patient in patients]
