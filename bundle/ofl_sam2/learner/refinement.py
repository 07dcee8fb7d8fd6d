"""What frozen features below stride 16 add to a mask: a light convolutional branch, fitted to the user's structures."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ofl_sam2.backbone.frozen import Decoded, ImageFeatures

_REDUCED = 16
_CERTAIN = 4.6


class Refinement(nn.Module):
    """Corrects the decoder's masks of known structures; starts as the identity, up to a limit of the logits.

    Light detail branches beside SAM's stride-16 path are the idea of DB-SAM (Qin et al., MICCAI 2024), learning from
    what leave-one-out segmentation gets wrong that of corrective learning (Wang et al., NeuroImage 2011).

    Args:
        channels: C of the backbone's stride-16 feature.
        values: label values of the structures it corrects.
        width: of its layers.
    """

    def __init__(self, channels: int, values: Sequence[int], width: int = 32) -> None:
        super().__init__()
        self.channels, self.values, self.width = channels, tuple(values), width
        self.middle = nn.Conv2d(channels // 4, _REDUCED, 1)
        self.coarse = nn.Conv2d(channels, _REDUCED, 1)
        seen = channels // 8 + 2 * _REDUCED
        self.norm = nn.GroupNorm(1, seen)
        self.image = nn.Conv2d(seen, width, 3, padding=1)
        self.masks = nn.Conv2d(3, width, 3, padding=1)
        self.which = nn.Embedding(len(self.values), width)
        self.body = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2),
            nn.GELU(),
        )
        self.change = nn.Embedding(len(self.values), width)
        nn.init.zeros_(self.change.weight)

    def forward(self, features: ImageFeatures, decoded: Decoded, values: Sequence[int]) -> Tensor:
        """Mask logits `(K, 4h, 4w)` of one slice; structures it does not know come back as the decoder drew them.

        Args:
            features: of the slice, N = 1.
            decoded: its K structures.
            values: their label values.
        """
        masks = decoded.masks()
        known = [row for row, value in enumerate(values) if value in self.values]
        if known:
            masks[known] = self.correct(features, decoded, values, known)
        return masks

    def correct(self, features: ImageFeatures, decoded: Decoded, values: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Corrected logits `(len(rows), 4h, 4w)` of those rows of the K structures, which it must know."""
        masks, logits = (part.clamp(-_CERTAIN, _CERTAIN) for part in (decoded.masks(), decoded.logits))
        others = torch.stack([_highest(masks, row) for row in rows])
        shown = torch.stack([masks[rows], logits[rows], others], 1) / _CERTAIN
        which = torch.tensor([self.values.index(values[row]) for row in rows], device=masks.device)
        hidden = self.body(self._look(features) + self.masks(shown) + self.which(which)[:, :, None, None])
        return masks[rows] + torch.einsum("kchw,kc->khw", hidden, self.change(which))

    def _look(self, features: ImageFeatures) -> Tensor:
        """What the slice shows, `(1, width, 4h, 4w)`."""
        side = features.stride4.shape[-2:]
        below = [self.middle(features.stride8), self.coarse(features.stride16)]
        grown = [functional.interpolate(part, side, mode="bilinear") for part in below]
        return self.image(self.norm(torch.cat([features.stride4, *grown], 1)))


def _highest(masks: Tensor, row: int) -> Tensor:
    """The highest logit `(h, w)` of the other structures than `row`; certainly none where there are no others."""
    others = [other for other in range(len(masks)) if other != row]
    return masks[others].amax(0) if others else torch.full_like(masks[row], -_CERTAIN)
