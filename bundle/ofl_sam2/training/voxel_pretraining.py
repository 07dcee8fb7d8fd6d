"""Pretrain the U-Net on synthetic volumes: features in which one labelled patient is enough to draw another.

Nothing but a linear map of the features is fitted to a patient's labels, in closed form (ridge regression, Bertinetto
et al., ICLR 2019), and the features are trained for what it draws in the other patient. Slices are thin or thick:
across thick ones the network has its kernels summed up, as where it starts for a user's labels.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from ofl_sam2.atomic import atomic_path
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import PRETRAINED_DEEPEST, Trunk, adapted, dynunet
from ofl_sam2.precision import autocast
from ofl_sam2.progress import CancelToken
from ofl_sam2.training.checkpoint import resume
from ofl_sam2.training.closed_form import RIDGE, SCALE, linear_map
from ofl_sam2.training.schedule import learning_rate
from ofl_sam2.training.synthetic import Dice
from ofl_sam2.training.synthetic_volumes import patients

CUBE = Plan((1.0, 1.0, 1.0), (40, 40, 40))
_FLAT, _THICKNESS, _FLAT_SHARE = (96, 96, 8), (3.0, 5.0, 8.0), 0.5
_PAIRS, _MOST_STRUCTURES, _LEAST_VOXELS, _ORGANS_SHARE = 2, 8, 30, 0.7
_RATE, _DECAY, _WARM_UP, _CLIP = 2e-3, 1e-4, 30, 12.0
_LEVELS = (1.0, 0.5, 0.25)
_CHECKPOINT_SECONDS = 120


class VoxelPretraining(nn.Module):
    """What a checkpoint holds: the network's trunk, scale and log ridge of the linear map at each level, work done."""

    step: Tensor
    spent: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk(dynunet(CUBE, CUBE.shape, 1, 1, PRETRAINED_DEEPEST))
        self.scale = nn.Parameter(torch.full((len(_LEVELS),), SCALE))
        self.log_ridge = nn.Parameter(torch.full((len(_LEVELS),), math.log(RIDGE)))
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("spent", torch.tensor(0.0, dtype=torch.float64))
        self._shapes: dict[Plan, Trunk] = {}

    def features(self, images: Tensor, plan: Plan) -> list[Tensor]:
        """Features `(B, C, x, y, z)` of images `(B, 1, x, y, z)` at each level, the finest first."""
        if plan not in self._shapes:
            self._shapes[plan] = Trunk(dynunet(plan, plan.shape, 1, 1, PRETRAINED_DEEPEST))
        shape, own = self._shapes[plan], dict(self.trunk.named_parameters())
        weights = {name: adapted(own[name], value.shape) for name, value in shape.named_parameters()}
        return functional_call(shape, weights, (images,))

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        with atomic_path(path) as temporary:
            torch.save(self.state_dict(), temporary)

    @classmethod
    def load(cls, path: Path) -> "VoxelPretraining":
        """Read a checkpoint.

        Raises:
            InputError: there is none, or it is damaged or of another network.
        """
        state = cls()
        resume(path, state.load_state_dict)
        return state


def pretrain_unet(
    state: VoxelPretraining,
    checkpoint: Path,
    minutes: float,
    device: str = "cpu",
    seed: int = 0,
    cancel: CancelToken | None = None,
) -> Iterator[tuple[float, float]]:
    """Run what is left of a time budget, yielding the share that is done and the loss of each step.

    From a checkpoint it goes on with a new optimizer and warm-up.

    Args:
        state: fresh or loaded from a checkpoint; changed in place.
        checkpoint: where to save.
        minutes: the whole budget, including what the state has spent already.
        device: "cpu" or "cuda".
        seed: of the synthetic volumes.
        cancel: to stop early; the checkpoint is written.
    """
    state.to(device).train()
    dice = Dice(torch.Generator().manual_seed(seed + int(state.step)))
    optimizer = torch.optim.AdamW(state.parameters(), lr=_RATE, weight_decay=_DECAY)
    first, saved, clock = int(state.step), float(state.spent), time.perf_counter()
    while (done := float(state.spent) / (60 * minutes)) < 1 and not (cancel and cancel.cancelled):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(_RATE, int(state.step) - first, done, _WARM_UP)
        plan, images, regions = _batch(dice)
        with autocast(device):
            features = state.features(images.to(device), plan)
        loss = _loss(state, [level.float() for level in features], regions.to(device))
        optimizer.zero_grad()
        loss.backward()
        if nn.utils.clip_grad_norm_(state.parameters(), _CLIP).isfinite():
            optimizer.step()
        before, clock = clock, time.perf_counter()
        state.step += 1
        state.spent += clock - before
        yield min(1.0, float(state.spent) / (60 * minutes)), loss.item()
        if float(state.spent) - saved > _CHECKPOINT_SECONDS:
            state.save(checkpoint)
            saved = float(state.spent)
    state.save(checkpoint)


