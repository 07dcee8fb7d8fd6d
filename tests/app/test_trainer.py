import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from lib.trainers import ofl_sam2 as task
from lib.trainers.ofl_sam2 import OFLSAM2Trainer
from lib.workspace import Workspace
from monailabel.utils.async_tasks import utils as background

from ofl_sam2.errors import InputError
from ofl_sam2.files import read_labels
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.service.journal import label_version
from ofl_sam2.service.label_files import content_sha256
from ofl_sam2.training.settings import EpochReport, TrainingResult

Make = Callable[..., Any]
LABELLED = ["synthetic_000", "synthetic_001"]


def outcome_of(before: float | None, after: float | None, improved: bool) -> Callable[..., TrainingResult]:
    """Instead of a training: changes the learner as one would, and reports two epochs."""

    def train(
        segmenter: VolumeSegmenter, cases: Any, settings: Any, checkpoint: Path, report: Any, **options: Any
    ) -> TrainingResult:
        reports = [EpochReport(1, 0.9, 0.5, 1.0), EpochReport(2, 0.8, 1.0, 2.0)]
        for entry in reports:
            report(entry)
        if improved:
            with torch.no_grad():
                segmenter.learner.lam.add_(0.5)
            segmenter.unet = VoxelUNet(Plan((1.0, 1.0, 4.0), (24, 20, 6)), tuple(segmenter.structures))
        return TrainingResult(reports, before, after, improved)

    return train


def test_training_reports_and_publishes_only_what_is_better(workspace: Workspace, make_studies: Make) -> None:
    trainer = OFLSAM2Trainer(workspace)
    before = workspace.snapshots.current()
    stats = trainer({"model": "ofl_sam2", "max_epochs": 2, "minutes": 5}, make_studies(LABELLED))
    assert stats == trainer.stats()
    assert (stats["epoch"], stats["total_epochs"], stats["state"]) == (2, 2, "done")
    assert 0 <= stats["best_metric"] <= 1 and stats["total_time"].startswith("0:")
    current = workspace.snapshots.current()
    assert stats["published"] == (current.version == before.version + 1)
    if stats["dice_before"] is not None:
        assert stats["published"] == (stats["dice_after"] > stats["dice_before"])
    assert not (workspace.options.model_root / "training.pt").exists()


