"""Reading and writing learners."""

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ofl_sam2.errors import WeightsError
from ofl_sam2.learner import load
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.learner.load import (
    WEIGHTS,
    begin_pretrained,
    learner_bytes,
    read_learner,
    read_unet,
    shipped_learner,
    unet_bytes,
)
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import Trunk, VoxelUNet

SHAPE = {"channels": "128", "inputs": "32", "encoding": "32", "kind": "mask"}


@pytest.mark.parametrize(
    "options", [{}, {"inputs": 16, "encoding": 8}, {"label_generator": "masked_features", "encoding": 16}]
)
def test_a_learner_comes_back_with_its_shape_and_values(make_learner, tmp_path, options):
    learner, path = make_learner(**options), tmp_path / "learner.safetensors"
    path.write_bytes(learner_bytes(learner))
    loaded = read_learner(path)
    for name in ("channels", "inputs", "encoding", "kind", "fitted"):
        assert getattr(loaded, name) == getattr(learner, name)
    for name, value in learner.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_the_same_learner_is_the_same_bytes(make_learner):
    assert learner_bytes(make_learner()) == learner_bytes(make_learner())
    assert learner_bytes(make_learner()) != learner_bytes(make_learner(fused=False))


def test_nano_comes_with_a_fitted_learner():
    learner = shipped_learner("nano", 128)
    assert learner.channels == 128
    assert learner.fitted


def test_a_backbone_without_a_shipped_learner_gets_a_fresh_one():
    learner = shipped_learner("sam2.1_hiera_tiny", 256)
    assert learner.channels == 256
    assert not learner.fitted


def test_the_learner_that_is_shipped_is_read_from_the_package(make_learner, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "WEIGHTS", tmp_path)
    (tmp_path / "other_learner.safetensors").write_bytes(learner_bytes(make_learner(inputs=16)))
    assert shipped_learner("other", 128).inputs == 16
    assert not shipped_learner("nano", 64).fitted


def test_a_unet_begins_with_the_weights_of_the_package():
    weights = load_file(WEIGHTS / "unet.safetensors")
    unet = begin_pretrained(VoxelUNet(Plan((1.0, 1.0, 1.0), (40, 40, 40)), (1, 2)))
    own = Trunk(unet.net).state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], value.float()) for name, value in weights.items())


def test_the_sha256_is_checked(make_learner, tmp_path):
    path = tmp_path / "learner.safetensors"
    path.write_bytes(learner_bytes(make_learner()))
    with pytest.raises(WeightsError, match="not the expected file"):
        read_learner(path, "0" * 64)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"kind": "other"},
        {"channels": "many"},
        {"channels": "0"},
        {"inputs": "-1"},
        {"encoding": "10000000"},
    ],
)
def test_a_header_that_describes_no_learner_is_refused(make_learner, tmp_path, header):
    path = tmp_path / "learner.safetensors"
    path.write_bytes(save(make_learner().state_dict(), None if header is None else {**SHAPE, **header}))
    with pytest.raises(WeightsError, match=r"no few-shot learner \(header: .*Train or learn again"):
        read_learner(path)


def test_other_names_and_shapes_are_refused(tmp_path):
    path = tmp_path / "learner.safetensors"
    state = FewShotLearner(64).state_dict()
    path.write_bytes(save(state, SHAPE))
    with pytest.raises(WeightsError, match="do not fit FewShotLearner"):
        read_learner(path)
    del state["lam"]
    path.write_bytes(save(state, {**SHAPE, "channels": "64", "inputs": "16"}))
    with pytest.raises(WeightsError, match="1 missing, such as lam"):
        read_learner(path)


def test_a_learner_in_another_file_format_is_refused(make_learner, tmp_path):
    path = tmp_path / "learner.pt"
    torch.save({"model": make_learner().state_dict()}, path)
    with pytest.raises(WeightsError, match="no few-shot learner"):
        read_learner(path)


def test_weights_of_a_backbone_are_no_learner(nano, tmp_path):
    save_file(nano.sam2.state_dict(), tmp_path / "nano.safetensors")
    with pytest.raises(WeightsError, match="no few-shot learner"):
        read_learner(tmp_path / "nano.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match="no weights file"):
        read_learner(tmp_path / "absent.safetensors")


def test_values_are_kept_in_full_precision(make_learner, tmp_path):
    path = tmp_path / "learner.safetensors"
    path.write_bytes(learner_bytes(make_learner()))
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}


PLAN = Plan((1.0, 1.0, 4.0), (24, 20, 6))


@pytest.mark.parametrize(("values", "colour"), [((1,), False), ((3, 200), True)])
def test_a_unet_comes_back_with_its_plan_structures_and_values(tmp_path, values, colour):
    unet, path = VoxelUNet(PLAN, values, colour, 1500), tmp_path / "unet.safetensors"
    path.write_bytes(unet_bytes(unet))
    loaded = read_unet(path)
    assert (loaded.plan, loaded.values, loaded.colour) == (PLAN, values, colour)
    assert loaded.patch == unet.patch != VoxelUNet(PLAN, values).patch
    assert not loaded.training
    for name, value in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def stored(unet, header):
    """The content of a file with the weights of a U-Net and any header."""
    return save({name: value.contiguous() for name, value in unet.state_dict().items()}, header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"spacing": "[1, 1]"},
        {"spacing": "[1, 1, 0]"},
        {"spacing": "[1, 1, NaN]"},
        {"shape": "[24, 20]"},
        {"shape": "[24, 20, 0]"},
        {"shape": "[4000, 4000, 4000]"},
        {"shape": "wide"},
        {"values": "[]"},
        {"values": "[1, 1]"},
        {"values": "7"},
        {"values": '["x"]'},
        {"patch_voxels": "0"},
        {"patch_voxels": "99999999"},
        {"deepest": "-1"},
        {"deepest": "6"},
    ],
)
def test_a_header_that_describes_no_unet_is_refused(tmp_path, header):
    path = tmp_path / "unet.safetensors"
    shape = {"spacing": "[1, 1, 4]", "shape": "[24, 20, 6]", "values": "[1, 2]", "colour": "false"}
    path.write_bytes(stored(VoxelUNet(PLAN, (1, 2)), None if header is None else {**shape, **header}))
    with pytest.raises(WeightsError, match=r"no U-Net \(header: .*Train again"):
        read_unet(path)


def test_a_unet_without_a_word_on_patches_and_depth_is_one_of_former_times(tmp_path):
    plan = Plan((1.0, 1.0, 4.0), (256, 256, 12))
    path, unet = tmp_path / "unet.safetensors", VoxelUNet(plan, (1, 2), patch_voxels=160_000, deepest=5)
    header = {"spacing": "[1, 1, 4]", "shape": "[256, 256, 12]", "values": "[1, 2]", "colour": "false"}
    path.write_bytes(stored(unet, header))
    assert read_unet(path).patch == unet.patch != VoxelUNet(plan, (1, 2)).patch


def test_a_unet_of_other_structures_than_its_header_says_is_refused(tmp_path):
    path, shape = tmp_path / "unet.safetensors", {"spacing": "[1, 1, 4]", "shape": "[24, 20, 6]", "colour": "false"}
    path.write_bytes(stored(VoxelUNet(PLAN, (1, 2)), {**shape, "values": "[1]"}))
    with pytest.raises(WeightsError):
        read_unet(path)
