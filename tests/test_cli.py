"""The commands as a user runs them, on small volumes at 64 pixels."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from safetensors.torch import load_file

import ofl_sam2
from ofl_sam2 import jobs, pretraining_jobs
from ofl_sam2.backbone import weights
from ofl_sam2.backbone.build import build_sam2
from ofl_sam2.backbone.configs import BACKBONES
from ofl_sam2.cli import main
from ofl_sam2.files import read_labels, read_volume
from ofl_sam2.learner.load import WEIGHTS, read_learner
from ofl_sam2.model_index import INDEX, read_index
from ofl_sam2.store import load_model
from ofl_sam2.training import pretraining, settings
from ofl_sam2.training.held_out import HeldOut
from ofl_sam2.training.pretraining import Stage
from ofl_sam2.training.settings import TrainingSettings

TINY = "sam2.1_hiera_tiny"
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-1, 1, 4]), (10, -20, 30))
CONTRACT = {
    "learn": "--images --labels --model --cases --structures --backbone --image-size --fresh --json",
    "train": "--images --labels --model --cases --minutes --epochs --seed",
    "segment": "--model --image --output --resume --json",
    "evaluate": "--predictions --labels --cases --json --metrics",
    "weights": "list fetch verify",
    "weights list": "",
    "weights fetch": "NAME",
    "weights verify": "PATH",
    "synth": "--output --cases --seed",
    "pretrain": "--output --minutes --device --resume --further --seed",
    "pretrain-unet": "--output --minutes --device --resume --seed",
    "demo": "--output --minutes --download",
}


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Study:
    """A folder with `images/`, `labels/` of the cases a to d, and a `model/` learned from a and b."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def labels(self) -> Path:
        return self.root / "labels"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def image(self, name: str) -> Path:
        return self.images / f"{name}.nii.gz"


