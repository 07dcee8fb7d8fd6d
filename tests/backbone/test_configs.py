from dataclasses import FrozenInstanceError

import pytest

from ofl_sam2.backbone.build import check_image_size
from ofl_sam2.backbone.configs import BACKBONES, backbone_config
from ofl_sam2.backbone.weights import CATALOGUE
from ofl_sam2.errors import InputError

EVERY_BACKBONE = pytest.mark.parametrize("name", BACKBONES)


def test_backbones_are_nano_and_everything_that_can_be_downloaded() -> None:
    assert set(BACKBONES) == {"nano", *CATALOGUE}


@EVERY_BACKBONE
def test_a_backbone_is_found_by_its_name(name: str) -> None:
    assert backbone_config(name).name == name


@EVERY_BACKBONE
def test_default_sizes_are_sizes_sam2_can_run_at(name: str) -> None:
    config = backbone_config(name)
    assert check_image_size(config.cpu_size) <= check_image_size(config.gpu_size)


@EVERY_BACKBONE
def test_global_attention_lies_within_the_encoder(name: str) -> None:
    config = backbone_config(name)
    assert max(config.global_attention_blocks) < sum(config.stages)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'sam3'.*nano.*sam2\.1_hiera_large"):
        backbone_config("sam3")


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        backbone_config("nano").width = 64
