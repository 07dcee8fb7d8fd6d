"""Training on labelled volumes: reproducible, bounded, resumable; SAM2 stays as it is."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Events

from ofl_sam2.backbone.weights import state_hash
from ofl_sam2.errors import Cancelled, InputError, ModelError
from ofl_sam2.memory.pool import MAIN, View
from ofl_sam2.progress import CancelToken
from ofl_sam2.training import episode_training, trainer, voxels
from ofl_sam2.training.held_out import HeldOut
from ofl_sam2.training.settings import TrainingSettings
from ofl_sam2.training.trainer import _unet_share as unet_share
from ofl_sam2.training.trainer import train

SHORT = TrainingSettings(minutes=5, epochs=3, steps_per_epoch=1, episodes=1, copies=1)


@pytest.fixture(scope="module")
def cases(make_case):
    return make_case("a"), make_case("b", seed=1, values=(1,), labelled_slices=(1, 2, 3))


@pytest.fixture
def build(make_segmenter, make_learner, cases):
    """A segmenter that has learned the cases."""
    return lambda: make_segmenter(cases, learner=make_learner(fused=False), pool_slices=3)


@pytest.fixture
def straight(make_segmenter, make_learner, cases, better_every_time):
    """An uninterrupted training: the segmenter after it, and its reports."""
    segmenter = make_segmenter(cases, learner=make_learner(fused=False), pool_slices=3)
    return SimpleNamespace(segmenter=segmenter, reports=train(segmenter, cases, SHORT).reports)


@pytest.fixture(autouse=True)
def better_every_time(monkeypatch):
    """Let held-out slices always speak for the new parameters."""
    scores = itertools.count()
    monkeypatch.setattr(HeldOut, "dice", lambda *_: next(scores) / 100)
    monkeypatch.setattr(HeldOut, "affordable", lambda held_out, of, *_: (held_out, held_out.dice(of)))


@pytest.fixture(autouse=True)
def no_unet(monkeypatch):
    """Leave all of the time to learner and fusion."""
    monkeypatch.setattr(trainer, "_unet_share", lambda *_: 0.0)


@pytest.fixture
def with_unet(monkeypatch, no_unet):
    monkeypatch.setattr(trainer, "_unet_share", unet_share)


@pytest.fixture
def seconds_are_steps(monkeypatch):
    """Let every training step take exactly one second."""
    ticks = itertools.count(-3)
    clock = SimpleNamespace(perf_counter=lambda: max(0, next(ticks)))
    for module in (trainer, episode_training):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(trainer, "_seconds_a_slice", lambda segmenter: 1e-6)


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
    backbone, solution = state_hash(segmenter.backbone.sam2), segmenter.view(MAIN).solution
    reports = train(segmenter, cases, SHORT).reports
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert all(np.isfinite(report.loss) and report.loss > 0 for report in reports)
    assert [name for name, value in segmenter.learner.named_parameters() if torch.equal(value, before[name])] == []
    assert state_hash(segmenter.backbone.sam2) == backbone == segmenter.backbone_hash
    assert all(value.grad is None for value in segmenter.backbone.parameters())
    assert not torch.equal(segmenter.view(MAIN).solution.tau, solution.tau)
    assert not segmenter.view(MAIN).solution.tau.requires_grad
    assert segmenter.segment(make_case("query", seed=7).volume).labels.shape == (24, 20, 6)


def test_a_seed_gives_the_same_losses_and_weights_twice_and_another_one_others(build, cases, straight):
    again = build()
    assert losses(train(again, cases, SHORT).reports) == losses(straight.reports)
    assert weights(again) == weights(straight.segmenter)
    assert losses(train(build(), cases, replace(SHORT, epochs=1, seed=1)).reports)[0] != straight.reports[0].loss


def test_the_learning_rate_does_not_depend_on_the_clock_when_epochs_are_given(
    build, cases, straight, seconds_are_steps
):
    slow = build()
    train(slow, cases, SHORT)
    assert weights(slow) == weights(straight.segmenter)


def test_time_ends_a_training_in_the_middle_of_an_epoch(build, cases, seconds_are_steps):
    reports = train(build(), cases, replace(SHORT, minutes=3 / 60, epochs=None, steps_per_epoch=2)).reports
    assert [report.seconds for report in reports] == [2, 3]
    assert [report.share for report in reports] == pytest.approx([2 / 3, 1])


def test_the_last_report_says_that_all_is_done(straight):
    assert [report.share for report in straight.reports] == pytest.approx([1 / 3, 2 / 3, 1])


def test_whichever_limit_comes_first_ends_a_training(build, cases, seconds_are_steps):
    assert len(train(build(), cases, replace(SHORT, minutes=2 / 60, epochs=50)).reports) == 2
    assert len(train(build(), cases, replace(SHORT, minutes=50, epochs=1)).reports) == 1


def test_a_cancelled_training_keeps_what_it_learned_and_leaves_no_checkpoint(build, cases, tmp_path):
    segmenter, token = build(), CancelToken()
    before = weights(segmenter)
    reports = train(segmenter, cases, SHORT, tmp_path / "c.pt", report=lambda _: token.cancel(), cancel=token).reports
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
    reports = train(resumed, cases, SHORT, checkpoint).reports
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert losses(reports) == losses(straight.reports)
    assert weights(resumed) == weights(straight.segmenter)
    assert torch.equal(resumed.view(MAIN).solution.tau, straight.segmenter.view(MAIN).solution.tau)
    assert not checkpoint.exists()


def test_after_an_error_the_mapping_networks_fit_the_learner(build, cases):
    segmenter = build()
    with pytest.raises(Crash):
        train(segmenter, cases, SHORT, report=crash_after(1))
    left = segmenter.view(MAIN).solution.tau
    segmenter.solve()
    assert torch.equal(left, segmenter.view(MAIN).solution.tau)


def test_a_finished_checkpoint_is_not_trained_further(build, cases, straight, tmp_path):
    checkpoint, segmenter = tmp_path / "training.pt", build()
    with pytest.raises(Crash):
        train(build(), cases, SHORT, checkpoint, report=crash_after(3))
    assert len(train(segmenter, cases, SHORT, checkpoint).reports) == 3
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
    reports = train(one, cases, settings, checkpoint).reports
    learner.load_state_dict(start)
    assert losses(reports) == losses(train(other_one, cases, settings).reports)


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


@pytest.mark.parametrize(("after", "improved"), [(0.6, True), (0.5, False), (0.4, False), (None, True)])
def test_parameters_that_are_no_better_on_held_out_slices_are_not_kept(build, cases, monkeypatch, after, improved):
    segmenter, scores = build(), iter([0.5, after])
    before = weights(segmenter)
    monkeypatch.setattr(HeldOut, "dice", lambda *_: next(scores))
    result = train(segmenter, cases, replace(SHORT, epochs=1))
    assert (result.dice_before, result.dice_after, result.improved) == (0.5, after, improved)
    assert (weights(segmenter) != before) == improved


def test_handlers_see_every_epoch_also_after_a_resume(build, cases, tmp_path):
    seen = []

    def attach(engine):
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append((e.state.epoch, e.state.output > 0)))

    with pytest.raises(Crash):
        train(build(), cases, SHORT, tmp_path / "c.pt", report=crash_after(1))
    train(build(), cases, SHORT, tmp_path / "c.pt", attach=attach)
    assert seen == [(2, True), (3, True)]


def test_more_processes_than_episodes_are_refused(build, cases, monkeypatch):
    monkeypatch.setattr(trainer, "world_size", lambda: 2)
    with pytest.raises(InputError, match="2 processes cannot share 1 episodes"):
        train(build(), cases, SHORT)


@pytest.mark.usefixtures("with_unet")
@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("helps", [True, False])
def test_a_unet_is_fitted_afterwards_and_kept_if_it_helps_what_was_kept(build, cases, monkeypatch, better, helps):
    segmenter, asked = build(), []
    before, shares = weights(segmenter), []
    slices = iter([0.5, 0.6 if better else 0.4])

    def dice(held_out, of):
        return next(slices) if View(0) in {view for view, _ in held_out.rows} else 0.55

    def compared(held_out, of, seconds, cancel):
        asked.append(seconds)
        return 0.65, 0.7 if helps else 0.6

    views = {4: (MAIN, View(0)), 2: (MAIN,)}

    def choose(cases, enough=4, *_, **__):
        return HeldOut({(view, "a"): (2,) for view in views[enough]})

    monkeypatch.setattr(HeldOut, "choose", choose)
    monkeypatch.setattr(HeldOut, "dice", dice)
    monkeypatch.setattr(HeldOut, "compared", compared)
    result = train(segmenter, cases, SHORT, report=lambda entry: shares.append(entry.share))
    assert (segmenter.unet is not None, result.improved) == (helps, helps or better)
    outcome = (0.55, 0.7) if helps else (0.5, 0.6) if better else (0.5, 0.4)
    assert (result.dice_before, result.dice_after) == outcome
    assert (weights(segmenter) != before) == better
    assert [{name: maps.shape for name, maps in seconds.items()} for seconds in asked] == [
        {(MAIN, "a"): (1, 2, 16, 16)}
    ]
    assert shares == sorted(shares)
    assert shares[SHORT.epochs - 1] == pytest.approx(0.6)
    assert shares[-1] == (1 if helps else pytest.approx(0.6 + 0.4 * 2 / 3))


@pytest.mark.usefixtures("with_unet")
@pytest.mark.parametrize("reason", ["a lone case of three slices", "too large to average"])
def test_without_a_way_to_tell_or_to_use_it_no_unet_is_fitted(build, cases, make_segmenter, monkeypatch, reason):
    monkeypatch.setattr("ofl_sam2.training.voxels.fit_unet", lambda *_: pytest.fail("a U-Net was fitted"))
    segmenter, given = build(), cases
    if reason == "a lone case of three slices":
        segmenter, given = make_segmenter(cases[1:], pool_slices=3), cases[1:]
    else:
        monkeypatch.setattr("ofl_sam2.drawing.MAX_AVERAGED", 2 * 24 * 20 * 6 - 1)
    train(segmenter, given, SHORT)
    assert segmenter.unet is None


@pytest.mark.usefixtures("with_unet")
def test_the_unet_gets_more_of_the_time_with_four_cases(make_segmenter, make_case):
    cases = tuple(make_case(name, seed=seed) for seed, name in enumerate("abcd"))
    segmenter, shares = make_segmenter(cases, pool_slices=3), []
    train(segmenter, cases, replace(SHORT, epochs=1), report=lambda entry: shares.append(entry.share))
    assert shares[0] == pytest.approx(0.4)


@pytest.mark.usefixtures("with_unet")
def test_a_training_of_a_minute_leaves_a_fitted_learner_as_it_is(make_segmenter, cases):
    segmenter = make_segmenter(cases, pool_slices=3)
    before = weights(segmenter)
    result = train(segmenter, cases, replace(SHORT, minutes=1.0))
    assert weights(segmenter) == before
    assert result.reports[0].share == pytest.approx(1 / 3)


@pytest.mark.usefixtures("with_unet")
@pytest.mark.parametrize("helps", [True, False])
def test_with_a_lone_case_a_fitted_learner_stays_and_a_unet_is_judged_on_slices(
    make_segmenter, make_case, monkeypatch, helps
):
    case, seen = make_case("a"), []
    segmenter, samples = make_segmenter([case], pool_slices=3), voxels._samples
    before = weights(segmenter)
    monkeypatch.setattr(voxels, "_samples", lambda *args: seen.append(args[2].labelled_slices) or samples(*args))
    monkeypatch.setattr(HeldOut, "dice", lambda *_: 0.5)
    monkeypatch.setattr(HeldOut, "compared", lambda *_: (0.5, 0.6 if helps else 0.4))
    result = train(segmenter, [case], SHORT)
    assert weights(segmenter) == before
    assert (segmenter.unet is not None) == result.improved == helps
    assert (result.dice_before, result.dice_after) == (0.5, 0.6 if helps else 0.4)
    assert [entry.share for entry in result.reports] == pytest.approx([1 / 3, 2 / 3, 1] if helps else [1 / 3, 2 / 3])
    assert seen == [(0, 1, 3, 4, 5), *([None] if helps else [])]


@pytest.mark.usefixtures("with_unet")
def test_with_a_lone_case_a_new_learner_is_fitted_too(make_segmenter, make_learner, make_case):
    case = make_case("a")
    segmenter = make_segmenter([case], learner=make_learner(fused=False), pool_slices=3)
    before = weights(segmenter)
    result = train(segmenter, [case], SHORT)
    assert weights(segmenter) != before
    assert result.reports[SHORT.epochs - 1].share == pytest.approx(0.6)


@pytest.mark.parametrize("count", [1, 4])
def test_nothing_is_held_out_where_nothing_else_would_teach(
    make_segmenter, make_learner, make_case, monkeypatch, count
):
    case = make_case("a")
    labels = np.where((case.labels == 1) & (np.arange(6) == 2), case.labels, 0)
    others = [make_case(name, seed=seed, values=(2,)) for seed, name in enumerate("bcd"[: count - 1], start=1)]
    cases = [replace(case, labels=labels, values=(1,)), *others]
    segmenter = make_segmenter(cases, learner=make_learner(fused=False), side_views=False, close_ups=False)
    segmenter.structures = {1: "lesion"}
    segmenter.solve()
    seen = []
    monkeypatch.setattr(HeldOut, "dice", lambda held_out, *_: seen.append(held_out.rows))
    assert train(segmenter, cases, replace(SHORT, epochs=1)).improved
    assert seen == [{}, {}]


def test_what_is_set_aside_counts_alike_in_all_processes(build, cases, monkeypatch):
    def mean(parameters, *numbers):
        return [5.0] if len(numbers) == 1 else [0.0, numbers[1]]

    monkeypatch.setattr(episode_training, "synchronise", mean)
    assert train(build(), cases, replace(SHORT, epochs=1)).reports[0].seconds == 5


@pytest.mark.usefixtures("with_unet")
def test_a_cancelled_training_fits_no_unet(build, cases):
    token, segmenter = CancelToken(), build()
    train(segmenter, cases, SHORT, report=lambda _: token.cancel(), cancel=token)
    assert segmenter.unet is None


def test_few_steps_are_averaged_equally_and_many_exponentially():
    average = [torch.zeros(1)]
    for step, value in enumerate((3.0, 6.0, 9.0)):
        if step == 0:
            average[0].fill_(value)
        else:
            episode_training._average(average, [torch.tensor([value])], step)
    assert average[0].item() == pytest.approx(6.0)
    episode_training._average(average, [torch.tensor([106.0])], torch.tensor(400))
    assert average[0].item() == pytest.approx(8.0)


@pytest.mark.parametrize(("seconds", "most"), [(1e-6, 400), (3.0, 25), (1e6, 0)])
def test_a_slow_backbone_begins_with_fewer_copies(build, cases, monkeypatch, seconds, most):
    rooms, own = [], trainer.FreshCopies
    monkeypatch.setattr(trainer, "_seconds_a_slice", lambda segmenter: seconds)

    def copies(*arguments):
        rooms.append(arguments[5])
        return own(*arguments)

    monkeypatch.setattr(trainer, "FreshCopies", copies)
    train(build(), cases, SHORT)
    assert rooms == [most]
