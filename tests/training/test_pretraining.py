"""Pretraining nano on synthetic anatomy, a few tiny steps of each stage."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from ofl_sam2.backbone.frozen import Decoded
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.backbone.weights import state_hash
from ofl_sam2.errors import InputError
from ofl_sam2.learner.load import shipped_learner
from ofl_sam2.progress import CancelToken
from ofl_sam2.training import pretraining
from ofl_sam2.training.pretraining import (
    FURTHER_SHARE,
    FURTHER_STAGES,
    STAGES,
    PretrainingState,
    Stage,
    mean_dice,
    pretrain,
    to_episode,
)
from ofl_sam2.training.synthetic_episodes import SyntheticEpisodes

MEMORY = Stage("memory", 0.25, 64, 1, 1, 1e-3, True, False)
JOINT = Stage("joint", 0.5, 96, 1, 1, 1e-3, True, True)
LEARNER = Stage("learner", 0.25, 64, 1, 1, 1e-3, False, True)


@pytest.fixture(autouse=True)
def seconds_are_steps(monkeypatch):
    """Let every step take exactly one second."""
    monkeypatch.setattr(pretraining, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


@pytest.fixture
def state():
    return PretrainingState.fresh(0)


def run(state, folder, steps, stages=(MEMORY, JOINT, LEARNER), **options):
    return list(pretrain(state, folder / "checkpoint.pt", steps / 60, stages=stages, workers=0, **options))


def test_a_short_run_passes_through_all_stages(state, tmp_path):
    reports = run(state, tmp_path, 4)
    assert [report.stage for report in reports] == ["memory", "joint", "joint", "learner"]
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert [report.share for report in reports] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(math.isfinite(report.loss) for report in reports)
    assert math.isnan(reports[0].online_dice)
    assert math.isnan(reports[-1].memory_dice)
    assert (state.step, state.spent) == (4, 4)
    assert (tmp_path / "checkpoint.pt").is_file()


def test_the_average_follows_the_weights_and_differs_from_them(state, tmp_path):
    start = state_hash(state.average)
    run(state, tmp_path, 2, (Stage("joint", 1.0, 64, 1, 2, 1e-3, True, True),))
    assert state_hash(state.average) != start
    assert state_hash(state.average["backbone"]) != state_hash(state.backbone)
    assert state_hash(state.average["learner"]) != state_hash(state.learner)
    assert not any(value.requires_grad for value in state.average.parameters())


def test_the_memory_stage_leaves_the_learner_alone(state, tmp_path):
    backbone, learner = state_hash(state.backbone), state_hash(state.learner)
    run(state, tmp_path, 2, (Stage("memory", 1.0, 64, 1, 2, 1e-3, True, False),))
    assert state_hash(state.learner) == learner
    assert state_hash(state.backbone) != backbone


def test_the_learner_stage_trains_the_learner_on_the_averaged_backbone_and_leaves_that_bit_identical(state, tmp_path):
    run(state, tmp_path, 2, (Stage("joint", 1.0, 64, 1, 2, 1e-3, True, True),))
    averaged = state_hash(state.average["backbone"])
    learner = state_hash(state.learner)
    state.spent = 0.0
    run(state, tmp_path, 2, (Stage("learner", 1.0, 64, 1, 2, 1e-3, False, True),))
    assert state_hash(state.backbone) == state_hash(state.average["backbone"]) == averaged
    assert state_hash(state.learner) != learner


def test_a_checkpoint_goes_on_where_it_was_left(state, tmp_path):
    token = CancelToken()
    reports = []
    for report in pretrain(state, tmp_path / "c.pt", 4 / 60, stages=(JOINT, LEARNER, LEARNER), cancel=token, workers=0):
        reports.append(report)
        if report.step == 1:
            token.cancel()
    assert [report.step for report in reports] == [1]
    resumed = PretrainingState.load(tmp_path / "c.pt")
    assert (resumed.step, resumed.spent) == (1, 1)
    for name in ("backbone", "learner", "average"):
        assert state_hash(getattr(resumed, name)) == state_hash(getattr(state, name))
    going_on = list(pretrain(resumed, tmp_path / "c.pt", 4 / 60, stages=(JOINT, LEARNER, LEARNER), workers=0))
    assert [(report.step, report.stage) for report in going_on] == [(2, "joint"), (3, "learner"), (4, "learner")]
    saved = PretrainingState.load(tmp_path / "c.pt")
    assert (saved.step, saved.spent) == (4, 4)


def test_checkpoints_are_written_on_the_way(state, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "_CHECKPOINT_SECONDS", 1)
    steps = pretrain(
        state, tmp_path / "c.pt", 1, stages=(Stage("memory", 1.0, 64, 1, 1, 1e-3, True, False),), workers=0
    )
    for report in steps:
        if report.step == 3:
            break
    assert PretrainingState.load(tmp_path / "c.pt").step == 2


def test_a_seed_gives_the_same_first_weights_and_losses_twice(tmp_path):
    one, again, other = (PretrainingState.fresh(seed) for seed in (3, 3, 4))
    assert state_hash(one.backbone) == state_hash(again.backbone) != state_hash(other.backbone)
    stages = (Stage("memory", 1.0, 64, 1, 1, 1e-3, True, False),)
    first, second = (run(state, tmp_path, 1, stages, seed=5)[0].loss for state in (one, again))
    assert first == second


def test_resuming_from_nothing_is_an_error_in_words(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint .*absent\.pt .*Leave --resume out"):
        PretrainingState.load(tmp_path / "absent.pt")


@pytest.mark.parametrize("stages", [STAGES, FURTHER_STAGES])
def test_the_stages_share_the_whole_budget(stages):
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    assert not stages[-1].train_backbone


def test_the_shipped_weights_are_trained_further_also_after_an_interruption(tmp_path):
    state = PretrainingState.shipped()
    shipped = load_backbone("nano")
    assert state_hash(state.backbone) == state_hash(state.average["backbone"]) == state_hash(shipped)
    assert state_hash(state.learner) == state_hash(shipped_learner("nano", shipped.width))
    state.save(tmp_path / "c.pt")
    resumed = PretrainingState.load(tmp_path / "c.pt")
    resumed.spent = 59.0
    assert resumed.further
    (report,) = pretrain(resumed, tmp_path / "c.pt", 1, workers=0)
    assert report.stage == FURTHER_STAGES[-1].name
    assert state_hash(resumed.learner) != state_hash(state.learner)


def test_further_training_ends_between_the_shipped_and_the_trained_weights():
    state = PretrainingState.shipped()
    with torch.no_grad():
        for value in state.average.parameters():
            value.add_(1.0)
    shipped_values = (*state.backbone.parameters(), *state.learner.parameters())
    for value, shipped in zip(state.result().parameters(), shipped_values, strict=True):
        torch.testing.assert_close(value, shipped + FURTHER_SHARE)


def test_training_from_scratch_ends_with_the_running_average(state):
    assert state.result() is state.average


def test_memory_alone_is_trained_in_a_share_of_the_steps(state, tmp_path):
    reports = run(state, tmp_path, 8, (Stage("joint", 1.0, 64, 1, 1, 1e-3, True, True, memory_share=0.5),))
    alone = [not math.isnan(report.memory_dice) for report in reports]
    assert 0 < sum(alone) < 8


def test_an_episode_lines_up_all_objects_of_a_batch(nano):
    batch = next(iter(SyntheticEpisodes(64, episodes=2, objects=3, queries=2, supports=(2, 2))))
    with torch.no_grad():
        episode = to_episode(nano, batch)
        query = nano.encode_images(batch.query_images[1, :1, None].expand(-1, 3, -1, -1))
    assert [len(part) for part in vars(episode).values()] == [2] * 6
    assert episode.sizes == (3, 3)
    assert episode.support_masks[0].shape == (6, 64, 64)
    assert torch.equal(episode.query_masks[1][4], batch.query_masks[1, 1, 1])
    torch.testing.assert_close(episode.query_features[0].stride16[4:5], query.stride16, rtol=1e-4, atol=1e-5)


def test_dice_is_the_mean_over_objects_that_are_present():
    masks = torch.zeros(3, 16, 16)
    masks[:2, :8] = 1
    logits = torch.full((3, 4, 4), -5.0)
    logits[0, :2], logits[1, :1] = 5.0, 5.0
    decoded = Decoded(logits, torch.ones(3), torch.ones(3), torch.zeros(3, 8))
    assert mean_dice(decoded, masks) == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(mean_dice(decoded[2:], masks[2:]))
