import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ofl_sam2.learner.steepest_descent import (
    Problem,
    convolve,
    correlate,
    descend,
    gradient,
    loss,
    patch_metric,
    solve_ridge,
    step_length,
)

KERNELS = pytest.mark.parametrize("kernel", [1, 3, 5])


def random_problem(
    shape: tuple[int, ...] = (2, 3, 4, 5, 6),
    encoding: int = 3,
    lam: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Inputs of `shape (B, T, C, h, w)`; about a third of the squared weights is zero."""
    random = torch.Generator().manual_seed(seed)
    batch, samples, _, height, width = shape
    target = (batch, samples, encoding, height, width)
    precision = torch.rand(target, generator=random, dtype=dtype) * (torch.rand(target, generator=random) > 1 / 3)
    return Problem(
        torch.randn(shape, generator=random, dtype=dtype),
        torch.rand(target, generator=random, dtype=dtype),
        precision / samples,
        torch.tensor(lam, dtype=dtype) ** 2,
    )


def random_tau(problem: Problem, kernel: int = 3, seed: int = 1) -> Tensor:
    batch, _, channels = problem.x.shape[:3]
    shape = (batch, problem.encoding.shape[2], channels, kernel, kernel)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=problem.x.dtype)


class TestConvolve:
    @KERNELS
    def test_each_class_is_an_ordinary_convolution(self, kernel: int) -> None:
        problem = random_problem()
        tau = random_tau(problem, kernel)
        for x, own, out in zip(problem.x, tau, convolve(problem.x, tau), strict=True):
            assert torch.allclose(out, functional.conv2d(x, own, padding=kernel // 2), atol=1e-12)

    @KERNELS
    def test_correlate_is_the_adjoint(self, kernel: int) -> None:
        problem = random_problem()
        tau, residual = random_tau(problem, kernel), problem.encoding
        left = (convolve(problem.x, tau) * residual).flatten(1).sum(1)
        right = (tau * correlate(problem.x, residual, kernel)).flatten(1).sum(1)
        assert torch.allclose(left, right, rtol=1e-12)

    def test_correlate_holds_no_more_than_a_few_results_at_a_time(self) -> None:
        class LargestResult(TorchDispatchMode):
            nbytes = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                out = func(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, tuple) else (out,):
                    if isinstance(tensor, Tensor) and not tensor._is_view():
                        self.nbytes = max(self.nbytes, tensor.nbytes)
                return out

        x, residual = torch.rand(7, 6, 16, 8, 8), torch.rand(7, 6, 4, 8, 8)
        with LargestResult() as largest:
            result = correlate(x, residual, 3)
        assert result.nbytes <= largest.nbytes <= max(result.nbytes, x[0].nbytes)


class TestDerivatives:
    def test_gradient_is_that_of_the_loss(self) -> None:
        problem = random_problem()
        tau = random_tau(problem).requires_grad_()
        (expected,) = torch.autograd.grad(loss(tau, problem).sum(), tau)
        assert torch.allclose(gradient(tau, problem), expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("other", [False, True], ids=["gradient", "another-direction"])
    def test_step_length_is_where_the_loss_along_the_line_is_flat_and_convex(self, other: bool) -> None:
        problem = random_problem()
        tau = random_tau(problem)
        slope = gradient(tau, problem)
        direction = slope + 0.3 * tau if other else slope
        alpha = step_length(slope, direction, problem).requires_grad_()
        along = loss(tau - alpha[:, None, None, None, None] * direction, problem).sum()
        (first,) = torch.autograd.grad(along, alpha, create_graph=True)
        (curvature,) = torch.autograd.grad(first.sum(), alpha)
        assert torch.allclose(first / curvature, torch.zeros_like(first), atol=1e-12)
        assert (curvature > 0).all()

    @pytest.mark.parametrize("preconditioned", [False, True])
    def test_gradients_flow_through_the_steps_to_every_input(self, preconditioned: bool) -> None:
        problem = random_problem((1, 2, 2, 3, 3), encoding=2)
        metric = patch_metric(problem.x, problem.ridge, 3) if preconditioned else None
        inputs = (random_tau(problem), problem.x, problem.encoding, problem.precision, problem.ridge)
        for tensor in inputs:
            tensor.requires_grad_()

        def solve(tau: Tensor, *parts: Tensor) -> Tensor:
            return descend(tau, Problem(*parts), 2, metric)

        assert torch.autograd.gradcheck(solve, inputs)

    def test_classes_are_independent(self) -> None:
        problem = random_problem()
        tau = random_tau(problem)
        first = Problem(problem.x[:1], problem.encoding[:1], problem.precision[:1], problem.ridge)
        assert torch.allclose(descend(tau, problem, 3)[:1], descend(tau[:1], first, 3), atol=1e-12)


class TestDescend:
    @settings(max_examples=60, deadline=None)
    @given(
        shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 5), st.integers(1, 5)),
        encoding=st.integers(1, 3),
        lam=st.sampled_from([0.0, 1e-4, 0.01, 1.0, 30.0]),
        silent=st.booleans(),
        scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
        single=st.booleans(),
        preconditioned=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def test_the_loss_never_rises(
        self,
        shape: tuple[int, ...],
        encoding: int,
        lam: float,
        silent: bool,
        scale: float,
        single: bool,
        preconditioned: bool,
        seed: int,
    ) -> None:
        given = random_problem(shape, encoding, lam, seed, torch.float32 if single else torch.float64)
        precision = given.precision * (0 if silent else 1)
        problem = Problem(scale * given.x, given.encoding, precision, given.ridge)
        tau = random_tau(problem)
        metric = patch_metric(problem.x, problem.ridge, 3) if preconditioned else None
        slack = 1e-5 if single else 1e-12
        before = loss(tau, problem)
        for _ in range(4):
            tau = descend(tau, problem, 1, metric)
            after = loss(tau, problem)
            assert tau.isfinite().all()
            assert (after <= before * (1 + slack) + 1e-30).all()
            before = after

    def test_the_limit_is_the_exact_solution(self) -> None:
        problem = random_problem(lam=1.0)
        exact = solve_ridge(problem, 3)
        assert torch.allclose(descend(torch.zeros_like(exact), problem, 300), exact, atol=1e-6)

    def test_no_step_changes_nothing(self) -> None:
        problem = random_problem()
        tau = random_tau(problem)
        assert torch.equal(descend(tau, problem, 0), tau)

    @pytest.mark.parametrize("zero", [False, True], ids=["fitted", "all-zero"])
    def test_a_perfect_fit_stays_put_and_has_finite_gradients(self, zero: bool) -> None:
        given = random_problem(lam=0.0, dtype=torch.float32)
        tau = torch.zeros_like(random_tau(given)) if zero else random_tau(given)
        x = given.x.clone().requires_grad_()
        problem = Problem(x, convolve(given.x, tau), given.precision, given.ridge)
        stayed = descend(tau, problem, 3)
        assert torch.allclose(stayed, tau, atol=1e-6)
        stayed.sum().backward()
        assert x.grad.isfinite().all()


class TestPatchMetric:
    def test_it_makes_one_step_enough_where_all_weights_are_equal(self) -> None:
        given = random_problem()
        even = Problem(given.x, given.encoding, torch.full_like(given.precision, 1 / given.x.shape[1]), given.ridge)
        start, exact = random_tau(even), solve_ridge(even, 3)
        near = descend(start, even, 1, patch_metric(even.x, even.ridge, 3))
        plain = descend(start, even, 1)
        assert (near - exact).norm() < 1e-2 * exact.norm() < (plain - exact).norm()

    @pytest.mark.parametrize("lam", [1e-4, 1e-2])
    def test_features_without_any_variation_still_have_one(self, lam: float) -> None:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(4, 1, 32, 1, 1, generator=random).expand(-1, 6, -1, 16, 16)
        x = x / (x.square().mean((2, 3, 4), keepdim=True) * 32 * 9).sqrt()
        assert patch_metric(x, torch.tensor(lam) ** 2, 3).isfinite().all()

    def test_no_gradient_flows_through_it(self) -> None:
        problem = random_problem()
        assert not patch_metric(problem.x.requires_grad_(), problem.ridge.requires_grad_(), 3).requires_grad


class TestSolveRidge:
    @KERNELS
    def test_the_gradient_vanishes_there(self, kernel: int) -> None:
        problem = random_problem()
        assert gradient(solve_ridge(problem, kernel), problem).abs().max() < 1e-12

    def test_without_weight_only_the_ridge_speaks(self) -> None:
        given = random_problem()
        silent = Problem(given.x, given.encoding, torch.zeros_like(given.precision), given.ridge)
        assert (solve_ridge(silent, 3) == 0).all()

    def test_gradients_flow_to_the_encoding(self) -> None:
        given = random_problem()
        encoding = given.encoding.clone().requires_grad_()
        solve_ridge(Problem(given.x, encoding, given.precision, given.ridge), 3).square().sum().backward()
        assert encoding.grad.abs().max() > 0


def test_a_tiny_ridge_is_solved_as_exactly_in_float32_as_in_float64():
    given = random_problem(shape=(1, 2, 4, 6, 6), lam=1e-7)
    alike = given.x[:, :, :1] + 1e-3 * given.x  # channels that hardly differ, as features do
    exact = Problem(
        alike.float().double(), given.encoding.float().double(), given.precision.float().double(), given.ridge
    )
    single = Problem(alike.float(), given.encoding.float(), given.precision.float(), given.ridge.float())
    assert torch.allclose(solve_ridge(single, 3), solve_ridge(exact, 3).float(), rtol=1e-4)
