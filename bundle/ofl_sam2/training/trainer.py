"""Fit learner and fusion to labelled volumes, then a 3D U-Net, each for its share of the time."""

import copy
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from ignite.engine import Engine

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.drawing import is_averaged
from ofl_sam2.errors import InputError
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.looks import Viewpoint
from ofl_sam2.progress import CancelToken, Progress, Watch
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.copies import FreshCopies
from ofl_sam2.training.episode_training import EpisodeTraining
from ofl_sam2.training.held_out import ENOUGH_CASES, HeldOut
from ofl_sam2.training.judge import Judge
from ofl_sam2.training.processes import rank, wait, world_size
from ofl_sam2.training.settings import EpochReport, TrainingResult, TrainingSettings

_SLICES_PER_MINUTE, _COPIES = 80, 0.25
_MOST_ASIDE, _JUDGING = 0.5, 0.1
_UNET, _MANY_UNET, _MINUTES_FOR_BOTH = 0.4, 0.6, 2.0


def train(
    segmenter: VolumeSegmenter,
    cases: Sequence[LabelledCase],
    settings: TrainingSettings | None = None,
    checkpoint: Path | None = None,
    report: Callable[[EpochReport], None] | None = None,
    encoded: Progress | None = None,
    cancel: CancelToken | None = None,
    attach: Callable[[Engine], None] | None = None,
    fitted: Collection[str] = (),
) -> TrainingResult:
    """Fit learner and fusion of a segmenter that has learned these cases; SAM2 stays as it is.

    What is fitted is the running average of the parameters over the last steps, on augmented copies that never repeat.
    A part of the time is for a 3D U-Net, unless a volume is too large to average probabilities in; with one case, or
    in less than two minutes, all of it, if the learner was fitted before. A part of the labels is held out; fitted
    parameters that are not better on it are dropped. So is the U-Net if it does not help what was kept, in a case that
    it has not seen, or in slices of a lone one; once it has helped, it learns from all labels, and takes the place of
    an earlier one, which has seen what is held out and so cannot be compared. Under `torch.distributed` the processes
    share the episodes of each step.

    Args:
        segmenter: changed in place when training ends, also when it is cancelled after the first epoch.
        cases: the labelled volumes.
        settings: how long and how.
        checkpoint: file that lets an interrupted training go on; deleted when training ends.
        report: called after each epoch.
        encoded: called with (done, total) slices while copies are encoded.
        cancel: to stop at the next step.
        attach: called with the engine before it runs; its output is the loss of a step. At the end of an epoch the
            segmenter has what is fitted so far.
        fitted: names of the cases of earlier trainings; others are held out where there are any.

    Raises:
        InputError: the segmenter has not learned yet, or there are more processes than episodes.
        ModelError: the checkpoint is damaged.
    """
    settings = settings or TrainingSettings()
    if segmenter.viewpoint is None:
        raise InputError("Learn the labels first, then train.")
    if world_size() > settings.episodes:
        raise InputError(
            f"{world_size()} processes cannot share {settings.episodes} episodes. Give as many episodes as processes."
        )
    grids = {case.volume.name: case.volume.grid for case in cases}
    names = list(grids)
    judge = Judge(segmenter, cases, names, fitted, cancel)
    share = _unet_share(segmenter, grids.values(), settings.minutes) if judge.held_out.rows else 0.0
    alone = judge.begin(_bounded(_JUDGING * 60 * settings.minutes)) if share else None
    result = TrainingResult([], alone, None, False)
    if share < 1:
        result = _fit_learner(
            segmenter, cases, names, fitted, settings, 1 - share, checkpoint, report, encoded, cancel, attach
        )
    reports = result.reports
    if share:
        unet = _fit_unet(segmenter, cases, judge, settings, share, reports, report, cancel)
        if unet:
            segmenter.unet = unet
        if unet or share == 1:
            result = TrainingResult(reports, alone, judge.dice, unet is not None)
    segmenter.solve()
    wait()
    if checkpoint is not None and rank() == 0:
        checkpoint.unlink(missing_ok=True)
    return result


