"""Fit the pretrained 3D U-Net to labelled volumes, by nnU-Net's recipe (Isensee et al., 2021)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from monai.transforms import (
    ClassesToIndices,
    Compose,
    Rand3DElasticd,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandCropByLabelClassesd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandSimulateLowResolutiond,
    RandSmoothDeformd,
    Transform,
)
from torch import Tensor, nn
from torch.nn import functional

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.drawing import is_averaged
from ofl_sam2.learner.load import begin_pretrained
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import MOST_VOXELS, PATCH_VOXELS, Trunk, VoxelUNet, at_time, times
from ofl_sam2.looks import Viewpoint
from ofl_sam2.memory.pool import evenly
from ofl_sam2.progress import CancelToken
from ofl_sam2.training.closed_form import SCALE, linear_map
from ofl_sam2.training.losses import marginal_loss
from ofl_sam2.training.schedule import learning_rate

MOST_VOLUMES, TRIED = 64, 0.4
_MOST_PATCHES, _FIRST_PATCHES = 2, 8
_RATE, _DECAY, _WARM_UP, _CLIP = 8e-3, 1e-4, 10, 12.0
_CHOICES = 10_000
_KEYS, _INDICES = ("image", "label"), "label_cls_indices"


@dataclass(frozen=True)
class _Sample:
    """A volume on the network's grid.

    Attributes:
        parts: `image` `(C, x, y, z)`; `label` `(1, x, y, z)`: 0, the number of a structure from 1, or one more than all
            of these where nothing is known; `label_cls_indices` of the voxels of each.
        taught: `(K,)`, whether a structure is labelled in this case.
    """

    parts: dict[str, Any]
    taught: Tensor


def fit_unet(
    viewpoint: Viewpoint,
    cases: Sequence[LabelledCase],
    structures: Sequence[int],
    early: Callable[[LabelledCase], LabelledCase | None],
    accept: Callable[[VoxelUNet], bool],
    seconds: float,
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    report: Callable[[float, float], None] | None = None,
    cancel: CancelToken | None = None,
) -> VoxelUNet | None:
    """Train a U-Net on labelled voxels, at first without some of the labels.

    Args:
        viewpoint: numbers the slices that are labelled.
        cases: labelled volumes, read one by one; at most `MOST_VOLUMES`, evenly chosen, are trained on, times of a
            sequence included, and none that is enormous on the network's grid.
        structures: label values.
        early: what of a case is trained on before `accept`; None leaves it out.
        accept: asked once, after `TRIED` of the training, whether to go on; then the cases are trained on.
        seconds: bound on the wall time; one step is always done.
        steps: if given, how many, within that time; the learning rate then follows them and not the time.
        seed: of the parameters and the draws.
        device: to train on.
        report: called after each step with the share that is done, in (0, 1], and its loss.
        cancel: to stop.

    Returns:
        None if it was not accepted, or cancelled, or if there is nothing to train on.
    """
    started = perf_counter()
    chosen = evenly(range(len(cases)), MOST_VOLUMES)
    plan = Plan.of(cases[number].volume for number in chosen).coarsened(MOST_VOXELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        colour, window = cases[chosen[0]].volume.colour, viewpoint.settings.ct_window
        unet = begin_pretrained(VoxelUNet(plan, structures, colour, ct_window=window)).to(device).train()
        most = max(1, MOST_VOLUMES // len(chosen))
        ready, whole = dict[int, list[_Sample]](), set[int]()
        for number in chosen:
            case = cases[number]
            if seen := early(case):
                ready[number] = _samples(unet, viewpoint, seen, most)
            if seen is case:
                whole.add(number)
        samples = [*chain(*ready.values())]
        if not samples:
            return None
        optimizer = torch.optim.AdamW(unet.parameters(), lr=_RATE, weight_decay=_DECAY)
        transforms = [*augmentation(plan, unet.patch, len(unet.values)), _Shading()]
        augment = Compose(transforms).set_random_state(seed)
        size = patches_per_step(unet)
        _begin_heads(unet, [_batch(samples, augment, size) for _ in range(_FIRST_PATCHES // size)])
        step, done, accepted = 0, 0.0, False
        while not step or done < 1:
            if cancel and cancel.cancelled:
                return None
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(_RATE, step, done, _WARM_UP)
            optimizer.zero_grad()
            loss = marginal_loss(unet, *(part.to(device) for part in _batch(samples, augment, size)))
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), _CLIP)
            optimizer.step()
            step += 1
            spent = min(1.0, (perf_counter() - started) / seconds)
            done = step / steps if steps and spent < 1 else spent
            if report:
                report(done, loss.item())
            if done >= TRIED and not accepted:
                accepted = accept(unet.eval())
                if not accepted:
                    return None
                unet.train()
                for number in set(chosen) - whole:
                    ready[number] = _samples(unet, viewpoint, cases[number], most)
                samples = [*chain(*(ready[number] for number in chosen))]
    return unet.eval()


def patches_per_step(unet: VoxelUNet) -> int:
    """Two small ones, one large one."""
    return max(1, min(_MOST_PATCHES, PATCH_VOXELS // math.prod(unet.patch)))


def _samples(unet: VoxelUNet, viewpoint: Viewpoint, case: LabelledCase, most: int) -> list[_Sample]:
    """Up to `most` volumes of a case in which a slice is labelled; none if they are enormous on the network's grid."""
    if not is_averaged(unet.shape_of(case.volume), 1):
        return []
    classes = _classes(viewpoint, case, unet.values)
    unknown = len(unet.values) + 1
    told = [time for time in range(times(case.volume)) if (at_time(classes, time) != unknown).any()]
    chosen = set(evenly(told, most))
    taught = torch.tensor([float(value in case.values) for value in unet.values])
    samples = []
    for time, image in enumerate(unet.images(case.volume)):
        if time in chosen:
            label = torch.from_numpy(at_time(classes, time)[None].astype(np.float32))
            label = functional.interpolate(label[None], image.shape[1:], mode="nearest-exact")[0]
            if (label == unknown).all():  # a coarser grid passes over slices
                continue
            image, label = _padded(image, unet.patch, 0.0), _padded(label, unet.patch, unknown)
            indices = ClassesToIndices(unknown, max_samples_per_class=_CHOICES)(label)
            samples.append(_Sample({"image": image, "label": label, _INDICES: indices}, taught))
    return samples


