"""A small 3D U-Net fitted to the user's labels: what it draws is averaged with what SAM2 draws."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ofl_sam2.intensity import intensity_for
from ofl_sam2.learner.plan import DEEPEST, Plan, ordered_grid, ordered_spacing
from ofl_sam2.volume import Volume

PATCH_VOXELS, MOST_VOXELS, PRETRAINED_DEEPEST = 320_000, 2 << 20, 3
_FILTERS, _MOST_FILTERS = 16, 320
_LEAST_LEVELS = 3
_OVERLAP = 0.5


class VoxelUNet(nn.Module):
    """nnU-Net's architecture (MONAI's DynUNet) in a size that learns within minutes on a CPU.

    Args:
        plan: its grid.
        values: label values of the structures.
        colour: it sees three channels instead of one.
        patch_voxels: most voxels of a patch.
        deepest: how often a patch is halved at most; by default as often as the pretrained weights know.
        ct_window: see `intensity_for`.
    """

    def __init__(
        self,
        plan: Plan,
        values: Sequence[int],
        colour: bool = False,
        patch_voxels: int = PATCH_VOXELS,
        deepest: int = PRETRAINED_DEEPEST,
        ct_window: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.values, self.colour = plan, tuple(values), colour
        self.patch_voxels, self.deepest, self.ct_window = patch_voxels, deepest, ct_window
        self.patch = plan.patch(patch_voxels, deepest)
        self.net = dynunet(plan, self.patch, 3 if colour else 1, 1 + len(self.values), deepest)
        # DynUNet registers its layers a second time, and safetensors refuses shared tensors.
        object.__setattr__(self.net, "skip_layers", self.net._modules.pop("skip_layers"))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 1 + K, x, y, z)` of images `(B, C, x, y, z)`, background first; `(B, heads, ...)` in training."""
        return self.net(images)

    @property
    def heads(self) -> list[nn.Conv3d]:
        """The linear maps to logits at full resolution, and at those below it that are supervised."""
        net: Any = self.net
        return [head.conv.conv for head in (net.output_block, *net.deep_supervision_heads)]

    @torch.no_grad()
    def probabilities(self, volume: Volume, values: Sequence[int], check: Callable[[], None]) -> Tensor:
        """Probabilities of structures in the grid of a volume, `(K, *grid)`, float16; NaN of those it does not know.

        Args:
            volume: of any grid.
            values: label values of the K structures.
            check: called before each patch; raises to stop.
        """
        from monai.inferers import sliding_window_inference

        device = next(self.parameters()).device
        result = np.full((len(values), *volume.grid), np.nan, np.float16)

        def logits(patches: Tensor) -> Tensor:
            check()
            return self(patches)

        for time, image in enumerate(self.images(volume)):
            drawn = sliding_window_inference(
                image[None], self.patch, 1, logits, _OVERLAP, "gaussian", sw_device=device, device="cpu"
            )
            for value, found in zip(self.values, drawn[0].softmax(0)[1:], strict=True):
                if value in values:
                    target = at_time(volume.in_order(result[values.index(value)]), time)
                    target[...] = resized(found[None], target.shape)[0].numpy()
        return torch.from_numpy(result)

    def images(self, volume: Volume) -> Iterator[Tensor]:
        """The volume as the network sees it, on its grid, `(C, x, y, z)` with mean 0 and variance 1; one a time."""
        window, voxels = intensity_for(volume, self.ct_window), volume.in_order(volume.voxels)
        shape = self.shape_of(volume)
        for time in range(times(volume)):
            grey = window.apply(voxels if volume.colour else at_time(voxels, time))
            image = torch.from_numpy(np.moveaxis(grey, -1, 0) if volume.colour else grey[None])
            if volume.colour != self.colour:
                image = image.mean(0, keepdim=True).expand(3 if self.colour else 1, -1, -1, -1)
            image = resized(image, shape)
            yield (image - image.mean()) / image.std().clamp(min=1e-6)

    def shape_of(self, volume: Volume) -> tuple[int, ...]:
        """Size of a volume on the network's grid; frames stay as many as they are."""
        sizes = ordered_grid(volume) * ordered_spacing(volume) / np.array(self.plan.spacing)
        width, height, depth = (max(1, round(size)) for size in sizes.tolist())
        return width, height, volume.grid[2] if volume.frames else depth