def _fit_learner(
    segmenter: VolumeSegmenter,
    cases: Sequence[LabelledCase],
    names: Sequence[str],
    fitted: Collection[str],
    settings: TrainingSettings,
    share: float,
    checkpoint: Path | None,
    report: Callable[[EpochReport], None] | None,
    encoded: Progress | None,
    cancel: CancelToken | None,
    attach: Callable[[Engine], None] | None,
) -> TrainingResult:
    """Fit learner and fusion in their share of the time, see `train`."""
    started = time.perf_counter()
    pooled = [c for pool in segmenter.pools.values() for c in pool.cases.values() if c.name in names]
    held_out = HeldOut.choose(pooled, structures=segmenter.structures, fitted=fitted).with_close_ups(segmenter)
    if not any(rest.known & segmenter.structures.keys() for c in pooled if (rest := held_out.without(c))):
        held_out = HeldOut({})  # nothing else teaches
    seconds = 60 * settings.minutes * share
    bounds = settings.max_slices, _SLICES_PER_MINUTE * seconds / 60, _COPIES * seconds / _seconds_a_slice(segmenter)
    room = round(min(bounds))
    copies = FreshCopies(segmenter, cases, names, held_out, settings.copies, room, settings.seed)
    run = EpisodeTraining(segmenter, copies, settings, seconds)
    if checkpoint is not None and checkpoint.is_file():
        run.resume(checkpoint)
    copies.start(run.steps, Watch(encoded, cancel))
    encoding, started = time.perf_counter() - started, time.perf_counter()
    held_out, before = held_out.affordable(segmenter, _bounded((_MOST_ASIDE * run.budget - encoding) / 2), cancel)
    scoring = 2 * (time.perf_counter() - started)
    run.set_aside(min(encoding + scoring, _MOST_ASIDE * run.budget))
    old = copy.deepcopy(segmenter.learner.state_dict())
    reports = run.run(checkpoint, report, cancel, attach)
    run.show()
    after = held_out.dice(segmenter)
    improved = before is None or after is None or after > before
    if not improved:
        segmenter.learner.load_state_dict(old)
    return TrainingResult(reports, before, after, improved)


def _bounded(seconds: float) -> float:
    """How long may be scored; several processes score everything, so that they decide alike."""
    return seconds if world_size() == 1 else math.inf


@torch.no_grad()
def _seconds_a_slice(segmenter: VolumeSegmenter) -> float:
    """How long SAM2 takes to encode a slice."""
    side = segmenter.backbone.image_size
    blank = torch.zeros(1, 3, side, side, device=segmenter.device)
    for _ in range(2):  # the first time, memory is made ready
        started = time.perf_counter()
        segmenter.backbone.encode_images(blank).stride16.sum().item()
    return max(time.perf_counter() - started, 1e-6)


def _unet_share(segmenter: VolumeSegmenter, grids: Collection[tuple[int, ...]], minutes: float) -> float:
    """Share of the time for the U-Net; none if a volume is too large to average probabilities in.

    It is smaller where the learner needs the time: with few cases, or if it was never fitted. One that was is left as
    it is if there is little time, and with a lone case: the neighbours of held-out slices do not tell what it draws in
    other cases.
    """
    if not all(is_averaged(grid, len(segmenter.structures)) for grid in grids):
        return 0.0
    if not segmenter.learner.fitted:
        return _UNET
    if len(grids) == 1 or minutes < _MINUTES_FOR_BOTH:
        return 1.0
    return _MANY_UNET if len(grids) >= ENOUGH_CASES else _UNET


def _fit_unet(
    segmenter: VolumeSegmenter,
    cases: Sequence[LabelledCase],
    judge: Judge,
    settings: TrainingSettings,
    share: float,
    reports: list[EpochReport],
    report: Callable[[EpochReport], None] | None,
    cancel: CancelToken | None,
) -> VoxelUNet | None:
    """Fit the U-Net in its share of the time; it takes as many steps as the epochs have, if they are limited.

    They are its own epochs in `reports` if there are none.
    """
    from ofl_sam2.training.voxels import fit_unet  # MONAI takes seconds to import

    seconds, spent = 60 * settings.minutes * share, reports[-1].seconds if reports else 0.0
    first, losses = not reports, list[float]()

    def tell(done: float, loss: float) -> None:
        shared, now = 1 - (1 - done) * share, spent + done * seconds
        losses.append(loss)
        if first and (len(losses) == settings.steps_per_epoch or done >= 1):
            reports.append(EpochReport(len(reports) + 1, sum(losses) / len(losses), shared, now))
            losses.clear()
        if report and reports:
            report(replace(reports[-1], share=shared, seconds=now))

    steps = settings.epochs and settings.epochs * settings.steps_per_epoch
    values, viewpoint = tuple(segmenter.structures), cast(Viewpoint, segmenter.viewpoint)
    return fit_unet(
        viewpoint,
        cases,
        values,
        judge.seen,
        judge.helps,
        seconds,
        steps,
        settings.seed,
        segmenter.device,
        tell,
        cancel,
    )
