"""The requests of Slicer's module in its order, on images of every kind and orientation."""

import http.client
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from scipy.spatial.transform import Rotation

from ofl_sam2.dataset import Case, load_case
from ofl_sam2.dicom import LPS_TO_RAS
from ofl_sam2.files import read_volume
from ofl_sam2.training.cohort import Patient

STEPS = (1.5, 2.0, 5.0)
IMAGES = ("axial", "coronal", "frames", "lps", "oblique", "partial", "ras", "tilted")
RAS = np.diag([-1, -1, 1])
CORONAL = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
OBLIQUE = Rotation.from_euler("xyz", [20, -30, 10], degrees=True).as_matrix()
NAMES = ["organ a", "organ b"]


def itk_image(voxels: np.ndarray, direction: np.ndarray) -> sitk.Image:
    """An image of `voxels` `(X, Y, Z)` whose axes point along the columns of `direction` (LPS)."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose()))
    image.SetSpacing(STEPS)
    image.SetOrigin((-31.5, 17.25, 120.0))
    image.SetDirection(direction.ravel().tolist())
    return image


def save_series(folder: Path, voxels: np.ndarray, direction: np.ndarray) -> None:
    """Write a DICOM series, its files named against the order of the slices."""
    folder.mkdir()
    image, writer = itk_image(voxels, direction), sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(voxels.shape[2]):
        slice_ = image[:, :, number : number + 1]
        for tag, value in {"0008|0060": "CT", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4"}.items():
            slice_.SetMetaData(tag, value)
        slice_.SetMetaData("0008|0018", f"1.2.3.4.{number + 1}")
        writer.SetFileName(str(folder / f"{99 - number}.dcm"))
        writer.Execute(slice_)


def save_frames(folder: Path, voxels: np.ndarray) -> None:
    folder.mkdir()
    grey = np.interp(voxels, (voxels.min(), voxels.max()), (0, 255)).astype(np.uint8)
    for number in range(voxels.shape[2]):
        Image.fromarray(grey[..., number].T).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def truth(cohort_of_eight: list[Patient]) -> dict[str, np.ndarray]:
    """Labels of the images, in the order of their voxels."""
    return {name: patient.labels for name, patient in zip(IMAGES, cohort_of_eight, strict=True)}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, cohort_of_eight: list[Patient]) -> Path:
    """Three DICOM series, frames, .nii.gz in LPS and oblique, .nrrd in RAS; all with thick slices."""
    folder = tmp_path_factory.mktemp("studies")
    voxels = {
        name: np.rint(patient.image).astype(np.int16) for name, patient in zip(IMAGES, cohort_of_eight, strict=True)
    }
    for name, direction in {"axial": np.eye(3), "coronal": CORONAL, "oblique": OBLIQUE}.items():
        save_series(folder / name, voxels[name], direction)
        np.testing.assert_array_equal(read_volume(folder / name).voxels, voxels[name])
    save_frames(folder / "frames", voxels["frames"])
    for name, direction in {"lps.nii.gz": np.eye(3), "partial.nii.gz": np.eye(3), "ras.nrrd": RAS}.items():
        sitk.WriteImage(itk_image(voxels[name.partition(".")[0]], direction), str(folder / name))
    tilted = np.eye(4)
    tilted[:3, :3] = OBLIQUE * STEPS
    nib.save(nib.Nifti1Image(voxels["tilted"], LPS_TO_RAS @ tilted), folder / "tilted.nii.gz")
    return folder


@pytest.fixture(scope="module")
def server(make_server: Callable[..., Any], studies: Path) -> Any:
    server = make_server(studies, image_size="64")
    server.start()
    return server


@pytest.fixture
def requests_sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Method and address of each request, as they go out."""
    sent: list[str] = []
    put = http.client.HTTPConnection.putrequest

    def record(connection: Any, method: str, url: str, *args: Any, **options: Any) -> None:
        sent.append(f"{method} {url}")
        put(connection, method, url, *args, **options)

    monkeypatch.setattr(http.client.HTTPConnection, "putrequest", record)
    return sent


