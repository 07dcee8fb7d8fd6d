"""How far to trust a result: confidence per slice, quality per structure and volume."""

import math
from collections.abc import Sequence

import torch
from scipy.ndimage import find_objects, gaussian_filter
from torch import Tensor

from ofl_sam2.backbone.frozen import Decoded

_TRUNCATE = 4.0


def confidence(decoded: Decoded) -> Tensor:
    """Confidence `(B,)` in [0, 1].

    sigmoid(object score) x predicted IoU where the object is judged present, 1 - sigmoid(object score) where absent.
    Mask and IoU come from the same output token.
    """
    presence = decoded.presence.sigmoid()
    return torch.where(decoded.presence > 0, presence * decoded.iou, 1 - presence)


class Quality:
    """Quality of K structures: how sure their voxels are, and how far they lie from where a mask may be wrong.

    The geometric mean of two means over the drawn voxels: of their probabilities, and of the mask after a Gaussian,
    the Dice that is left where the surface is as uncertain as that. It is lower for small and thin structures.
    """

    def __init__(self, count: int) -> None:
        self._sure, self._inside, self._drawn = torch.zeros(count), torch.zeros(count), torch.zeros(count)

    def forget(self, rows: list[int]) -> None:
        """Start anew for some structures."""
        self._sure[rows] = self._inside[rows] = self._drawn[rows] = 0

    def add(self, rows: list[int], probabilities: Tensor, masks: Tensor, widths: Sequence[float]) -> None:
        """Count a part of the volume.

        Args:
            rows: of the k structures.
            probabilities: `(k, ...)`.
            masks: what is drawn, bool, `(k, ...)`.
            widths: of the Gaussian in voxels, one for each axis of a mask.
        """
        reaches = [math.ceil(_TRUNCATE * width) for width in widths]
        for row, probability, mask in zip(rows, probabilities, masks, strict=True):
            for box in find_objects(mask.byte().numpy()):
                ends = zip(box, reaches, strict=True)
                near = tuple(slice(max(0, side.start - reach), side.stop + reach) for side, reach in ends)
                drawn = mask[near]
                blurred = gaussian_filter(drawn.float().numpy(), widths, mode="nearest", truncate=_TRUNCATE)
                self._sure[row] += probability[near][drawn].sum()
                self._inside[row] += torch.from_numpy(blurred)[drawn].sum()
                self._drawn[row] += drawn.sum()

    def of(self, confidences: Tensor) -> Tensor:
        """Quality `(K,)` in [0, 1]; of a structure that was not drawn the mean of its `confidences (S, K)`."""
        quality = (self._sure * self._inside).sqrt() / self._drawn.clamp_min(1)
        return torch.where(self._drawn > 0, quality.clamp(max=1), confidences.mean(0))
