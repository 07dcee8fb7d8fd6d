"""Fit learner and fusion to labelled volumes: an Ignite engine over few-shot episodes on cached frozen features.

A 3D U-Net is fitted to the same labels afterwards, see `training.voxels`.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ofl_sam2.atomic import atomic_path
from ofl_sam2.dataset import LabelledCase
from ofl_sam2.drawing import is_averaged
from ofl_sam2.errors import InputError, ModelError
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.looks import Viewpoint
from ofl_sam2.memory.pool import MAIN, PooledCase
from ofl_sam2.progress import CancelToken, Progress, Watch
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.bank import EpisodeBank
from ofl_sam2.training.copies import FreshCopies
from ofl_sam2.training.episodes import unroll
from ofl_sam2.training.held_out import ENOUGH_CASES, HeldOut
from ofl_sam2.training.losses import segmentation_loss
from ofl_sam2.training.processes import rank, synchronise, wait, world_size
from ofl_sam2.training.schedule import learning_rate
from ofl_sam2.training.synthetic import Dice

_ENDLESS = 10**6
_SLICES_PER_MINUTE = 80
_MOST_ASIDE = 0.5
_UNET, _MANY_UNET, _MINUTES_FOR_BOTH = 0.4, 0.6, 2.0
_AVERAGED = 0.98
_WARM_UP, _LEAST_RATE = 20, 0.05


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how to train.

    Attributes:
        minutes: wall time; encoding and scoring count, but leave at least half of it to the episodes.
        epochs: limit in epochs, if given; whichever comes first. The learning rate then falls with the epochs, not with
            the time, so that a seed reproduces the result.
        steps_per_epoch: steps between two reports and checkpoints.
        episodes: per step.
        rate: peak learning rate of AdamW; the projection P learns at `projection_rate` times it.
        projection_rate: see `rate`.
        copies: most augmented copies of each view of a volume at hand; each step draws a part of another one.
        max_slices: bound on the slices (copies included) held in memory; short trainings start with fewer copies.
        seed: of augmentation and episodes.
    """

    minutes: float = 5.0
    epochs: int | None = None
    steps_per_epoch: int = 10
    episodes: int = 2
    rate: float = 5e-4
    projection_rate: float = 0.2
    copies: int = 8
    max_slices: int = 1200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or (self.epochs is not None and self.epochs <= 0):
            raise InputError("Training needs a positive number of minutes and epochs.")


@dataclass(frozen=True)
class EpochReport:
    """Progress of a training: epoch, its mean loss, share of the budget used in [0, 1], seconds so far."""

    epoch: int
    loss: float
    share: float
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        reports: of all epochs, those before a resume included.
        dice_before, dice_after: on held-out labelled slices, in [0, 1], of the old state and of the fitted one; with
            the U-Net, if it was kept, as it was before it saw them. None where there are too few to hold any out.
        improved: whether something fitted was kept; without held-out slices it is.
    """

    reports: list[EpochReport]
    dice_before: float | None
    dice_after: float | None
    improved: bool


def train(
    segmenter: VolumeSegmenter,
    cases: Sequence[LabelledCase],
    settings: TrainingSettings | None = None,
    checkpoint: Path | None = None,
    report: Callable[[EpochReport], None] | None = None,
    encoded: Progress | None = None,
    cancel: CancelToken | None = None,
    attach: Callable[[Engine], None] | None = None,
) -> TrainingResult:
    """Fit learner and fusion of a segmenter that has learned these cases; SAM2 stays as it is.

    What is fitted is the running average of the parameters over the last steps, on augmented copies that never repeat.
    A part of the time is for a 3D U-Net, unless a volume is too large to average probabilities in; with one case, or
    in less than two minutes, all of it, if the learner was fitted before. A part of the labels is held out; fitted
    parameters that are not better on it are dropped. So is the U-Net if it does not help what was kept, in a case that
    it has not seen, or in slices of a lone one; once it has helped, it learns from all labels. Under
    `torch.distributed` the processes share the episodes of each step.

    Args:
        segmenter: changed in place when training ends, also when it is cancelled after the first epoch.
        cases: the labelled volumes.
        settings: how long and how.
        checkpoint: file that lets an interrupted training go on; deleted when training ends.
        report: called after each epoch.
        encoded: called with (done, total) slices while copies are encoded.
        cancel: to stop at the next step.
        attach: called with the engine before it runs; its output is the loss of a step.

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
    judge = _Judge(segmenter, cases)
    share = _unet_share(segmenter, cases, settings.minutes) if judge.held_out.rows else 0.0
    alone = judge.held_out.dice(segmenter) if share else None
    result = TrainingResult([], alone, None, False)
    if share < 1:
        result = _fit_learner(segmenter, cases, settings, 1 - share, checkpoint, report, encoded, cancel, attach)
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
    names = [case.volume.name for case in cases]
    held_out = HeldOut.choose([c for pool in segmenter.pools.values() for c in pool.cases.values() if c.name in names])
    room = min(settings.max_slices, round(_SLICES_PER_MINUTE * settings.minutes * share))
    copies = FreshCopies(segmenter, cases, names, held_out, settings.copies, room, settings.seed)
    run = _Training(segmenter, copies, settings, 60 * settings.minutes * share)
    if checkpoint is not None and checkpoint.is_file():
        run.resume(checkpoint)
    copies.start(run.steps, Watch(encoded, cancel))
    encoding, started = time.perf_counter() - started, time.perf_counter()
    before = held_out.dice(segmenter)
    scoring = 2 * (time.perf_counter() - started)
    run.spent = max(run.spent, min(encoding + scoring, _MOST_ASIDE * run.budget))
    reports = run.run(checkpoint, report, cancel, attach)
    old = copy.deepcopy(segmenter.learner.state_dict())
    segmenter.learner.load_state_dict(run.average.module.state_dict())
    after = held_out.dice(segmenter)
    improved = before is None or after is None or after > before
    if not improved:
        segmenter.learner.load_state_dict(old)
    return TrainingResult(reports, before, after, improved)


