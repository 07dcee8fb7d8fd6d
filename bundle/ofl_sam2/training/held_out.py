"""Labelled slices that training does not see: they decide whether its result is kept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ofl_sam2.memory.pool import PooledCase, SupportPool, View
from ofl_sam2.propagation import LearnedView, Propagation
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.losses import shrink_masks

ENOUGH_CASES = 4
MOST_SCORED = 16
_CASES_PER_HELD_OUT = 8
_EVERY = 5


@dataclass(frozen=True)
class HeldOut:
    """Rows of pooled cases that are kept apart: whole cases of four or more, else every fifth slice of each.

    Attributes:
        rows: view and key of a pooled case -> rows.
    """

    rows: Mapping[tuple[View, str], tuple[int, ...]]

    @classmethod
    def choose(cls, cases: Sequence[PooledCase]) -> "HeldOut":
        """Choose among all views of the cases to train on."""
        names = sorted({case.name for case in cases})
        if len(names) >= ENOUGH_CASES:
            apart = set(names[::_CASES_PER_HELD_OUT][: len(names) // ENOUGH_CASES])
            return cls({(c.view, c.key): tuple(range(len(c))) for c in cases if c.name in apart})
        return cls({(c.view, c.key): rows for c in cases if (rows := _every_fifth(c))})

    def without(self, case: PooledCase) -> PooledCase | None:
        """What is left of a pooled case; None if that is nothing."""
        apart = set(self.rows.get((case.view, case.key), ()))
        kept = [row for row in range(len(case)) if row not in apart]
        return part(case, kept) if kept else None

    @torch.no_grad()
    def dice(self, segmenter: VolumeSegmenter) -> float | None:
        """Mean Dice of held-out slices, each case segmented from the other cases, a lone one from its other slices.

        Returns:
            In [0, 1], at logit size; None where nothing could be scored.
        """
        scores: list[float] = []
        for (view, key), rows in self.rows.items():
            pool = segmenter.pools[view]
            case = pool.cases[key]
            others = pool.without({case.name})
            if not others.cases and (rest := self.without(case)):
                others.add(rest)
            values = tuple(v for v in segmenter.structures if v in case.known & _taught(others.cases.values()))
            if values:
                scores += _dice(segmenter, part(case, _middle(case, rows)), others, values)
        return sum(scores) / len(scores) if scores else None


def part(case: PooledCase, rows: Sequence[int]) -> PooledCase:
    """Some of the slices of a pooled case."""
    chosen = list(rows)
    slices = tuple(case.slices[row] for row in chosen)
    return replace(case, slices=slices, features=case.features[chosen], labels=case.labels[chosen])


def _taught(cases: Iterable[PooledCase]) -> frozenset[int]:
    return frozenset().union(*(case.known for case in cases))


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


def _dice(segmenter: VolumeSegmenter, case: PooledCase, pool: SupportPool, values: tuple[int, ...]) -> list[float]:
    learned = LearnedView(pool, values, segmenter.backbone, segmenter.learner, segmenter.settings)
    run = Propagation(learned.supports, values, learned.solution, segmenter.settings, segmenter.active_refinement)
    overlap, total = torch.zeros(len(values)), torch.zeros(len(values))
    for result in run.run(lambda row: case.slice(row).to(segmenter.device), pool.similarity(case.descriptors)):
        predicted = (result.logits > 0).flatten(1).cpu()
        masks = torch.stack([case.mask(result.index, value) for value in values])
        true = (shrink_masks(masks, result.logits.shape[-1]) > 0.5).flatten(1)
        overlap += (predicted & true).sum(1)
        total += predicted.sum(1) + true.sum(1)
    return (2 * overlap / total)[total > 0].tolist()
