"""Labels on a real DICOM server: there and back voxel for voxel, those of others too; drafts; failures in words."""

import copy
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import requests
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.uid import JPEG2000Lossless

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "app"), str(TESTS.parent / "apps" / "ofl_sam2")]
from dicom_series import COLUMNS, ORIENTATIONS, ROWS, make_series  # noqa: E402
from lib.datastores.archive import ArchiveError, open_archive  # noqa: E402
from lib.datastores.dicomweb import JournaledDICOMWebDatastore  # noqa: E402
from lib.datastores.segmentation import Prediction  # noqa: E402

from ofl_sam2.dicom import read_headers  # noqa: E402
from ofl_sam2.files import read_labels, read_volume, write_labels  # noqa: E402
from ofl_sam2.service.journal import LabelJournal  # noqa: E402

pytestmark = pytest.mark.e2e
FINAL = "final"
NAMES = {1: "liver", 2: "spleen"}
INFO = [{"name": name, "idx": value} for value, name in NAMES.items()]


@pytest.fixture(scope="module")
def archive(make_orthanc):
    """An Orthanc for this module."""
    return make_orthanc()


@pytest.fixture
def upload(archive, tmp_path):
    """Store instances of one series, as they are; the result is its SeriesInstanceUID."""

    def store(instances):
        folder = tmp_path / instances[0].SeriesInstanceUID
        folder.mkdir()
        for number, instance in enumerate(instances):
            instance.save_as(folder / f"{number}.dcm", write_like_original=False)
        archive.upload(sorted(folder.iterdir()))
        return instances[0].SeriesInstanceUID

    return store


@pytest.fixture
def connect(archive, tmp_path):
    """Open the study of a series as the app does; each `name` has a cache and a journal of its own."""

    def build(instances, name="one", expiry_s=0):
        wanted = {"StudyInstanceUID": instances[0].StudyInstanceUID, "Modality": instances[0].Modality}
        journal = LabelJournal(tmp_path / name / "journal")
        store = JournaledDICOMWebDatastore(
            open_archive(archive.url), tmp_path / name / "cache", journal, [wanted], expiry_s=expiry_s
        )
        store.told = []
        store.on_label = lambda image_id, event: store.told.append(image_id)
        return store

    return build


def drawn(store, uid, path):
    """A label of two structures that touch every side of the image, drawn on it as a client does."""
    image = read_volume(store.get_image_uri(uid))
    labels = np.zeros(image.grid, np.uint8)
    labels[:4, :3, 1:] = 1
    labels[5:, 4:, :-1] = 2
    labels[0, 0, 0] = labels[6, 5, 2] = 1
    write_labels(path, labels, image)
    return labels


def final(store, uid):
    return read_labels(store.get_label_uri(uid, FINAL)).voxels


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_label_goes_there_and_back(connect, upload, archive, tmp_path, orientation, reverse):
    instances = make_series("MR", orientation=orientation)
    for instance in instances:
        if reverse:
            instance.InstanceNumber = 100 - instance.InstanceNumber
    uid = upload(instances)
    store = connect(instances)
    labels = drawn(store, uid, tmp_path / "label.nrrd")
    store.save_label(uid, str(tmp_path / "label.nrrd"), FINAL, {"label_info": INFO})
    (stored,) = archive.series("SEG", instances[0].StudyInstanceUID)
    assert stored["SeriesDescription"] == "OFL-SAM2 label"
    other = connect(instances, "another")
    other.refresh()
    assert np.count_nonzero(final(other, uid) != labels) == 0
    assert other.get_label_info(uid, FINAL)["label_info"] == INFO


def test_a_cache_that_was_deleted_comes_back(connect, upload, tmp_path):
    instances = make_series()
    uid = upload(instances)
    store = connect(instances)
    labels = drawn(store, uid, tmp_path / "label.nii.gz")
    store.save_label(uid, str(tmp_path / "label.nii.gz"), FINAL, {"label_info": INFO})
    shutil.rmtree(tmp_path / "one" / "cache")
    again = connect(instances)
    again.refresh()
    assert uid in again.get_labeled_images() and again.told == []
    again.get_image_uri(uid)
    again.refresh()
    np.testing.assert_array_equal(final(again, uid), labels)


