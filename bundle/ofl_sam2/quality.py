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


def volume_quality(confidences: Tensor, present: Tensor) -> Tensor:
    """Quality per structure `(K,)`: mean confidence of the slices that hold it, of all slices where none does.

    Args:
        confidences: `(S, K)`.
        present: `(S, K)` bool, whether the structure was found in the slice.
    """
    counted = torch.where(present.any(0), present, torch.ones_like(present)).float()
    return (confidences * counted).sum(0) / counted.sum(0)
