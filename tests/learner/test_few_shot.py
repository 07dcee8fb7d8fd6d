import pytest
import torch
from torch import Tensor

from ofl_sam2.learner.few_shot import KERNEL, LABEL_GENERATORS, FewShotLearner, mask_at_logit_size
from ofl_sam2.learner.steepest_descent import descend, gradient, loss, patch_metric, solve_ridge

CHANNELS, ENCODING, SIDE = 16, 6, 5
CLASSES, SAMPLES = 2, 3


def build(kind: str = "masked_features") -> FewShotLearner:
    torch.manual_seed(0)
    return FewShotLearner(CHANNELS, encoding=ENCODING, label_generator=kind)


@pytest.fixture(params=LABEL_GENERATORS)
def learner(request: pytest.FixtureRequest) -> FewShotLearner:
    return build(request.param)


@pytest.fixture(scope="module")
def features() -> Tensor:
    """Support features of all classes and samples."""
    return torch.randn(CLASSES * SAMPLES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def masks() -> Tensor:
    random = torch.Generator().manual_seed(2)
    return (torch.rand(CLASSES * SAMPLES, 4 * SIDE, 4 * SIDE, generator=random) > 0.5).float()


def solve(learner: FewShotLearner, features: Tensor, masks: Tensor) -> Tensor:
    x = learner.embed(features).unflatten(0, (CLASSES, SAMPLES))
    encoded = [part.unflatten(0, (CLASSES, SAMPLES)) for part in learner.encode_labels(features, masks)]
    problem = learner.problem(x, *encoded, torch.full((CLASSES, SAMPLES), 1 / SAMPLES))
    return learner.solve(learner.start(CLASSES), problem, steps=2, metric=learner.metric(x))


def test_the_fused_feature_starts_as_memory_attention_bit_for_bit(
    learner: FewShotLearner, features: Tensor, masks: Tensor
) -> None:
    attended = 10 * torch.randn(CLASSES, CHANNELS, SIDE, SIDE)
    tau = solve(learner, features, masks)
    target = learner.target_feature(learner.embed(features[:CLASSES]), tau)
    assert tau.abs().max() > 0
    assert (target == 0).all()
    assert torch.equal(learner.fuse(target, attended), attended)


def test_without_adaptive_fusion_the_branches_are_added() -> None:
    learner = build()
    torch.nn.init.normal_(learner.fusion.memory_gate.expand.weight)
    target, attended = torch.randn(2, CLASSES, CHANNELS, SIDE, SIDE)
    assert torch.equal(learner.fuse(target, attended, adaptive=False), target + attended)
    assert not torch.equal(learner.fuse(target, attended), target + attended)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_learner_inputs_have_mean_square_one_over_fan_in(scale: float, features: Tensor) -> None:
    learner = build()
    x = learner.embed(scale * features)
    assert x.shape == (CLASSES * SAMPLES, CHANNELS // 4, SIDE, SIDE)
    expected = torch.full((len(x),), 1 / (x.shape[1] * KERNEL**2))
    assert torch.allclose(x.square().flatten(1).mean(1), expected, rtol=1e-5)


def test_an_image_without_any_feature_gives_finite_inputs_and_gradients() -> None:
    learner = build()
    torch.nn.init.zeros_(learner.projection.bias)
    x = learner.embed(torch.zeros(1, CHANNELS, SIDE, SIDE))
    x.sum().backward()
    assert (x == 0).all()
    assert learner.projection.weight.grad.isfinite().all()


def test_labels_are_encoded_at_the_feature_size(learner: FewShotLearner, features: Tensor, masks: Tensor) -> None:
    encoding, weight = learner.encode_labels(features, masks)
    assert encoding.shape == weight.shape == (CLASSES * SAMPLES, ENCODING, SIDE, SIDE)
    assert (encoding >= 0).all()
    assert (weight == 1).all()


def test_the_mask_generator_ignores_features(features: Tensor, masks: Tensor) -> None:
    learner = build("mask")
    assert torch.equal(learner.encode_labels(features, masks)[0], learner.encode_labels(-features, masks)[0])


def test_the_problem_weighs_samples_and_pixels() -> None:
    learner = build()
    x, encoding = torch.randn(1, 2, 4, SIDE, SIDE), torch.rand(1, 2, ENCODING, SIDE, SIDE)
    weight, share = torch.rand_like(encoding), torch.tensor([[0.25, 0.75]])
    problem = learner.problem(x, encoding, weight, share)
    assert torch.equal(problem.precision[0, 1], 0.75 * weight[0, 1] ** 2)
    assert problem.ridge == learner.lam**2
    tau = learner.start(1)
    by_hand = (0.25 * (weight * encoding)[0, 0].square().sum() + 0.75 * (weight * encoding)[0, 1].square().sum()) / 2
    assert torch.allclose(loss(tau, problem), by_hand)


def test_the_mapping_network_starts_at_zero() -> None:
    tau = build().start(3)
    assert tau.shape == (3, ENCODING, CHANNELS // 4, KERNEL, KERNEL)
    assert (tau == 0).all()


def test_solving_is_steepest_descent_or_exact() -> None:
    learner = build().double()
    shapes = (1, 2, 4, SIDE, SIDE), (1, 2, ENCODING, SIDE, SIDE)
    x, encoding = (torch.rand(shape, dtype=torch.float64) for shape in shapes)
    problem = learner.problem(x, encoding, torch.ones_like(encoding), torch.full((1, 2), 0.5, dtype=torch.float64))
    start = learner.start(1)
    assert torch.equal(learner.solve(start, problem, 3), descend(start, problem, 3))
    metric = learner.metric(x)
    assert torch.equal(metric, patch_metric(x, learner.lam**2, KERNEL))
    assert torch.equal(learner.solve(start, problem, 3, metric), descend(start, problem, 3, metric))
    exact = learner.solve(start, problem, 3, exact=True)
    assert torch.equal(exact, solve_ridge(problem, KERNEL))
    assert gradient(exact, problem).abs().max() < 1e-9


def test_every_parameter_learns_once_the_zero_layers_have_moved(
    learner: FewShotLearner, features: Tensor, masks: Tensor
) -> None:
    random = torch.Generator().manual_seed(3)
    attended, wanted = torch.randn(2, CLASSES, CHANNELS, SIDE, SIDE, generator=random)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-2)

    def unreached() -> set[str]:
        optimiser.zero_grad()
        tau = solve(learner, features, masks)
        target = learner.target_feature(learner.embed(features[:CLASSES]), tau)
        (learner.fuse(target, attended) - wanted).square().mean().backward()
        return {name for name, parameter in learner.named_parameters() if not parameter.grad.abs().max() > 0}

    at_start = unreached()
    assert not {"up.2.weight", "up.2.bias", "fusion.memory_gate.expand.weight"} & at_start
    optimiser.step()
    assert unreached() == {"fusion.target_gate.reduce.weight", "fusion.target_gate.reduce.bias"}
    optimiser.step()
    assert unreached() == set()


def test_targets_of_one_class_do_not_depend_on_another(features: Tensor) -> None:
    learner = build()
    torch.nn.init.normal_(learner.up[-1].weight)
    x, tau = learner.embed(features[:CLASSES]), torch.randn_like(learner.start(CLASSES))
    both = learner.target_feature(x, tau)
    assert both.shape == (CLASSES, CHANNELS, SIDE, SIDE)
    assert torch.allclose(both[1:], learner.target_feature(x[1:], tau[1:]), atol=1e-5)


def test_it_is_fitted_once_the_last_layer_has_moved(learner: FewShotLearner) -> None:
    assert not learner.fitted
    torch.nn.init.constant_(learner.up[-1].bias, 1e-6)
    assert learner.fitted


def test_sizes_can_be_chosen() -> None:
    learner = FewShotLearner(CHANNELS, inputs=7, encoding=3, label_generator="mask")
    assert learner.start(1).shape == (1, 3, 7, KERNEL, KERNEL)
    assert (learner.channels, learner.inputs, learner.encoding, learner.kind) == (CHANNELS, 7, 3, "mask")


def test_masks_are_averaged_to_the_logit_size() -> None:
    masks = torch.zeros(2, 16, 16)
    masks[0, :2, :4] = 1
    small = mask_at_logit_size(masks, 4)
    assert small.shape == (2, 4, 4)
    assert small[0, 0, 0] == 0.5
    assert small.sum() == 0.5
