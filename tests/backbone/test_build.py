import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sam2.modeling.sam2_base import SAM2Base

from ofl_sam2.backbone.build import build_sam2, check_image_size
from ofl_sam2.backbone.configs import BACKBONES
from ofl_sam2.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT.parent / "shared" / "sam2_key_manifests"
NANO = BACKBONES["nano"]


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "nano"])
def test_names_and_shapes_are_those_of_the_released_weights(name: str) -> None:
    manifest = MANIFESTS / f"{name}.pt.keys.json"
    if not manifest.is_file():
        pytest.skip(f"no manifest of the released weights at {manifest}")
    released = {key: tuple(entry["shape"]) for key, entry in json.loads(manifest.read_text())["tensors"].items()}
    built = {key: tuple(tensor.shape) for key, tensor in build_sam2(BACKBONES[name], 64).state_dict().items()}
    assert built == released


def test_nano_is_small() -> None:
    assert sum(parameter.numel() for parameter in build_sam2(NANO, 64).parameters()) < 5_000_000


def test_the_model_is_in_eval_mode_at_the_default_or_the_chosen_size() -> None:
    assert build_sam2(NANO).image_size == NANO.cpu_size
    model = build_sam2(NANO, 96)
    assert model.image_size == 96
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_only_nano_tracks_with_the_single_mask(name: str) -> None:
    assert BACKBONES[name].track_best_of_three == (name != "nano")


def test_a_subclass_can_be_built() -> None:
    class Tracker(SAM2Base):
        pass

    assert type(build_sam2(NANO, 64, Tracker)) is Tracker


def test_288_runs() -> None:
    with torch.no_grad():
        features = build_sam2(NANO, 288).forward_image(torch.rand(1, 3, 288, 288))["backbone_fpn"]
    assert [tuple(feature.shape) for feature in features] == [(1, 16, 72, 72), (1, 32, 36, 36), (1, 128, 18, 18)]


@pytest.mark.parametrize(("size", "proposal"), [(272, "256|288"), (0, "32"), (-64, "32"), (33, "32"), (500, "512")])
def test_impossible_sizes_are_refused_with_a_possible_one(size: int, proposal: str) -> None:
    with pytest.raises(InputError, match=rf"size {size} .*multiple of 32.*Try ({proposal})\."):
        build_sam2(NANO, size)


@pytest.mark.parametrize("size", [32, 64, 288, 1024])
def test_possible_sizes_are_returned(size: int) -> None:
    assert check_image_size(size) == size


def test_building_needs_neither_torchvision_nor_configuration_files() -> None:
    code = """
import sys
import ofl_sam2.backbone.frozen as frozen
frozen.SAM2Backbone(__import__("ofl_sam2.backbone.configs", fromlist=["BACKBONES"]).BACKBONES["nano"], 64)
print([name for name in ("torchvision", "sam2.build_sam") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bundle")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
