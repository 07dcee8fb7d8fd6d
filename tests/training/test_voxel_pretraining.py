"""Pretraining the U-Net on synthetic volumes, a few small steps."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Generator

from ofl_sam2.backbone.weights import state_hash
from ofl_sam2.errors import InputError
from ofl_sam2.learner.plan import Plan
from ofl_sam2.progress import CancelToken
from ofl_sam2.training import voxel_pretraining
from ofl_sam2.training.synthetic import Dice
from ofl_sam2.training.voxel_pretraining import VoxelPretraining, pretrain_unet


@pytest.fixture(autouse=True)
def small_volumes(monkeypatch):
    """Let every step take exactly one second, on small volumes."""
    monkeypatch.setattr(voxel_pretraining, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(voxel_pretraining, "CUBE", Plan((1.0, 1.0, 1.0), (16, 16, 16)))
    monkeypatch.setattr(voxel_pretraining, "_FLAT", (16, 24, 8))
    monkeypatch.setattr(voxel_pretraining, "PRETRAINED_DEEPEST", 2)
    monkeypatch.setattr(voxel_pretraining, "_LEVELS", (1.0, 0.5))


@pytest.fixture
def state():
    torch.manual_seed(0)
    return VoxelPretraining()


def run(state, folder, steps, **options):
    return list(pretrain_unet(state, folder / "checkpoint.pt", steps / 60, **options))


def test_a_run_ends_with_its_time_and_changes_the_trunk(state, tmp_path):
    start = state_hash(state.trunk)
    reports = run(state, tmp_path, 4)
    assert [share for share, _ in reports] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert all(0 < loss < 10 for _, loss in reports)
    assert state_hash(state.trunk) != start
    assert state_hash(VoxelPretraining.load(tmp_path / "checkpoint.pt")) == state_hash(state)


def test_what_it_learns_helps_with_volumes_it_has_not_seen(state, tmp_path):
    def error():
        dice = Dice(Generator().manual_seed(99))
        losses = []
        for _ in range(6):
            plan, images, structures = voxel_pretraining._batch(dice)
            losses.append(voxel_pretraining._loss(state, state.features(images, plan), structures).item())
        return sum(losses) / len(losses)

    with torch.no_grad():
        before = error()
    run(state, tmp_path, 60)
    with torch.no_grad():
        assert error() < before - 0.1


def test_it_goes_on_where_it_was_left(state, tmp_path):
    token = CancelToken()
    for _ in pretrain_unet(state, tmp_path / "c.pt", 4 / 60, cancel=token):
        token.cancel()
    resumed = VoxelPretraining.load(tmp_path / "c.pt")
    assert (int(resumed.step), float(resumed.spent)) == (1, 1)
    assert len(list(pretrain_unet(resumed, tmp_path / "c.pt", 4 / 60))) == 3
    assert int(VoxelPretraining.load(tmp_path / "c.pt").step) == 4


def test_checkpoints_are_written_on_the_way(state, tmp_path, monkeypatch):
    monkeypatch.setattr(voxel_pretraining, "_CHECKPOINT_SECONDS", 1)
    steps = pretrain_unet(state, tmp_path / "c.pt", 1)
    next(itertools.islice(steps, 2, None))
    assert int(VoxelPretraining.load(tmp_path / "c.pt").step) == 2


def test_a_missing_or_foreign_checkpoint_is_an_error_in_words(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint .*absent\.pt .*Leave --resume out"):
        VoxelPretraining.load(tmp_path / "absent.pt")
    torch.save({"trunk": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="cannot be used"):
        VoxelPretraining.load(tmp_path / "other.pt")


def test_slices_are_thin_or_thick_along_any_axis():
    dice = Dice(Generator().manual_seed(0))
    seen = set()
    for _ in range(40):
        plan, images, structures = voxel_pretraining._batch(dice)
        assert images.shape == (4, 1, *plan.shape)
        assert structures.shape == (4, *plan.shape)
        assert plan.shape[plan.thick_axis or 0] == (16 if plan.thick_axis is None else 8)
        assert structures.amax((1, 2, 3)).unflatten(0, (2, 2)).diff().eq(0).all()
        seen.add(plan.thick_axis)
    assert seen == {None, 0, 1, 2}


@pytest.mark.parametrize(("first", "drawn"), [(0, {0, 1, 2, 3}), (2, {2, 3}), (4, set())])
def test_the_first_regions_can_be_left_out(first, drawn):
    pair = [torch.arange(4).repeat_interleave(50) for _ in range(2)]
    seen = set()
    for seed in range(20):
        numbers = voxel_pretraining._numbers(Dice(Generator().manual_seed(seed)), pair, first)
        seen |= set() if numbers is None else set(numbers.nonzero().flatten().tolist())
    assert seen == drawn
