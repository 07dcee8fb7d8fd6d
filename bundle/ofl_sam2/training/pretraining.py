"""Pretrain nano on synthetic anatomy: SAM2's own objectives, joint stages, then learner and fusion on the result.

The stages share one time budget. At first the images are small, because a step then costs a quarter.
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ofl_sam2.atomic import atomic_path
from ofl_sam2.backbone.configs import backbone_config
from ofl_sam2.backbone.frozen import Decoded, ImageFeatures, SAM2Backbone
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.learner.load import shipped_learner
from ofl_sam2.progress import CancelToken
from ofl_sam2.training.checkpoint import resume
from ofl_sam2.training.episodes import Episode, unroll
from ofl_sam2.training.losses import segmentation_loss, shrink_masks
from ofl_sam2.training.processes import rank, synchronise
from ofl_sam2.training.schedule import learning_rate
from ofl_sam2.training.synthetic import Dice
from ofl_sam2.training.synthetic_episodes import Episodes, SyntheticEpisodes

_WARM_UP, _LEAST_RATE = 30, 0.1
_EMA = 0.998
_CHECKPOINT_SECONDS = 120
_TEACHER_FORCING = 0.3
FURTHER_SHARE = 0.6


@dataclass(frozen=True)
class Stage:
    """One part of the pretraining.

    Attributes:
        name: in logs and model card.
        share: of the time budget.
        size: image side in pixels.
        episodes, objects: per step.
        rate: peak learning rate.
        train_backbone: whether SAM2 is trained, with its memory alone.
        train_learner: whether learner and fusion are trained.
        memory_share: of the steps that train SAM2, how many train it with its memory alone, too.
    """

    name: str
    share: float
    size: int
    episodes: int
    objects: int
    rate: float
    train_backbone: bool
    train_learner: bool
    memory_share: float = 1.0


STAGES = (
    Stage("memory, small", 0.20, 128, 6, 3, 6e-4, True, False),
    Stage("joint, small", 0.35, 128, 6, 3, 6e-4, True, True, memory_share=0.4),
    Stage("joint", 0.25, 256, 4, 3, 4e-4, True, True, memory_share=0.4),
    Stage("learner", 0.20, 256, 4, 4, 1e-3, False, True),
)
FURTHER_STAGES = (
    Stage("joint", 0.82, 256, 3, 3, 1.5e-4, True, True, memory_share=0.4),
    Stage("learner", 0.18, 256, 3, 4, 4e-4, False, True),
)


@dataclass
class PretrainingState:
    """What a checkpoint holds: weights, their running averages, how much was done, and of which stages."""

    backbone: SAM2Backbone
    learner: FewShotLearner
    average: nn.ModuleDict
    further: bool
    step: int = 0
    spent: float = 0.0

    @classmethod
    def fresh(cls, seed: int) -> "PretrainingState":
        """Random weights, for `STAGES`."""
        torch.manual_seed(seed)
        backbone = SAM2Backbone(backbone_config("nano"))
        return cls._of(backbone, FewShotLearner(backbone.width), further=False)

    @classmethod
    def shipped(cls) -> "PretrainingState":
        """The weights of the package, for `FURTHER_STAGES`."""
        backbone = load_backbone("nano")
        return cls._of(backbone, shipped_learner("nano", backbone.width), further=True)

    @classmethod
    def _of(cls, backbone: SAM2Backbone, learner: FewShotLearner, further: bool) -> "PretrainingState":
        average = copy.deepcopy(nn.ModuleDict({"backbone": backbone, "learner": learner})).requires_grad_(False)
        return cls(backbone, learner, average, further)

    @torch.no_grad()
    def result(self) -> nn.ModuleDict:
        """The running averages; after further training, `FURTHER_SHARE` of them and the rest of the package's weights.

        Between both ends the weights are better than at either (Wortsman et al., CVPR 2022).
        """
        if not self.further:
            return self.average
        mixed = PretrainingState.shipped().average
        for value, trained in zip(mixed.parameters(), self.average.parameters(), strict=True):
            value.lerp_(trained.to(value), FURTHER_SHARE)
        return mixed

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically; with several processes the first one does."""
        if rank():
            return
        state = {
            "backbone": self.backbone.state_dict(),
            "learner": self.learner.state_dict(),
            "average": self.average.state_dict(),
            "further": self.further,
            "step": self.step,
            "spent": self.spent,
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    @classmethod
    def load(cls, path: Path) -> "PretrainingState":
        """Read a checkpoint.

        Raises:
            InputError: there is none, or it is damaged or of another network.
        """
        state = cls.fresh(0)

        def take(saved: dict[str, Any]) -> None:
            state.backbone.load_state_dict(saved["backbone"])
            state.learner.load_state_dict(saved["learner"])
            state.average.load_state_dict(saved["average"])
            state.further, state.step, state.spent = saved["further"], saved["step"], saved["spent"]

        resume(path, take)
        return state


@dataclass(frozen=True)
class StepReport:
    """One step: stage, number, share of the budget spent, loss, and Dice of the last query slice by branch."""

    stage: str
    step: int
    share: float
    loss: float
    memory_dice: float
    online_dice: float


def pretrain(
    state: PretrainingState,
    checkpoint: Path,
    minutes: float,
    device: str = "cpu",
    seed: int = 0,
    stages: tuple[Stage, ...] | None = None,
    cancel: CancelToken | None = None,
    workers: int = 1,
) -> Iterator[StepReport]:
    """Run what is left of a time budget, yielding a report per step and writing checkpoints.

    A stage that was interrupted goes on with a new optimizer and warm-up, one of the learner alone from the running
    average.

    Args:
        state: fresh, shipped, or loaded from a checkpoint; changed in place.
        checkpoint: where to save.
        minutes: the whole budget, including what the state has spent already.
        device: "cpu" or "cuda".
        seed: of the synthetic episodes.
        stages: their shares sum to 1; default by the state.
        cancel: to stop early; the checkpoint is written.
        workers: processes that draw synthetic volumes.
    """
    modules = nn.ModuleDict({"backbone": state.backbone, "learner": state.learner}).to(device)
    state.average.to(device)
    plan, ends = _Plan(checkpoint, 60 * minutes, device, seed, cancel or CancelToken(), workers), 0.0
    for stage in stages or (FURTHER_STAGES if state.further else STAGES):
        begins, ends = ends, ends + stage.share * plan.budget
        if state.spent >= ends:
            continue
        if not stage.train_backbone:
            modules.load_state_dict(state.average.state_dict())
        yield from _run_stage(state, stage, (begins, ends), plan)
        state.save(checkpoint)
        if plan.cancel.cancelled:
            return


@dataclass(frozen=True)
class _Plan:
    """What all stages share, see `pretrain`; `budget` in seconds."""

    checkpoint: Path
    budget: float
    device: str
    seed: int
    cancel: CancelToken
    workers: int


def _run_stage(state: PretrainingState, stage: Stage, window: tuple[float, float], plan: _Plan) -> Iterator[StepReport]:
    """Train until the seconds spent leave `window`."""
    state.backbone.resize(stage.size)
    state.backbone.requires_grad_(stage.train_backbone)
    state.learner.requires_grad_(stage.train_learner)
    trained = [p for p in (*state.backbone.parameters(), *state.learner.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.rate, weight_decay=0.02, betas=(0.9, 0.98))
    batches = _batches(stage, plan.seed + state.step, plan.workers)
    coin = Dice(torch.Generator().manual_seed(plan.seed + state.step))
    first, saved, clock = state.step, state.spent, time.perf_counter()
    while state.spent < window[1] and not plan.cancel.cancelled:
        done = (state.spent - window[0]) / (window[1] - window[0])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage.rate, state.step - first, done, _WARM_UP, _LEAST_RATE)
        memory = stage.train_backbone and coin.chance(stage.memory_share)
        outputs = _objective(state, stage, next(batches).to(plan.device), memory)
        pairs = [pair for branch in outputs for pair in branch]
        loss = torch.stack([segmentation_loss(*pair, presence=0.5, empty=0.5) for pair in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        before, clock = clock, time.perf_counter()
        (state.spent,) = synchronise(trained, state.spent + clock - before)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        state.step += 1
        _average(state)
        dice = [mean_dice(*branch[-1]) if branch else math.nan for branch in outputs]
        yield StepReport(stage.name, state.step, state.spent / plan.budget, loss.item(), *dice)
        if state.spent - saved > _CHECKPOINT_SECONDS:
            state.save(plan.checkpoint)
            saved = state.spent


def _batches(stage: Stage, seed: int, workers: int) -> Iterator[Episodes]:
    data = SyntheticEpisodes(stage.size, stage.episodes, stage.objects, seed=seed, process=rank())
    return iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def _objective(
    state: PretrainingState, stage: Stage, batch: Episodes, memory: bool
) -> list[list[tuple[Decoded, Tensor]]]:
    """Decoded queries and their masks, for the memory branch and for the online branch; none where not wanted."""
    with torch.set_grad_enabled(stage.train_backbone):
        episode = to_episode(state.backbone, batch)
    branches: list[list[tuple[Decoded, Tensor]]] = [[], []]
    learners: Iterable[FewShotLearner | None] = [None] * memory + [state.learner] * stage.train_learner
    for learner in learners:
        outputs = unroll(state.backbone, learner, episode, _TEACHER_FORCING)
        branches[learner is not None] = list(zip(outputs, episode.query_masks, strict=True))
    return branches


def to_episode(backbone: SAM2Backbone, batch: Episodes) -> Episode:
    """Encode all images of a batch once and line its E x O objects up."""
    episodes, supports, objects = batch.support_masks.shape[:3]
    images = torch.cat([batch.support_images, batch.query_images], 1)
    features = backbone.encode_images(images.flatten(0, 1)[:, None].expand(-1, 3, -1, -1))
    masks = torch.cat([batch.support_masks, batch.query_masks], 1)
    rows = torch.arange(episodes, device=images.device).repeat_interleave(objects) * images.shape[1]

    def column(first: int, last: int) -> tuple[list[ImageFeatures], list[Tensor]]:
        return [features[rows + i] for i in range(first, last)], [masks[:, i].flatten(0, 1) for i in range(first, last)]

    support_features, support_masks = column(0, supports)
    memories = [backbone.remember_mask(*pair) for pair in zip(support_features, support_masks, strict=True)]
    supported = memories, [f.stride16 for f in support_features], support_masks
    return Episode(*supported, *column(supports, images.shape[1]), sizes=(objects,) * episodes)


@torch.no_grad()
def mean_dice(decoded: Decoded, masks: Tensor) -> float:
    """Mean Dice of the objects that are present, at logit size."""
    predicted, true = decoded.masks() > 0, shrink_masks(masks, decoded.logits.shape[-1]) > 0.5
    overlap, total = (predicted & true).flatten(1).sum(1), predicted.flatten(1).sum(1) + true.flatten(1).sum(1)
    present = true.flatten(1).any(1)
    return float((2 * overlap / total.clamp_min(1))[present].mean())


@torch.no_grad()
def _average(state: PretrainingState) -> None:
    decay = min(_EMA, (1 + state.step) / (20 + state.step))
    current = (*state.backbone.parameters(), *state.learner.parameters())
    for mean, value in zip(state.average.parameters(), current, strict=True):
        mean.lerp_(value, 1 - decay)
