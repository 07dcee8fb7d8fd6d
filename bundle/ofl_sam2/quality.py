"""How far to trust a result: confidence per slice, quality per structure and volume."""

import torch
from torch import Tensor

from ofl_sam2.backbone.frozen import Decoded


def confidence(decoded: Decoded) -> Tensor:
    """Confidence `(B,)` in [0, 1].

    sigmoid(object score) x predicted IoU where the object is judged present, 1 - sigmoid(object score) where absent.
    Mask and IoU come from the same output token.
    """
    presence = decoded.presence.sigmoid()
    return torch.where(decoded.presence > 0, presence * decoded.iou, 1 - presence)


class ExpectedDice:
    """Quality of K structures: the Dice that their probabilities let expect of what is drawn.

    The sum of 2 p over the voxels drawn, divided by their number plus the sum of p over all voxels. Where views agree,
    probabilities are near 0 or 1, and this is near 1.
    """

    def __init__(self, count: int) -> None:
        self._agreed, self._total = torch.zeros(count), torch.zeros(count)

    def forget(self, rows: list[int]) -> None:
        """Start anew for some structures."""
        self._agreed[rows] = self._total[rows] = 0

    def add(self, rows: list[int], probabilities: Tensor, masks: Tensor) -> None:
        """Count probabilities and drawn masks `(k, ...)` of some structures in a part of the volume."""
        probability, drawn = probabilities.flatten(1), masks.flatten(1)
        self._agreed[rows] += 2 * (probability * drawn).sum(1)
        self._total[rows] += drawn.sum(1) + probability.sum(1)

    def quality(self, confidences: Tensor) -> Tensor:
        """Quality `(K,)` in [0, 1]; of a structure that was not drawn the mean of its `confidences (S, K)`."""
        drawn = self._agreed > 0
        return torch.where(drawn, self._agreed / self._total.clamp_min(1e-6), confidences.mean(0))
