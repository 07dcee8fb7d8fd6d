"""The online few-shot learner: projection, label generator, ridge, U and fusion are trained, tau is solved."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ofl_sam2.learner.fusion import AdaptiveFusion
from ofl_sam2.learner.label_generator import MaskedFeatureLabelGenerator, MaskLabelGenerator
from ofl_sam2.learner.steepest_descent import Problem, convolve, descend, patch_metric, solve_ridge

KERNEL = 3
LABEL_GENERATORS: dict[str, Callable[[int, int], nn.Module]] = {
    "mask": lambda channels, encoding: MaskLabelGenerator(encoding),
    "masked_features": MaskedFeatureLabelGenerator,
}


class FewShotLearner(nn.Module):
    """Mapping network and everything around it; starts such that the fused feature equals memory attention exactly.

    Args:
        channels: C of the backbone's stride-16 feature.
        inputs: C_x, channels of the learner input; default C / 4.
        encoding: D, channels of the target encoding.
        label_generator: "mask" or "masked_features".
    """

    def __init__(
        self, channels: int, inputs: int | None = None, encoding: int = 32, label_generator: str = "mask"
    ) -> None:
        super().__init__()
        self.channels, self.inputs, self.encoding = channels, inputs or channels // 4, encoding
        self.kind = label_generator
        self.projection = nn.Conv2d(channels, self.inputs, 3, padding=1)
        self.label_generator = LABEL_GENERATORS[label_generator](channels, encoding)
        self.lam = nn.Parameter(torch.tensor(0.01))
        first, last = nn.Conv2d(encoding, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(first.weight)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.up = nn.Sequential(first, nn.ReLU(), last)
        self.fusion = AdaptiveFusion(channels)

    @property
    def fitted(self) -> bool:
        """Whether U was ever trained; before that the online branch has no effect."""
        return any(bool(parameter.any()) for parameter in self.up[-1].parameters())

    def embed(self, features: Tensor) -> Tensor:
        """Learner input x `(B, C_x, h, w)`: projected features, scaled per image to mean square 1 / (C_x k^2)."""
        x = self.projection(features)
        mean_square = (x**2).flatten(1).mean(1)[:, None, None, None]
        return x / (mean_square * self.inputs * KERNEL**2).clamp_min(1e-12).sqrt()

    def encode_labels(self, features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Target encoding and spatial weights, both `(B, D, h, w)`, of masks `(B, 4h, 4w)` in [0, 1]."""
        return self.label_generator(features, masks)

    def problem(self, x: Tensor, encoding: Tensor, weight: Tensor, sample_weight: Tensor) -> Problem:
        """The inner problem of B classes with T samples.

        Args:
            x: `(B, T, C_x, h, w)`.
            encoding, weight: `(B, T, D, h, w)`.
            sample_weight: a_t, `(B, T)`, non-negative with sum 1 over T.
        """
        return Problem(x, encoding, sample_weight[:, :, None, None, None] * weight**2, self.lam**2)

    def start(self, classes: int) -> Tensor:
        """The zero mapping network `(B, D, C_x, k, k)`."""
        return self.lam.new_zeros(classes, self.encoding, self.inputs, KERNEL, KERNEL)

    def metric(self, x: Tensor) -> Tensor:
        """Metric of the descent from samples `x (B, T, C_x, h, w)`; no gradient flows through it."""
        return patch_metric(x, self.lam**2, KERNEL)

    def solve(
        self, tau: Tensor, problem: Problem, steps: int, metric: Tensor | None = None, exact: bool = False
    ) -> Tensor:
        """Improve `tau` on the problem by steepest descent, or replace it by the exact ridge solution."""
        return solve_ridge(problem, KERNEL) if exact else descend(tau, problem, steps, metric)

    def target_feature(self, x: Tensor, tau: Tensor) -> Tensor:
        """T = U(x conv tau) `(B, C, h, w)` of queries `x (B, C_x, h, w)`."""
        return self.up(convolve(x[:, None], tau)[:, 0])

    def fuse(self, target: Tensor, attended: Tensor, adaptive: bool = True) -> Tensor:
        """Z from both branches: adaptive fusion, or their plain sum."""
        return self.fusion(target, attended) if adaptive else target + attended


def mask_at_logit_size(masks: Tensor, side: int) -> Tensor:
    """Average masks `(B, size, size)` to the decoder's logit size `(B, side, side)`."""
    return functional.adaptive_avg_pool2d(masks[:, None], side)[:, 0]
