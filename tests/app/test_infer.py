import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from lib.datastores.archive import ArchiveError
from lib.datastores.segmentation import make_segmentation, read_segmentation
from lib.infers.batch import BatchInfer
from lib.infers.ofl_sam2 import OFLSAM2Infer
from lib.workspace import Workspace
from PIL import Image
from pydicom.uid import generate_uid
from scipy.spatial.transform import Rotation

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.dicom import read_headers
from ofl_sam2.errors import Cancelled, InputError, OFLError
from ofl_sam2.files import read_labels, read_volume

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [12, -7, 20], degrees=True).as_matrix() @ np.diag([3.0, 3.0, 6.0])
OBLIQUE[:3, 3] = [5, -7, 11]
AFFINES = {
    "RAS": np.diag([3.0, 3.0, 6.0, 1.0]),
    "LPS": np.diag([-3.0, -3.0, 6.0, 1.0]),
    "z-flip": np.diag([3.0, 3.0, -6.0, 1.0]),
    "PIR": np.array([[0, 0, 6.0, 1], [-3.0, 0, 0, 2], [0, -3.0, 0, 3], [0, 0, 0, 1]]),
    "oblique": OBLIQUE,
}


@pytest.fixture
def task(workspace: Workspace) -> OFLSAM2Infer:
    return OFLSAM2Infer(workspace)


@pytest.fixture
def image(tmp_path: Path, cases: list[LabelledCase]) -> Path:
    """An image that was not learned."""
    path = tmp_path / "new.nii.gz"
    nib.save(nib.Nifti1Image(cases[2].volume.voxels, cases[2].volume.affine), path)
    return path


def geometry(path: Path | str) -> np.ndarray:
    """Size, origin, spacing and direction, as ITK sees them."""
    read = sitk.ReadImage(str(path))
    return np.array([*read.GetSize(), *read.GetOrigin(), *read.GetSpacing(), *read.GetDirection()])


def test_refused_before_the_first_label(fresh_workspace: Workspace, image: Path) -> None:
    task = OFLSAM2Infer(fresh_workspace)
    assert task.is_valid() and task.info()["labels"] == {}
    with pytest.raises(InputError, match="Nothing has been learned yet"):
        task({"image": str(image)})
    assert fresh_workspace.jobs.list() == []


def test_info_offers_every_structure_and_only_strings(task: OFLSAM2Infer) -> None:
    info = task.info()
    assert (info["type"], info["dimension"]) == ("segmentation", 3)
    assert info["labels"] == {"organ a": 1, "organ b": 2}
    assert info["config"]["structures"] == ["all", "organ a", "organ b"]
    assert all(isinstance(choice, str) for choices in info["config"].values() for choice in choices)


def test_default_options_change_nothing(task: OFLSAM2Infer, image: Path) -> None:
    plain, _ = task({"image": str(image)})
    chosen, _ = task({"image": str(image), **task.config()})
    assert np.array_equal(read_labels(plain).voxels, read_labels(chosen).voxels)


def test_result_is_that_of_the_library(
    task: OFLSAM2Infer, workspace: Workspace, image: Path, cases: list[LabelledCase]
) -> None:
    file, params = task({"image": str(image), "image_id": "new"})
    _, segmenter = workspace.serving.current()
    expected = segmenter.segment(read_volume(image))
    assert np.array_equal(read_labels(file).voxels, expected.labels)
    assert params["label_names"] == {"organ a": 1, "organ b": 2}
    assert params["volume_ml"] == {name: pytest.approx(ml, abs=1e-3) for name, ml in expected.volume_ml.items()}
    assert params["quality"] == pytest.approx(np.mean(list(expected.quality.values())), abs=1e-4)
    assert np.shape(list(params["slice_confidence"].values())) == expected.confidence.T.shape
    assert params["learned_from"] == [case.volume.name for case in cases[:2]]
    assert params["snapshot"] == 1 and params["trained_on"] == []
    assert params["fitted"] is True
    assert set(params["latencies"]) == {"pre", "infer", "write", "total"}
    assert workspace.scores.read()["new"].quality == pytest.approx(params["quality"], abs=1e-4)


