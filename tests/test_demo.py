"""The demo from end to end on small synthetic volumes."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai import apps
from PIL import Image

from ofl_sam2 import demo, jobs
from ofl_sam2.cli import main
from ofl_sam2.demo import demo_data, run_demo
from ofl_sam2.errors import Cancelled, InputError
from ofl_sam2.files import read_labels
from ofl_sam2.model_index import read_index
from ofl_sam2.progress import CancelToken
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training import cohort
from ofl_sam2.training.settings import EpochReport, TrainingResult


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Four synthetic cases of a few slices; nano at 64 pixels; no file of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_SYNTHETIC_CASES", 4)
        patch.setattr(cohort, "_DEPTH", 6)
        patch.setattr(cohort, "_SIDE", 48)
        load = jobs.load_backbone
        patch.setattr(jobs, "load_backbone", lambda name, size, device: load(name, 64, device))
        patch.setenv("OFL_SAM2_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("OFL_SAM2_DATA", raising=False)
        yield


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    """The output of a first run."""
    output = tmp_path_factory.mktemp("demo") / "output"
    run_demo(output, 0, False, CancelToken())
    return output


@pytest.fixture
def output(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "output"))


@pytest.fixture
def segmented(monkeypatch) -> list[str]:
    """Names of the volumes that are segmented from now on."""
    names: list[str] = []
    segment = VolumeSegmenter.segment
    monkeypatch.setattr(
        VolumeSegmenter,
        "segment",
        lambda self, volume, *rest: (names.append(volume.name), segment(self, volume, *rest))[1],
    )
    return names


def test_everything_promised_is_there(finished):
    report = json.loads((finished / "report.json").read_text())
    assert "synthetic" in report["data"]
    assert report["learned_from"] == ["synthetic_000", "synthetic_001"]
    others = ["synthetic_002", "synthetic_003"]
    assert list(report["scores"]["cases"]) == others
    assert report["scores"]["mean"]["dice"] > 0.1
    assert report["peak_memory_gb"] > 0
    for name in others:
        assert report["segmentation"][name]["seconds"] > 0
        image = nib.load(finished / "synthetic_data" / "images" / f"{name}.nii.gz")
        label = nib.load(finished / "labels" / f"{name}.nii.gz")
        assert label.shape == image.shape
        np.testing.assert_allclose(label.affine, image.affine)
        with Image.open(finished / "overlays" / f"{name}.png") as picture:
            assert min(picture.size) > 100
    with Image.open(finished / "summary.png") as picture:
        assert min(picture.size) > 100


def test_a_second_run_segments_nothing_and_shows_the_same(output, segmented, capsys):
    before = json.loads((output / "report.json").read_text())
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--output", str(output), "--minutes", "0"])
    shown = capsys.readouterr()
    assert not stopped.value.code
    assert segmented == []
    after = json.loads((output / "report.json").read_text())
    assert (after["scores"], after["segmentation"]) == (before["scores"], before["segmentation"])
    assert "SYNTHETIC" in shown.err
    assert "s per volume, peak memory" in shown.out
    for words in ("synthetic_002", "mean", "synthetic organ A", "summary.png", "report.json", str(output / "labels")):
        assert words in shown.out


def test_only_what_is_missing_is_done_again(output, segmented):
    (output / "labels" / "synthetic_003.nii.gz").unlink()
    (output / "overlays" / "synthetic_002.png").unlink()
    (output / "report.json").unlink()
    run_demo(output, 0, False, CancelToken())
    assert segmented == ["synthetic_003"]
    assert (output / "overlays" / "synthetic_002.png").is_file()
    assert list(json.loads((output / "report.json").read_text())["segmentation"]) == ["synthetic_003"]


def test_a_run_that_was_stopped_before_its_report_is_completed(output, capsys):
    (output / "report.json").unlink()
    run_demo(output, 0, False, CancelToken())
    assert (output / "report.json").is_file()
    assert "s per volume" not in capsys.readouterr().out


def test_after_training_every_case_is_segmented_again(output, segmented, monkeypatch):
    monkeypatch.setattr(
        jobs, "train", lambda *_, **__: TrainingResult([EpochReport(1, 0.5, 1.0, 60.0)], 0.5, 0.6, True)
    )
    run_demo(output, 1, False, CancelToken())
    assert segmented == ["synthetic_002", "synthetic_003"]
    assert json.loads((output / "report.json").read_text())["training_minutes"] == 1
    run_demo(output, 1, False, CancelToken())
    assert len(segmented) == 2


def test_another_training_time_trains_again(output, monkeypatch):
    trained = []
    result = TrainingResult([EpochReport(1, 0.5, 1.0, 60.0)], 0.5, 0.6, True)
    monkeypatch.setattr(jobs, "train", lambda *arguments, **_: (trained.append(arguments[2].minutes), result)[1])
    for minutes in (1, 1, 2, 0):
        run_demo(output, minutes, False, CancelToken())
        assert json.loads((output / "report.json").read_text())["training_minutes"] == minutes
    assert trained == [1, 2]


def test_an_interrupted_training_is_taken_up_again(output, monkeypatch):
    trained = []

    def interrupted(segmenter, cases, settings, checkpoint, report, encoded, cancel, **options):
        trained.append(len(cases))
        cancel.cancel()
        return TrainingResult([], None, None, True)

    monkeypatch.setattr(jobs, "train", interrupted)
    for _ in range(2):
        with pytest.raises(Cancelled):
            run_demo(output, 1, False, CancelToken())
    assert trained == [2, 2]
    assert not list((output / "labels").iterdir())


def test_a_model_of_other_cases_is_replaced(output, monkeypatch):
    monkeypatch.setattr(demo, "SHOTS", 1)
    run_demo(output, 0, False, CancelToken())
    assert {stored.case for stored in read_index(output / "model").pool} == {"synthetic_000"}
    report = json.loads((output / "report.json").read_text())
    assert set(report["segmentation"]) == set(report["scores"]["cases"])
    assert len(report["segmentation"]) == 3


def test_incomplete_synthetic_data_is_written_again(output):
    (output / "synthetic_data" / "labels" / "synthetic_003.nii.gz").unlink()
    data = demo_data(output, False)
    assert data.others == ("synthetic_002", "synthetic_003")
    assert read_labels(data.case("synthetic_003").label).voxels.any()


@pytest.mark.parametrize("minutes", [-1.0, float("nan"), float("inf")])
def test_an_impossible_time_is_refused(tmp_path, minutes):
    with pytest.raises(InputError, match="minutes is not possible"):
        run_demo(tmp_path / "out", minutes, False, CancelToken())
    assert not (tmp_path / "out").exists()


def hippocampus(folder: Path, images: str, labels: str, count: int) -> None:
    for name, values in ((images, (0, 100)), (labels, (0, 3))):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            voxels = np.random.default_rng(number).integers(*values, (6, 6, 4)).astype(np.uint8)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / name / f"hippocampus_{number:03d}.nii.gz")


def test_real_volumes_are_taken_with_their_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("OFL_SAM2_DATA", str(tmp_path))
    folder = tmp_path / "msd_hippocampus"
    hippocampus(folder, "images", "labels", 25)
    data = demo_data(tmp_path / "out", False)
    assert "MSD Task04" in data.title
    assert data.shots == ("hippocampus_000", "hippocampus_001")
    assert (len(data.others), data.structures) == (20, {1: "anterior", 2: "posterior"})
    splits = {"dev_shots": [f"hippocampus_{n:03d}" for n in (7, 9, 11)], "dev_val": ["hippocampus_003"]}
    (folder / "splits.json").write_text(json.dumps(splits))
    data = demo_data(tmp_path / "out", False)
    assert (data.shots, data.others) == (("hippocampus_007", "hippocampus_009"), ("hippocampus_003",))


def test_an_environment_without_the_data_falls_back_to_synthetic_volumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OFL_SAM2_DATA", str(tmp_path / "nowhere"))
    assert demo_data(tmp_path / "out", False).title.startswith("synthetic")
    assert "SYNTHETIC" in capsys.readouterr().err


def test_a_download_is_taken_from_where_monai_puts_it(tmp_path, monkeypatch):
    asked = []

    def dataset(root, task, section, **options):
        asked.append((task, section, options["download"]))
        if not (root / task).exists():
            hippocampus(root / task, "imagesTr", "labelsTr", 4)

    monkeypatch.setattr(apps, "DecathlonDataset", dataset)
    for _ in range(2):
        data = demo_data(tmp_path, True)
        assert (len(data.shots), len(data.others)) == (2, 2)
        assert data.case("hippocampus_003").label is not None
    assert asked == [("Task04_Hippocampus", "training", True)] * 2


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def dataset(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(apps, "DecathlonDataset", dataset)
    with pytest.raises(
        InputError, match=r"could not be downloaded \(no route to host\).*set OFL_SAM2_DATA to a folder"
    ):
        demo_data(tmp_path, True)
