"""A U-Net is judged by what is drawn without it."""

import pytest
import torch

from ofl_sam2.memory.pool import CLOSE, MAIN
from ofl_sam2.progress import CancelToken
from ofl_sam2.training.held_out import HeldOut
from ofl_sam2.training.judge import Judge


class Drawn:
    """Instead of a U-Net: draws what is labelled, shifted along the first axis."""

    def __init__(self, cases, shift=0):
        self.labels = {case.volume.name: case.labels for case in cases}
        self.shift = shift

    def shape_of(self, volume):
        return volume.grid

    def probabilities(self, volume, values, check):
        return torch.stack([torch.from_numpy(self.labels[volume.name] == v).roll(self.shift, 0) for v in values]).half()


@pytest.fixture(scope="module")
def small(make_small_case):
    return [make_small_case(name, seed) for seed, name in enumerate("ab")]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_drawn_in_close_ups_is_judged_in_these_alone(make_segmenter, small, count):
    cases = small[:count]
    segmenter = make_segmenter(tuple(cases), unet_views=100.0)
    judge = Judge(segmenter, cases, [case.volume.name for case in cases], ())
    before = judge.begin(600)
    scored = judge._scored
    assert set(scored.rows) == {(MAIN, "a"), (CLOSE, "a (1,)")}
    assert before == HeldOut({entry: rows for entry, rows in scored.rows.items() if entry[0] == CLOSE}).dice(segmenter)
    assert judge.helps(Drawn(cases)) and judge.dice > 0.95 > before
    assert not judge.helps(Drawn(cases, shift=30))


def test_the_rows_of_a_lone_case_s_close_up_are_the_slices_that_the_unet_has_not_seen(make_segmenter, small):
    segmenter, case = make_segmenter((small[0],)), small[0]
    judge = Judge(segmenter, [case], ["a"], ())
    judge.begin(600)
    seen = set(judge.seen(case).labelled_slices)
    look = next(look for look in segmenter.viewpoint.looks(case) if look.view == CLOSE)
    lower = look.window.lower[segmenter.viewpoint.main_axis(case.volume)]
    rows = judge._scored.rows[CLOSE, "a (1,)"]
    apart = {segmenter.pools[CLOSE].cases["a (1,)"].slices[row] + lower for row in rows}
    assert apart and not apart & seen


def test_without_close_ups_the_main_view_is_judged(make_segmenter, small):
    segmenter = make_segmenter(tuple(small), close_ups=False)
    judge = Judge(segmenter, small, ["a", "b"], ())
    before = judge.begin(600)
    assert set(judge._scored.rows) == {(MAIN, "a")}
    assert before == judge.held_out.dice(segmenter)


def test_a_cancelled_training_gets_no_unet(make_segmenter, small):
    cancel = CancelToken()
    judge = Judge(make_segmenter(tuple(small)), small, ["a", "b"], (), cancel)
    judge.begin(600)
    cancel.cancel()
    assert not judge.helps(Drawn(small))


def test_a_unet_that_is_worse_than_what_was_drawn_at_first_does_not_help(make_segmenter, small, monkeypatch):
    judge = Judge(make_segmenter(tuple(small)), small, ["a", "b"], ())
    before = judge.begin(600)
    monkeypatch.setattr(HeldOut, "compared", lambda *_: (before - 0.2, before - 0.1))
    assert not judge.helps(Drawn(small))
