"""The learning rate over a training."""

import math


def learning_rate(peak: float, step: int, done: float, warm_up: int, least: float = 0.0) -> float:
    """After a linear warm-up a cosine decay to a part of the peak.

    Args:
        peak: the highest rate.
        step: number of the step, from 0.
        done: share of the training in [0, 1].
        warm_up: steps until the peak.
        least: part of the peak that is left at the end.
    """
    warm = min(1.0, (step + 1) / warm_up)
    return peak * warm * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))
