import pytest
import torch
from torch import nn

from ofl_sam2.learner.label_generator import MaskedFeatureLabelGenerator, MaskLabelGenerator

CHANNELS, ENCODING, SIDE = 12, 5, 6


@pytest.fixture(params=["mask", "masked_features"])
def generator(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "mask":
        return MaskLabelGenerator(ENCODING, width=16)
    return MaskedFeatureLabelGenerator(CHANNELS, ENCODING, width=16)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, CHANNELS, SIDE, SIDE)


@pytest.fixture
def masks() -> torch.Tensor:
    return torch.rand(3, 4 * SIDE, 4 * SIDE)


def test_encodings_are_not_negative_and_of_the_feature_size(
    generator: nn.Module, features: torch.Tensor, masks: torch.Tensor
) -> None:
    encoding, weight = generator(features, masks)
    assert encoding.shape == weight.shape == (3, ENCODING, SIDE, SIDE)
    assert (encoding >= 0).all()
    assert (encoding > 0).any()


def test_spatial_weights_start_at_exactly_one(
    generator: nn.Module, features: torch.Tensor, masks: torch.Tensor
) -> None:
    _, weight = generator(features, masks)
    assert (weight == 1).all()


def test_the_encoding_follows_the_mask(generator: nn.Module, features: torch.Tensor, masks: torch.Tensor) -> None:
    assert not torch.equal(generator(features, masks)[0], generator(features, 1 - masks)[0])


def test_every_parameter_learns(generator: nn.Module, features: torch.Tensor, masks: torch.Tensor) -> None:
    with torch.no_grad():
        generator.heads.weight.weight.normal_()
    encoding, weight = generator(features, masks)
    (encoding.square().sum() + weight.square().sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in generator.parameters())


def test_samples_do_not_see_each_other(generator: nn.Module, features: torch.Tensor, masks: torch.Tensor) -> None:
    together, _ = generator(features, masks)
    alone, _ = generator(features[1:2], masks[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-6)


def test_the_mask_generator_ignores_features(features: torch.Tensor, masks: torch.Tensor) -> None:
    generator = MaskLabelGenerator(ENCODING)
    assert torch.equal(generator(features, masks)[0], generator(torch.full_like(features, torch.nan), masks)[0])


def test_the_masked_feature_generator_sees_inside_and_outside_apart(features: torch.Tensor) -> None:
    generator = MaskedFeatureLabelGenerator(CHANNELS, ENCODING)
    masks = torch.zeros(3, 4 * SIDE, 4 * SIDE)
    masks[:, : 2 * SIDE] = 1
    for name, rows in (("inside", slice(0, SIDE // 2)), ("outside", slice(SIDE // 2, SIDE))):
        features_there = features.clone()
        features_there[:, :, rows] = 0
        branch = getattr(generator, name)
        seen: list[torch.Tensor] = []
        handle = branch.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        generator(features_there, masks)
        handle.remove()
        assert (seen[0] == 0).all()
