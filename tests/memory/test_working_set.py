import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ofl_sam2.memory.working_set import WorkingSet

CLASSES, SUPPORTS = 2, 3


def supports(count: int = SUPPORTS, value: float = 0.0, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((classes, count, 2, 1, 1), value), *torch.full((2, classes, count, 3, 1, 1), value)


def query(value: float, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((classes, 2, 1, 1), value), *torch.full((2, classes, 3, 1, 1), value)


def held(working_set: WorkingSet) -> list[float]:
    """Values of the queries that are held, oldest first."""
    return [float(x.flatten()[0]) for x, _, _ in working_set.queries]


@settings(max_examples=100, deadline=None)
@given(
    classes=st.integers(1, 3),
    count=st.integers(1, 4),
    rate=st.floats(0.01, 1.0),
    floor=st.floats(0.0, 1.0),
    capacity=st.integers(0, 5),
    accepted=st.lists(st.integers(0, 7), max_size=12),
)
def test_weights_are_shares_and_supports_keep_their_floor(
    classes: int, count: int, rate: float, floor: float, capacity: int, accepted: list[int]
) -> None:
    working_set = WorkingSet(*supports(count, classes=classes), rate, floor, capacity)
    for index, bits in enumerate(accepted):
        chosen = torch.tensor([bool(bits >> row & 1) for row in range(classes)])
        working_set.add(*query(float(index), classes), chosen)
        weights = working_set.weights()
        assert weights.shape == (classes, count + len(working_set.queries))
        assert len(working_set.queries) <= capacity
        assert (weights >= 0).all()
        assert torch.allclose(weights.sum(1), torch.ones(classes), atol=1e-5)
        assert (weights[:, :count].sum(1) >= floor - 1e-5).all()


def test_supports_alone_share_the_weight_equally() -> None:
    weights = WorkingSet(*supports()).weights()
    assert torch.allclose(weights, torch.full((CLASSES, SUPPORTS), 1 / SUPPORTS))


def test_a_query_enters_with_the_rate_and_the_rest_is_renormalised() -> None:
    working_set = WorkingSet(*supports(), rate=0.1)
    working_set.add(*query(1))
    working_set.add(*query(2))
    assert torch.allclose(working_set.weights(), torch.tensor([0.27, 0.27, 0.27, 0.09, 0.1]).expand(CLASSES, -1))


def test_supports_keep_the_floor_against_many_queries() -> None:
    working_set = WorkingSet(*supports(), rate=0.5, support_floor=0.4)
    for index in range(10):
        working_set.add(*query(index))
    assert torch.allclose(working_set.weights()[:, :SUPPORTS].sum(1), torch.full((CLASSES,), 0.4))


def test_a_class_that_did_not_accept_gives_no_weight() -> None:
    working_set = WorkingSet(*supports(), rate=0.2)
    working_set.add(*query(1), accepted=torch.tensor([True, False]))
    assert torch.allclose(working_set.weights()[:, -1], torch.tensor([0.2, 0.0]))
    assert torch.allclose(working_set.weights()[1, :SUPPORTS], torch.full((SUPPORTS,), 1 / SUPPORTS))


def test_a_query_no_class_accepted_is_not_kept() -> None:
    working_set = WorkingSet(*supports())
    working_set.add(*query(1), accepted=torch.tensor([False, False]))
    assert working_set.queries == []
    assert working_set.weights().shape == (CLASSES, SUPPORTS)


def test_the_lightest_query_goes_first() -> None:
    working_set = WorkingSet(*supports(), rate=0.1, capacity=2)
    working_set.add(*query(1))
    working_set.add(*query(2), accepted=torch.tensor([True, False]))
    working_set.add(*query(3))
    assert held(working_set) == [1, 3]
    working_set.add(*query(4))
    assert held(working_set) == [3, 4]
    assert working_set.weights().shape == (CLASSES, SUPPORTS + 2)


def test_the_weight_of_a_dropped_query_returns_to_the_supports() -> None:
    working_set = WorkingSet(*supports(), rate=0.1, capacity=1)
    working_set.add(*query(1))
    working_set.add(*query(2))
    assert torch.allclose(working_set.weights()[0], torch.tensor([0.3, 0.3, 0.3, 0.1]))


def test_replacing_supports_keeps_queries_and_their_weights() -> None:
    working_set = WorkingSet(*supports(), rate=0.1)
    working_set.add(*query(7))
    working_set.replace_supports(*supports(5, value=2.0))
    x, _, _, weights = working_set.samples()
    assert x[0, :, 0, 0, 0].tolist() == [2, 2, 2, 2, 2, 7]
    assert torch.allclose(weights[0], torch.tensor([0.18] * 5 + [0.1]))


@pytest.mark.parametrize("queries", [0, 2])
def test_samples_put_supports_first_and_belong_together(queries: int) -> None:
    working_set = WorkingSet(*supports(value=5.0))
    for index in range(queries):
        working_set.add(*query(float(index)))
    x, encoding, weight, shares = working_set.samples()
    assert x.shape == (CLASSES, SUPPORTS + queries, 2, 1, 1)
    assert encoding.shape == weight.shape == (CLASSES, SUPPORTS + queries, 3, 1, 1)
    assert shares.shape == (CLASSES, SUPPORTS + queries)
    expected = [5.0] * SUPPORTS + [float(index) for index in range(queries)]
    assert all(part[1, :, 0, 0, 0].tolist() == expected for part in (x, encoding, weight))


def test_the_newest_query_of_a_single_class_is_kept_among_those_of_all() -> None:
    working_set = WorkingSet(*supports(classes=12), capacity=3)
    for value in (1.0, 2.0, 3.0):
        working_set.add(*query(value, 12))
    only = torch.zeros(12, dtype=torch.bool)
    only[4] = True
    for value in (4.0, 5.0):
        working_set.add(*query(value, 12), only)
        assert held(working_set)[-1] == value