def draw(scene: Any, labels: np.ndarray) -> None:
    scene.segments |= {name: labels == value for value, name in enumerate(NAMES, start=1)}


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_requests_of_a_session_in_their_order(
    server: Any, slicer: Any, truth: dict[str, np.ndarray], requests_sent: list[str]
) -> None:
    assert not slicer.rest.auth_enabled()
    slicer.connect()
    first = slicer.open(slicer.next_sample("sequential"))
    draw(first, truth["axial"])
    assert slicer.submit_scene(first)["label"] == "axial" and slicer.info["labels"] == NAMES
    expected = ["GET /auth/", "GET /info/", "POST /activelearning/sequential", "GET /datastore/image?image=axial"]
    expected += ["GET /datastore/?output=all", "PUT /datastore/label?image=axial", "GET /info/"]
    assert requests_sent == expected

    server.wait_until(lambda status: "axial" in status["learned"])
    requests_sent.clear()
    second = slicer.open(slicer.next_sample("sequential"))
    assert list(second.segments) == NAMES and not any(mask.any() for mask in second.segments.values())
    answer = slicer.run(second)
    assert answer["learned_from"] == ["axial"] and answer["label_names"] == {"organ a": 1, "organ b": 2}
    session = slicer.rest.create_session(str(slicer.folder / "coronal.nii.gz"))["session_id"]
    assert slicer.rest.get_session(session)
    slicer.run(second, session)
    slicer.submit_scene(second)
    slicer.rest.train_start("", {})  # "ALL", which the panel shows first
    started = time.monotonic()
    while not slicer.rest.train_status(check_if_running=True):  # the server's own thread takes the task up
        assert time.monotonic() < started + 30
    assert slicer.rest.train_stop()["status"] == "STOPPED"
    expected = ["POST /activelearning/sequential", "GET /datastore/image?image=coronal", "GET /datastore/?output=all"]
    expected += ["POST /infer/ofl_sam2?image=coronal", "PUT /session/", f"GET /session/{session}"]
    expected += [f"POST /infer/ofl_sam2?image=coronal&session_id={session}"]
    expected += ["PUT /datastore/label?image=coronal", "GET /info/", "POST /train/"]
    asked = "GET /train/?check_if_running=true"
    assert requests_sent == [*expected, *[asked] * requests_sent.count(asked), "DELETE /train/"]


@pytest.mark.parametrize("image", ["frames", "lps", "oblique", "partial", "ras", "tilted"])
def test_label_drawn_on_the_download_fits_the_image(
    server: Any, slicer: Any, studies: Path, truth: dict[str, np.ndarray], image: str
) -> None:
    scene = slicer.open(slicer.next_sample("sequential"))
    assert scene.sample["id"] == image and scene.grid == truth[image].shape
    draw(scene, truth[image])
    slicer.submit_scene(scene)
    server.wait_until(lambda status: image in status["learned"])
    stored = next((studies / "labels" / "final").glob(f"{image}.*"))
    original = next(path for path in studies.iterdir() if path.name.partition(".")[0] == image)
    np.testing.assert_array_equal(load_case(Case(image, original, stored)).labels, truth[image])

    slicer.run(scene)
    for value, name in enumerate(NAMES, start=1):
        drawn = truth[image] == value
        mirrored = [dice(scene.segments[name], np.flip(drawn, axis)) for axis in range(2)]
        assert dice(scene.segments[name], drawn) > max(0.3, *mirrored)
    if image != "frames":  # uploaded as a file they are a volume, which is looked at in other directions too
        session = slicer.rest.create_session(str(slicer.folder / scene.sample["name"]))["session_id"]
        uploaded = slicer.open(scene.sample, shared_disk=True)
        slicer.run(uploaded, session)
        assert all(np.array_equal(scene.segments[name], uploaded.segments[name]) for name in NAMES)


def test_segments_keep_their_names_in_any_order_and_when_some_are_missing(
    server: Any, slicer: Any, truth: dict[str, np.ndarray]
) -> None:
    sample = server.get("/datastore/image/info?image=partial").json()
    scene = slicer.open({**sample, "id": "partial"}, shared_disk=True)
    organ_b, corner = truth["partial"] == 2, np.zeros(scene.grid, bool)
    corner[:6, :6, :2] = True
    scene.segments = {"corner": corner, "not drawn": np.zeros(scene.grid, bool), "organ b": organ_b}
    before = server.learning()["snapshot"]
    slicer.submit_scene(scene)
    server.wait_until(lambda status: status["snapshot"] > before)
    assert server.get("/ofl/structures").json() == {"organ a": 1, "organ b": 2, "corner": 3}

    answer = slicer.run(scene)
    assert dice(scene.segments["organ b"], organ_b) > max(0.5, dice(scene.segments["organ b"], truth["partial"] == 1))
    assert list(answer["label_names"]) == [name for name in (*NAMES, "corner") if name in answer["label_names"]]
    scene.segments["organ a"] = kept = np.ones(scene.grid, bool)
    assert slicer.run(scene, structures="organ b")["label_names"] == {"organ b": 1}
    assert scene.segments["organ a"] is kept and dice(scene.segments["organ b"], organ_b) > 0.5
    before = dict(scene.segments)
    assert slicer.run(scene, quality_threshold="1")["label_names"] == {"background": 0}
    assert all(scene.segments[name] is mask for name, mask in before.items()) and len(before) == len(scene.segments)
