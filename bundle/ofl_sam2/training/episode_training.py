"""Fit learner and fusion: an Ignite engine over few-shot episodes on cached frozen features."""

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ofl_sam2.atomic import atomic_path
from ofl_sam2.errors import ModelError
from ofl_sam2.memory.pool import PooledCase
from ofl_sam2.progress import CancelToken
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.bank import EpisodeBank
from ofl_sam2.training.copies import FreshCopies
from ofl_sam2.training.episodes import unroll
from ofl_sam2.training.losses import segmentation_loss
from ofl_sam2.training.processes import rank, synchronise
from ofl_sam2.training.schedule import learning_rate
from ofl_sam2.training.settings import EpochReport, TrainingSettings
from ofl_sam2.training.synthetic import Dice

_ENDLESS = 10**6
_AVERAGED = 0.98
_WARM_UP, _LEAST_RATE = 20, 0.05


class EpisodeTraining:
    """The engine, its optimizer and what a checkpoint needs; `budget` in seconds."""

    def __init__(
        self, segmenter: VolumeSegmenter, copies: FreshCopies, settings: TrainingSettings, budget: float
    ) -> None:
        self.copies, self.settings, self.budget = copies, settings, budget
        self.backbone, self._shown = segmenter.backbone, segmenter.learner
        self.learner = copy.deepcopy(segmenter.learner)
        self.average = AveragedModel(self.learner, multi_avg_fn=_average)
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

    def set_aside(self, seconds: float) -> None:
        """Count time that was spent before the first step; all processes count alike, so that they end together."""
        (mean,) = synchronise(list(self.learner.parameters()), seconds)
        self.spent = max(self.spent, mean)

    def show(self) -> None:
        """Let the segmenter's learner have what is fitted so far."""
        self._shown.load_state_dict(self.average.module.state_dict())

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
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.show)
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
        value = loss.item()  # waits for a GPU
        spent, mean_loss = synchronise(parameters, time.perf_counter() - started, value)
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


@torch.no_grad()
def _average(averaged: Sequence[Tensor], current: Sequence[Tensor], steps: Tensor | int) -> None:
    """The mean of the first fifty steps, then the exponential running average."""
    for mean, value in zip(averaged, current, strict=True):
        mean.lerp_(value, max(1 - _AVERAGED, 1 / (int(steps) + 1)))


def _fingerprint(segmenter: VolumeSegmenter, volumes: Sequence[PooledCase], settings: TrainingSettings) -> str:
    """Identifies what is trained on and how."""
    learner = segmenter.learner
    layout = (learner.kind, learner.inputs, learner.encoding)
    digest = hashlib.sha256(f"{segmenter.backbone_hash}{layout}{settings}{segmenter.structures}".encode())
    for volume in volumes:
        digest.update(volume.name.encode())
        digest.update(volume.labels.numpy().tobytes())
    return digest.hexdigest()