@pytest.mark.parametrize("extension", [".nii.gz", ".nrrd"])
@pytest.mark.parametrize("orientation", AFFINES)
def test_result_lies_exactly_on_its_image(
    task: OFLSAM2Infer,
    workspace: Workspace,
    cases: list[LabelledCase],
    tmp_path: Path,
    orientation: str,
    extension: str,
) -> None:
    path = tmp_path / "turned.nii.gz"
    nib.save(nib.Nifti1Image(cases[2].volume.voxels, AFFINES[orientation]), path)
    file, _ = task({"image": str(path), "result_extension": extension, "result_dtype": "uint8"})
    assert file.endswith(extension)
    assert geometry(file) == pytest.approx(geometry(path), abs=1e-4)
    _, segmenter = workspace.serving.current()
    expected = segmenter.segment(read_volume(path)).labels
    written = sitk.GetArrayFromImage(sitk.ReadImage(file)).T
    assert written.dtype == np.uint8 and np.array_equal(written, expected)


def test_single_structure_keeps_its_value(task: OFLSAM2Infer, image: Path) -> None:
    everything, _ = task({"image": str(image)})
    file, params = task({"image": str(image), "structures": "organ b"})
    assert np.array_equal(read_labels(file).voxels, 2 * (read_labels(everything).voxels == 2))
    assert params["label_names"] == {"organ b": 2} and params["left_out"] == []


def test_what_is_found_is_numbered_by_position_for_those_who_count(task: OFLSAM2Infer, image: Path) -> None:
    everything, _ = task({"image": str(image)})
    file, params = task({"image": str(image), "structures": "organ b", "by_position": True})
    assert np.array_equal(read_labels(file).voxels, read_labels(everything).voxels == 2)
    assert params["label_names"] == {"organ b": 1} and params["structures"] == {"organ a": 1, "organ b": 2}
    both, params = task({"image": str(image), "by_position": True})
    assert np.array_equal(read_labels(both).voxels, read_labels(everything).voxels)
    assert params["label_names"] == {"organ a": 1, "organ b": 2}


@pytest.mark.parametrize(("by_position", "names"), [(True, {"background": 0}), (False, {})])
def test_nothing_found_has_no_name(task: OFLSAM2Infer, image: Path, by_position: bool, names: dict[str, int]) -> None:
    file, params = task({"image": str(image), "quality_threshold": 1, "by_position": by_position})
    assert params["label_names"] == names and not read_labels(file).voxels.any()


def test_structures_below_the_threshold_are_left_out(task: OFLSAM2Infer, image: Path) -> None:
    _, params = task({"image": str(image)})
    worse, better = sorted(params["structure_quality"], key=params["structure_quality"].get)
    between = np.mean(list(params["structure_quality"].values()))
    file, params = task({"image": str(image), "quality_threshold": str(between)})
    assert params["left_out"] == [worse] and set(params["label_names"]) == {better}
    assert set(np.unique(read_labels(file).voxels)) == {0, params["label_names"][better]}


