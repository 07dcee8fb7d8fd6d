"""The mapping network's inner problem, solved by steepest descent or exactly: pure functions in float32 (or float64).

Shapes: B classes, T samples, `x (B, T, C, h, w)` learner inputs, `tau (B, D, C, k, k)` the mapping network,
`encoding (B, T, D, h, w)` target encodings e, `precision (B, T, D, h, w)` = a_t w_t^2, the squared weights s_t^2.
The ridge is lam^2. Equations: L(tau) = 1/2 sum_t |s_t (x_t * tau - e_t)|^2 + 1/2 |lam tau|^2 (Bhat et al., ECCV 2020).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

_EPS = 1e-12
_DAMPING = 1e-6  # of the trace: keeps the metric of features without variation well-conditioned for float32


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
    shape = (residual.shape[2], x.shape[2], kernel, kernel)
    pairs = zip(x, residual, strict=True)
    return torch.stack([conv2d_weight(inputs, shape, outputs, padding=kernel // 2) for inputs, outputs in pairs])


def loss(tau: Tensor, problem: Problem) -> Tensor:
    """L(tau) per class, `(B,)`."""
    residual = convolve(problem.x, tau) - problem.encoding
    data = (problem.precision * residual**2).flatten(1).sum(1)
    return 0.5 * (data + problem.ridge * (tau**2).flatten(1).sum(1))


def gradient(tau: Tensor, problem: Problem) -> Tensor:
    """dL/dtau, same shape as tau."""
    residual = problem.precision * (convolve(problem.x, tau) - problem.encoding)
    return correlate(problem.x, residual, tau.shape[-1]) + problem.ridge * tau


def step_length(slope: Tensor, direction: Tensor, problem: Problem) -> Tensor:
    """Exact line search along `-direction`: <g, d> / (sum |s (x * d)|^2 + lam^2 |d|^2), per class `(B,)`."""
    descent = (slope * direction).flatten(1).sum(1)
    bend = (problem.precision * convolve(problem.x, direction) ** 2).flatten(1).sum(1)
    return descent / (bend + problem.ridge * (direction**2).flatten(1).sum(1)).clamp_min(_EPS)


def descend(tau: Tensor, problem: Problem, steps: int, metric: Tensor | None = None) -> Tensor:
    """Take `steps` steps of steepest descent; the loss of each class never rises.

    Args:
        tau: where to start.
        problem: what to minimise.
        steps: how many.
        metric: Cholesky factors `(B, K, K)` of `patch_metric`: steepest descent in that metric. Features are strongly
            correlated, so plain descent (None) fits their mean first and hardly anything else.
    """
    for _ in range(steps):
        slope = gradient(tau, problem)
        direction = slope
        if metric is not None:
            columns = torch.cholesky_solve(slope.flatten(2).transpose(1, 2), metric)
            direction = columns.transpose(1, 2).reshape(slope.shape)
        tau = tau - step_length(slope, direction, problem)[:, None, None, None, None] * direction
    return tau


@torch.no_grad()
def patch_metric(x: Tensor, ridge: Tensor, kernel: int) -> Tensor:
    """Cholesky factor of the mean patch covariance plus the ridge, per class `(B, K, K)`, K = C k^2.

    With spatial weights of 1 and equal sample weights it is the Hessian of the inner problem, but for the damping.
    Factorised in float64: features are often so alike that their covariance is not positive definite in float32.

    Args:
        x: `(B, T, C, h, w)`.
        ridge: lam^2, scalar.
        kernel: k.
    """
    factors = []
    for samples in x:
        columns = functional.unfold(samples.double(), kernel, padding=kernel // 2).transpose(0, 1).flatten(1)
        covariance = columns @ columns.T / len(samples)
        covariance.diagonal().add_(ridge + _DAMPING * covariance.trace())
        factors.append(torch.linalg.cholesky(covariance))
    return torch.stack(factors).to(x.dtype)


def solve_ridge(problem: Problem, kernel: int) -> Tensor:
    """The exact minimiser `(B, D, C, k, k)`, one linear system per class and encoding channel; needs a ridge > 0.

    Solved in float64, as a trained ridge is far below what float32 resolves.
    """
    classes = zip(problem.x.double(), problem.encoding.double(), problem.precision.double(), strict=True)
    solved = [_solve_class(x, e, precision, problem.ridge.double(), kernel) for x, e, precision in classes]
    return torch.stack(solved).to(problem.x.dtype)


def _solve_class(x: Tensor, encoding: Tensor, precision: Tensor, ridge: Tensor, kernel: int) -> Tensor:
    """`(D, C, k, k)` of one class: `x (T, C, h, w)`, `encoding` and `precision (T, D, h, w)`."""
    columns = functional.unfold(x, kernel, padding=kernel // 2).transpose(0, 1).flatten(1)
    damping = ridge * torch.eye(len(columns), dtype=columns.dtype, device=columns.device)
    solutions = []
    for target, weight in zip(encoding.transpose(0, 1).flatten(1), precision.transpose(0, 1).flatten(1), strict=True):
        weighted = columns * weight
        solutions.append(torch.linalg.solve(weighted @ columns.T + damping, weighted @ target))
    return torch.stack(solutions).view(-1, x.shape[1], kernel, kernel)
