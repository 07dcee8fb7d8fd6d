"""The U-Net's geometry: what it draws lies where it saw it, in every grid."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from ofl_sam2.errors import Cancelled
from ofl_sam2.learner.load import WEIGHTS
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import Trunk, VoxelUNet, _InstanceNorm, adapted, dynunet
from ofl_sam2.progress import CancelToken
from ofl_sam2.volume import Volume, canonical_view

PLAN = Plan((1.0, 1.0, 2.0), (16, 20, 12))


class Bright(nn.Module):
    """Instead of a network: structure 1 is brighter than the mean, structure 2 darker."""

    def __init__(self):
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor(20.0))

    def forward(self, images):
        grey = self.steepness * images.mean(1, keepdim=True)
        return torch.cat([torch.full_like(grey, -40), grey, -grey], 1)


@pytest.fixture
def unet():
    built = VoxelUNet(PLAN, (1, 2)).eval()
    built.net = Bright()
    return built


def halves(grid):
    """A part of a grid that no flip or exchange of axes leaves where it is."""
    bright = np.zeros(grid, bool)
    bright[: grid[0] // 2, grid[1] // 4 :] = True
    return bright


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3))[::3])
def test_probabilities_are_in_the_grid_of_the_volume(unet, order, signs):
    affine = np.zeros((4, 4))
    affine[order, range(3)] = np.array(signs) * (1.0, 1.5, 2.0)
    affine[3, 3] = 1
    bright = halves((14, 18, 10))
    volume = Volume(np.where(bright, 100, 0).astype(np.int16), affine, "a")
    found = unet.probabilities(volume, (2, 1), lambda: None)
    assert (found.shape, found.dtype) == ((2, 14, 18, 10), torch.float16)
    assert ((found[1].numpy() > 0.5) == bright).mean() > 0.93
    assert ((found[0].numpy() > 0.5) == ~bright).mean() > 0.93


def test_every_time_of_a_sequence_is_drawn_from_itself(unet):
    bright = np.stack([halves((14, 18, 10)), ~halves((14, 18, 10))], -1)
    volume = Volume(np.where(bright, 100.0, 0), np.diag([1.0, 1.0, 2.0, 1.0]), "a")
    assert np.array_equal(unet.probabilities(volume, (1,), lambda: None)[0].numpy() > 0.5, bright)


@pytest.mark.parametrize("colour", [False, True])
def test_frames_are_not_turned_and_colour_fits_any_volume(colour):
    unet = VoxelUNet(PLAN, (1, 2), colour).eval()
    unet.net = Bright()
    bright = halves((14, 18, 6))
    turned = np.array([[0, -1.0, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])
    grey = np.where(bright, 200, 0).astype(np.uint8)
    for voxels, shown in ((grey, False), (np.stack(3 * [grey], -1), True)):
        volume = Volume(voxels, turned, "a", frames=True, colour=shown)
        assert next(unet.images(volume)).shape == (3 if colour else 1, 14, 18, 6)
        assert np.array_equal(unet.probabilities(volume, (1,), lambda: None)[0].numpy() > 0.5, bright)


def test_structures_it_does_not_know_are_nan(unet):
    found = unet.probabilities(Volume(np.random.rand(8, 8, 8), np.eye(4), "a"), (7, 1), lambda: None)
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


def test_images_are_on_the_grid_of_the_plan_with_mean_0_and_variance_1(unet):
    volume = Volume(np.random.default_rng(0).normal(50, 9, (14, 18, 10)), np.diag([2.0, 1, 1, 1]), "a")
    (image,) = unet.images(volume)
    assert image.shape == (1, 28, 18, 5)
    assert image.mean() == pytest.approx(0, abs=1e-3)
    assert image.std() == pytest.approx(1, abs=1e-3)
    (flat,) = unet.images(Volume(np.full((8, 8, 8), 3.0), np.eye(4), "a"))
    assert flat.isfinite().all()


def test_it_stops_between_patches(unet):
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        unet.probabilities(Volume(np.random.rand(8, 8, 8), np.eye(4), "a"), (1,), token.check)


@pytest.mark.parametrize("shape", [(24, 20, 6), (5, 6, 1), (40, 40, 40), (96, 96, 9)])
def test_networks_of_all_sizes_run(shape):
    unet = VoxelUNet(Plan((1.0, 1.0, 4.0), shape), (1, 2, 3))
    images = torch.randn(2, 1, *unet.patch)
    assert unet.train()(images).shape[0] == 2
    assert unet(images).shape[2:] == (4, *unet.patch)
    assert unet.eval()(images).shape == (2, 4, *unet.patch)


def test_canonical_order_is_that_of_the_plan(unet):
    affine = np.array([[0.0, 0, -4, 30], [-1, 0, 0, 20], [0, 2, 0, 10], [0, 0, 0, 1]])
    voxels = np.random.default_rng(0).normal(0, 1, (24, 20, 6))
    unet.plan = Plan((4.0, 1.0, 2.0), (6, 24, 20))
    (image,) = unet.images(Volume(voxels, affine, "a"))
    shown = canonical_view(voxels, affine)
    assert image[0].shape == shown.shape
    assert np.corrcoef(image[0].numpy().ravel(), shown.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("axes", [(2,), (3,), (2, 4), (2, 3, 4)])
def test_an_adapted_kernel_does_the_same_where_nothing_changes_along_the_other_axes(axes):
    weight, image = torch.randn(4, 1, 3, 3, 3), torch.randn(1, 1, 7, 7, 7)
    for axis in axes:
        image = image.mean(axis, keepdim=True).expand_as(image)
    kernel = adapted(weight, (4, 1, *(1 if axis in axes else 3 for axis in range(2, 5))))
    inner = [slice(1, -1) if axis in axes else slice(None) for axis in range(2, 5)]
    drawn = functional.conv3d(image, kernel)[(slice(None), slice(None), *inner)]
    assert torch.allclose(drawn, functional.conv3d(image, weight), atol=1e-4)


def test_an_adapted_upsampling_is_the_mean_along_an_axis_that_keeps_its_size():
    weight, features = torch.randn(4, 5, 2, 2, 2), torch.randn(1, 4, 3, 3, 3)
    kept = functional.conv_transpose3d(features, adapted(weight, (4, 5, 2, 1, 2)), stride=(2, 1, 2))
    doubled = functional.conv_transpose3d(features, weight, stride=2)
    assert torch.allclose(kept, doubled.unflatten(3, (3, 2)).mean(4), atol=1e-5)


def test_an_adapted_kernel_sees_grey_in_three_channels_as_in_one():
    weight, image = torch.randn(4, 1, 3, 3, 3), torch.randn(1, 1, 5, 5, 5)
    colour = functional.conv3d(image.expand(-1, 3, -1, -1, -1), adapted(weight, (4, 3, 3, 3, 3)))
    assert torch.allclose(colour, functional.conv3d(image, weight), atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 6, 1), (16, 20, 12), (96, 96, 9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_any_depth_begins_with_the_levels_it_shares(shape, channels):
    cube = Plan((1.0, 1.0, 1.0), (40, 40, 40))
    weights = Trunk(dynunet(cube, cube.shape, 1, 1)).state_dict()
    net = dynunet(Plan((1.0, 1.0, 4.0), shape), shape, channels, 3)
    trunk = Trunk(net)
    fresh = {name: value.clone() for name, value in trunk.state_dict().items()}
    trunk.begin(weights)
    shared = {name for name in fresh if name in weights}
    assert {name.split(".")[1] for name in shared if name.startswith("encoder")} == set("0123"[: len(trunk.encoder)])
    for name, value in Trunk(net).state_dict().items():
        expected = adapted(weights[name], value.shape) if name in shared else fresh[name]
        assert torch.equal(value, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("training", [True, False])
def test_instances_are_normalised_where_they_lie(layout, training):
    ours, theirs = (norm(4, affine=True).train(training) for norm in (_InstanceNorm, nn.InstanceNorm3d))
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.tensor([1.0, 2, 3, 4]))
            norm.bias.copy_(torch.tensor([0.0, 1, 2, 3]))
    images = (3 + 5 * torch.randn(2, 4, 6, 5, 3)).contiguous(memory_format=layout)
    outcomes = []
    for norm in (ours, theirs):
        given = images.clone().requires_grad_()
        drawn = norm(given)
        (drawn**3).mean().backward()
        outcomes.append([drawn, given.grad, norm.weight.grad, norm.bias.grad])
    assert outcomes[0][0].is_contiguous(memory_format=layout)
    for one, other in zip(*outcomes, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_channels_stay_last_through_the_network_with_any_numbers():
    unet = VoxelUNet(Plan((1.0, 1.0, 4.0), (24, 20, 6)), (1, 2)).train()
    images = torch.randn(2, 1, *unet.patch)
    for level in Trunk(unet.net)(images):
        assert level.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        logits = unet(images)
    assert (logits.float() - unet(images)).abs().amax() < 0.5
    logits.float().square().mean().backward()
    assert all(value.grad.isfinite().all() for value in unet.parameters())


def test_no_level_is_deeper_than_the_pretrained_ones():
    plan = Plan((1.0, 1.0, 1.0), (64, 64, 64))
    names, shallow, deep = (
        {*weights}
        for weights in (
            load_file(WEIGHTS / "unet.safetensors"),
            Trunk(VoxelUNet(plan, (1,)).net).state_dict(),
            Trunk(VoxelUNet(plan, (1,), deepest=5).net).state_dict(),
        )
    )
    assert shallow <= names
    assert not deep <= names


def test_the_trunk_is_what_the_heads_see():
    plan = Plan((1.0, 1.0, 4.0), (32, 24, 8))
    net = dynunet(plan, plan.shape, 1, 3).eval()
    images = torch.randn(2, 1, *plan.shape)
    features = Trunk(net)(images)
    assert [level.shape[1] for level in features] == [16 * 2**level for level in range(len(features))]
    assert torch.allclose(net.output_block(features[0]), net(images), atol=1e-5)
