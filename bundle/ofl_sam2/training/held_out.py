"""Labelled slices that training does not see: they decide whether its result is kept."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from random import Random
from time import perf_counter
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.drawing import is_averaged, scored
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.looks import Viewpoint
from ofl_sam2.memory.pool import CLOSE, PooledCase, SupportPool, View, pool_key
from ofl_sam2.progress import CancelToken, Watch
from ofl_sam2.propagation import LearnedView, Propagation
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.losses import shrink_masks

ENOUGH_CASES = 4
MOST_SCORED = 16
_CASES_PER_HELD_OUT, _MOST_CASES = 8, 4
_EVERY = 5

Entry = tuple[View, str]


@dataclass(frozen=True)
class HeldOut:
    """Rows of pooled cases that are kept apart: whole cases where there are enough, else every fifth slice of each.

    Attributes:
        rows: view and key of a pooled case -> rows.
        magnified: case -> structures that are scored in its close-ups alone, as they are drawn.
    """

    rows: Mapping[Entry, tuple[int, ...]]
    magnified: Mapping[str, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def choose(
        cls,
        cases: Sequence[PooledCase],
        enough: int = ENOUGH_CASES,
        structures: Collection[int] | None = None,
        fitted: Collection[str] = (),
    ) -> "HeldOut":
        """Choose among all views of the cases to train on; whole ones of `enough`, which are two or more.

        Cases that share most of the structures, by default all label values, with the others tell most. Those that the
        parameters were `fitted` to before flatter what there was, so others are chosen where there are any.
        """
        names = sorted({case.name for case in cases})
        if len(names) < enough:
            return cls({(c.view, c.key): rows for c in cases if (rows := _every_fifth(c))})
        taught = {name: frozenset().union(*(c.known for c in cases if c.name == name)) for name in names}
        holders = Counter(value for values in taught.values() for value in values)
        shared = {value for value in structures or holders if holders[value] > 1}
        names.sort(key=lambda name: -len(shared & taught[name]))
        most = min(_MOST_CASES, max(1, len(names) // ENOUGH_CASES))
        fair = [name for name in names if name not in fitted and shared & taught[name]]
        apart = set((fair or names)[::_CASES_PER_HELD_OUT][:most])
        return cls({(c.view, c.key): tuple(range(len(c))) for c in cases if c.name in apart})

    def with_close_ups(self, segmenter: VolumeSegmenter) -> "HeldOut":
        """The same rows; structures that are drawn in close-ups are scored in these alone."""
        close = segmenter.active_close_ups
        if close is None:
            return self
        magnified = dict[str, frozenset[int]]()
        for case in (close.pool.cases[key] for view, key in self.rows if view == CLOSE):
            drawn = case.known.intersection(close.values, _taught(self._others(close.pool, case)))
            magnified[case.name] = magnified.get(case.name, frozenset()) | drawn
        return replace(self, magnified=magnified)

    def without(self, case: PooledCase) -> PooledCase | None:
        """What is left of a pooled case; None if that is nothing."""
        apart = set(self.rows.get((case.view, case.key), ()))
        kept = [row for row in range(len(case)) if row not in apart]
        return part(case, kept) if kept else None

    def seen(self, case: LabelledCase, pooled: PooledCase) -> LabelledCase | None:
        """As `without`, of a case and its main view."""
        if (pooled.view, pooled.key) not in self.rows:
            return case
        left = self.without(pooled)
        return replace(case, labelled_slices=left.slices) if left else None

    @torch.no_grad()
    def dice(self, segmenter: VolumeSegmenter) -> float | None:
        """Mean Dice of what is in held-out slices, cases segmented from the others, a lone one from its other slices.

        Args:
            segmenter: what to score; its own U-Net is not asked.

        Returns:
            In [0, 1], at logit size; None where nothing could be scored.
        """
        return _mean(self._scores(segmenter, entry)[0] for entry in self.rows)

    @torch.no_grad()
    def compared(
        self, segmenter: VolumeSegmenter, seconds: Mapping[Entry, Tensor], cancel: CancelToken | None = None
    ) -> tuple[float | None, float | None]:
        """As `dice`, and the Dice of the average with what a U-Net says (see `drawn_by`); no rows are of side views.

        Raises:
            Cancelled: stopped by `cancel`.
        """
        pairs = [self._scores(segmenter, entry, (None, seconds[entry]), cancel) for entry in self.rows]
        without, averaged = (_mean(pair[number] for pair in pairs) for number in range(2))
        return without, averaged

    @torch.no_grad()
    def affordable(
        self, segmenter: VolumeSegmenter, limit: float, cancel: CancelToken | None = None
    ) -> tuple["HeldOut", float | None]:
        """What can be scored in about so many seconds, and its `dice`.

        That is one view of a case with structures at least. Side views come last, the others are in random order.

        Raises:
            Cancelled: stopped by `cancel`.
        """
        started, scores = perf_counter(), dict[Entry, list[float]]()
        shuffled = Random(0).sample(list(self.rows), len(self.rows))
        for entry in sorted(shuffled, key=lambda entry: entry[0].axis is not None):
            if any(scores.values()) and perf_counter() - started >= limit:
                break
            (scores[entry],) = self._scores(segmenter, entry, cancel=cancel)
        return replace(self, rows={entry: self.rows[entry] for entry in scores}), _mean(scores.values())

    def _scores(
        self,
        segmenter: VolumeSegmenter,
        entry: Entry,
        seconds: Sequence[Tensor | None] = (None,),
        cancel: CancelToken | None = None,
    ) -> list[list[float]]:
        """Dice of each structure of a view of a case, averaged with each of `seconds`; see `dice`."""
        view, key = entry
        pool = segmenter.pools[view]
        case = pool.cases[key]
        others = self._others(pool, case)
        magnified = frozenset() if view.close else self.magnified.get(case.name, frozenset())
        known = case.known & _taught(others) - magnified
        values = tuple(value for value in segmenter.structures if value in known)
        if not values:
            return [[] for _ in seconds]
        return _dice(segmenter, part(case, _middle(case, self.rows[entry])), others, values, seconds, cancel)

    def _others(self, pool: SupportPool, case: PooledCase) -> SupportPool:
        """What a case of a pool is segmented from."""
        others = pool.without({case.name})
        if not others.cases and (rest := self.without(case)):
            others.add(rest)
        return others

    def drawn_by(
        self,
        unet: VoxelUNet,
        segmenter: VolumeSegmenter,
        cases: Iterable[LabelledCase],
        cancel: CancelToken | None = None,
    ) -> dict[Entry, Tensor]:
        """What a U-Net makes of the slices that are scored.

        Args:
            unet: to ask.
            segmenter: has learned the cases.
            cases: those with held-out slices.
            cancel: to stop.

        Returns:
            For each of the rows' views and keys `(S, K, h, w)` at logit size; K are all structures of the segmenter.
            NaN of a case that is too large on its grid.

        Raises:
            Cancelled: stopped by `cancel`.
        """
        seconds, check = dict[Entry, Tensor](), Watch(None, cancel).check
        values, viewpoint = tuple(segmenter.structures), cast(Viewpoint, segmenter.viewpoint)
        for case in cases:
            known = is_averaged(unet.shape_of(case.volume), len(values))
            found = unet.probabilities(case.volume, values, check).numpy() if known else None
            for look in viewpoint.looks(case):
                entry = look.view, pool_key(case.volume.name, look.focus)
                if entry not in self.rows:
                    continue
                pooled = segmenter.pools[look.view].cases[entry[1]]
                rows, side = _middle(pooled, self.rows[entry]), pooled.labels.shape[-1] // 4
                seconds[entry] = torch.full((len(rows), len(values), side, side), torch.nan)
                if found is not None:
                    maps = found[(slice(None), *(look.window.slices if look.window else ()))]
                    for plane, row in zip(seconds[entry], rows, strict=True):
                        drawn = np.stack([look.stack.slice_of(one, pooled.slices[row]) for one in maps])
                        resized = look.stack.geometry.to_input(torch.from_numpy(drawn.astype(np.float32)))
                        plane[...] = shrink_masks(resized[:, 0], side)
        return seconds


def part(case: PooledCase, rows: Sequence[int]) -> PooledCase:
    """Some of the slices of a pooled case."""
    chosen = list(rows)
    slices = tuple(case.slices[row] for row in chosen)
    return replace(case, slices=slices, features=case.features[chosen], labels=case.labels[chosen])


def _mean(scores: Iterable[Sequence[float]]) -> float | None:
    values = [*chain.from_iterable(scores)]
    return sum(values) / len(values) if values else None


def _taught(pool: SupportPool) -> frozenset[int]:
    return frozenset().union(*(case.known for case in pool.cases.values()))


def _every_fifth(case: PooledCase) -> tuple[int, ...]:
    """Every fifth slice of a case; none where there are fewer, or where none of them has a structure.

    A run of slices would leave a gap in the anatomy that training sees: on hippocampus it made training worse.
    """
    rows = tuple(range(_EVERY // 2, len(case), _EVERY)) if len(case) >= _EVERY else ()
    return rows if any(case.present[row] for row in rows) else ()


def _middle(case: PooledCase, rows: Sequence[int]) -> tuple[int, ...]:
    """Up to `MOST_SCORED` successive ones of the rows, in the middle of those with a structure."""
    filled = [position for position, row in enumerate(rows) if case.present[row]] or [len(rows) // 2]
    first = min(max(filled[len(filled) // 2] - MOST_SCORED // 2, 0), max(0, len(rows) - MOST_SCORED))
    return tuple(rows[first : first + MOST_SCORED])


def _dice(
    segmenter: VolumeSegmenter,
    case: PooledCase,
    pool: SupportPool,
    values: tuple[int, ...],
    seconds: Sequence[Tensor | None],
    cancel: CancelToken | None,
) -> list[list[float]]:
    settings = segmenter.settings
    weight = settings.unet_weight(sum(not view.close for view in segmenter.pools))
    learned = LearnedView(pool, values, segmenter.backbone, segmenter.learner, settings)
    run = Propagation(learned.supports, values, learned.solution, settings)
    columns = [list(segmenter.structures).index(value) for value in values]
    overlap, sizes, true_sizes = *torch.zeros(2, len(seconds), len(values)), torch.zeros(len(values))
    for result in run.run(lambda row: case.slice(row).to(segmenter.device), pool.similarity(case.descriptors)):
        if cancel:
            cancel.check()
        masks = torch.stack([case.mask(result.index, value) for value in values])
        true = (shrink_masks(masks, result.logits.shape[-1]) > 0.5).flatten(1)
        true_sizes += true.sum(1)
        probabilities = result.logits.sigmoid().cpu()
        for number, second in enumerate(seconds):
            by_unet = None if second is None else second[result.index, columns]
            predicted = (scored(probabilities, settings.threshold, by_unet, weight) > 0).flatten(1)
            overlap[number] += (predicted & true).sum(1)
            sizes[number] += predicted.sum(1)
    return [dice[true_sizes > 0].tolist() for dice in 2 * overlap / (sizes + true_sizes)]