def foreign(headers, labels):
    """A SEG of another program: highdicom with UIDs of its own."""
    return highdicom.seg.Segmentation(
        source_images=headers,
        pixel_array=np.ascontiguousarray(labels.transpose()),
        segmentation_type="BINARY",
        segment_descriptions=[
            highdicom.seg.SegmentDescription(number, name, codes.SCT.Organ, codes.SCT.Liver, "MANUAL")
            for number, name in NAMES.items()
        ],
        series_instance_uid=highdicom.UID(),
        series_number=7,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="another",
        manufacturer_model_name="another",
        software_versions="1",
        device_serial_number="1",
    )


def test_the_segmentation_of_another_program_is_noticed_and_a_draft_is_not(connect, upload, archive, tmp_path):
    instances = make_series()
    uid = upload(instances)
    store = connect(instances)
    store.refresh()
    labels = drawn(store, uid, tmp_path / "label.nii.gz")
    draft = store.store_draft(uid, tmp_path / "label.nii.gz", NAMES, Prediction("ofl_sam2", 3))
    store.refresh()
    assert store.told == [] and uid in store.get_unlabeled_images()
    described = [series["SeriesDescription"] for series in archive.series("SEG", draft.StudyInstanceUID)]
    assert described == ["OFL-SAM2 draft of ofl_sam2, snapshot 3"]
    headers = read_headers(Path(store.get_image_uri(uid)).parent / uid)
    upload([foreign(headers, labels)])
    store.refresh()
    assert store.told == [uid]
    np.testing.assert_array_equal(final(store, uid), labels)
    store.refresh()
    assert store.told == [uid]


def test_a_series_that_was_deleted_after_it_was_listed_is_said(connect, upload, archive):
    instances = make_series()
    uid = upload(instances)
    store = connect(instances, expiry_s=600)
    assert store.list_images() == [uid]
    archive.delete(uid)
    with pytest.raises(ArchiveError, match=r"does not have .* Refresh the list") as gone:
        store.get_image_uri(uid)
    assert gone.value.status == 404


def test_series_are_listed_page_by_page(upload, archive, monkeypatch):
    uids = {upload(make_series(slices=2, seed=seed)) for seed in range(5)}
    monkeypatch.setattr("lib.datastores.archive._PAGE", 2)
    found = open_archive(archive.url).series({"Modality": "CT"})
    assert uids <= found.keys() and all(found[uid].instances == 2 for uid in uids)


def compressed(instance, syntax, folder):
    """An instance in another transfer syntax."""
    if syntax == "JPEG2000Lossless":
        stream = io.BytesIO()
        Image.fromarray(instance.pixel_array.astype(np.uint16)).save(
            stream, "JPEG2000", no_jp2=True, irreversible=False
        )
        instance.PixelRepresentation, instance.PixelData = 0, encapsulate([stream.getvalue()])
        instance.file_meta.TransferSyntaxUID = JPEG2000Lossless
        instance["PixelData"].is_undefined_length = True
        return instance
    tool = {"JPEGLSLossless": "dcmcjpls", "JPEGLossless": "dcmcjpeg", "RLELossless": "dcmcrle"}[syntax]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: apt-get install dcmtk")
    instance.save_as(folder / "plain.dcm", write_like_original=False)
    subprocess.run([tool, folder / "plain.dcm", folder / "packed.dcm"], check=True, timeout=60)
    return pydicom.dcmread(folder / "packed.dcm")


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless", "JPEGLSLossless", "JPEGLossless"])
def test_compressed_series_are_read_exactly(connect, upload, syntax, tmp_path):
    plain = make_series()
    packed = [compressed(copy.deepcopy(instance), syntax, tmp_path) for instance in plain]
    uid = upload(packed)
    store = connect(packed)
    image = read_volume(store.get_image_uri(uid))
    files = Path(store.get_image_uri(uid)).parent / uid
    assert {header.file_meta.TransferSyntaxUID.keyword for header in read_headers(files)} <= {syntax, "JPEGLosslessSV1"}
    pixels = {int(instance.InstanceNumber): instance.pixel_array.T - 1000 for instance in plain}
    np.testing.assert_array_equal(image.voxels, np.stack([pixels[number] for number in sorted(pixels)], axis=2))


