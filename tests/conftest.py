"""Fixtures that many tests share."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ofl_sam2.backbone.configs import backbone_config
from ofl_sam2.backbone.frozen import SAM2Backbone
from ofl_sam2.dataset import LabelledCase
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.settings import Settings
from ofl_sam2.volume import Volume


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real medical images; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("OFL_SAM2_DATA", default))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real images at {folder}; set OFL_SAM2_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def nano() -> SAM2Backbone:
    """A frozen nano with random weights at 64 pixels; its object scores are spread out so that they take both signs."""
    torch.manual_seed(0)
    backbone = SAM2Backbone(backbone_config("nano"), 64).freeze()
    score = backbone.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1]
    score.weight.mul_(200)
    score.bias.mul_(200).add_(26)
    return backbone


@pytest.fixture(scope="session")
def make_learner() -> Callable[..., FewShotLearner]:
    """Build a learner with random weights; `fused=False` leaves U and the gates as before any training."""

    def build(fused: bool = True, **options: Any) -> FewShotLearner:
        torch.manual_seed(1)
        learner = FewShotLearner(128, **options)
        if fused:
            for layer in (learner.up[-1], learner.fusion.target_gate.expand, learner.fusion.memory_gate.expand):
                torch.nn.init.normal_(layer.weight, std=0.05)
        return learner

    return build


@pytest.fixture(scope="session")
def make_case() -> Callable[..., LabelledCase]:
    """Build a noisy volume of `grid` voxels with a bright box (value 1) beside a dim one (value 2) in its middle."""

    def build(
        name: str = "a",
        seed: int = 0,
        grid: tuple[int, ...] = (24, 20, 6),
        affine: np.ndarray | None = None,
        values: tuple[int, ...] = (1, 2),
        labelled_slices: tuple[int, ...] | None = None,
        frames: bool = False,
    ) -> LabelledCase:
        labels = np.zeros(grid, np.uint8)
        x, y, z = (slice(size // 4, max(size // 4 + 1, 3 * size // 4)) for size in grid[:3])
        middle = (grid[0] + 1) // 2
        labels[x.start : middle, y, z] = 1
        labels[middle : x.stop, y, z] = 2
        labels[~np.isin(labels, values)] = 0
        noise = np.random.default_rng(seed).normal(0, 5, grid)
        voxels = (np.array([20, 100, 60])[labels] + noise).astype(np.float32)
        affine = np.diag([1.0, 1.0, 4.0, 1.0]) if affine is None else affine
        found = tuple(int(value) for value in np.unique(labels) if value)
        return LabelledCase(Volume(voxels, affine, name, frames=frames), labels, found, labelled_slices)

    return build


@pytest.fixture(scope="session")
def make_small_case(make_case: Callable[..., LabelledCase]) -> Callable[..., LabelledCase]:
    """Build a case of voxels of equal sides with a structure that is drawn in a close-up."""

    def build(name: str, seed: int = 0) -> LabelledCase:
        case = make_case(name, seed, grid=(64, 60, 62), affine=np.eye(4))
        labels = np.zeros_like(case.labels)
        labels[24:36, 26:38, 30:42] = 1
        volume = replace(case.volume, voxels=case.volume.voxels + 200 * labels)
        return replace(case, volume=volume, labels=labels, values=(1,))

    return build


@pytest.fixture(scope="session")
def make_segmenter(
    nano: SAM2Backbone, make_learner: Callable[..., FewShotLearner], make_case: Callable[..., LabelledCase]
) -> Callable[..., VolumeSegmenter]:
    """Build a segmenter that has learned the default case, or `cases`."""

    def build(
        cases: tuple[LabelledCase, ...] | None = None, learner: FewShotLearner | None = None, **switches: Any
    ) -> VolumeSegmenter:
        settings = Settings.from_dict({"gamma": 0.5, **switches})
        segmenter = VolumeSegmenter(nano, learner or make_learner(), settings)
        if cases != ():
            segmenter.learn(cases or (make_case(),))
        return segmenter

    return build


@pytest.fixture(scope="session")
def cube() -> Callable[..., np.ndarray]:
    """Build labels with a cube of 1."""

    def build(start: tuple[int, int, int], side: int = 8, shape: tuple[int, int, int] = (24, 24, 24)) -> np.ndarray:
        labels = np.zeros(shape, np.uint8)
        labels[tuple(slice(first, first + side) for first in start)] = 1
        return labels

    return build
