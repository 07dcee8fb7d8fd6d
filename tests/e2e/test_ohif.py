"""What an annotator does in OHIF: draw, export, let the next case be segmented, correct a draft, train."""

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import requests
from ohif import Viewer
from orthanc import Orthanc
from phantom import AFFINE, SHAPE, Phantom, write_phantom
from playwright.sync_api import Page, Response

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Clinic:
    """A DICOM server with two patients, our server on it, and a person at the viewer."""

    orthanc: Orthanc
    server: Any
    viewer: Viewer
    first: Phantom
    second: Phantom

    def wait_until_learned(self, case: Phantom) -> None:
        self.server.wait_until(lambda status: case.series in status["learned"], seconds=60)


@pytest.fixture
def clinic(
    tmp_path: Path, make_orthanc: Callable[..., Orthanc], start_server: Callable[..., Any], page: Page
) -> Iterator[Clinic]:
    """The second patient's ball is a little larger and lies elsewhere. The first one's slices are numbered downwards.

    What was seen last is kept as a picture.
    """
    orthanc = make_orthanc()
    first = write_phantom(tmp_path / "first", "Phantom^First", centre=(60, 44, 9), radius_mm=24, seed=1, upwards=False)
    second = write_phantom(tmp_path / "second", "Phantom^Second", centre=(56, 47, 13), radius_mm=26, seed=2)
    for patient in (first, second):
        orthanc.upload(patient.files)
    server = start_server(orthanc.url)
    viewer = Viewer(page, server.url, tmp_path)
    viewer.accept_warning()
    yield Clinic(orthanc, server, viewer, first, second)
    viewer.picture("last")


def dice(answer: Response, case: Phantom, tmp_path: Path) -> float:
    """Overlap of the label map that the browser was sent, which it lays over the image voxel by voxel, with truth."""
    (tmp_path / "answer.nrrd").write_bytes(answer.body())
    labels, _ = nrrd.read(str(tmp_path / "answer.nrrd"))
    found = labels == 1
    return float(2 * (found & case.truth).sum() / (found.sum() + case.truth.sum()))


def stored(orthanc: Orthanc, description: str) -> bytes:
    """The file of a stored segmentation."""
    series = next(found for found in orthanc.series("SEG") if found["SeriesDescription"] == description)
    (file,) = orthanc.instances(series["SeriesInstanceUID"])
    return file


def voxels(file: bytes) -> Counter[float]:
    """How many voxels a segmentation of one structure has at each height in mm."""
    segmentation = pydicom.dcmread(io.BytesIO(file))
    frames = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    heights = [
        float(groups.PlanePositionSequence[0].ImagePositionPatient[2])
        for groups in segmentation.PerFrameFunctionalGroupsSequence
    ]
    return Counter(
        {height: int(np.count_nonzero(frame)) for height, frame in zip(heights, frames, strict=True) if frame.any()}
    )


def test_an_exported_label_teaches_the_next_case(clinic: Clinic, tmp_path: Path) -> None:
    viewer = clinic.viewer
    viewer.open_from_list("Phantom, Second", "MONAI Label")
    viewer.connect()
    refused = viewer.run()
    assert refused.status == 400
    assert viewer.says(refused.json()["detail"])
    assert viewer.overlays() == [0, 0, 0]

    viewer.open_from_list("Phantom, First", "Segmentation")
    viewer.add_segmentation("ball")
    viewer.show_slice(SHAPE[2] - 1 - clinic.first.centre[2])
    viewer.dab("Brush", clinic.first.radius_mm)
    assert viewer.overlays()[0] > 1000
    viewer.open_export_menu()
    viewer.picture("export")
    viewer.export("drawn in OHIF")
    assert clinic.orthanc.count("SEG") == 1
    clinic.wait_until_learned(clinic.first)
    assert clinic.server.get("/ofl/status").json()["structures"] == {"ball": 1}

    viewer.open_from_list("Phantom, Second", "MONAI Label")
    viewer.connect()
    answer = viewer.run()
    viewer.picture("result")
    assert min(viewer.overlays()) > 500
    assert dice(answer, clinic.second, tmp_path) > 0.9


def test_the_next_sample_is_shown_though_its_study_holds_others(clinic: Clinic, tmp_path: Path) -> None:
    study, viewer = clinic.second.study, clinic.viewer
    other = write_phantom(tmp_path / "other", "Phantom^Second", (56, 47, 13), 26, seed=3, study=study, series_number=1)
    clinic.orthanc.upload(other.files)
    while clinic.server.get("/info/").json()["datastore"]["total"] < 3:
        time.sleep(0.5)
    for case in (clinic.first, other):
        save_truth(clinic, case, tmp_path)
    viewer.open_from_list("Phantom, Second", "MONAI Label")
    viewer.connect()
    assert other.series in viewer.run().url
    viewer.next_sample()
    viewer.connect()
    assert clinic.second.series in viewer.run().url