def _unet_share(segmenter: VolumeSegmenter, cases: Sequence[LabelledCase], minutes: float) -> float:
    """Share of the time for the U-Net; none if a volume is too large to average probabilities in.

    It is smaller where the learner needs the time: with few cases, or if it was never fitted. One that was is left as
    it is if there is little time, and with a lone case: the neighbours of held-out slices do not tell what it draws in
    other cases.
    """
    if not all(is_averaged(case.volume.grid, len(segmenter.structures)) for case in cases):
        return 0.0
    if not segmenter.learner.fitted:
        return _UNET
    if len(cases) == 1 or minutes < _MINUTES_FOR_BOTH:
        return 1.0
    return _MANY_UNET if len(cases) >= ENOUGH_CASES else _UNET


class _Judge:
    """Whether a U-Net helps in slices of the main view that it has not seen: of whole cases if there are two.

    Attributes:
        held_out: these slices.
        early: the other labels.
        dice: on them, with the last U-Net asked about.
    """

    def __init__(self, segmenter: VolumeSegmenter, cases: Sequence[LabelledCase]) -> None:
        pooled = {case.volume.name: segmenter.pool.cases[case.volume.name] for case in cases}
        self.segmenter, self.cases = segmenter, cases
        self.held_out = HeldOut.choose(list(pooled.values()), enough=2)
        seen = [self.held_out.seen(case, pooled[case.volume.name]) for case in cases]
        self.early = [case for case in seen if case]
        self.dice: float | None = None

    def helps(self, unet: VoxelUNet) -> bool:
        """Whether the average with a U-Net is better than what the segmenter draws without."""
        apart = [case for case in self.cases if (MAIN, case.volume.name) in self.held_out.rows]
        seconds = self.held_out.drawn_by(unet, self.segmenter, apart)
        without = self.held_out.dice(self.segmenter)
        self.dice = self.held_out.dice(self.segmenter, seconds)
        return without is not None and self.dice is not None and self.dice > without


def _fit_unet(
    segmenter: VolumeSegmenter,
    cases: Sequence[LabelledCase],
    judge: _Judge,
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
        judge.early,
        judge.helps,
        seconds,
        steps,
        settings.seed,
        segmenter.device,
        tell,
        cancel,
    )


