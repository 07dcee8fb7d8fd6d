"""Several processes under torchrun do the work of one."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
RUN = ("monai.bundle", "run", "--config_file")


@pytest.fixture(scope="module")
def study(bundle: Path, tmp_path_factory) -> Path:
    """Four slices around the middle of both example volumes."""
    folder = tmp_path_factory.mktemp("study")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for name in ("synthetic_000", "synthetic_001"):
            image = nib.load(bundle / "examples" / kind / f"{name}.nii.gz")
            nib.save(image.slicer[:, :, 10:14], folder / kind / f"{name}.nii.gz")
    return folder


def python(*arguments: str | Path, cwd: Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_training_has_the_loss_curve_of_one_process(bundle, study, tmp_path):
    def losses(name: str, files: str, *program: str) -> list[float]:
        options = ("--dataset_dir", study, "--image_size", "64", "--train#trainer#max_epochs", "1")
        outputs = ("--model_dir", tmp_path / name, "--output_dir", tmp_path / "eval")
        log = python(*program, *RUN, files, *options, *outputs, cwd=bundle)
        assert (tmp_path / name / "model.json").is_file() and (tmp_path / f"{name}.pt").is_file()
        return [float(loss) for loss in re.findall(r"train_loss: (\S+)", log)]

    alone = losses("alone", "configs/train.json", "-m")
    together = losses("together", "['configs/train.json','configs/multi_gpu_train.json']", *TORCHRUN)
    assert len(alone) == len(together) == 10
    assert together == pytest.approx(alone, rel=0.01)


def test_evaluation_scores_every_case_once(bundle, study, tmp_path):
    files = "['configs/inference.json','configs/evaluate.json','configs/multi_gpu_evaluate.json']"
    python(*TORCHRUN, *RUN, files, "--dataset_dir", study, "--output_dir", tmp_path, cwd=bundle)
    with (tmp_path / "mean_dice_raw.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(Path(row["filename"]).name for row in rows) == ["synthetic_000.nii.gz", "synthetic_001.nii.gz"]
