"""Fit the refinement to what leave-one-out segmentation of the labelled slices gets wrong (corrective learning)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ofl_sam2.backbone.frozen import Decoded, ImageFeatures
from ofl_sam2.learner.refinement import Refinement
from ofl_sam2.memory.pool import PooledCase, evenly
from ofl_sam2.progress import CancelToken
from ofl_sam2.propagation import LearnedView, Propagation
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.held_out import HeldOut, part
from ofl_sam2.training.losses import shrink_masks
from ofl_sam2.training.schedule import learning_rate
from ofl_sam2.training.synthetic import Dice

MAX_SLICES = 800
STEPS = 300
_BATCH, _EMPTY = 14, 4
_MOST_AT_ONCE = 4
_POOL_SLICES = 8
_RATE, _DECAY = 2e-3, 1e-2
_WARM_UP, _AVERAGED = 20, 0.95
_ENTROPY = 3.0
_COLLECTING = 0.6


@dataclass(frozen=True)
class Example:
    """A labelled slice and what was drawn of its K structures without the labels of its case.

    Attributes:
        case, row: where features and labels are.
        values: of the K structures.
        decoded: the structures, float16.
    """

    case: PooledCase
    row: int
    values: tuple[int, ...]
    decoded: Decoded

    @property
    def present(self) -> frozenset[int]:
        """Which of the structures the slice holds."""
        return self.case.present[self.row] & set(self.values)


def fit_refinement(
    segmenter: VolumeSegmenter,
    held_out: HeldOut,
    seconds: float,
    seed: int = 0,
    report: Callable[[float], None] | None = None,
    cancel: CancelToken | None = None,
) -> Refinement | None:
    """Fit a refinement to the labelled slices of a segmenter, which stays as it is.

    Args:
        segmenter: has learned several cases.
        held_out: cases whose labels are not aimed at.
        seconds: bound on the wall time; the first slices and a step are always done.
        seed: of the parameters and the draws.
        report: called with the share that is done, in (0, 1].
        cancel: to stop.

    Returns:
        None if there was nothing to learn from, or it was cancelled.
    """
    if cancel and cancel.cancelled:
        return None
    started = time.perf_counter()

    def share() -> float:
        done = min(1.0, (time.perf_counter() - started) / seconds)
        if report:
            report(done)
        return done

    dice = Dice(torch.Generator().manual_seed(seed))
    examples = _examples(segmenter, held_out, dice, lambda: share() > _COLLECTING or bool(cancel and cancel.cancelled))
    filled = [example for example in examples if example.present]
    if not filled or (cancel and cancel.cancelled):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        refinement = Refinement(segmenter.backbone.width, tuple(segmenter.structures)).to(segmenter.device)
    average = AveragedModel(refinement, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGED))
    optimizer = torch.optim.AdamW(refinement.parameters(), lr=_RATE, weight_decay=_DECAY)
    empty = [example for example in examples if not example.present]
    begun = share()
    for step in range(STEPS):
        done = max(step / STEPS, (share() - begun) / (1 - begun) if begun < 1 else 1.0)
        if (step and done >= 1) or (cancel and cancel.cancelled):
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(_RATE, step, min(1.0, done), _WARM_UP)
        batch = _draw(dice, filled, _BATCH - min(_EMPTY, len(empty))) + _draw(dice, empty, min(_EMPTY, len(empty)))
        optimizer.zero_grad()
        _loss(refinement, batch, dice).backward()
        optimizer.step()
        average.update_parameters(refinement)
    refinement.load_state_dict(average.module.state_dict())
    return None if cancel and cancel.cancelled else refinement.eval()


@torch.no_grad()
def _examples(segmenter: VolumeSegmenter, held_out: HeldOut, dice: Dice, stop: Callable[[], bool]) -> list[Example]:
    """Evenly spread labelled slices of all cases and views, each segmented from the labels of the other cases."""
    settings = replace(segmenter.settings, pool_slices=min(_POOL_SLICES, segmenter.settings.pool_slices))
    cases = [rest for pool in segmenter.pools.values() for c in pool.cases.values() if (rest := held_out.without(c))]
    kept = min(1.0, MAX_SLICES / max(1, sum(map(len, cases))))
    examples: list[Example] = []
    for case in sorted(cases, key=lambda _: dice.uniform(0, 1)):
        if examples and stop():
            break
        pool = segmenter.pools[case.view].without({case.name})
        taught = set(pool.values()) & case.known
        values = tuple(value for value in segmenter.structures if value in taught)
        rows = evenly(range(len(case)), max(1, round(kept * len(case))))
        if values:
            learned = LearnedView(pool, values, segmenter.backbone, segmenter.learner, settings)
            examples += _segmented(part(case, rows), learned, segmenter)
    return examples


def _segmented(case: PooledCase, learned: LearnedView, segmenter: VolumeSegmenter) -> list[Example]:
    """The slices of a case as a view that has not learned it draws them."""
    drawn: list[Decoded] = []

    def keep(_: ImageFeatures, decoded: Decoded, values: Sequence[int]) -> Tensor:
        drawn.append(decoded.to("cpu", torch.float16))
        return decoded.masks()

    run = Propagation(learned.supports, learned.values, learned.solution, segmenter.settings, keep)
    similarity = learned.pool.similarity(case.descriptors)
    indices = [result.index for result in run.run(lambda row: case.slice(row).to(segmenter.device), similarity)]
    return [Example(case, index, learned.values, decoded) for index, decoded in zip(indices, drawn, strict=True)]


def _draw(dice: Dice, examples: Sequence[Example], count: int) -> list[Example]:
    return [examples[dice.integer(0, len(examples) - 1)] for _ in range(count)]


def _loss(refinement: Refinement, batch: Sequence[Example], dice: Dice) -> Tensor:
    """Cross-entropy, and Dice of each structure over the batch."""
    device = refinement.change.weight.device
    sums = torch.zeros(2, len(refinement.values), device=device)
    entropies = []
    for example in batch:
        rows = _some(dice, example)
        masks = torch.stack([example.case.mask(example.row, example.values[row]) for row in rows])
        features, decoded = example.case.slice(example.row).to(device), example.decoded.to(device, torch.float32)
        logits = refinement.correct(features, decoded, example.values, rows)
        target, probability = shrink_masks(masks, logits.shape[-1]).to(device), logits.sigmoid()
        entropies.append(functional.binary_cross_entropy_with_logits(logits, target))
        found = torch.stack([2 * (probability * target).sum((1, 2)), (probability + target).sum((1, 2))])
        which = [refinement.values.index(example.values[row]) for row in rows]
        sums = sums.index_add(1, torch.tensor(which, device=device), found)
    overlap, total = sums[:, sums[1] > 0]
    return _ENTROPY * torch.stack(entropies).mean() + (1 - (overlap + 1) / (total + 1)).mean()


def _some(dice: Dice, example: Example) -> list[int]:
    """Up to four structures of a slice, those in it first."""
    present = example.present
    every = range(len(example.values))
    order = sorted(every, key=lambda row: (example.values[row] not in present, dice.uniform(0, 1)))
    return sorted(order[:_MOST_AT_ONCE])
