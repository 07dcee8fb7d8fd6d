"""Fitting the refinement to leave-one-out segmentations."""

import pytest
import torch

from ofl_sam2.backbone.weights import state_hash
from ofl_sam2.memory.pool import MAIN
from ofl_sam2.progress import CancelToken
from ofl_sam2.training import refining
from ofl_sam2.training.held_out import HeldOut
from ofl_sam2.training.refining import fit_refinement
from ofl_sam2.training.synthetic import Dice

NOTHING = HeldOut({})
MINUTE = 60.0


def some_order():
    return Dice(torch.Generator().manual_seed(0))


@pytest.fixture
def segmenter(make_segmenter, make_case):
    """Has learned three cases, of which the last holds one structure only."""
    cases = make_case("a"), make_case("b", seed=1), make_case("c", seed=2, values=(1,))
    return make_segmenter(cases, pool_slices=3, side_views=False, close_ups=False)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(refining, "STEPS", 3)


def test_every_slice_is_drawn_without_the_labels_of_its_case(segmenter, monkeypatch):
    pools, view = [], refining.LearnedView

    def watched(pool, *rest):
        pools.append(set(pool.cases))
        return view(pool, *rest)

    monkeypatch.setattr(refining, "LearnedView", watched)
    examples = refining._examples(segmenter, NOTHING, some_order(), lambda: False)
    assert sorted(map(sorted, pools)) == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert sorted((e.case.name, e.row) for e in examples) == [(name, row) for name in "abc" for row in range(6)]
    assert {e.case.name: e.values for e in examples} == {"a": (1, 2), "b": (1, 2), "c": (1,)}
    assert all(e.decoded.logits.shape == (len(e.values), 16, 16) for e in examples)


def test_held_out_cases_are_no_examples(segmenter):
    held_out = HeldOut({(MAIN, "b"): tuple(range(6))})
    assert {e.case.name for e in refining._examples(segmenter, held_out, some_order(), lambda: False)} == {"a", "c"}


def test_the_number_of_slices_is_bounded_and_they_are_spread(segmenter, monkeypatch):
    monkeypatch.setattr(refining, "MAX_SLICES", 6)
    examples = refining._examples(segmenter, NOTHING, some_order(), lambda: False)
    assert [e.case.slices[e.row] for e in examples if e.case.name == "a"] in ([1, 4], [4, 1])
    assert len(examples) == 6


def test_when_time_is_up_the_first_case_is_enough(segmenter):
    assert len({e.case.name for e in refining._examples(segmenter, NOTHING, some_order(), lambda: True)}) == 1


def test_it_learns_and_leaves_the_segmenter_alone(segmenter, monkeypatch):
    monkeypatch.setattr(refining, "STEPS", 40)
    losses, loss = [], refining._loss
    monkeypatch.setattr(refining, "_loss", lambda *args: losses.append(loss(*args)) or losses[-1])
    before = state_hash(segmenter.learner), state_hash(segmenter.backbone.sam2)
    shares = []
    refinement = fit_refinement(segmenter, NOTHING, 10 * MINUTE, report=shares.append)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert (state_hash(segmenter.learner), state_hash(segmenter.backbone.sam2)) == before
    assert segmenter.refinement is None
    assert refinement.values == (1, 2)
    assert refinement.change.weight.any()
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_a_seed_gives_the_same_twice(segmenter):
    state = torch.get_rng_state()
    one, again, other = (fit_refinement(segmenter, NOTHING, MINUTE, seed) for seed in (0, 0, 1))
    assert state_hash(one) == state_hash(again) != state_hash(other)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_time_it_takes_one_step(segmenter, monkeypatch):
    steps, loss = [], refining._loss
    monkeypatch.setattr(refining, "_loss", lambda *args: steps.append(1) or loss(*args))
    assert fit_refinement(segmenter, NOTHING, 1e-9) is not None
    assert len(steps) == 1


def test_one_case_says_nothing(make_segmenter):
    assert fit_refinement(make_segmenter(), NOTHING, MINUTE) is None


def test_it_can_be_cancelled(segmenter):
    token = CancelToken()
    token.cancel()
    assert fit_refinement(segmenter, NOTHING, MINUTE, cancel=token) is None
