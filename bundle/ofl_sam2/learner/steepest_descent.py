"""The mapping network's inner problem, solved by steepest descent or exactly: pure functions in float32 (or float64).

Shapes: B classes, T samples, `x (B, T, C, h, w)` learner inputs, `tau (B, D, C, k, k)` the mapping network,
`encoding (B, T, D, h, w)` target encodings e, `precision (B, T, D, h, w)` = a_t w_t^2, the squared weights s_t^2.
The ridge is lam^2. Equations: L(tau) = 1/2 sum_t |s_t (x_t * tau - e_t)|^2 + 1/2 |lam tau|^2 (Bhat et al., ECCV 2020).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_EPS = 1e-12


@dataclass(frozen=True)
class Problem:
    """One weighted ridge regression per class: inputs, encodings, squared weights and the ridge lam^2 (scalar)."""

    x: Tensor
    encoding: Tensor
    precision: Tensor
    ridge: Tensor


def convolve(x: Tensor, tau: Tensor) -> Tensor:
    """Apply `tau (B, D, C, k, k)` to `x (B, T, C, h, w)`: `(B, T, D, h, w)`."""
    batch, samples, channels, height, width = x.shape
    grouped = x.transpose(0, 1).reshape(samples, batch * channels, height, width)
    out = functional.conv2d(grouped, tau.flatten(0, 1), padding=tau.shape[-1] // 2, groups=batch)
    return out.view(samples, batch, -1, height, width).transpose(0, 1)


def correlate(x: Tensor, residual: Tensor, kernel: int) -> Tensor:
    """Adjoint of `convolve` in tau, summed over samples: `(B, D, C, k, k)`."""
    batch, samples, channels = x.shape[:3]
    columns = functional.unfold(x.flatten(0, 1), kernel, padding=kernel // 2)
    columns = columns.view(batch, samples, channels * kernel**2, -1)
    weight = torch.einsum("btdp,btkp->bdk", residual.flatten(3), columns)
    return weight.view(batch, -1, channels, kernel, kernel)


def loss(tau: Tensor, problem: Problem) -> Tensor:
    """L(tau) per class, `(B,)`."""
    residual = convolve(problem.x, tau) - problem.encoding
    data = (problem.precision * residual**2).flatten(1).sum(1)
    return 0.5 * (data + problem.ridge * (tau**2).flatten(1).sum(1))


def gradient(tau: Tensor, problem: Problem) -> Tensor:
    """dL/dtau, same shape as tau."""
    residual = problem.precision * (convolve(problem.x, tau) - problem.encoding)
    return correlate(problem.x, residual, tau.shape[-1]) + problem.ridge * tau


def step_length(direction: Tensor, problem: Problem) -> Tensor:
    """Exact line search along `-direction`: |g|^2 / (sum |s (x * g)|^2 + lam^2 |g|^2), per class `(B,)`."""
    squared = (direction**2).flatten(1).sum(1)
    curvature = (problem.precision * convolve(problem.x, direction) ** 2).flatten(1).sum(1) + problem.ridge * squared
    return squared / curvature.clamp_min(_EPS)


def descend(tau: Tensor, problem: Problem, steps: int) -> Tensor:
    """Take `steps` steps of steepest descent; the loss of each class never rises."""
    for _ in range(steps):
        direction = gradient(tau, problem)
        tau = tau - step_length(direction, problem)[:, None, None, None, None] * direction
    return tau


def solve_ridge(problem: Problem, kernel: int) -> Tensor:
    """The exact minimiser `(B, D, C, k, k)`, one linear system per class and encoding channel."""
    batch, samples, channels = problem.x.shape[:3]
    columns = functional.unfold(problem.x.flatten(0, 1), kernel, padding=kernel // 2)
    columns = columns.view(batch, samples, channels * kernel**2, -1).transpose(1, 2).flatten(2)
    identity = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    solutions = []
    for channel in range(problem.encoding.shape[2]):
        weighted = columns * problem.precision[:, :, channel].flatten(1)[:, None]
        right = torch.einsum("bkm,bm->bk", weighted, problem.encoding[:, :, channel].flatten(1))
        gram = weighted @ columns.transpose(1, 2) + problem.ridge * identity
        solutions.append(torch.linalg.solve(gram, right))
    return torch.stack(solutions, 1).view(batch, -1, channels, kernel, kernel)