def test_a_corrected_draft_is_learned(clinic: Clinic, tmp_path: Path) -> None:
    viewer = clinic.viewer
    save_truth(clinic, clinic.first, tmp_path)
    viewer.open_from_list("Phantom, First", "MONAI Label")
    viewer.connect()
    viewer.next_sample()
    assert clinic.second.study in viewer.address
    draft = requests.post(f"{clinic.server.url}/ofl/drafts", params={"image": clinic.second.series}, timeout=120).json()
    segmentations = clinic.orthanc.count("SEG")

    viewer.open_from_list("Phantom, Second", "Segmentation")
    viewer.load_segmentation(draft["description"][:14])
    viewer.show_slice(clinic.second.centre[2])
    assert viewer.overlays()[0] > 1000
    viewer.dab("Brush", clinic.second.radius_mm + 6, "Circle")
    viewer.picture("draft")
    viewer.open_export_menu()
    viewer.export("corrected in OHIF")
    assert clinic.orthanc.count("SEG") == segmentations + 1
    drafted, corrected = (voxels(stored(clinic.orthanc, name)) for name in (draft["description"], "corrected in OHIF"))
    changed = {height for height in drafted | corrected if drafted[height] != corrected[height]}
    assert changed == {clinic.second.height_mm}
    assert corrected[clinic.second.height_mm] > 1.2 * drafted[clinic.second.height_mm] > 100
    viewer.open_export_menu()
    assert voxels(viewer.download().read_bytes()) == corrected
    clinic.wait_until_learned(clinic.second)

    viewer.open_from_list("Phantom, Second", "MONAI Label")
    viewer.connect()
    assert viewer.run().ok
    assert min(viewer.overlays()) > 500
    viewer.start_training()
    assert clinic.server.get("/train/?check_if_running=true").ok
    viewer.stop_training()
    assert clinic.server.get("/train/?check_if_running=true").status_code == 404


def test_a_label_lies_over_a_chest_ct(
    data_dir: Path, tmp_path: Path, make_orthanc: Callable[..., Orthanc], start_server: Callable[..., Any], page: Page
) -> None:
    source = data_dir / "dicom_lidc_0314_ct"
    slices = sorted((source / "dicom" / "CT").glob("*.dcm"))[30:60]
    orthanc = make_orthanc()
    orthanc.upload(slices)
    server = start_server(orthanc.url)
    series = orthanc.series("CT")[0]["SeriesInstanceUID"]
    lungs = nib.load(source / "labels_derived" / "lungs_threshold.nii.gz").slicer[:, :, 39:69]
    save_label(server, series, np.asarray(lungs.dataobj).astype(np.uint8), lungs.affine, "lung", tmp_path)

    viewer = Viewer(page, server.url, tmp_path)
    viewer.accept_warning()
    patient = str(pydicom.dcmread(slices[0], stop_before_pixels=True).PatientID)
    viewer.open_from_list(patient, "Segmentation")
    viewer.load_segmentation("OFL-SAM2 label")
    viewer.picture("label")
    assert viewer.overlays()[0] > 10_000

    viewer.open_from_list(patient, "MONAI Label")
    viewer.connect()
    viewer.choose("store_draft", "on")
    assert viewer.run().ok
    viewer.picture("chest")
    axial, between_the_lungs, coronal = viewer.overlays()
    assert axial > 1000
    assert coronal > 100 > between_the_lungs
    assert orthanc.count("SEG") == 2


def save_truth(clinic: Clinic, case: Phantom, folder: Path) -> None:
    """Save the truth of a case as its label, through our server."""
    save_label(clinic.server, case.series, case.truth.astype(np.uint8), AFFINE, "ball", folder)


def save_label(server: Any, series: str, labels: np.ndarray, affine: np.ndarray, name: str, folder: Path) -> None:
    """Save a label with one structure, and wait until it is learned."""
    path = folder / "label.nii.gz"
    nib.save(nib.Nifti1Image(labels, affine), path)
    with path.open("rb") as file:
        answer = requests.put(
            f"{server.url}/datastore/label",
            params={"image": series},
            data={"params": json.dumps({"label_info": [{"name": name, "idx": 1}]})},
            files={"label": file},
            timeout=120,
        )
    assert answer.ok, answer.text
    server.wait_until(lambda status: series in status["learned"], seconds=120)