class _Training:
    """The engine, its optimizer and what a checkpoint needs; `budget` in seconds."""

    def __init__(
        self, segmenter: VolumeSegmenter, copies: FreshCopies, settings: TrainingSettings, budget: float
    ) -> None:
        self.copies, self.settings, self.budget = copies, settings, budget
        self.backbone = segmenter.backbone
        self.learner = copy.deepcopy(segmenter.learner)
        self.average = AveragedModel(self.learner, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGED))
        self.bank = EpisodeBank(segmenter.backbone, copies.volumes, tuple(segmenter.structures))
        self.dice = Dice(torch.Generator().manual_seed(settings.seed + 1))
        projection = list(self.learner.projection.parameters())
        others = [p for p in self.learner.parameters() if all(p is not q for q in projection)]
        self.optimizer = torch.optim.AdamW(
            [{"params": projection, "scale": settings.projection_rate}, {"params": others, "scale": 1.0}],
            lr=settings.rate,
        )
        self.reports: list[EpochReport] = []
        self.epochs, self.spent = 0, 0.0
        self.fingerprint = _fingerprint(segmenter, copies.originals, settings)

    @property
    def steps(self) -> int:
        """Steps taken so far, those before a resume included."""
        return int(self.average.n_averaged)

    def run(
        self,
        checkpoint: Path | None,
        report: Callable[[EpochReport], None] | None,
        cancel: CancelToken | None,
        attach: Callable[[Engine], None] | None,
    ) -> list[EpochReport]:
        engine = Engine(self._step)
        losses: list[float] = []

        @engine.on(Events.ITERATION_COMPLETED)
        def _watch(engine: Engine) -> None:
            losses.append(engine.state.output)
            if self._share() >= 1 or (cancel and cancel.cancelled):
                engine.terminate()

        @engine.on(Events.EPOCH_COMPLETED | Events.TERMINATE)
        def _report(engine: Engine) -> None:
            if not losses:
                return
            self.epochs += 1
            share = min(1.0, self._share()) * self.budget / (60 * self.settings.minutes)
            entry = EpochReport(self.epochs, sum(losses) / len(losses), share, self.spent)
            losses.clear()
            self.reports.append(entry)
            if checkpoint is not None and rank() == 0:
                self.save(checkpoint)
            if report:
                report(entry)

        total, steps = self.settings.epochs or _ENDLESS, self.settings.steps_per_epoch
        if attach:
            attach(engine)
        if self.epochs < total and self._share() < 1:
            engine.load_state_dict({"epoch": self.epochs, "max_epochs": total, "epoch_length": steps})
            engine.run([None] * steps)
        return self.reports

    def _by_time(self) -> float:
        return self.spent / self.budget

    def _by_epochs(self) -> float:
        return self.epochs / self.settings.epochs if self.settings.epochs else 0.0

    def _share(self) -> float:
        return max(self._by_time(), self._by_epochs())

    def _step(self, engine: Engine, _: Any) -> float:
        started = time.perf_counter()
        done = self._by_epochs() if self.settings.epochs else min(1.0, self._by_time())
        rate = learning_rate(self.settings.rate, self.steps, done, _WARM_UP, _LEAST_RATE)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.copies.step()
        self.bank.replace(self.copies.volumes)
        episode = self.bank.draw(self.dice, self.settings.episodes)
        outputs = unroll(self.backbone, self.learner, episode)
        parts = torch.arange(sum(episode.sizes)).split(episode.sizes)
        losses = [
            segmentation_loss(decoded[part], masks[part], presence=1.0, empty=1.0)
            for decoded, masks in zip(outputs, episode.query_masks, strict=True)
            for part in parts
        ]
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.learner.parameters())
        spent, mean_loss = synchronise(parameters, time.perf_counter() - started, loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.learner)
        self.spent += spent
        return mean_loss

    def save(self, path: Path) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "learner": self.learner.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.dice.generator.get_state(),
            "reports": [vars(entry) for entry in self.reports],
            "spent": self.spent,
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same labels and settings; ignore one of others."""
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            fingerprint = state["fingerprint"]
        except Exception as error:
            raise ModelError(f"The training checkpoint {path} is damaged. Delete it and train again.") from error
        if fingerprint != self.fingerprint:
            return
        self.learner.load_state_dict(state["learner"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.dice.generator.set_state(state["generator"])
        self.reports = [EpochReport(**entry) for entry in state["reports"]]
        self.epochs, self.spent = len(self.reports), state["spent"]


def _fingerprint(segmenter: VolumeSegmenter, volumes: Sequence[PooledCase], settings: TrainingSettings) -> str:
    """Identifies what is trained on and how."""
    learner = segmenter.learner
    layout = (learner.kind, learner.inputs, learner.encoding)
    digest = hashlib.sha256(f"{segmenter.backbone_hash}{layout}{settings}{segmenter.structures}".encode())
    for volume in volumes:
        digest.update(volume.name.encode())
        digest.update(volume.labels.numpy().tobytes())
    return digest.hexdigest()