@pytest.fixture(scope="module", autouse=True)
def isolated(tmp_path_factory):
    """No file of the user is read or written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFL_SAM2_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OFL_SAM2_WEIGHTS", str(tmp_path_factory.mktemp("weights")))
        patch.delenv("OFL_SAM2_DATA", raising=False)
        yield


@pytest.fixture
def cli(capsys) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Result(stopped.value.code or 0, shown.out, shown.err)

    return run


def succeed(result: Result) -> Result:
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    return result


def assert_refused(result: Result, words: str) -> None:
    """Exit code 2 and exactly one line that begins with Error."""
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert re.search(words, errors[0]), errors[0]
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1] == errors[0]


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture(scope="module")
def study(make_case, tmp_path_factory) -> Study:
    study = Study(tmp_path_factory.mktemp("study"))
    for seed, name in enumerate("abcd"):
        case = make_case(name, seed)
        save_nifti(study.image(name), case.volume.voxels, case.volume.affine)
        save_nifti(study.labels / f"{name}.nii.gz", case.labels, case.volume.affine)
    segmenter = jobs.open_segmenter(study.model, image_size=64)
    jobs.learn_cases(segmenter, study.images, study.labels, study.model, ["a", "b"], None, False, jobs.CancelToken())
    return study


@pytest.fixture
def own(study, tmp_path) -> Study:
    """A copy of the study to change."""
    return Study(Path(shutil.copytree(study.root, tmp_path / "own")))


def learn_arguments(study: Study, model: Path) -> list[object]:
    return ["learn", "--images", study.images, "--labels", study.labels, "--model", model, "--image-size", 64]


# Help and version


@pytest.mark.parametrize("command", CONTRACT)
def test_help_names_what_the_contract_promises(cli, command):
    shown = succeed(cli(*command.split(), "--help")).out
    for word in CONTRACT[command].split():
        assert word in shown
    assert cli(*command.split(), "-h").out == shown
    assert not re.search(r"^ +(--[\w-]+)(\s+[A-Z]+)?\s*$\n^ +--", shown, re.MULTILINE), "an option without a text"


def test_the_overview_names_every_command(cli):
    shown = succeed(cli("--help")).out
    for command in CONTRACT:
        assert command.split()[0] in shown


def test_no_command_at_all_shows_the_overview(cli):
    shown = cli()
    assert shown.code in (0, 2)
    assert "Commands" in shown.out + shown.err


def test_the_version_is_that_of_the_package(cli):
    assert succeed(cli("--version")).out.strip() == ofl_sam2.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learn"], "Missing option '--images'"),
        (["segmnt"], "No such command"),
        (["segment", "--modl", "x"], "No such option"),
        (["train", "--images", "i", "--labels", "l", "--model", "m", "--epochs", "many"], "--epochs"),
        (["train", "--images", "i", "--labels", "l", "--model", "m", "--seed", "-1"], "--seed"),
        (["synth", "--output", "x", "--cases", "0"], "--cases"),
    ],
)
def test_wrong_usage_is_refused(cli, arguments, words):
    assert_refused(cli(*arguments), words)


# Learning


def test_learn_segment_and_evaluate_from_pairs(cli, study, tmp_path):
    model, output = tmp_path / "model", tmp_path / "out"
    learned = succeed(
        cli(*learn_arguments(study, model), "--cases", "a,b", "--structures", "1=bright", "--json", tmp_path / "l.json")
    )
    assert "Learned 1=bright from 12 slices of 2 cases" in learned.out
    assert str(model) in learned.out
    report = json.loads((tmp_path / "l.json").read_text())
    assert report["cases"] == ["a", "b"]
    assert (report["backbone"], report["structures"], report["fitted"]) == ("nano", {"1": "bright"}, True)
    assert report["seconds"] > 0
    images = ["--image", study.image("c"), "--image", study.image("d")]
    segmented = succeed(cli("segment", "--model", model, *images, "--output", output, "--json", tmp_path / "s.json"))
    assert "2 label maps" in segmented.out
    results = json.loads((tmp_path / "s.json").read_text())
    assert set(results["results"]) == {"c", "d"}
    assert results["failures"] == {}
    assert results["results"]["c"]["labels"] == str(output / "c.nii.gz")
    assert set(results["results"]["c"]["quality"]) == {"bright"}
    assert set(np.unique(read_labels(output / "c.nii.gz").voxels)) <= {0, 1}
    scored = succeed(
        cli(
            *["evaluate", "--predictions", output, "--labels", study.labels, "--structures", "1=bright"],
            *["--metrics", "dice,hd95,surface_dice", "--json", tmp_path / "e.json"],
        )
    )
    assert "bright" in scored.out
    assert "HD95" in scored.out
    scores = json.loads((tmp_path / "e.json").read_text())
    assert set(scores["cases"]) == {"c", "d"}
    assert scores["mean"]["dice"] > 0.3


def test_a_model_that_exists_is_extended(cli, own):
    result = succeed(cli(*learn_arguments(own, own.model), "--cases", "c"))
    assert "of 3 cases" in result.out
    assert [stored.case for stored in read_index(own.model).pool] == ["a", "b", "c"]


def test_fresh_starts_anew_and_forgets_the_notes(cli, own):
    index = json.loads((own.model / INDEX).read_text())
    index["notes"] = {"trained_on": ["a", "b"]}
    (own.model / INDEX).write_text(json.dumps(index))
    succeed(cli(*learn_arguments(own, own.model), "--cases", "a"))
    assert read_index(own.model).notes == {"trained_on": ["a", "b"]}
    succeed(cli(*learn_arguments(own, own.model), "--cases", "c", "--fresh"))
    assert [stored.case for stored in read_index(own.model).pool] == ["c"]
    assert read_index(own.model).notes == {}


def test_without_a_list_of_cases_all_with_a_label_are_learned(cli, own, tmp_path):
    (own.labels / "d.nii.gz").unlink()
    succeed(cli(*learn_arguments(own, tmp_path / "model")))
    assert [stored.case for stored in read_index(tmp_path / "model").pool] == ["a", "b", "c"]


def test_slices_without_a_label_can_be_left_out(cli, study, tmp_path):
    result = succeed(cli(*learn_arguments(study, tmp_path / "model"), "--cases", "a", "--ignore-empty-slices"))
    labelled = np.asarray(nib.load(study.labels / "a.nii.gz").dataobj).any((0, 1)).sum()
    assert f"from {labelled} slices" in result.out


def test_a_backbone_other_than_the_saved_one_is_refused(cli, own):
    arguments = learn_arguments(own, own.model)
    assert_refused(cli(*arguments[:-1], 96), "learned with nano at 64 pixels, not with nano at 96.*--fresh")
    assert_refused(cli(*arguments[:-2], "--backbone", TINY), "not with sam2.1_hiera_tiny")
    assert "of 2 cases" in succeed(cli(*arguments[:-2], "--cases", "a")).out


# Training


@pytest.fixture
def quick_training(monkeypatch):
    """One step an epoch, one copy of each volume."""
    quick = partial(TrainingSettings, steps_per_epoch=1, episodes=1, copies=1)
    monkeypatch.setattr(settings, "TrainingSettings", quick)


@pytest.mark.usefixtures("quick_training")
def test_training_changes_learner_and_fusion_and_says_so(cli, own, tmp_path, monkeypatch):
    monkeypatch.setattr(HeldOut, "dice", lambda *_: None)
    before = load_model(own.model)
    arguments = learn_arguments(own, own.model)[1:]
    result = succeed(cli("train", *arguments, "--cases", "a,b", "--epochs", 2, "--json", tmp_path / "t.json"))
    assert "Trained 2 epochs on 2 cases" in result.out
    report = json.loads((tmp_path / "t.json").read_text())
    assert (report["epochs"], len(report["losses"])) == (2, 2)
    after = load_model(own.model)
    assert not torch.equal(after.learner.projection.weight, before.learner.projection.weight)
    assert after.backbone_hash == before.backbone_hash
    assert read_index(own.model).notes["trained_on"] == ["a", "b"]
    assert not (own.model / jobs.CHECKPOINT).exists()


@pytest.mark.parametrize("option", [("--minutes", 0), ("--minutes", -1), ("--epochs", 0)])
def test_training_needs_a_positive_time(cli, own, option):
    assert_refused(cli("train", *learn_arguments(own, own.model)[1:], *option), "positive number of minutes and epochs")


# Segmenting: resume, failures, interruption


def test_resume_skips_what_is_there(cli, study, tmp_path):
    (tmp_path / "c.nii.gz").write_bytes(b"mine")
    arguments = ["segment", "--model", study.model, "--output", tmp_path]
    images = ["--image", study.image("c"), "--image", study.image("d")]
    result = succeed(cli(*arguments, *images, "--resume"))
    assert (tmp_path / "c.nii.gz").read_bytes() == b"mine"
    assert "c: " in result.err
    assert "skipped" in result.err
    assert "1 label maps" in result.out
    succeed(cli(*arguments, *images))
    assert read_labels(tmp_path / "c.nii.gz").voxels.shape == (24, 20, 6)


def test_resume_keeps_what_was_reported(cli, study, tmp_path):
    report = tmp_path / "s.json"
    arguments = ["segment", "--model", study.model, "--output", tmp_path, "--resume", "--json", report]
    first, second = (["--image", study.image(name)] for name in "cd")
    succeed(cli(*arguments, *first))
    before = json.loads(report.read_text())["results"]
    succeed(cli(*arguments, *first, *second))
    after = json.loads(report.read_text())["results"]
    assert list(after) == ["c", "d"] and after["c"] == before["c"]


@pytest.mark.parametrize("content", ["", "[]", '{"results": []}', "{}"])
def test_a_file_of_something_else_is_not_gone_on_with(cli, study, tmp_path, content):
    (report := tmp_path / "s.json").write_text(content)
    arguments = ["--image", study.image("c"), "--output", tmp_path, "--resume", "--json", report]
    assert_refused(cli("segment", "--model", study.model, *arguments), "s.json does not hold results")
    assert report.read_text() == content


def test_bad_images_do_not_keep_the_others_from_being_done(cli, study, tmp_path):
    truncated = tmp_path / "truncated.nii.gz"
    truncated.write_bytes(study.image("c").read_bytes()[:500])
    images = [tmp_path / "absent.nii.gz", truncated, study.image("c")]
    arguments = [part for image in images for part in ("--image", image)]
    output = tmp_path / "out"
    result = cli("segment", "--model", study.model, *arguments, "--output", output, "--json", tmp_path / "s.json")
    assert_refused(result, "2 of the images could not be segmented. absent: .*does not exist.* truncated: Cannot read")
    assert [path.name for path in output.iterdir()] == ["c.nii.gz"]
    report = json.loads((tmp_path / "s.json").read_text())
    assert (set(report["results"]), set(report["failures"])) == ({"c"}, {"absent", "truncated"})


def test_a_folder_of_images_is_segmented_as_a_whole(cli, study, tmp_path):
    folder = tmp_path / "cases"
    folder.mkdir()
    for name in ("c", "d"):
        shutil.copy(study.image(name), folder)
    succeed(cli("segment", "--model", study.model, "--image", folder, "--output", tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c.nii.gz", "d.nii.gz"]


def test_two_images_of_one_name_are_refused_before_any_work(cli, study, tmp_path):
    other = shutil.copy(study.image("c"), tmp_path)
    result = cli("segment", "--model", study.model, "--image", study.image("c"), "--image", other, "--output", tmp_path)
    assert_refused(result, "have the same name")


def test_an_image_given_as_the_current_folder_has_its_name(cli, study, tmp_path, monkeypatch):
    save_series(tmp_path / "series", read_volume(study.image("c")).voxels)
    monkeypatch.chdir(tmp_path / "series")
    succeed(cli("segment", "--model", study.model, "--image", ".", "--output", tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["series.nii.gz"]


def test_ctrl_c_keeps_finished_cases_and_leaves_nothing_else(study, tmp_path):
    """The volumes to come are long enough for the signal to arrive while they are segmented."""
    image = nib.load(study.image("c"))
    images = [study.image("c")]
    for number in range(3):
        voxels = np.tile(np.asarray(image.dataobj), (1, 1, 60))
        images.append(save_nifti(tmp_path / f"long_{number}.nii.gz", voxels, image.affine))
    output = tmp_path / "out"
    arguments = [str(part) for image in images for part in ("--image", image)]
    command = [sys.executable, "-m", "ofl_sam2", "segment", "--model", str(study.model), "--output", str(output)]
    command += ["--json", str(tmp_path / "s.json")]
    child = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 120
    while not (output / "c.nii.gz").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, shown = child.communicate(timeout=120)
    assert child.returncode == 130, shown
    assert "Stopping after the current step" in shown
    assert "Traceback" not in shown
    assert shown.splitlines()[-1] == "Cancelled; what was finished before is kept."
    finished = sorted(path.name for path in output.iterdir())
    assert "c.nii.gz" in finished
    assert len(finished) < len(images)
    for name in finished:
        assert read_labels(output / name).voxels.any()
    reported = json.loads((tmp_path / "s.json").read_text())["results"]
    assert [f"{name}.nii.gz" for name in sorted(reported)] == finished


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(ofl_sam2.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "ofl_sam2", "segment", "--model", str(tmp_path), "--image", "x", "--output", "y"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert_refused(Result(result.returncode, result.stdout, result.stderr), "holds no model")
    assert len(result.stderr.splitlines()) == 1


# Every format


def save_series(folder: Path, voxels: np.ndarray) -> Path:
    """A CT series of `voxels (X, Y, Z)` with voxels of 1 x 1 x 4 mm."""
    folder.mkdir(parents=True)
    for index in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{index + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.is_little_endian, slice_.is_implicit_VR = True, False
        slice_.SOPClassUID, slice_.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        slice_.Modality, slice_.SeriesInstanceUID, slice_.ImageType = "CT", "1.2.3", ["ORIGINAL", "PRIMARY", "AXIAL"]
        slice_.Rows, slice_.Columns, slice_.PixelSpacing = voxels.shape[1], voxels.shape[0], [1, 1]
        slice_.ImageOrientationPatient, slice_.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-10, 20, 4 * index]
        slice_.SliceThickness, slice_.RescaleSlope, slice_.RescaleIntercept = 4, 1, -1000
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 0
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.PixelData = (voxels[:, :, index].T.clip(0) + 1000).astype("<u2").tobytes()
        slice_.save_as(folder / f"{index}.dcm")
    return folder


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_a_label_map_has_the_grid_and_kind_of_its_image(cli, study, tmp_path, suffix):
    voxels = np.asarray(nib.load(study.image("c")).dataobj)
    nifti = save_nifti(tmp_path / "nifti.nii", voxels, OBLIQUE)
    image = sitk.ReadImage(str(nifti))
    path = tmp_path / f"oblique{suffix}"
    sitk.WriteImage(image, str(path))
    succeed(cli("segment", "--model", study.model, "--image", path, "--output", tmp_path / "out"))
    (label,) = (tmp_path / "out").iterdir()
    assert label.name == f"oblique{'.nii.gz' if suffix == '.nii' else suffix}"
    written = sitk.ReadImage(str(label))
    assert written.GetSize() == image.GetSize()
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(written, geometry)(), getattr(image, geometry)(), atol=1e-5)
    assert sitk.GetArrayFromImage(written).any()
    if suffix.startswith(".nii"):
        np.testing.assert_allclose(nib.load(label).affine, nib.load(path).affine, atol=1e-5)


def test_one_study_may_mix_formats_and_a_dicom_series(cli, study, tmp_path):
    mixed = Study(tmp_path / "mixed")
    for name, suffix in (("a", ".nrrd"), ("b", ".mha")):
        for folder in ("images", "labels"):
            target = mixed.root / folder / f"{name}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.ReadImage(str(study.root / folder / f"{name}.nii.gz")), str(target))
    voxels = np.asarray(nib.load(study.image("c")).dataobj)
    series = save_series(mixed.images / "c", voxels)
    Image.new("L", (8, 8)).save(series / "preview.png")
    volume = read_volume(series)
    labels = np.asarray(nib.load(study.labels / "c.nii.gz").dataobj)
    save_nifti(mixed.labels / "c.nii.gz", labels, volume.affine)
    assert "of 3 cases" in succeed(cli(*learn_arguments(mixed, mixed.model))).out
    succeed(cli("segment", "--model", mixed.model, "--image", series, "--output", tmp_path / "out"))
    written = nib.load(tmp_path / "out" / "c.nii.gz")
    assert written.shape == voxels.shape
    np.testing.assert_allclose(written.affine, volume.affine, atol=1e-5)
    scored = succeed(cli("evaluate", "--predictions", tmp_path / "out", "--labels", mixed.labels))
    assert "structure_1" in scored.out


def test_a_folder_of_frames_is_learned_from_one_labelled_frame(cli, make_case, tmp_path):
    case = make_case(grid=(24, 20, 5))
    images, labels = tmp_path / "images" / "cine", tmp_path / "labels" / "cine"
    for folder in (images, labels):
        folder.mkdir(parents=True)
    frames = case.volume.voxels.clip(0, 255).astype(np.uint8)
    for index in range(5):
        Image.fromarray(frames[:, :, index].T).save(images / f"frame{index}.png")
    Image.fromarray(case.labels[:, :, 2].T.copy()).save(labels / "frame2.png")
    model, output = tmp_path / "model", tmp_path / "out"
    assert "from 1 slices of 1 cases" in succeed(cli(*learn_arguments(Study(tmp_path), model))).out
    succeed(cli("segment", "--model", model, "--image", images, "--output", output))
    assert sorted(path.name for path in (output / "cine").iterdir()) == [f"frame{i}.png" for i in range(5)]
    with Image.open(output / "cine" / "frame0.png") as mask:
        assert mask.size == (24, 20)
    assert read_labels(output / "cine").voxels.any()
    again = succeed(cli("segment", "--model", model, "--image", images, "--output", output, "--resume"))
    assert "0 label maps" in again.out
    scored = succeed(cli("evaluate", "--predictions", output, "--labels", tmp_path / "labels"))
    assert "cine" in scored.out


def test_a_sequence_of_volumes_gets_a_sequence_of_labels(cli, study, make_case, tmp_path):
    case = make_case(grid=(24, 20, 3, 2))
    path = save_nifti(tmp_path / "cine.nii.gz", case.volume.voxels, OBLIQUE)
    succeed(cli("segment", "--model", study.model, "--image", path, "--output", tmp_path / "out"))
    written = nib.load(tmp_path / "out" / "cine.nii.gz")
    assert written.shape == (24, 20, 3, 2)
    np.testing.assert_allclose(written.affine, OBLIQUE, atol=1e-5)


# Bad input


def change_label(study: Study, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    label = nib.load(study.labels / "a.nii.gz")
    voxels = np.asarray(label.dataobj).copy()
    save_nifti(study.labels / "a.nii.gz", change(voxels), label.affine if affine is None else affine)


def with_nan(study: Study) -> None:
    image = nib.load(study.image("a"))
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, :2] = np.nan, np.inf
    save_nifti(study.image("a"), voxels, image.affine)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: shutil.rmtree(s.images), "images is not a folder"),
        (lambda s: shutil.rmtree(s.labels), "labels is not a folder"),
        (lambda s: [path.unlink() for path in s.labels.iterdir()], "labels holds no images"),
        (lambda s: (s.labels / "a.nii.gz").rename(s.labels / "z.nii.gz"), "labels without an image .*: z"),
        (lambda s: (s.labels / "a.nii.gz").unlink(), "no label for a"),
        (lambda s: shutil.copy(s.image("a"), s.images / "a.nii"), "several files of one case: a.nii, a.nii.gz"),
        (
            lambda s: change_label(s, lambda v: v[:-1]),
            r"shape \(23, 20, 6\) \(axes RAS\), but .* \(24, 20, 6\) \(axes RAS\)",
        ),
        (lambda s: change_label(s, lambda v: v, OBLIQUE), "lie in different places in space"),
        (lambda s: change_label(s, np.zeros_like), "is empty: it holds no structure"),
        (lambda s: change_label(s, lambda v: v * np.float32(0.5)), "fractional labels such as 0.5"),
        (lambda s: change_label(s, lambda v: -v.astype(np.int16)), "Labels are integers from 0"),
        (with_nan, "holds 2 voxels that are NaN or infinite"),
        (lambda s: truncate(s.image("a")), "Cannot read .*a.nii.gz"),
        (lambda s: truncate(s.labels / "a.nii.gz"), "Cannot read .*a.nii.gz"),
        (lambda s: s.image("a").write_bytes(b""), "Cannot read .*a.nii.gz"),
    ],
)
def test_bad_images_and_labels_are_refused_and_the_model_stays(cli, own, damage, words):
    damage(own)
    before = (own.model / INDEX).read_bytes()
    assert_refused(cli(*learn_arguments(own, own.model), "--cases", "a"), words)
    assert (own.model / INDEX).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cases", "a,nobody"], "no case named nobody. It holds: a, b, c, d"),
        (["--cases", ","], "list of names is empty"),
        (["--structures", "1=organ,2=Organ"], "repeats a value or a name"),
        (["--structures", "1=organ,1=other"], "repeats a value or a name"),
        (["--structures", "organ"], "Write VALUE=NAME"),
        (["--structures", "7=liver"], "No label holds 7=liver; the labels hold 1, 2"),
        (["--backbone", "mega"], "Unknown backbone 'mega'. Choose one of: nano"),
        (["--image-size", 272], "272"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(cli, study, tmp_path, options, words):
    assert_refused(cli(*learn_arguments(study, tmp_path / "model"), *options), words)
    assert not (tmp_path / "model").exists()


def test_weights_that_are_absent_are_named_with_file_and_folder(cli, study, tmp_path, monkeypatch):
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(tmp_path / "here"))
    result = cli(*learn_arguments(study, tmp_path / "model"), "--backbone", TINY)
    assert_refused(result, rf"{tmp_path}/here/{TINY}.pt is missing. Run 'ofl-sam2 weights fetch {TINY}'")


def test_a_model_folder_that_is_absent_or_newer_is_refused(cli, own, tmp_path):
    arguments = ["segment", "--image", own.image("c"), "--output", tmp_path / "out", "--model"]
    assert_refused(cli(*arguments, tmp_path / "nowhere"), "holds no model")
    index = json.loads((own.model / INDEX).read_text())
    (own.model / INDEX).write_text(json.dumps({**index, "format": 99, "version": "9.9"}))
    for command in (cli(*arguments, own.model), cli(*learn_arguments(own, own.model))):
        assert_refused(command, "version 9.9, which is newer")
    (own.model / INDEX).write_text("{")
    for command in (cli(*arguments, own.model), cli(*learn_arguments(own, own.model))):
        assert_refused(command, "is damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "words"), [(28, "the disk is full"), (30, "the file system is read-only"), (5, "Input/output error")]
)
def test_an_output_that_cannot_be_written_stops_at_once(cli, own, tmp_path, monkeypatch, number, words):
    def refuse(*paths):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    images = ["--image", own.image("c"), "--image", own.image("d")]
    result = cli("segment", "--model", own.model, *images, "--output", tmp_path / "out")
    assert_refused(result, words)
    assert list((tmp_path / "out").iterdir()) == []
    assert_refused(cli(*learn_arguments(own, own.model), "--cases", "c"), words)
    monkeypatch.undo()
    assert [stored.case for stored in read_index(own.model).pool] == ["a", "b"]


def test_an_output_below_a_file_is_refused(cli, study, tmp_path):
    (tmp_path / "file").touch()
    result = cli("segment", "--model", study.model, "--image", study.image("c"), "--output", tmp_path / "file" / "out")
    assert_refused(result, "a file stands where a folder is needed")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "iou"], r"Unknown metrics \['iou'\]; choose from dice, hd95, surface_dice"),
        (["--metrics", ""], "list of names is empty"),
        (["--cases", "nobody"], "no case named nobody"),
        (["--structures", "x"], "Write VALUE=NAME"),
        (["--predictions", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_requests_for_scores_are_refused(cli, study, options, words):
    assert_refused(cli("evaluate", "--predictions", study.labels, "--labels", study.labels, *options), words)


def test_what_is_not_scored_is_said(cli, study, tmp_path):
    shutil.copytree(study.labels, tmp_path / "some")
    (tmp_path / "some" / study.image("a").name).unlink()
    arguments = ["evaluate", "--predictions", tmp_path / "some", "--labels", study.labels, "--structures", "1=bright"]
    said = succeed(cli(*arguments, "--tolerance", "2", "--ignore-empty-slices")).err
    assert "Without a prediction, and in no mean: a." in said and "also hold 2" in said


def test_labels_agree_with_themselves(cli, study):
    shown = succeed(cli("evaluate", "--predictions", study.labels, "--labels", study.labels, "--cases", "a,b")).out
    assert shown.count("1.000") == 9
    assert "Dice" in shown


# Weights, synthetic volumes, pretraining


def test_weights_are_listed_with_their_places(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(tmp_path))
    (tmp_path / f"{TINY}.pt").touch()
    os.truncate(tmp_path / f"{TINY}.pt", weights.CATALOGUE[TINY].size)
    (tmp_path / "sam2.1_hiera_small.pt").write_bytes(b"damaged")
    lines = succeed(cli("weights", "list")).out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "present" if name in ("nano", TINY) else "absent"] for name in BACKBONES
    ]
    assert lines[1].endswith(str(tmp_path / f"{TINY}.pt"))


def test_fetching_offline_says_which_file_to_put_where(cli, tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise weights.URLError("no network")

    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(weights._OPENER, "open", offline)
    assert_refused(cli("weights", "fetch", TINY), rf"no network.*Get {TINY}.pt .* put it at {tmp_path}/{TINY}.pt")
    assert_refused(cli("weights", "fetch", "nano"), "no downloadable weights called 'nano'")


def test_a_weights_file_is_identified_or_refused(cli, tmp_path, monkeypatch):
    path = tmp_path / "some.pt"
    path.write_bytes(b"weights")
    entry = weights.WeightsEntry(TINY, weights.sha256_of(path), 7)
    assert_refused(cli("weights", "verify", path), "is none of the known weights")
    assert_refused(cli("weights", "verify", tmp_path / "absent.pt"), "no weights file")
    monkeypatch.setitem(weights.CATALOGUE, TINY, entry)
    assert f"some.pt is {TINY}, intact" in succeed(cli("weights", "verify", path)).out


def test_synthetic_volumes_are_written_as_pairs(cli, tmp_path):
    assert "2 synthetic cases" in succeed(cli("synth", "--output", tmp_path, "--cases", 2, "--seed", 3)).out
    for folder in ("images", "labels"):
        assert len(list((tmp_path / folder).iterdir())) == 2
    assert_refused(cli("synth", "--output", tmp_path / "images" / "synthetic_000.nii.gz", "--cases", 1), "Cannot write")


@pytest.fixture
def quick_stages(monkeypatch):
    stages = (Stage("joint", 0.5, 64, 1, 1, 1e-4, True, True), Stage("learner", 0.5, 64, 1, 1, 1e-4, False, True))
    monkeypatch.setattr(
        pretraining_jobs, "pretrain", lambda *a, **o: pretraining.pretrain(*a, **o, stages=stages, workers=0)
    )


@pytest.mark.usefixtures("quick_stages")
def test_pretraining_writes_both_weights_and_goes_on_from_its_checkpoint(cli, tmp_path):
    output = tmp_path / "new.safetensors"
    result = succeed(cli("pretrain", "--output", output, "--minutes", 0.02))
    names = {"new.safetensors", "new_learner.safetensors", "new.checkpoint.pt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    layout = {name: tuple(value.shape) for name, value in build_sam2(BACKBONES["nano"], 64).state_dict().items()}
    assert {name: tuple(value.shape) for name, value in load_file(output).items()} == layout
    assert read_learner(tmp_path / "new_learner.safetensors").fitted
    assert "Stage 'joint' begins" in result.err
    steps = int(result.out.split()[0])
    assert steps >= 1
    checkpoint = tmp_path / "new.checkpoint.pt"
    budget = torch.load(checkpoint, weights_only=True)["spent"] / 60 + 0.01
    resumed = succeed(cli("pretrain", "--output", output, "--minutes", budget, "--resume", checkpoint))
    assert int(resumed.out.split()[0]) > steps


def test_pretraining_the_unet_writes_its_weights_and_goes_on_from_its_checkpoint(cli, tmp_path):
    output = tmp_path / "unet.safetensors"
    steps = int(succeed(cli("pretrain-unet", "--output", output, "--minutes", 0.02)).out.split()[0])
    assert {path.name for path in tmp_path.iterdir()} == {"unet.safetensors", "unet.checkpoint.pt"}
    shipped = load_file(WEIGHTS / "unet.safetensors")
    assert {name: tuple(value.shape) for name, value in load_file(output).items()} == {
        name: tuple(value.shape) for name, value in shipped.items()
    }
    checkpoint = tmp_path / "unet.checkpoint.pt"
    budget = float(torch.load(checkpoint, weights_only=True)["spent"]) / 60 + 0.01
    resumed = succeed(cli("pretrain-unet", "--output", output, "--minutes", budget, "--resume", checkpoint))
    assert int(resumed.out.split()[0]) > steps >= 1
    assert_refused(cli("pretrain-unet", "--output", output, "--resume", __file__), "checkpoint .* cannot be used")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", 0], "0 minutes is not possible"),
        (["--minutes", -3], "-3 minutes is not possible"),
        (["--minutes", "nan"], "nan minutes is not possible"),
        (["--resume", "absent.pt"], "no checkpoint absent.pt"),
        (["--resume", __file__], "checkpoint .* cannot be used"),
        (["--resume", "absent.pt", "--further"], "either --resume or --further"),
        (["--output", "nano.pt"], "written as .safetensors"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_requests_for_pretraining_are_refused(cli, tmp_path, options, words):
    assert_refused(cli("pretrain", "--output", tmp_path / "new.safetensors", *options), words)
    assert list(tmp_path.iterdir()) == []


# SAM2.1


@pytest.mark.usefixtures("quick_training")
def test_the_same_commands_run_at_the_size_of_sam2_1_tiny(cli, study, tmp_path, monkeypatch):
    """Random values in the true layout: no accuracy, but every shape."""
    torch.manual_seed(0)
    path = tmp_path / "weights" / f"{TINY}.pt"
    path.parent.mkdir()
    torch.save({"model": build_sam2(BACKBONES[TINY], 64).state_dict()}, path)
    entry = weights.WeightsEntry(TINY, weights.sha256_of(path), path.stat().st_size)
    monkeypatch.setitem(weights.CATALOGUE, TINY, entry)
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(path.parent))
    small = Study(tmp_path / "small")
    for name in "ab":
        for folder in ("images", "labels"):
            image = nib.load(study.root / folder / f"{name}.nii.gz")
            save_nifti(small.root / folder / f"{name}.nii.gz", np.asarray(image.dataobj)[:, :, 2:4], image.affine)
    arguments = learn_arguments(small, small.model)[1:]
    learned = succeed(cli("learn", *arguments, "--backbone", TINY, "--cases", "a"))
    assert f"not fitted to {TINY}" in learned.err
    assert "ofl-sam2 train" in learned.err
    trained = succeed(cli("train", *arguments, "--cases", "a", "--epochs", 1))
    assert "Trained 1 epochs" in trained.out
    assert load_model(small.model).learner.fitted
    segmented = succeed(
        cli("segment", "--model", small.model, "--image", small.image("b"), "--output", tmp_path / "out")
    )
    assert "1 label maps" in segmented.out
    written, image = nib.load(tmp_path / "out" / "b.nii.gz"), nib.load(small.image("b"))
    assert written.shape == image.shape
    np.testing.assert_allclose(written.affine, image.affine)
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1, 2}