def test_better_result_is_published_on_top_of_newer_labels(
    workspace: Workspace,
    make_studies: Make,
    cases: Any,
    label_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = outcome_of(0.5, 0.75, improved=True)

    def train(segmenter: VolumeSegmenter, *args: Any, **options: Any) -> TrainingResult:
        newer = workspace.open_base()
        newer.learn(cases[:3], segmenter.structures)
        learned = {case.volume.name: "1" * 64 for case in cases[:3]}
        workspace.snapshots.publish(newer, {"learned": learned, "flagged": {"synthetic_002": {"1": 0.1}}})
        return trained(segmenter, *args)

    monkeypatch.setattr(task, "train", train)
    stats = OFLSAM2Trainer(workspace)({}, make_studies(LABELLED))
    snapshot, segmenter = workspace.serving.current()
    assert snapshot.version == 3 and stats["published"] and stats["best_metric"] == 0.75
    assert "Published as snapshot 3: Dice on held-out slices was 0.5 before and 0.75" in stats["message"]
    assert list(segmenter.pool.cases) == ["synthetic_000", "synthetic_001", "synthetic_002"]
    assert segmenter.learner.lam.item() == pytest.approx(workspace.open_base().learner.lam.item() + 0.5)
    assert segmenter.unet is not None and segmenter.unet.values == (1, 2)
    names = [{"name": "organ a", "idx": 1}, {"name": "organ b", "idx": 2}]
    versions = {name: label_version(content_sha256(label_files[name]), names) for name in LABELLED}
    assert snapshot.notes["trained_on"] == versions
    assert set(snapshot.notes["learned"]) == set(segmenter.pool.cases) and snapshot.notes["flagged"]


def test_worse_result_is_not_published_and_says_so(
    workspace: Workspace, make_studies: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "train", outcome_of(0.5, 0.4, improved=False))
    stats = OFLSAM2Trainer(workspace)({}, make_studies(LABELLED))
    assert workspace.snapshots.current().version == 1 and not stats["published"]
    assert stats["best_metric"] == 0.5 and stats["message"].startswith("Not published: Dice on held-out slices was 0.5")


def test_result_that_cannot_be_compared_says_so(
    workspace: Workspace, make_studies: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "train", outcome_of(None, None, improved=True))
    stats = OFLSAM2Trainer(workspace)({}, make_studies(LABELLED))
    assert stats["published"] and "too few labels" in stats["message"] and stats["best_metric"] == 0.0


def test_a_second_training_knows_which_cases_the_first_one_was_fitted_to(
    workspace: Workspace, make_studies: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []
    trained = outcome_of(0.5, 0.75, improved=True)

    def train(*args: Any, fitted: Any, **options: Any) -> TrainingResult:
        told.append(sorted(fitted))
        return trained(*args, **options)

    monkeypatch.setattr(task, "train", train)
    for _ in range(2):
        OFLSAM2Trainer(workspace)({}, make_studies(LABELLED))
    assert told == [[], LABELLED]


def test_labels_that_the_snapshot_does_not_know_are_learned_first(
    workspace: Workspace, make_studies: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def train(segmenter: VolumeSegmenter, cases: Any, *args: Any, **options: Any) -> TrainingResult:
        seen["names"] = [case.volume.name for case in cases]
        seen["pool"] = list(segmenter.pool.cases)
        return TrainingResult([], 0.5, 0.5, False)

    monkeypatch.setattr(task, "train", train)
    studies = make_studies(["synthetic_000", "synthetic_001", "synthetic_002", "synthetic_003"])
    studies.labels["synthetic_003"].write_bytes(b"no label")
    studies.vanished.add("synthetic_000")
    OFLSAM2Trainer(workspace)({}, studies)
    assert seen["names"] == ["synthetic_001", "synthetic_002"]
    assert seen["pool"] == ["synthetic_000", "synthetic_001", "synthetic_002"]
    stats = OFLSAM2Trainer(workspace).stats()
    assert list(stats["left_out"]) == ["synthetic_000", "synthetic_003"] and stats["cases"] == 2


def test_a_label_that_was_changed_since_is_learned_first_and_stays_as_it_was_at_the_start(
    workspace: Workspace, make_studies: Make, label_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_labels(label_files["synthetic_000"])
    nib.save(nib.Nifti1Image(np.uint8(volume.voxels == 1), volume.affine), label_files["synthetic_000"])

    def train(segmenter: VolumeSegmenter, cases: Any, *args: Any, **options: Any) -> TrainingResult:
        assert segmenter.pool.cases["synthetic_000"].known == {1}
        label_files["synthetic_000"].unlink()
        again = [cases[0], *cases][:2]
        assert all(np.array_equal(case.labels, np.where(volume.voxels == 1, 1, 0)) for case in again)
        assert [case.volume.name for case in cases] == LABELLED and again[0].values == (1,)
        return TrainingResult([], 0.5, 0.5, False)

    monkeypatch.setattr(task, "train", train)
    OFLSAM2Trainer(workspace)({}, make_studies(LABELLED))


def test_a_label_that_is_being_saved_is_left_out(workspace: Workspace, make_studies: Make) -> None:
    studies, trainer = make_studies(LABELLED[:1]), OFLSAM2Trainer(workspace)
    studies.info = {**studies.info, "sha256": "1" * 64}
    with pytest.raises(InputError, match="no final label to train on"):
        trainer({}, studies)


def test_refused_before_the_first_label(fresh_workspace: Workspace, make_studies: Make) -> None:
    trainer = OFLSAM2Trainer(fresh_workspace)
    assert trainer.stats() == {}
    with pytest.raises(InputError, match="Nothing has been learned yet"):
        trainer({}, make_studies())
    stats = trainer.stats()
    assert stats["state"] == "failed" and "Save a label first" in stats["message"] and "total_time" in stats


@pytest.mark.parametrize(
    "request_", [{"minutes": "long"}, {"max_epochs": "all"}, {"minutes": -1}, {"minutes": "nan"}, {"seed": "x"}]
)
def test_bad_options_are_refused(workspace: Workspace, make_studies: Make, request_: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="number"):
        OFLSAM2Trainer(workspace)(request_, make_studies(LABELLED))


def test_stats_are_there_from_the_first_second(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = OFLSAM2Trainer(workspace)
    monkeypatch.setattr(background, "background_tasks", {"train": [{"id": "1", "status": "SUBMITTED"}]})
    starting = {"epoch": 0, "total_epochs": 1, "best_metric": 0.0, "state": "starting"}
    assert trainer.stats() == starting
    monkeypatch.setattr(background, "background_processes", {"train": {"1": SimpleNamespace(pid=os.getpid() + 1)}})
    trainer._stats.begin(total_epochs=7)
    assert trainer.stats() == starting
    monkeypatch.setattr(background, "background_processes", {"train": {"1": SimpleNamespace(pid=os.getpid())}})
    stats = trainer.stats()
    assert (stats["epoch"], stats["total_epochs"], stats["state"]) == (0, 7, "preparing") and "total_time" not in stats


def test_killed_training_leaves_the_snapshot_and_says_stopped(workspace: Workspace, app_dir: Path) -> None:
    stats = workspace.options.model_root / "training.json"
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from lib.trainers.stats import TrainingStats;"
        "TrainingStats(Path(sys.argv[2])).begin(5); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(app_dir), str(stats)])
    try:
        while not stats.exists():
            assert process.poll() is None
            time.sleep(0.1)
        trainer = OFLSAM2Trainer(workspace)
        assert "total_time" not in trainer.stats()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    stopped = trainer.stats()
    assert stopped["state"] == "stopped" and not stopped["published"] and "total_time" in stopped
    assert workspace.snapshots.current().version == 1
