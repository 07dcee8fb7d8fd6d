"""Training on labelled volumes: reproducible, bounded, resumable; SAM2 stays as it is."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ofl_sam2.backbone.weights import state_hash
from ofl_sam2.errors import Cancelled, InputError, ModelError
from ofl_sam2.progress import CancelToken
from ofl_sam2.training import trainer
from ofl_sam2.training.trainer import TrainingSettings, bank_volumes, train

SHORT = TrainingSettings(minutes=5, epochs=3, steps_per_epoch=1, episodes=1, copies=1)


@pytest.fixture(scope="module")
def cases(make_case):
    return make_case("a"), make_case("b", seed=1, values=(1,), labelled_slices=(1, 2, 3))


@pytest.fixture
def build(make_segmenter, make_learner, cases):
    """A segmenter that has learned the cases."""
    return lambda: make_segmenter(cases, learner=make_learner(fused=False), pool_slices=3)


@pytest.fixture(scope="module")
def straight(make_segmenter, make_learner, cases):
    """An uninterrupted training: the segmenter after it, and its reports."""
    segmenter = make_segmenter(cases, learner=make_learner(fused=False), pool_slices=3)
    return SimpleNamespace(segmenter=segmenter, reports=train(segmenter, cases, SHORT))


@pytest.fixture
def seconds_are_steps(monkeypatch):
    """Let every training step take exactly one second."""
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


def losses(reports):
    return [report.loss for report in reports]


def weights(segmenter):
    return state_hash(segmenter.learner)


class Crash(Exception):
    """Stands for the process being killed."""


def crash_after(epochs):
    def report(entry):
        if entry.epoch == epochs:
            raise Crash

    return report


def test_training_changes_every_part_of_the_learner_and_nothing_of_sam2(build, cases, make_case):
    segmenter = build()
    before = {name: value.detach().clone() for name, value in segmenter.learner.named_parameters()}
    backbone, solution = state_hash(segmenter.backbone.sam2), segmenter.solution
    reports = train(segmenter, cases, SHORT)
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert all(np.isfinite(report.loss) and report.loss > 0 for report in reports)
    assert [name for name, value in segmenter.learner.named_parameters() if torch.equal(value, before[name])] == []
    assert state_hash(segmenter.backbone.sam2) == backbone == segmenter.backbone_hash
    assert all(value.grad is None for value in segmenter.backbone.parameters())
    assert not torch.equal(segmenter.solution.tau, solution.tau)
    assert not segmenter.solution.tau.requires_grad
    assert segmenter.segment(make_case("query", seed=7).volume).labels.shape == (24, 20, 6)


def test_a_seed_gives_the_same_losses_and_weights_twice_and_another_one_others(build, cases, straight):
    again = build()
    assert losses(train(again, cases, SHORT)) == losses(straight.reports)
    assert weights(again) == weights(straight.segmenter)
    assert losses(train(build(), cases, replace(SHORT, epochs=1, seed=1)))[0] != straight.reports[0].loss


def test_the_learning_rate_does_not_depend_on_the_clock_when_epochs_are_given(
    build, cases, straight, seconds_are_steps
):
    slow = build()
    train(slow, cases, SHORT)
    assert weights(slow) == weights(straight.segmenter)


def test_time_ends_a_training_in_the_middle_of_an_epoch(build, cases, seconds_are_steps):
    reports = train(build(), cases, replace(SHORT, minutes=3 / 60, epochs=None, steps_per_epoch=2))
    assert [report.seconds for report in reports] == [2, 3]
    assert [report.share for report in reports] == pytest.approx([2 / 3, 1])


def test_the_last_report_says_that_all_is_done(straight):
    assert [report.share for report in straight.reports] == pytest.approx([1 / 3, 2 / 3, 1])


def test_whichever_limit_comes_first_ends_a_training(build, cases, seconds_are_steps):
    assert len(train(build(), cases, replace(SHORT, minutes=2 / 60, epochs=50))) == 2
    assert len(train(build(), cases, replace(SHORT, minutes=50, epochs=1))) == 1


def test_a_cancelled_training_keeps_what_it_learned_and_leaves_no_checkpoint(build, cases, tmp_path):
    segmenter, token = build(), CancelToken()
    before = weights(segmenter)
    reports = train(segmenter, cases, SHORT, tmp_path / "c.pt", report=lambda _: token.cancel(), cancel=token)
    assert [report.epoch for report in reports] == [1, 2]
    assert weights(segmenter) != before
    assert list(tmp_path.iterdir()) == []


def test_cancelling_while_copies_are_encoded_changes_nothing(build, cases):
    segmenter, token = build(), CancelToken()
    before = weights(segmenter)
    with pytest.raises(Cancelled):
        train(segmenter, cases, SHORT, encoded=lambda *_: token.cancel(), cancel=token)
    assert weights(segmenter) == before


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(build, cases, straight, tmp_path):
    checkpoint, resumed = tmp_path / "training.pt", build()
    with pytest.raises(Crash):
        train(build(), cases, SHORT, checkpoint, report=crash_after(1))
    assert checkpoint.is_file()
    reports = train(resumed, cases, SHORT, checkpoint)
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert losses(reports) == losses(straight.reports)
    assert weights(resumed) == weights(straight.segmenter)
    assert torch.equal(resumed.solution.tau, straight.segmenter.solution.tau)
    assert not checkpoint.exists()


def test_after_an_error_the_mapping_networks_fit_the_learner(build, cases):
    segmenter = build()
    with pytest.raises(Crash):
        train(segmenter, cases, SHORT, report=crash_after(1))
    left = segmenter.solution.tau
    segmenter.solve()
    assert torch.equal(left, segmenter.solution.tau)


def test_a_finished_checkpoint_is_not_trained_further(build, cases, straight, tmp_path):
    checkpoint, segmenter = tmp_path / "training.pt", build()
    with pytest.raises(Crash):
        train(build(), cases, SHORT, checkpoint, report=crash_after(3))
    assert len(train(segmenter, cases, SHORT, checkpoint)) == 3
    assert weights(segmenter) == weights(straight.segmenter)


@pytest.mark.parametrize("other", ["labels", "settings", "learner"])
def test_a_checkpoint_of_something_else_is_ignored(
    build, make_segmenter, make_learner, make_case, cases, tmp_path, other
):
    checkpoint = tmp_path / "training.pt"
    with pytest.raises(Crash):
        train(build(), cases, replace(SHORT, epochs=1), checkpoint, report=crash_after(1))
    settings, learner = replace(SHORT, epochs=1), make_learner(fused=False)
    if other == "labels":
        cases = (cases[0], make_case("b", seed=1, values=(1,), labelled_slices=(2, 3, 4)))
    elif other == "settings":
        settings = replace(settings, episodes=2)
    else:
        learner = make_learner(fused=False, encoding=16)
    one, other_one = (make_segmenter(cases, learner=learner, pool_slices=3) for _ in range(2))
    start = {name: value.clone() for name, value in learner.state_dict().items()}
    reports = train(one, cases, settings, checkpoint)
    learner.load_state_dict(start)
    assert losses(reports) == losses(train(other_one, cases, settings))


@pytest.mark.parametrize("damage", ["cut", "text", "foreign"])
def test_a_damaged_checkpoint_is_an_error_in_words(build, cases, tmp_path, damage):
    checkpoint, segmenter = tmp_path / "training.pt", build()
    with pytest.raises(Crash):
        train(build(), cases, SHORT, checkpoint, report=crash_after(1))
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    elif damage == "text":
        checkpoint.write_text("not a checkpoint")
    else:
        torch.save({"weights": torch.zeros(3)}, checkpoint)
    before = weights(segmenter)
    with pytest.raises(ModelError, match=r"training\.pt is damaged\. Delete it and train again"):
        train(segmenter, cases, SHORT, checkpoint)
    assert weights(segmenter) == before


def test_training_needs_learned_labels_and_a_budget(make_segmenter, cases):
    with pytest.raises(InputError, match="Learn the labels first"):
        train(make_segmenter(()), cases, SHORT)
    for wrong in ({"minutes": 0}, {"epochs": 0}):
        with pytest.raises(InputError, match="positive number of minutes and epochs"):
            TrainingSettings(**wrong)


def test_copies_are_encoded_beside_the_originals_and_reported(build, cases):
    segmenter, steps = build(), []
    volumes = bank_volumes(segmenter, cases, replace(SHORT, copies=2), lambda *step: steps.append(step))
    assert [(volume.name, volume.slices) for volume in volumes[:2]] == [("a", tuple(range(6))), ("b", (1, 2, 3))]
    assert [volume.name for volume in volumes] == ["a", "b", "a", "a", "b", "b"]
    assert steps[-1] == (18, 18)
    assert {volume.features.stride16.dtype for volume in volumes} == {torch.float16}
    assert volumes[4].slices == volumes[1].slices
    assert not torch.equal(volumes[2].labels, volumes[3].labels)


def test_the_number_of_copies_keeps_to_the_bound_in_slices(build, cases):
    segmenter = build()
    assert len(bank_volumes(segmenter, cases, replace(SHORT, copies=8, max_slices=27))) == 2 + 2 * 2
    assert len(bank_volumes(segmenter, cases, replace(SHORT, copies=8, max_slices=1))) == 2 + 2 * 1
