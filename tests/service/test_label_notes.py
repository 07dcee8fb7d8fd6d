"""Which labels look wrong, judged by the other labels."""

from dataclasses import replace

import numpy as np
import pytest

from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.service.label_notes import LabelNotes, agreement
from ofl_sam2.service.snapshots import Snapshot


def test_a_low_dice_is_flagged_only_where_other_labels_agree():
    agreed = {"a": {"1": 0.9}, "b": {"1": 0.7, "2": 0.1}, "c": {"1": 0.29, "2": 0.29}, "d": {}}
    assert LabelNotes(agreement=agreed).flagged() == {"c": {"1": 0.29}}
    assert LabelNotes(agreement={**agreed, "c": {"1": 0.3}}).flagged() == {}
    assert LabelNotes(agreement={**agreed, "a": {"1": 0.5}}).flagged() == {}


def test_a_label_has_to_be_checked_when_it_is_new_or_changed_and_not_alone():
    notes = LabelNotes()
    notes.learn("a", "1")
    assert notes.unchecked() == []
    notes.learn("b", "1")
    assert notes.unchecked() == ["a", "b"]
    notes.agreement = {"a": {}, "b": {"1": 0.5}}
    assert notes.unchecked() == []
    notes.learn("b", "2")
    assert notes.unchecked() == ["b"]
    assert notes.learned == {"a": "1", "b": "2"}


def test_notes_are_copied_from_a_snapshot(tmp_path):
    snapshot = Snapshot(1, tmp_path, {"learned": {"a": "1"}, "reason": "test"}, "")
    notes = LabelNotes.of(snapshot)
    notes.forget("a")
    assert (notes.learned, snapshot.notes["learned"]) == ({}, {"a": "1"})
    assert LabelNotes.of(None) == LabelNotes()


def test_parameters_fitted_on_changed_or_removed_labels_are_named():
    notes = LabelNotes(learned={"a": "1", "b": "2"}, trained_on={"a": "1", "b": "1", "c": "1"})
    assert notes.fitted_on_removed() == ["b", "c"]


@pytest.mark.parametrize("partly", [False, True])
def test_agreement_is_the_dice_with_what_the_other_labels_make_of_the_image(make_segmenter, make_case, partly):
    segmenter = make_segmenter((make_case("a"), make_case("b", seed=1)), side_views=False, close_ups=False)
    case = make_case("c", seed=2)
    drawn = segmenter.segment(case.volume).labels
    values = tuple(int(value) for value in np.unique(drawn) if value)
    assert values
    labels, labelled = drawn, None
    if partly:
        stack, spoilt = segmenter.stack(case.volume), drawn.copy()
        labelled = tuple(index for index in range(len(stack)) if stack.slice_of(drawn, index).any())
        for index in set(range(len(stack))) - set(labelled):
            stack.slice_of(spoilt, index)[...] = values[0]
        labels = spoilt
    same = agreement(segmenter, replace(case, labels=labels, values=values, labelled_slices=labelled))
    assert set(same.values()) == {1.0}
    other = np.where(drawn == 0, values[0], 0).astype(drawn.dtype)
    assert agreement(segmenter, replace(case, labels=other, values=values[:1])) == {str(values[0]): 0.0}


def test_the_image_s_own_label_does_not_count(make_segmenter, make_case):
    segmenter = make_segmenter((make_case("a"),))
    assert agreement(segmenter, make_case("a")) == {}
    assert set(segmenter.pool.cases) == {"a"}


def test_a_unet_that_was_fitted_to_the_label_is_not_asked(make_segmenter, make_case, monkeypatch):
    segmenter = make_segmenter((make_case("a"), make_case("b", seed=1)))
    without = agreement(segmenter, make_case("b", seed=1))
    segmenter.unet = VoxelUNet(Plan((1.0, 1.0, 4.0), (24, 20, 6)), (1, 2))
    monkeypatch.setattr(VoxelUNet, "probabilities", None)
    assert agreement(segmenter, make_case("b", seed=1)) == without != {}
    assert segmenter.unet is not None


def test_what_nobody_has_learned_cannot_disagree(make_segmenter, make_case):
    assert agreement(make_segmenter(()), make_case("a")) == {}
    assert agreement(make_segmenter((make_case("a", values=(1,)),)), make_case("b", values=(2,))) == {}
