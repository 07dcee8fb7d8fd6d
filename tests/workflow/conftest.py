"""Fixtures of the workflow's tests: a small study on disk, and features cached in a temporary folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import pytest

from ofl_sam2.dataset import LabelledCase


@pytest.fixture(scope="module", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the feature cache of the user out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFL_SAM2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def study(make_case: Callable[..., LabelledCase], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/` of a, b and c.1 and `labels/` of a and b."""
    root = tmp_path_factory.mktemp("study")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for seed, name in enumerate(("a", "b", "c.1")):
        case = make_case(name, seed)
        nib.save(nib.Nifti1Image(case.volume.voxels, case.volume.affine), root / "images" / f"{name}.nii.gz")
        if name != "c.1":
            nib.save(nib.Nifti1Image(case.labels, case.volume.affine), root / "labels" / f"{name}.nii.gz")
    return root
