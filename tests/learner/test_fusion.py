import pytest
import torch

from ofl_sam2.learner.fusion import AdaptiveFusion

CHANNELS = 8


@pytest.fixture
def fusion() -> AdaptiveFusion:
    torch.manual_seed(0)
    return AdaptiveFusion(CHANNELS)


@pytest.fixture
def branches() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, CHANNELS, 3, 3), 100 * torch.randn(2, CHANNELS, 3, 3)


def test_gates_start_at_exactly_one(fusion: AdaptiveFusion, branches: tuple[torch.Tensor, torch.Tensor]) -> None:
    for value in branches:
        assert (fusion.target_gate(value) == 1).all()
        assert (fusion.memory_gate(value) == 1).all()


def test_it_starts_as_the_sum(fusion: AdaptiveFusion, branches: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(fusion(*branches), branches[0] + branches[1])


def test_gates_stay_between_zero_and_two_and_weigh_each_branch(
    fusion: AdaptiveFusion, branches: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    target, attended = branches
    gates = fusion.target_gate(target), fusion.memory_gate(attended)
    assert all(((gate >= 0) & (gate <= 2)).all() for gate in gates)
    assert torch.equal(fusion(target, attended), gates[0] * target + gates[1] * attended)
    assert not torch.equal(gates[0], torch.ones_like(target))


def test_gates_look_at_single_pixels(fusion: AdaptiveFusion, branches: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.nn.init.normal_(fusion.target_gate.expand.weight)
    torch.nn.init.constant_(fusion.target_gate.reduce.bias, 10)
    target = branches[0]
    changed = target.clone()
    changed[:, :, 1, 1] += 1
    difference = (fusion.target_gate(changed) != fusion.target_gate(target)).any(1)
    assert difference[:, 1, 1].all()
    assert difference.sum() == len(target)


def test_gradients_reach_the_gates_at_the_start(
    fusion: AdaptiveFusion, branches: tuple[torch.Tensor, torch.Tensor]
) -> None:
    fusion(*branches).square().sum().backward()
    for gate in (fusion.target_gate, fusion.memory_gate):
        assert gate.expand.weight.grad.abs().max() > 0
        assert gate.expand.bias.grad.abs().max() > 0
