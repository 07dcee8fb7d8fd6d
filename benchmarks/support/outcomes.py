"""The methods of the label-efficiency table: learn a task within a budget, then segment its queries."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ignite.engine import Engine

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.segmenter import with_settings
from ofl_sam2.training.settings import TrainingSettings
from ofl_sam2.training.trainer import train
from ofl_sam2.volume import Volume

from . import nano
from .peers import PEERS, train_peer

UNTRAINED = {"memory": {"online_branch": False}, "learn": {}, "ridge": {"exact_ridge": True}}
METHODS = (*UNTRAINED, "train", *PEERS)


@dataclass(frozen=True)
class Fitted:
    """A method that is ready to segment.

    Attributes:
        seconds: wall time until then.
        cpu_seconds: CPU time of all threads until then.
        steps: optimizer steps.
        segment: volume -> label values in its grid.
        details: what else is worth a cell.
    """

    seconds: float
    cpu_seconds: float
    steps: int
    segment: Callable[[Volume], np.ndarray] = field(repr=False)
    details: dict[str, Any] = field(default_factory=dict)


def fit(method: str, budget: float, cases: Sequence[LabelledCase], structures: dict[int, str], seed: int = 0) -> Fitted:
    """Learn labelled volumes by one of `METHODS`.

    Args:
        method: of `METHODS`.
        budget: wall time in seconds; 0 for the methods without training.
        cases: the labelled volumes.
        structures: {label value: name}.
        seed: of training.
    """
    if method in PEERS:
        wall, cpu = time.perf_counter(), time.process_time()
        peer = train_peer(method, cases, structures, budget, seed)
        return Fitted(time.perf_counter() - wall, time.process_time() - cpu, peer.steps, peer.segment)
    segmenter, steps, details = with_settings(nano(), **UNTRAINED.get(method, {})), 0, {}
    wall, cpu = time.perf_counter(), time.process_time()
    segmenter.learn(cases, structures)
    if method == "train":
        left = budget - (time.perf_counter() - wall)
        steps, details = _train(segmenter, cases, max(left, budget / 2), seed)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Fitted(seconds, cpu_seconds, steps, lambda volume: segmenter.segment(volume).labels, details)


def _train(segmenter, cases: Sequence[LabelledCase], seconds: float, seed: int) -> tuple[int, dict[str, Any]]:
    """Steps, and what training found on held-out slices."""
    engines: list[Engine] = []
    settings = TrainingSettings(minutes=seconds / 60, seed=seed)
    result = train(segmenter, cases, settings, attach=engines.append)
    found = {"held_out_before": result.dice_before, "held_out_after": result.dice_after}
    kept = {"improved": result.improved, "unet": segmenter.unet is not None}
    return engines[0].state.iteration if engines else 0, {**kept, **found}