def _classes(viewpoint: Viewpoint, case: LabelledCase, values: Sequence[int]) -> np.ndarray:
    """The number of the structure in each voxel from 1, one more than all of them in slices that are not labelled."""
    classes = np.full(case.volume.grid, len(values) + 1, np.uint16)
    stack = viewpoint.stack(case.volume)
    for index in viewpoint.labelled_slices(case):
        drawn, told = stack.slice_of(case.labels, index), stack.slice_of(classes, index)
        told[...] = 0
        for number, value in enumerate(values, start=1):
            told[drawn == value] = number
    return case.volume.in_order(classes)


def _padded(maps: Tensor, patch: Sequence[int], value: float) -> Tensor:
    """At least as large as a patch."""
    missing = [max(0, side - size) for size, side in zip(maps.shape[1:], patch, strict=True)]
    ends = [end for gap in reversed(missing) for end in (gap // 2, gap - gap // 2)]
    return functional.pad(maps, ends, value=value)


def augmentation(plan: Plan, patch: Sequence[int], structures: int, scaling: float = 0.3) -> list[Transform]:
    """nnU-Net's patches around structures and elsewhere, deformed and recoloured.

    Slices three times as thick as pixels turn in plane only, and bend coarsely. There is no mirroring: structures may
    have left and right twins.

    Args:
        plan: of the volumes.
        patch: its size in voxels.
        structures: how many, K.
        scaling: most that they grow or shrink by.

    Returns:
        Transforms of `image`, `label` with 0 to K, and `label_cls_indices` (`ClassesToIndicesd`) into a list of one.
    """
    crop = RandCropByLabelClassesd(
        _KEYS,
        label_key="label",
        spatial_size=patch,
        ratios=[structures] + structures * [1],
        num_classes=structures + 1,
        indices_key=_INDICES,
        warn=False,
    )
    thick = plan.thick_axis
    turn = [0.3 if thick in (None, axis) else 0.0 for axis in range(3)]
    scale = [scaling if axis != thick else 0.0 for axis in range(3)]
    spatial = {"mode": ("bilinear", "nearest"), "padding_mode": "border"}
    return [
        crop,
        RandAffined(_KEYS, prob=0.5, rotate_range=turn, scale_range=scale, **spatial),
        _bend(patch, thick, spatial),
        RandGaussianNoised("image", prob=0.1, std=0.1),
        RandGaussianSmoothd("image", (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=0.2),
        RandScaleIntensityd("image", factors=0.25, prob=0.15),
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        RandSimulateLowResolutiond("image", prob=0.25),
    ]


def _bend(patch: Sequence[int], thick: int | None, spatial: Mapping[str, Any]) -> Transform:
    """Fine deformation; where slices are thick a coarse one, which differs along the stack."""
    if thick is None:
        return Rand3DElasticd(_KEYS, sigma_range=(5, 8), magnitude_range=(40, 120), prob=0.2, **spatial)
    return RandSmoothDeformd(
        _KEYS,
        spatial_size=patch,
        rand_size=[3 if axis == thick else 4 for axis in range(3)],
        field_mode="trilinear",
        align_corners=True,
        prob=0.5,
        def_range=0.4,
        grid_mode=spatial["mode"],
        grid_padding_mode=spatial["padding_mode"],
        grid_align_corners=True,
    )


class _Shading(RandBiasFieldd):
    """Brightness that changes slowly over an `image`, as near a receiver coil; the darkest voxel stays as it is."""

    def __init__(self) -> None:
        super().__init__("image", coeff_range=(-0.3, 0.3), prob=0.5)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        floor = data["image"].amin()
        shaded = super().__call__({**data, "image": data["image"] - floor})
        return {**shaded, "image": shaded["image"] + floor}


@torch.no_grad()
def _begin_heads(unet: VoxelUNet, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give each head the linear map, in closed form, from its features to what is labelled in some patches.

    Background is left out where a structure is not labelled in the case.
    """
    trunk, device = Trunk(unet.net), next(unet.parameters()).device
    unknown = 1 + len(unet.values)
    features, classes = [], []
    for images, labels, taught in batches:
        told = (labels > 0) | (taught.amin(1) > 0)[:, None, None, None, None]
        classes.append(torch.where(told, labels, unknown).to(device))
        features.append(trunk(images.to(device)))
    drawn = torch.cat(classes)
    for head, *maps in zip(unet.heads, *features, strict=False):
        rows = torch.cat(maps).transpose(0, 1).flatten(1)
        numbers = functional.interpolate(drawn, maps[0].shape[2:], mode="nearest-exact").flatten().long()
        known = numbers < unknown
        if known.any():
            solution = SCALE * linear_map(rows[:, known], numbers[known], unknown)
            head.weight.copy_(solution[:-1].T[:, :, None, None, None])
            cast(Tensor, head.bias).copy_(solution[-1])


def _batch(samples: Sequence[_Sample], augment: Compose, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images `(B, C, x, y, z)`, labels `(B, 1, x, y, z)` and `taught (B, K)` of patches from random volumes."""
    images, labels, taught = [], [], []
    for row in torch.randint(len(samples), (size,)).tolist():
        (patch,) = augment(samples[row].parts)
        images.append(patch["image"].as_tensor())
        labels.append(patch["label"].as_tensor())
        taught.append(samples[row].taught)
    return torch.stack(images), torch.stack(labels), torch.stack(taught)