class Trunk(nn.Module):
    """The blocks of a DynUNet by resolution, the full one first: networks of any depth name the same ones alike."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([net.input_block, *net.downsamples, net.bottleneck])
        self.decoder = nn.ModuleList([*net.upsamples][::-1])

    def forward(self, images: Tensor) -> list[Tensor]:
        """What the heads see of images `(B, C, x, y, z)`, `(B, 16 * 2**level, ...)` at each level."""
        encoded = []
        for block in self.encoder:
            images = block(images)
            encoded.append(images)
        features = [encoded.pop()]
        for block in reversed(self.decoder):
            features.append(block(features[-1], encoded.pop()))
        return features[:0:-1]

    @torch.no_grad()
    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of another trunk, as far as it reaches."""
        own = self.state_dict()
        self.load_state_dict(own | {name: adapted(weights[name], own[name].shape) for name in own if name in weights})


def adapted(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A weight of a network with one channel and kernels that look along all axes, for one with another `shape`.

    The result is that of an image which does not change along the other axes, and has the same grey in all channels.
    """
    for axis, size in enumerate(shape):
        if axis > 1 and weight.shape[axis] > size:
            transposed = weight.shape[axis] == 2
            weight = weight.mean(axis, keepdim=True) if transposed else weight.sum(axis, keepdim=True)
        elif weight.shape[axis] < size:
            weight = weight.expand(*shape[: axis + 1], *weight.shape[axis + 1 :]) / size
    return weight


class _InstanceNorm(nn.InstanceNorm3d):
    """The same, but channels may stay last in memory, where convolutions are up to three times as fast on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        """Of `(B, C, x, y, z)`."""
        each = [
            functional.batch_norm(image, None, None, self.weight, self.bias, True, 0.0, self.eps)
            for image in images.split(1)
        ]
        return each[0] if len(each) == 1 else torch.cat(each)


def dynunet(plan: Plan, patch: Sequence[int], channels: int, classes: int, deepest: int = DEEPEST) -> nn.Module:
    """MONAI's DynUNet with deep supervision and 16 filters at full resolution, of at least three levels."""
    from monai.networks.nets import DynUNet  # takes seconds to import

    strides, kernels = plan.pooling(patch, deepest)
    missing = max(0, _LEAST_LEVELS - len(strides))
    strides, kernels = strides + missing * [[1, 1, 1]], kernels + missing * [[3, 3, 3]]
    filters = [min(_FILTERS * 2**level, _MOST_FILTERS) for level in range(len(strides))]
    heads = {"deep_supervision": True, "deep_supr_num": max(1, min(2, len(strides) - 2))}
    net = DynUNet(3, channels, classes, kernels, strides, strides[1:], filters=filters, **heads)
    for block in net.modules():
        for name, layer in block.named_children():
            if isinstance(layer, nn.InstanceNorm3d):
                block.register_module(name, _InstanceNorm(layer.num_features, layer.eps, affine=True))
    return net.to(memory_format=torch.channels_last_3d)


def times(volume: Volume) -> int:
    """How many volumes follow each other in time; frames are one volume."""
    return 1 if volume.frames else math.prod(volume.grid[3:])


def at_time(array: NDArray[Any], time: int) -> NDArray[Any]:
    """View of one volume of a sequence."""
    return array[..., time] if array.ndim == 4 else array


def resized(maps: Tensor, shape: Sequence[int]) -> Tensor:
    """Maps `(C, x, y, z)` on a grid of another size, linearly interpolated."""
    if maps.shape[1:] == tuple(shape):
        return maps
    return functional.interpolate(maps[None], tuple(shape), mode="trilinear", align_corners=False)[0]
