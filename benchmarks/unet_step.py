"""Seconds of a training step of the U-Net, thin and thick slices: as it is, deeper, and as MONAI builds it; medians."""

import statistics
import time
from collections.abc import Callable

import torch
from support import write
from torch import nn

from ofl_sam2.learner.plan import DEEPEST, Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.training.losses import marginal_loss
from ofl_sam2.training.voxels import patches_per_step

REPEATS = 5
PLANS = {"thin": Plan((1.0, 1.0, 1.0), (36, 50, 36)), "thick": Plan((1.4, 10.0, 1.4), (256, 12, 256))}


def as_it_is(plan: Plan) -> VoxelUNet:
    return VoxelUNet(plan, (1, 2))


def deeper(plan: Plan) -> VoxelUNet:
    return VoxelUNet(plan, (1, 2), deepest=DEEPEST)


def by_monai(plan: Plan) -> VoxelUNet:
    """Deeper, MONAI's own layers, channels first in memory."""
    unet = deeper(plan)
    for block in unet.modules():
        for name, layer in block.named_children():
            if isinstance(layer, nn.InstanceNorm3d):
                block.register_module(name, nn.InstanceNorm3d(layer.num_features, affine=True))
    return unet.to(memory_format=torch.contiguous_format)


def stepper(unet: VoxelUNet) -> Callable[[], None]:
    """A step on random patches, as many as in a training."""
    unet.train()
    size = patches_per_step(unet)
    images, labels = torch.randn(size, 1, *unet.patch), torch.randint(3, (size, 1, *unet.patch)).float()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        marginal_loss(unet, images, labels, torch.ones(size, 2)).backward()
        optimizer.step()

    return step


def main() -> None:
    seconds: dict[str, dict[str, float]] = {}
    for slices, plan in PLANS.items():
        steps = {build.__name__: stepper(build(plan)) for build in (as_it_is, deeper, by_monai)}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(REPEATS + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if repeat:
                    taken[name].append(time.perf_counter() - started)
        seconds[slices] = {name: round(statistics.median(times), 3) for name, times in taken.items()}
        print(slices, seconds[slices], flush=True)
    write("unet_step", {"seconds": seconds})


if __name__ == "__main__":
    main()
