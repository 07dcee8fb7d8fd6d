"""Slices that training does not see."""

import itertools

import numpy as np
import pytest
import torch

from ofl_sam2.backbone.frozen import ImageFeatures
from ofl_sam2.errors import Cancelled
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.memory.pool import CLOSE, MAIN, PooledCase, View
from ofl_sam2.progress import CancelToken
from ofl_sam2.segmenter import with_settings
from ofl_sam2.training.held_out import MOST_SCORED, HeldOut, _middle, part


def pooled(name, slices=10, filled=range(3, 7), view=MAIN):
    labels = torch.zeros(slices, 64, 64, dtype=torch.uint8)
    labels[list(filled), 10:30, 10:30] = 1
    shapes = ((16, 16, 16), (32, 8, 8), (128, 4, 4))
    features = ImageFeatures(*(torch.zeros(slices, *shape) for shape in shapes))
    return PooledCase(name, tuple(range(slices)), features, labels, view)


@pytest.mark.parametrize(("cases", "apart"), [(4, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_of_four_or_more_cases_whole_ones_are_held_out_in_all_views(cases, apart):
    every = [pooled(f"{i:02d}", view=view) for i in range(cases) for view in (MAIN, View(0))]
    held_out = HeldOut.choose(every)
    names = {key for _, key in held_out.rows}
    assert len(names) == apart
    assert len(held_out.rows) == 2 * apart
    assert [held_out.without(case) is None for case in every] == [case.name in names for case in every]


@pytest.mark.parametrize("enough", [2, 4])
def test_a_case_that_shares_structures_with_the_others_is_held_out(enough):
    alone, *others = (pooled(name) for name in "abcde")
    alone.labels[alone.labels > 0] = 7
    others[2].labels[0, :5, :5] = 2
    others[3].labels[0, :5, :5] = 2
    assert {key for _, key in HeldOut.choose([alone, *others], enough).rows} == {"d"}
    assert {key for _, key in HeldOut.choose([alone, *others], enough, (1, 7)).rows} == {"b"}


@pytest.mark.parametrize(("fitted", "apart"), [("abce", {"d"}), ("abcd", {"a"}), ("abcde", {"a"}), ("", {"a"})])
def test_a_case_that_was_not_fitted_before_is_held_out(fitted, apart):
    cases = [pooled(name) for name in "abcde"]
    cases[4].labels[cases[4].labels > 0] = 7
    assert {key for _, key in HeldOut.choose(cases, fitted=fitted).rows} == apart


def test_no_more_than_four_cases_are_held_out():
    assert len(HeldOut.choose([pooled(f"{number:03d}") for number in range(100)]).rows) == 4


@pytest.mark.parametrize("cases", [1, 2, 3])
def test_of_few_cases_every_fifth_slice_is_held_out(cases):
    every = [pooled(f"{i}", filled=range(2, 7)) for i in range(cases)]
    held_out = HeldOut.choose(every)
    assert dict(held_out.rows) == {(MAIN, case.name): (2, 7) for case in every}
    assert {held_out.without(case).slices for case in every} == {(0, 1, 3, 4, 5, 6, 8, 9)}


@pytest.mark.parametrize(("slices", "filled"), [(4, (1, 2)), (10, (3, 4, 5))])
def test_slices_that_say_nothing_are_not_held_out(slices, filled):
    assert not HeldOut.choose([pooled("a", slices, filled)]).rows


def test_too_few_slices_leave_nothing_to_hold_out(make_segmenter):
    held_out = HeldOut.choose([pooled("a", slices=4, filled=(1, 2)), pooled("b", slices=4, filled=(1,))])
    assert not held_out.rows
    assert held_out.dice(make_segmenter()) is None


@pytest.fixture(scope="module")
def small(make_small_case):
    """Cases with one structure each, small enough for close-ups."""
    return [make_small_case(name, seed) for seed, name in enumerate("abcd")]


def everywhere(segmenter):
    """What is held out of all views."""
    every = [case for pool in segmenter.pools.values() for case in pool.cases.values()]
    return HeldOut.choose(every).with_close_ups(segmenter)


@pytest.mark.parametrize("count", [1, 4])
def test_structures_that_are_drawn_in_close_ups_are_scored_in_these_alone(make_segmenter, small, count):
    segmenter = make_segmenter(tuple(small[:count]))
    held_out = everywhere(segmenter)
    assert held_out.magnified == {"a": {1}}
    for entry in held_out.rows:
        assert bool(held_out._scores(segmenter, entry)[0]) == entry[0].close
    some, dice = held_out.affordable(segmenter, -1)
    assert dice is not None and CLOSE in {view for view, _ in some.rows}


def test_close_ups_that_are_not_made_are_not_scored_in_place_of_others(make_segmenter, small):
    segmenter = make_segmenter(tuple(small))
    assert everywhere(with_settings(segmenter, close_ups=False)).magnified == {}


def test_what_no_close_up_of_another_case_teaches_is_scored_in_the_main_view(make_segmenter, make_case, small):
    segmenter = make_segmenter((small[0], make_case("b", values=(1,))))
    assert list(segmenter.pools[CLOSE].cases) == ["a (1,)"]
    whole = segmenter.pool.cases["a"], segmenter.pools[CLOSE].cases["a (1,)"]
    rows = {(case.view, case.key): tuple(range(len(case))) for case in whole}
    held_out = HeldOut(rows).with_close_ups(segmenter)
    assert not held_out.magnified.get("a")
    assert [bool(held_out._scores(segmenter, entry)[0]) for entry in rows] == [True, False]


def test_a_part_of_a_case_keeps_slices_features_and_labels_together():
    case = pooled("a")
    chosen = part(case, [3, 9])
    assert chosen.slices == (3, 9)
    assert torch.equal(chosen.labels, case.labels[[3, 9]])
    assert (len(chosen.features), chosen.name, chosen.present) == (2, "a", [{1}, frozenset()])


def test_a_case_is_scored_from_the_other_cases_and_a_lone_one_from_its_other_slices(
    make_segmenter, make_case, monkeypatch
):
    pools = []

    def perfect(segmenter, case, pool, values, *_):
        pools.append({key: other.slices for key, other in pool.cases.items()})
        return [[1.0] * len(values)]

    monkeypatch.setattr("ofl_sam2.training.held_out._dice", perfect)
    two, one = make_segmenter((make_case("a"), make_case("b", seed=1))), make_segmenter((make_case("a"),))
    for segmenter in (two, one):
        assert HeldOut.choose(list(segmenter.pool.cases.values())).dice(segmenter) == 1
    assert pools == [{"b": tuple(range(6))}, {"a": tuple(range(6))}, {"a": (0, 1, 3, 4, 5)}]


def test_the_score_is_the_dice_of_what_the_segmenter_draws(make_segmenter, make_case):
    segmenter = make_segmenter((make_case("a"), make_case("b", seed=1)))
    held_out = HeldOut.choose(list(segmenter.pool.cases.values()))
    score = held_out.dice(segmenter)
    assert 0 <= score <= 1
    assert score == held_out.dice(segmenter)


def test_no_more_is_scored_than_there_is_time_for_and_main_views_come_first(make_segmenter, make_case, monkeypatch):
    cases = [make_case(name, seed=seed, affine=np.eye(4), grid=(24, 24, 24)) for seed, name in enumerate("ab")]
    segmenter = make_segmenter(tuple(cases))
    held_out = HeldOut.choose([case for pool in segmenter.pools.values() for case in pool.cases.values()])
    everything, dice = held_out.affordable(segmenter, 600)
    assert everything.rows == held_out.rows and dice == pytest.approx(held_out.dice(segmenter))
    ticks = itertools.count()
    monkeypatch.setattr("ofl_sam2.training.held_out.perf_counter", lambda: next(ticks))
    for limit, count in ((-1, 1), (2, 2), (3, 3)):
        some, dice = held_out.affordable(segmenter, limit)
        assert len(some.rows) == count and dice == some.dice(segmenter)
        assert {view for view, _ in list(some.rows)[:2]} == {MAIN}
        assert some.rows.items() <= held_out.rows.items()


def test_scoring_can_be_cancelled(make_segmenter, make_case):
    segmenter, cancel = make_segmenter((make_case("a"), make_case("b", seed=1))), CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        HeldOut.choose(list(segmenter.pool.cases.values())).affordable(segmenter, 600, cancel)


def test_a_unet_is_not_asked_about_a_case_that_is_too_large_on_its_grid(make_segmenter, make_case):
    case = make_case("a")
    segmenter = make_segmenter((case, make_case("b", seed=1)))
    held_out = HeldOut.choose(list(segmenter.pool.cases.values()), enough=2)
    fine = VoxelUNet(Plan((0.01, 0.01, 0.04), (24, 20, 6)), (1, 2))
    assert held_out.drawn_by(fine, segmenter, [case])[MAIN, "a"].isnan().all()


def test_a_unet_counts_as_it_does_where_it_is_averaged(make_segmenter, make_case):
    cases = make_case("a"), make_case("b", seed=1)
    segmenter = make_segmenter(cases, unet_views=9.0)
    held_out = HeldOut.choose(list(segmenter.pool.cases.values()))

    class Knowing:
        def shape_of(self, volume):
            return volume.grid

        def probabilities(self, volume, values, check):
            labels = next(case.labels for case in cases if case.volume is volume)
            return torch.stack([torch.from_numpy(labels == value).half() for value in values])

    seconds = held_out.drawn_by(Knowing(), segmenter, cases)
    assert {name: maps.shape for name, maps in seconds.items()} == dict.fromkeys(
        ((MAIN, "a"), (MAIN, "b")), (1, 2, 16, 16)
    )
    without, averaged = held_out.compared(segmenter, seconds)
    assert averaged > 0.95 > without == held_out.dice(segmenter)
    unknown = {name: torch.full_like(maps, torch.nan) for name, maps in seconds.items()}
    assert held_out.compared(segmenter, unknown) == (without, without)


@pytest.mark.parametrize(("count", "names"), [(2, "a"), (3, "a"), (4, "a"), (9, "ai")])
def test_whole_cases_are_held_out_but_never_all(count, names):
    held_out = HeldOut.choose([pooled(name) for name in "abcdefghi"[:count]], enough=2)
    assert held_out.rows == {(MAIN, name): tuple(range(10)) for name in names}


def test_what_is_held_out_of_a_case_counts_as_not_labelled(make_segmenter, make_case):
    cases = make_case("a", labelled_slices=(0, 2, 3, 4, 5)), make_case("b", seed=1)
    pool = make_segmenter(cases).pool
    held_out = HeldOut({(MAIN, "a"): (1, 4)})
    one, other = (held_out.seen(case, pool.cases[case.volume.name]) for case in cases)
    assert one.labelled_slices == (0, 3, 4)
    assert other is cases[1]
    assert HeldOut({(MAIN, "b"): tuple(range(6))}).seen(cases[1], pool.cases["b"]) is None


def test_of_a_long_case_the_middle_of_the_structure_is_scored():
    case = pooled("a", slices=60, filled=range(20, 50))
    rows = _middle(case, range(60))
    assert len(rows) == MOST_SCORED
    assert rows == tuple(range(rows[0], rows[0] + MOST_SCORED))
    assert set(rows) < set(range(20, 50))
    assert _middle(pooled("b", slices=8), range(8)) == tuple(range(8))
