"""Adaptive fusion of the online branch (target features T) with the offline branch (memory attention A)."""

from torch import Tensor, nn


class _Gate(nn.Module):
    """G(v) = 2 sigmoid(V relu(W v)) per pixel and channel; V starts at 0, so G starts at exactly 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)
        for parameter in self.expand.parameters():
            nn.init.zeros_(parameter)

    def forward(self, value: Tensor) -> Tensor:
        return 2 * self.expand(self.reduce(value).relu()).sigmoid()


class AdaptiveFusion(nn.Module):
    """Z = G_1(T) T + G_2(A) A (LLB, Lan et al., AAAI 2023, with the factor 2 so that it starts as T + A).

    Args:
        channels: C of both branches.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.target_gate = _Gate(channels)
        self.memory_gate = _Gate(channels)

    def forward(self, target: Tensor, attended: Tensor) -> Tensor:
        """Fuse `target` and `attended`, both `(B, C, h, w)`."""
        return self.target_gate(target) * target + self.memory_gate(attended) * attended
