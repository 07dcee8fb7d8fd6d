"""The label map in the making: slices and windows are painted onto it in the volume's own grid."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LOGIT_LIMIT = 30.0


class Canvas:
    """Labels of K structures in the grid of a volume.

    Args:
        grid: of the volume.
        values: K label values.
        overlap: structures may overlap; then `labels` is `(K, *grid)`, one binary map each.
        repaint: parts will be painted again.
    """

    def __init__(self, grid: tuple[int, ...], values: tuple[int, ...], overlap: bool, repaint: bool) -> None:
        self.values, self.overlap = values, overlap
        dtype = np.uint8 if overlap else np.min_scalar_type(max(values))
        self.labels = np.zeros((len(values), *grid) if overlap else grid, dtype)
        self._best = None if overlap or not repaint else np.full(grid, -LOGIT_LIMIT, np.float16)

    def mask(self, value: int) -> NDArray[np.bool_]:
        """Where a structure is."""
        return self.labels[self.values.index(value)] > 0 if self.overlap else self.labels == value

    def erase(self, values: Collection[int]) -> None:
        """Take structures off."""
        if self.overlap:
            self.labels[[self.values.index(value) for value in values]] = 0
            return
        gone = np.isin(self.labels, list(values))
        self.labels[gone] = 0
        if self._best is not None:
            self._best[gone] = -LOGIT_LIMIT

    def paint(
        self, part: Callable[[NDArray[Any]], NDArray[Any]], logits: Tensor, values: tuple[int, ...]
    ) -> NDArray[np.bool_]:
        """Draw structures where they are likelier than the background and than what is there.

        Args:
            part: views the part of an array in the grid that is painted.
            logits: `(k, ...)` of that part.
            values: the k structures.

        Returns:
            Whether each of them was drawn anywhere, `(k,)`.
        """
        if self.overlap:
            masks = (logits > 0).numpy()
            for mask, value in zip(masks, values, strict=True):
                part(self.labels[self.values.index(value)])[...] = mask
            return masks.reshape(len(values), -1).any(1)
        winner = merge(logits).numpy()
        target = part(self.labels)
        if self._best is None:
            target[...] = np.array([0, *values])[winner]
        else:
            top, best = logits.amax(0).numpy(), part(self._best)
            won = (winner > 0) & (top > best)
            target[won], best[won] = np.array([0, *values])[winner[won]], top[won]
        return np.bincount(winner.ravel(), minlength=len(values) + 1)[1:] > 0


def merge(logits: Tensor) -> Tensor:
    """Winner per pixel, 0 the background: softmax over logits with p_0 = prod(1 - p_i).

    Args:
        logits: `(K, ...)`.

    Returns:
        int64 in 0..K, of the other axes.

    Example:
        >>> merge(torch.tensor([[[2.0]], [[-1.0]]])).item()
        1
    """
    log_background = torch.nn.functional.logsigmoid(-logits).sum(0, keepdim=True)
    background = log_background - torch.log1p(-log_background.exp().clamp_max(1 - 1e-7))
    return torch.cat([background, logits]).argmax(0)
