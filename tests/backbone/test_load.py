from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ofl_sam2.backbone import load
from ofl_sam2.backbone.build import build_sam2
from ofl_sam2.backbone.configs import BACKBONES
from ofl_sam2.backbone.weights import CATALOGUE, ENVIRONMENT
from ofl_sam2.errors import InputError, WeightsError

NANO, TINY = BACKBONES["nano"], "sam2.1_hiera_tiny"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_sam2(NANO, 64).state_dict()


@pytest.fixture
def nano_file(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in the place of the package's own."""
    path = tmp_path / "nano.safetensors"
    save_file(state, path)
    monkeypatch.setattr(load, "NANO_WEIGHTS", path)
    return path


@pytest.fixture
def tiny_file(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in the place of a released one."""
    path = tmp_path / f"{TINY}.pt"
    torch.save({"model": state}, path)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(load, "backbone_config", lambda name: NANO)
    return path


@pytest.mark.usefixtures("nano_file")
def test_nano_is_loaded_frozen_and_in_eval_mode(state: dict[str, Tensor]) -> None:
    backbone = load.load_backbone("nano")
    loaded = backbone.sam2.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    assert backbone.image_size == NANO.cpu_size


@pytest.mark.usefixtures("nano_file")
def test_the_size_can_be_chosen() -> None:
    assert load.load_backbone("nano", 96).image_size == 96


@pytest.mark.usefixtures("nano_file")
@pytest.mark.parametrize("size", [0, 272])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"size {size} "):
        load.load_backbone("nano", size)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="Unknown backbone 'micro'"):
        load.load_backbone("micro")


def test_a_package_without_its_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "NANO_WEIGHTS", tmp_path / "nano.safetensors")
    with pytest.raises(WeightsError, match=r"nano\.safetensors.*Install it again"):
        load.load_backbone("nano")


def test_weights_of_another_layout_are_refused(nano_file: Path, state: dict[str, Tensor]) -> None:
    save_file({name: tensor for name, tensor in state.items() if name != "no_obj_ptr"}, nano_file)
    with pytest.raises(WeightsError, match="1 missing, such as no_obj_ptr"):
        load.load_backbone("nano", 64)


def test_weights_that_were_not_fetched_come_with_the_command_that_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(WeightsError, match=rf"{TINY}\.pt is missing.*weights fetch {TINY}"):
        load.load_backbone(TINY)


@pytest.mark.usefixtures("tiny_file")
def test_a_released_file_is_verified_before_it_is_read() -> None:
    with pytest.raises(WeightsError, match="truncated"):
        load.load_backbone(TINY)


@pytest.mark.usefixtures("tiny_file")
def test_a_file_that_holds_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "verify", lambda path: CATALOGUE["sam2.1_hiera_large"])
    with pytest.raises(WeightsError, match=rf"weights of sam2\.1_hiera_large, not of {TINY}"):
        load.load_backbone(TINY)


@pytest.mark.usefixtures("tiny_file")
def test_a_verified_file_is_loaded(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "verify", lambda path: CATALOGUE[TINY])
    backbone = load.load_backbone(TINY, 64)
    assert torch.equal(backbone.sam2.no_obj_ptr, state["no_obj_ptr"])