def test_changed_settings_reach_the_method(task: OFLSAM2Infer, workspace: Workspace, image: Path) -> None:
    _, plain = task({"image": str(image), "image_id": "new"})
    _, other = task({"image": str(image), "image_id": "new", "online_update": "off", "order": ["first_to_last"]})
    assert plain["slice_confidence"] != other["slice_confidence"]
    assert workspace.scores.read()["new"].quality == pytest.approx(plain["quality"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"structures": "lung"}, "'lung' has not been learned. Learned: organ a, organ b"),
        ({"gamma": "high"}, "gamma is 'high'"),
        ({"gamma": "2"}, "gamma is 2; it must be between 0 and 1"),
        ({"online_update": "maybe"}, "online_update is 'maybe'"),
        ({"order": "random"}, "order is 'random'"),
        ({"quality_threshold": "-1"}, "quality_threshold is -1"),
        ({"device": "cuda"}, "The device 'cuda' is not the server's"),
        ({"result_extension": ".png"}, "unknown suffix"),
    ],
)
def test_bad_option_is_refused_in_words(
    task: OFLSAM2Infer, workspace: Workspace, image: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        task({"image": str(image), **options})
    assert workspace.jobs.list() == []


def test_vanished_image_is_refused_in_words(task: OFLSAM2Infer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        task({"image": str(tmp_path / "gone.nii.gz")})


def test_running_segmentation_is_listed_and_can_be_cancelled(
    task: OFLSAM2Infer, workspace: Workspace, image: Path
) -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            task({"image": str(image), "image_id": "new"})
        except Cancelled as error:
            errors.append(error)

    with workspace.segmenting:
        worker = threading.Thread(target=run)
        worker.start()
        while not (jobs := workspace.jobs.list()):
            worker.join(0.01)
        assert (jobs[0].kind, jobs[0].image) == ("infer", "new")
        assert workspace.jobs.cancel(jobs[0].id)
    worker.join()
    assert len(errors) == 1 and workspace.jobs.list() == [] and "new" not in workspace.scores.read()


def test_bad_image_does_not_stop_a_batch(task: OFLSAM2Infer, image: Path, studies: Path) -> None:
    (studies / "broken.nii.gz").write_bytes(b"no image")
    seen = []

    def infer(request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        seen.append((request["image"], request["label_tag"], request["save_label"]))
        if request["image"] == "gone":
            raise ArchiveError("The series is no more.", 404)
        file, params = task({**request, "image": str(studies / f"{request['image']}.nii.gz")})
        return {"file": file, "label": request["image"], "params": params}

    results = BatchInfer()({"images": ["synthetic_001", "broken", "gone", "synthetic_000"]}, None, infer)
    assert seen == [(image, "original", True) for image in ("broken", "gone", "synthetic_000", "synthetic_001")]
    assert results["gone"] == {"error": "The series is no more."}
    assert "broken" in results["broken"]["error"]
    assert results["synthetic_000"]["params"]["snapshot"] == 1 and "file" not in results["synthetic_000"]
    assert len(BatchInfer()({"images": ["a", "b"], "max_batch_size": 1}, None, lambda *_: {})) == 1


def test_frames_and_sequences_are_segmented(
    task: OFLSAM2Infer, workspace: Workspace, cases: list[LabelledCase], tmp_path: Path
) -> None:
    voxels = cases[2].volume.voxels
    grey = (255 * (voxels - voxels.min()) / np.ptp(voxels)).astype(np.uint8)
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(grey.shape[2]):
        Image.fromarray(grey[:, :, index].T).save(frames / f"{index}.png")
    sequence = tmp_path / "sequence.nii.gz"
    nib.save(nib.Nifti1Image(np.stack([voxels, voxels[::-1]], axis=-1), cases[2].volume.affine), sequence)
    _, segmenter = workspace.serving.current()
    for path, grid in ((frames, voxels.shape), (sequence, (*voxels.shape, 2))):
        file, params = task({"image": str(path), "result_extension": ".nrrd"})
        written = sitk.GetArrayFromImage(sitk.ReadImage(file)).T
        assert written.shape == grid and params["volume_ml"]
        assert np.array_equal(written, segmenter.segment(read_volume(path)).labels)


def test_result_of_a_real_dicom_series_becomes_a_dicom_seg(
    data_dir: Path, fresh_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    series = tmp_path / "series"
    series.mkdir()
    for path in sorted((data_dir / "dicom_lidc_0314_ct" / "dicom" / "CT").iterdir())[:8]:
        shutil.copy(path, series)
    volume = read_volume(series)
    body = (volume.voxels > -300).astype(np.uint8)
    segmenter = fresh_workspace.open_base()
    segmenter.learn([LabelledCase(volume, body, (1,))], {1: "body"})
    fresh_workspace.snapshots.publish(segmenter, {})
    file, params = OFLSAM2Infer(fresh_workspace)({"image": str(series), "result_extension": ".nii.gz"})
    labels = read_labels(file).voxels
    assert params["label_names"] == {"body": 1} and labels.any()
    dataset = make_segmentation(labels, read_headers(series), {1: "body"}, generate_uid())
    dataset.save_as(tmp_path / "segmentation.dcm", write_like_original=False)
    names = read_segmentation(tmp_path / "segmentation.dcm", Path(file), tmp_path / "back.nii.gz")
    assert names == [{"name": "body", "idx": 1}]
    assert np.array_equal(read_labels(tmp_path / "back.nii.gz").voxels, labels)


def test_a_score_that_cannot_be_kept_costs_no_result(
    task: OFLSAM2Infer, image: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OFLError("the disk is full")

    monkeypatch.setattr(workspace.scores, "put", fail)
    file, _ = task({"image": str(image), "image_id": "new"})
    assert read_labels(file).voxels.any()
