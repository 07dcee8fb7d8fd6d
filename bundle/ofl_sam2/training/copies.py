"""What training draws episodes from: the labelled slices and augmented copies of them, with frozen features."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from ofl_sam2.backbone.frozen import ImageFeatures
from ofl_sam2.dataset import LabelledCase
from ofl_sam2.looks import Viewpoint
from ofl_sam2.memory.pool import PooledCase
from ofl_sam2.progress import Watch
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.augmentation import augment
from ofl_sam2.training.held_out import HeldOut
from ofl_sam2.training.synthetic import Dice
from ofl_sam2.volume import SliceStack


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
        cases: the labelled volumes; read one at a time, twice.
        held_out: what to leave out.
        copies: most copies of each view of a case.
        max_slices: bound on the slices in memory; where the originals reach it, half as many copies are made.
        seed: of the augmentation.
        watch: told of every encoded batch.
    """
    dice = Dice(torch.Generator().manual_seed(seed))
    originals: list[PooledCase] = []
    owners: list[int] = []
    for number, case in enumerate(cases):
        pooled = (c for pool in segmenter.pools.values() for c in pool.cases.values() if c.name == case.volume.name)
        kept = [rest for c in pooled if (rest := held_out.without(c))]
        originals += kept
        owners += [number] * len(kept)
    chosen = _choose(dice, [len(original) for original in originals], copies, max_slices)
    watch.expect(sum(len(originals[row]) for row in chosen))
    augmented = []
    for number in sorted({owners[row] for row in chosen}):
        looks = {(look.view, look.focus): look for look in cast(Viewpoint, segmenter.viewpoint).looks(cases[number])}
        for original in (originals[row] for row in chosen if owners[row] == number):
            stack = looks[original.view, original.focus].stack
            augmented.append(_copy(segmenter, dice, original, stack, watch))
    return originals + augmented


def _choose(dice: Dice, sizes: Sequence[int], copies: int, max_slices: int) -> list[int]:
    """Which originals to copy, each up to `copies` times in random order, as long as there is room."""
    room = max(max_slices - sum(sizes), max_slices // 2)
    chosen: list[int] = []
    for _ in range(copies):
        for row in torch.randperm(len(sizes), generator=dice.generator).tolist():
            if sum(sizes[other] for other in chosen) + sizes[row] <= room or not chosen:
                chosen.append(row)
    return chosen


def _copy(segmenter: VolumeSegmenter, dice: Dice, original: PooledCase, stack: SliceStack, watch: Watch) -> PooledCase:
    warped, labels = augment(dice, stack.images(original.slices), original.labels)
    parts = []
    for batch in warped.split(8):
        parts.append(segmenter.backbone.encode_images(batch.to(segmenter.device)).to("cpu", torch.float16))
        watch.advance(len(batch))
    return replace(original, features=ImageFeatures.cat(parts), labels=labels)