@pytest.fixture(scope="module")
def live(make_orthanc, start_server):
    """Start our server on an Orthanc that asks for a password; each on a model root of its own."""
    orthanc = make_orthanc(users={"alice": "secret"})

    def start(password):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MONAI_LABEL_DICOMWEB_USERNAME", "alice")
            patch.setenv("MONAI_LABEL_DICOMWEB_PASSWORD", password)
            return start_server(orthanc.url, image_size="64")

    return orthanc, start


def stored_in(orthanc, folder, instances):
    """Store instances, and read them back as a volume."""
    folder.mkdir()
    for number, instance in enumerate(instances):
        instance.save_as(folder / f"{number}.dcm", write_like_original=False)
    orthanc.upload(sorted(folder.iterdir()))
    return instances[0].SeriesInstanceUID


def sentence(answer, status):
    assert answer.status_code == status, answer.text
    return answer.json()["detail"]


def test_annotators_learn_what_goes_on(live, tmp_path):
    orthanc, start = live
    first, second, third = (
        stored_in(orthanc, tmp_path / str(seed), make_series(slices=5, seed=seed, orientation="axial"))
        for seed in range(3)
    )
    server = start("secret")
    labels = np.zeros((COLUMNS, ROWS, 5), np.uint8)
    labels[2:6, 2:7, 1:4], labels[7:10, 2:7, 1:4] = 1, 2
    write_labels(tmp_path / "label.nrrd", labels, read_volume(tmp_path / "0"))
    with (tmp_path / "label.nrrd").open("rb") as file:
        form = {"params": json.dumps({"label_info": INFO})}
        address = f"{server.url}/datastore/label?image={first}"
        requests.put(address, data=form, files={"label": file}, timeout=120).raise_for_status()
    server.wait_until(lambda status: status["snapshot"])
    assert len(orthanc.series("SEG")) == 1

    prediction = requests.post(f"{server.url}/infer/ofl_sam2?image={first}&output=dicom_seg", timeout=120)
    prediction.raise_for_status()
    segments = pydicom.dcmread(io.BytesIO(prediction.content)).SegmentSequence
    assert [segment.SegmentLabel for segment in segments] == ["liver", "spleen"]
    draft = requests.post(f"{server.url}/ofl/drafts?image={first}", timeout=120)
    draft.raise_for_status()
    assert draft.json()["series"] in {series["SeriesInstanceUID"] for series in orthanc.series("SEG")}

    headers = read_headers(tmp_path / "1")
    stored_in(orthanc, tmp_path / "foreign", [foreign(headers, labels)])
    server.wait_until(lambda status: len(status["learned"]) == 2, seconds=90)
    assert server.get("/datastore/").json()["completed"] == 2

    orthanc.delete(third)
    sentence(requests.post(f"{server.url}/infer/ofl_sam2?image={third}", timeout=120), 404)
    orthanc.stop()
    time.sleep(6)
    gone = requests.post(f"{server.url}/infer/ofl_sam2?image={third}", timeout=120)
    assert "does not answer. Start it" in sentence(gone, 502)
    assert server.learning()["snapshot"]
    orthanc.start()
    requests.post(f"{server.url}/infer/ofl_sam2?image={second}", timeout=120).raise_for_status()


def test_a_wrong_password_is_said(live):
    _, start = live
    with pytest.raises(requests.HTTPError) as refused:
        start("wrong")
    assert "refuses the login" in sentence(refused.value.response, 502)
