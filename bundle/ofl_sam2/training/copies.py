"""What training draws episodes from: the labelled slices and augmented copies of them, with frozen features."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from ofl_sam2.backbone.frozen import ImageFeatures
from ofl_sam2.dataset import LabelledCase
from ofl_sam2.looks import Look, Viewpoint
from ofl_sam2.memory.pool import PooledCase, pool_key
from ofl_sam2.progress import Watch
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.augmentation import augment
from ofl_sam2.training.held_out import HeldOut
from ofl_sam2.training.synthetic import Dice


@torch.no_grad()
def with_copies(
    segmenter: VolumeSegmenter,
    cases: Sequence[LabelledCase],
    held_out: HeldOut,
    copies: int,
    max_slices: int,
    seed: int,
    watch: Watch,
) -> list[PooledCase]:
    """The pooled slices of all views of the cases, without the held-out ones, and augmented copies of them.

    Args:
        segmenter: has learned the cases.
        cases: the labelled volumes.
        held_out: what to leave out.
        copies: most copies of each view of a case.
        max_slices: bound on the slices in memory; where the originals reach it, half as many copies are made.
        seed: of the augmentation.
        watch: told of every encoded batch.
    """
    dice = Dice(torch.Generator().manual_seed(seed))
    viewpoint = cast(Viewpoint, segmenter.viewpoint)
    looks, originals = [], []
    for case in cases:
        for look in viewpoint.looks(case):
            kept = held_out.without(segmenter.pools[look.view].cases[pool_key(case.volume.name, look.focus)])
            if kept:
                looks.append(look)
                originals.append(kept)
    room = max(max_slices - sum(map(len, originals)), max_slices // 2)
    chosen: list[tuple[Look, PooledCase]] = []
    total = 0
    for _ in range(copies):
        for row in torch.randperm(len(looks), generator=dice.generator).tolist():
            if total + len(originals[row]) <= room or not chosen:
                chosen.append((looks[row], originals[row]))
                total += len(originals[row])
    watch.expect(total)
    augmented = []
    for look, original in chosen:
        warped, labels = augment(dice, look.stack.images(original.slices), original.labels)
        parts = []
        for batch in warped.split(8):
            parts.append(segmenter.backbone.encode_images(batch.to(segmenter.device)).to("cpu", torch.float16))
            watch.advance(len(batch))
        augmented.append(replace(original, features=ImageFeatures.cat(parts), labels=labels))
    return originals + augmented
