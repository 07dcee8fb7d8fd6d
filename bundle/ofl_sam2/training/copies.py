"""What training draws from: the labelled slices, and augmented copies of them that are drawn anew all the time."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ofl_sam2.backbone.frozen import ImageFeatures
from ofl_sam2.dataset import LabelledCase
from ofl_sam2.looks import Look, Viewpoint
from ofl_sam2.memory.pool import PooledCase, View
from ofl_sam2.progress import Watch
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.augmentation import augment
from ofl_sam2.training.held_out import HeldOut
from ofl_sam2.training.synthetic import Dice

BATCH = 8


class _Original(NamedTuple):
    """The labelled slices of one view of case `number`."""

    pooled: PooledCase
    number: int


class _Unfinished(NamedTuple):
    """A copy in the making: the batches of its images that wait, the features of the others, its labels."""

    original: PooledCase
    labels: Tensor
    waiting: list[Tensor]
    done: list[ImageFeatures]


class FreshCopies:
    """The pooled slices of all views of labelled cases, without the held-out ones, and augmented copies of them.

    Each step encodes a batch of the next copy. When that is complete it joins, and the oldest ones leave where there is
    no more room. Copy number n depends on the seed and n alone, so an interrupted training goes on with the same ones.

    Args:
        segmenter: has learned the cases.
        cases: the labelled volumes; each is read once a round.
        names: of the cases.
        held_out: what to leave out.
        most: copies of each view of a case.
        max_slices: bound on the slices in memory; where the originals reach it, half of it is for copies.
        seed: of the augmentation.
    """

    def __init__(
        self,
        segmenter: VolumeSegmenter,
        cases: Sequence[LabelledCase],
        names: Sequence[str],
        held_out: HeldOut,
        most: int,
        max_slices: int,
        seed: int,
    ) -> None:
        self.segmenter, self.cases, self.seed = segmenter, cases, seed
        pooled = [
            _Original(rest, number)
            for number, name in enumerate(names)
            for pool in segmenter.pools.values()
            for c in pool.cases.values()
            if c.name == name and (rest := held_out.without(c))
        ]
        self.originals = [original.pooled for original in pooled]
        generator = torch.Generator().manual_seed(seed)
        place = torch.randperm(len(names), generator=generator).tolist()
        shuffled = [pooled[row] for row in torch.randperm(len(pooled), generator=generator).tolist()]
        self._cycle = sorted(shuffled, key=lambda original: place[original.number])
        self._most, self._room = most * len(pooled), max(max_slices - sum(map(len, self.originals)), max_slices // 2)
        self._copies: list[PooledCase] = []
        self._next = 0
        self._unfinished: _Unfinished | None = None
        self._looks: tuple[int, dict[tuple[View, tuple[int, ...]], Look]] = -1, {}

    @property
    def volumes(self) -> list[PooledCase]:
        """Originals and the copies at hand."""
        return self.originals + self._copies

    def start(self, steps: int, watch: Watch) -> None:
        """Encode the copies that are at hand after so many steps of training."""
        last = self._kept([self._size(number) for number in range(self._most)])
        batches = 0
        while steps >= batches + self._batches(last):
            batches += self._batches(last)
            last += 1
        first = last - self._kept([self._size(number) for number in range(last - 1, -1, -1)])
        watch.expect(sum(map(self._size, range(first, last))))
        self._next = first
        while self._next < last:
            watch.advance(self.step())
        for _ in range(steps - batches):
            self.step()

    @torch.no_grad()
    def step(self) -> int:
        """Encode a batch of the next copy; return of how many slices."""
        unfinished = self._unfinished or self._begin()
        batch = unfinished.waiting.pop(0)
        features = self.segmenter.backbone.encode_images(batch.to(self.segmenter.device))
        unfinished.done.append(features.to("cpu", torch.float16))
        self._unfinished = unfinished if unfinished.waiting else None
        if not unfinished.waiting:
            copy = replace(unfinished.original, features=ImageFeatures.cat(unfinished.done), labels=unfinished.labels)
            newest_first = [copy, *reversed(self._copies)]
            self._copies = newest_first[: self._kept([len(c) for c in newest_first])][::-1]
            self._next += 1
        return len(batch)

    def _begin(self) -> _Unfinished:
        original, number = self._cycle[self._next % len(self._cycle)]
        if self._looks[0] != number:
            looks = cast(Viewpoint, self.segmenter.viewpoint).looks(self.cases[number])
            self._looks = number, {(look.view, look.focus): look for look in looks}
        stack = self._looks[1][original.view, original.focus].stack
        dice = Dice(torch.Generator().manual_seed((self.seed << 20) + self._next))
        images, labels = augment(dice, stack.images(original.slices), original.labels)
        return _Unfinished(original, labels, list(images.split(BATCH)), [])

    def _size(self, number: int) -> int:
        return len(self._cycle[number % len(self._cycle)].pooled)

    def _batches(self, number: int) -> int:
        return -(-self._size(number) // BATCH)

    def _kept(self, sizes: Sequence[int]) -> int:
        """How many of the first of the sizes there is room for, at least one."""
        return max(1, sum(total <= self._room for total in accumulate(sizes[: self._most])))
