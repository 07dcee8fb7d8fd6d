"""How to train, how it goes on, and what it came to."""

import math
from dataclasses import dataclass

from ofl_sam2.errors import InputError


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
        if not 0 < self.minutes < math.inf or (self.epochs is not None and self.epochs <= 0):
            raise InputError("Training needs a finite, positive number of minutes and epochs.")


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
