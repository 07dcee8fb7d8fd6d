"""Losses: on the decoder's own logits, taken before SAM2 overwrites the masks of absent objects, and of the U-Net."""

import torch
from torch import Tensor
from torch.nn import functional

from ofl_sam2.backbone.frozen import Decoded
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.precision import autocast


def shrink_masks(masks: Tensor, side: int) -> Tensor:
    """Reduce masks `(B, H, W)` in [0, 1] to `(B, side, side)` by area."""
    return functional.interpolate(masks[:, None], size=(side, side), mode="area")[:, 0]


def soft_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """IoU `(B,)` of thresholded logits with thresholded masks, both `(B, h, w)`; 1 where both are empty."""
    predicted, true = logits > 0, masks > 0.5
    union = (predicted | true).flatten(1).sum(1)
    return torch.where(union > 0, (predicted & true).flatten(1).sum(1) / union.clamp_min(1), 1.0)


def segmentation_loss(
    decoded: Decoded,
    masks: Tensor,
    *,
    cross_entropy: float = 1.0,
    dice: float = 1.0,
    presence: float = 0.2,
    iou: float = 0.2,
    empty: float = 0.0,
) -> Tensor:
    """Weighted loss of B decoded objects against masks `(B, size, size)` in [0, 1].

    Cross-entropy, Dice and the IoU loss (squared error of the predicted IoU) count where the object is present, the
    presence loss everywhere, and `empty` weighs the cross-entropy where the object is absent. SAM2's own tracking
    losses in a light form; SAM2 has no mask loss on absent objects.
    """
    target = shrink_masks(masks, decoded.logits.shape[-1])
    present = (masks.flatten(1).amax(1) > 0).float()
    probability = decoded.logits.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(decoded.logits, target, reduction="none").flatten(1).mean(1)
    overlap = (probability * target).flatten(1).sum(1)
    dice_loss = 1 - (2 * overlap + 1) / (probability.flatten(1).sum(1) + target.flatten(1).sum(1) + 1)
    quality = (decoded.iou - soft_iou(decoded.logits, target)) ** 2
    per_object = present * (cross_entropy * entropy + dice * dice_loss + iou * quality)
    presence_loss = functional.binary_cross_entropy_with_logits(decoded.presence, present)
    absent = 1 - present
    empty_loss = (absent * entropy).sum() / absent.sum().clamp_min(1)
    return per_object.sum() / present.sum().clamp_min(1) + presence * presence_loss + empty * empty_loss


def marginal_loss(unet: VoxelUNet, images: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
    """Cross-entropy and Dice where labels are known, with deep supervision: each head counts half as much.

    Background may be any structure that is not labelled in its case (marginal loss, Shi et al., 2021).

    Args:
        unet: in training mode.
        images: `(B, C, x, y, z)`.
        labels: `(B, 1, x, y, z)`, as in the samples: 0, from 1 a structure's number, K + 1 where nothing is known.
        taught: `(B, K)`, 1 where a structure is labelled in the case.
    """
    count = len(unet.values)
    known = (labels <= count).float()
    target = torch.cat([labels == number for number in range(1, count + 1)], 1).float()
    hidden = functional.pad(1 - taught, (1, 0), value=1.0)[:, :, None, None, None].log()
    with autocast(images.device):
        heads = unet(images).float().unbind(1)
    weights = [0.5**level for level in range(len(heads))]
    losses = []
    for logits in heads:
        likely = logits.log_softmax(1)
        background = (likely + hidden).logsumexp(1, keepdim=True)
        entropy = -torch.where(labels == 0, background, (likely[:, 1:] * target).sum(1, keepdim=True)) * known
        told = known * taught[:, :, None, None, None]
        probability, voxels = likely[:, 1:].exp(), (0, 2, 3, 4)
        overlap, total = (told * probability * target).sum(voxels), (told * (probability + target)).sum(voxels)
        dice = (2 * overlap + 1e-5) / (total + 1e-5)
        losses.append(entropy.sum() / known.sum().clamp(min=1) + (1 - dice).mean())
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
