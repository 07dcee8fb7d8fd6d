"""Label generators: from a mask (and the features under it) to what the mapping network is asked to predict.

Both return a target encoding `(B, D, h, w)` >= 0 and spatial weights `(B, D, h, w)`, which start at 1 everywhere.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Heads(nn.Module):
    """Encoding and weight heads on a shared feature."""

    def __init__(self, width: int, encoding: int) -> None:
        super().__init__()
        self.encoding = nn.Conv2d(width, encoding, 3, padding=1)
        self.weight = nn.Conv2d(width, encoding, 3, padding=1)
        nn.init.kaiming_normal_(self.encoding.weight)
        weight, bias = self.weight.parameters()
        nn.init.zeros_(weight)
        nn.init.ones_(bias)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        return functional.relu(self.encoding(feature)), self.weight(feature)


class MaskLabelGenerator(nn.Module):
    """Sees the mask only: strided convolutions from stride 4 to stride 16.

    Args:
        encoding: channels D of the target encoding.
        width: channels of the hidden layers.
    """

    def __init__(self, encoding: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width // 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        self.heads = _Heads(width, encoding)

    def forward(self, features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Encode masks `(B, 4h, 4w)` in [0, 1]; `features (B, C, h, w)` are not looked at."""
        return self.heads(self.layers(masks[:, None]))


class MaskedFeatureLabelGenerator(nn.Module):
    """Sees the mask and the image features inside and outside of it.

    Args:
        channels: C of the image features.
        encoding: channels D of the target encoding.
        width: channels of the hidden layers.
    """

    def __init__(self, channels: int, encoding: int, width: int = 64) -> None:
        super().__init__()
        self.mask = MaskLabelGenerator(encoding, width).layers
        self.inside = nn.Conv2d(channels, width // 2, 1)
        self.outside = nn.Conv2d(channels, width // 2, 1)
        self.mix = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU())
        self.heads = _Heads(width, encoding)

    def forward(self, features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Encode masks `(B, 4h, 4w)` in [0, 1] with features `(B, C, h, w)`."""
        cover = functional.avg_pool2d(masks[:, None], 4)
        parts = [self.mask(masks[:, None]), self.inside(features * cover), self.outside(features * (1 - cover))]
        return self.heads(self.mix(torch.cat(parts, 1)))
