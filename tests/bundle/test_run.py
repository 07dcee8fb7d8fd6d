"""`python -m monai.bundle run` on the downloaded bundle, without the checkout."""

import csv
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ofl_sam2.dataset import find_cases, load_case
from ofl_sam2.evaluation import evaluate_folders
from ofl_sam2.files import read_volume, write_labels
from ofl_sam2.jobs import CHECKPOINT, open_segmenter
from ofl_sam2.model_index import read_index
from ofl_sam2.store import load_model

RUN = ("-m", "monai.bundle", "run", "--config_file")


@pytest.fixture
def copied(downloaded: Path, tmp_path: Path) -> Path:
    """A copy of the downloaded bundle that a test may train in."""
    return Path(shutil.copytree(downloaded, tmp_path / "ofl_sam2"))


@pytest.fixture(scope="module")
def small(downloaded: Path, tmp_path_factory) -> Path:
    """A study cut out of the example volumes: `images/` and `labels/` of one and two."""
    folder = tmp_path_factory.mktemp("small")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for name, source in (("one", "synthetic_000"), ("two", "synthetic_001")):
            image = nib.load(downloaded / "examples" / kind / f"{source}.nii.gz")
            nib.save(image.slicer[:, :, 8:14], folder / kind / f"{name}.nii.gz")
    return folder


def supports(study: Path) -> list[str]:
    folders = ["--support_images", f"{study}/images", "--support_labels", f"{study}/labels"]
    return [*folders, "--support_cases", "['one']", "--structures", "1=first,2=second", "--image_size", "64"]


def labels_in(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_the_checkout_is_out_of_sight(isolated, tmp_path):
    assert isolated("-c", "import ofl_sam2", cwd=tmp_path, check=False).returncode == 1


def test_example_runs_as_it_is(downloaded, isolated, tmp_path):
    output = tmp_path / "out"
    isolated(*RUN, "configs/inference.json", "--cases", "['synthetic_001']", "--output_dir", output, cwd=downloaded)
    assert [path.name for path in output.iterdir()] == ["synthetic_001.nii.gz"]
    image = downloaded / "examples" / "images" / "synthetic_001.nii.gz"
    expected = load_model(downloaded / "models" / "example").segment(read_volume(image)).labels
    written = nib.load(output / "synthetic_001.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), expected)
    assert np.array_equal(written.affine, nib.load(image).affine)


def test_supports_from_another_folder_score_as_the_command_line(downloaded, isolated, small, tmp_path):
    files = "['{0}/inference.json','{0}/evaluate.json']".format(downloaded / "configs")
    where = ["--bundle_root", downloaded, "--dataset_dir", small, "--output_dir", tmp_path / "eval"]
    isolated(*RUN, files, *where, *supports(small), cwd=tmp_path)
    cases = find_cases(small / "images", small / "labels")
    segmenter = open_segmenter(tmp_path / "none", image_size=64)
    segmenter.learn([load_case(cases[0])], {1: "first", 2: "second"})
    for case in cases:
        volume = read_volume(case.image)
        write_labels(tmp_path / "labels" / f"{case.name}.nii.gz", segmenter.segment(volume).labels, volume)
    metrics = ("dice", "hd95", "surface_dice")
    report = evaluate_folders(tmp_path / "labels", small / "labels", metrics=metrics, structures=segmenter.structures)
    with (tmp_path / "eval" / "metrics.csv").open() as file:
        scored = {name: float(value) for name, value in csv.reader(file)}
    assert scored == pytest.approx({f"{'mean_' * (m == 'dice')}{m}": report.mean()[m] for m in metrics}, abs=1e-6)
    with (tmp_path / "eval" / "mean_dice_raw.csv").open() as file:
        assert [Path(row["filename"]).name for row in csv.DictReader(file)] == ["one.nii.gz", "two.nii.gz"]


def test_a_batch_goes_on_where_it_stopped(downloaded, isolated, small, tmp_path):
    study = Path(shutil.copytree(small, tmp_path / "study"))
    (study / "images" / "three.nii.gz").write_bytes(b"no image")
    output, files = tmp_path / "out", "['configs/inference.json','configs/batch_inference.json']"
    options = (*RUN, files, "--image_dir", study / "images", "--output_dir", output, *supports(small))
    failed = isolated(*options, cwd=downloaded, check=False)
    assert failed.returncode == 1
    assert "three.nii.gz" in failed.stderr.splitlines()[-1] and failed.stderr.splitlines()[-1].startswith("Error: ")
    assert [path.name for path in output.iterdir()] == ["one.nii.gz"]
    before = (output / "one.nii.gz").stat().st_mtime_ns
    (study / "images" / "three.nii.gz").unlink()
    isolated(*options, cwd=downloaded)
    assert sorted(path.name for path in output.iterdir()) == ["one.nii.gz", "two.nii.gz"]
    assert (output / "one.nii.gz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("inference", ["--suport_images", "x"], "suport_images: .*Did you mean support_images"),
        ("inference", ["--support_images", "x", "--support_labels", "y"], "support_images and .*: x is not a folder"),
        ("inference", ["--model_dir", "absent"], "model_dir: absent holds no model"),
        (
            "train",
            ["--backbone", "sam2.1_hiera_tiny"],
            "model_dir, backbone, image_size: The weights of sam2.1_hiera_tiny are not here",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    downloaded, isolated, tmp_path, monkeypatch, config, options, message
):
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(tmp_path / "no weights"))
    output = ["--output_dir", tmp_path / "out"] + (["--model_dir", tmp_path / "m"] if config == "train" else [])
    done = isolated(*RUN, f"configs/{config}.json", *output, *options, cwd=downloaded, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(f"^Error: {message}", done.stderr.splitlines()[-1])
    assert not (tmp_path / "m").exists()
    assert all(path.name.startswith("events.out.tfevents") for path in tmp_path.glob("out/*"))  # TensorBoard's log


def test_training_survives_a_kill_and_is_what_inference_loads(copied, isolated, small, tmp_path):
    options = [
        *RUN,
        "configs/train.json",
        "--dataset_dir",
        small,
        "--image_size",
        "64",
        "--train#trainer#max_epochs",
        "2",
    ]
    command = [sys.executable, *map(str, options)]
    model = copied / "models" / "model"
    with subprocess.Popen(command, cwd=copied, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not (model / CHECKPOINT).is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert (model / CHECKPOINT).is_file()
    shipped = (copied / "models" / "model.pt").read_bytes()
    log = isolated(*options, cwd=copied).stdout
    assert "Epoch: 2/2" in log and "Epoch: 1/2" not in log
    assert not (model / CHECKPOINT).exists()
    assert (copied / "models" / "model.pt").read_bytes() != shipped
    assert read_index(model).notes["trained_on"] == ["one", "two"]
    output = tmp_path / "out"
    isolated(*RUN, "configs/inference.json", "--image_dir", small / "images", "--output_dir", output, cwd=copied)
    expected = load_model(model).segment(read_volume(small / "images" / "two.nii.gz")).labels
    assert np.array_equal(labels_in(output / "two.nii.gz"), expected)