def _batch(dice: Dice) -> tuple[Plan, Tensor, Tensor]:
    """Plan, images `(B, 1, x, y, z)` and structures `(B, x, y, z)`, 0 where none is; patients 2 i and 2 i + 1 match."""
    shape, thickness, order = CUBE.shape, 1.0, [0, 1, 2]
    if dice.chance(_FLAT_SHARE):
        shape, thickness = _FLAT, _THICKNESS[dice.integer(0, len(_THICKNESS) - 1)]
        order = [[0, 1, 2], [0, 2, 1], [2, 0, 1]][dice.integer(0, 2)]
    spacing = (1.0, 1.0, thickness)
    plan = Plan(tuple(spacing[axis] for axis in order), tuple(shape[axis] for axis in order))
    images: list[Tensor] = []
    structures: list[Tensor] = []
    while len(images) < 2 * _PAIRS:
        tissues, pair = patients(dice, shape, thickness)
        numbers = _numbers(dice, [regions for _, regions in pair], 1 + tissues if dice.chance(_ORGANS_SHARE) else 0)
        if numbers is not None:
            images += [image.permute(order) for image, _ in pair]
            structures += [numbers[regions].permute(order) for _, regions in pair]
    return plan, torch.stack(images)[:, None], torch.stack(structures)


def _numbers(dice: Dice, pair: list[Tensor], first: int) -> Tensor | None:
    """Region -> number of a structure from 1, 0 where it is not drawn; None if both patients share no region.

    Regions before the `first` are not drawn.
    """
    counts = torch.stack([regions.flatten().bincount(minlength=64) for regions in pair])
    usable = (counts.amin(0) >= _LEAST_VOXELS) & (counts[0] < 0.5 * pair[0].numel())
    regions = first + usable[first:].nonzero().flatten()
    if not len(regions):
        return None
    chosen = torch.randperm(len(regions), generator=dice.generator)[: dice.integer(1, _MOST_STRUCTURES)]
    numbers = torch.zeros(len(usable), dtype=torch.long)
    numbers[regions[chosen]] = torch.arange(1, len(chosen) + 1)
    return numbers


def _loss(state: VoxelPretraining, features: list[Tensor], structures: Tensor) -> Tensor:
    """Cross-entropy and Dice of each patient drawn after the other, at all levels: each counts half as much."""
    losses = []
    for level, (maps, weight) in enumerate(zip(features, _LEVELS, strict=True)):
        small = functional.interpolate(structures[:, None].float(), maps.shape[2:], mode="nearest-exact")
        rows, truths = maps.flatten(2), small.flatten(1).long()
        for learned in range(len(maps)):
            drawn = learned ^ 1
            count = 1 + int(structures[[learned, drawn]].max())
            solution = linear_map(rows[learned], truths[learned], count, state.log_ridge[level].exp())
            logits = state.scale[level] * (solution[:-1].T @ rows[drawn] + solution[-1, :, None])
            target = functional.one_hot(truths[drawn], count).T[1:]
            likely = logits.softmax(0)[1:]
            dice = (2 * (likely * target).sum(1) + 1) / (likely.sum(1) + target.sum(1) + 1)
            losses.append(weight * (functional.cross_entropy(logits[None], truths[drawn][None]) + (1 - dice).mean()))
    return torch.stack(losses).sum() / (sum(_LEVELS) * len(structures))
