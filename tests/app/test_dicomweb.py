"""Studies on a DICOMweb server that lives in this process: copies, labels there and back voxel for voxel, failures."""

import shutil
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
from lib.datastores import dicomweb
from lib.datastores.dicomweb import JournaledDICOMWebDatastore, connect
from lib.datastores.segmentation import read_segmentation, write_segmentation
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.exception import ImageNotFoundException
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.files import read_labels, read_volume, write_labels
from ofl_sam2.service.journal import LabelJournal

FINAL = "final"
INFO = [{"name": "liver", "idx": 2}, {"name": "unused", "idx": 3}, {"name": "spleen", "idx": 5}]


class Server:
    """What of a DICOMweb client the datastore uses, on a list of instances."""

    base_url = "http://dicomweb.test"

    def __init__(self, instances):
        self.instances = list(instances)
        self.offline = False
        self.calls = []

    def _matching(self, call, **wanted):
        self.calls.append(call)
        if self.offline:
            raise requests.ConnectionError("no route to host")
        return [i for i in self.instances if all(i.get(name) == value for name, value in wanted.items())]

    def search_for_series(self, search_filters):
        by_series = {i.SeriesInstanceUID: i for i in self._matching("search", **search_filters)}
        return [_header(i, "StudyInstanceUID", "SeriesInstanceUID", "Modality") for i in by_series.values()]

    def retrieve_series(self, study, series):
        return self._matching("retrieve", StudyInstanceUID=study, SeriesInstanceUID=series)

    def retrieve_series_metadata(self, study, series):
        names = ("ReferencedSeriesSequence", "ContentDate", "ContentTime")
        return [_header(i, *names) for i in self._matching("metadata", SeriesInstanceUID=series)]

    def store_instances(self, datasets):
        self._matching("store")
        self.instances += datasets
        return Dataset()

    def segmentations(self):
        return [instance for instance in self.instances if instance.Modality == "SEG"]


def _header(instance, *names):
    header = Dataset()
    for name in names:
        if name in instance:
            setattr(header, name, instance[name].value)
    return header.to_json_dict()


def series(modality="CT", slices=6, seed=0):
    """An oblique series of 12 x 10 pixels, its instances in a random order."""
    rotation = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0]
    row, column, normal = rotation[0], rotation[1], np.cross(rotation[0], rotation[1])
    study, uid, frame = generate_uid(), generate_uid(), generate_uid()
    instances = []
    for index in range(slices):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        instance = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        instance.is_little_endian, instance.is_implicit_VR = True, False
        instance.SOPClassUID, instance.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        instance.StudyInstanceUID, instance.SeriesInstanceUID, instance.FrameOfReferenceUID = study, uid, frame
        instance.Modality, instance.PatientID, instance.PatientName = modality, "patient", "Test^Patient"
        instance.PatientBirthDate, instance.PatientSex, instance.AccessionNumber = "19700101", "O", "1"
        instance.StudyDate, instance.StudyTime, instance.StudyID = "20200101", "101010", "1"
        instance.SeriesNumber, instance.InstanceNumber = 1, index + 1
        instance.Rows, instance.Columns, instance.PixelSpacing = 10, 12, [0.7, 0.9]
        instance.SliceThickness = 2.5
        instance.ImageOrientationPatient = [round(float(value), 10) for value in (*row, *column)]
        instance.ImagePositionPatient = [
            round(float(value), 8) for value in 50 * row - 30 * column + 2.5 * index * normal
        ]
        instance.SamplesPerPixel, instance.PhotometricInterpretation = 1, "MONOCHROME2"
        instance.BitsAllocated = instance.BitsStored = 16
        instance.HighBit, instance.PixelRepresentation = 15, 1
        instance.RescaleSlope, instance.RescaleIntercept = 1, -1000
        pixels = np.random.default_rng(seed + index).integers(0, 2000, (10, 12), np.int16)
        instance.PixelData = pixels.tobytes()
        instances.append(instance)
    np.random.default_rng(seed).shuffle(instances)
    return instances


def drawn(image: Path) -> np.ndarray:
    """Labels 2 and 5 that touch neither the first nor the last slice."""
    labels = np.zeros(read_volume(image).grid, np.uint8)
    labels[2:6, 3:7, 1:4] = 2
    labels[7:11, 1:9, 2:5] = 5
    labels[8, 4, 3] = 2
    return labels


@pytest.fixture(autouse=True)
def tools_on_path(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")


@pytest.fixture
def server():
    return Server([*series(), *series("MR", seed=10), *series("XA", seed=20)])


@pytest.fixture
def start(server, tmp_path):
    stores = []

    def build(reconcile=True, **options):
        store = JournaledDICOMWebDatastore(server, tmp_path / "cache", LabelJournal(tmp_path / "journal"), **options)
        store.told = []
        store.on_label = lambda image_id, event: store.told.append((image_id, event.sha256))
        if reconcile:
            store.reconcile()
        stores.append(store)
        return store

    yield build
    for store in stores:
        store.close()


@pytest.fixture
def upload(tmp_path):
    """A label drawn on an image, as a client sends it."""

    def write(store, image_id, name="upload.nii.gz"):
        image = Path(store.get_image_uri(image_id))
        write_labels(tmp_path / name, drawn(image), read_volume(image))
        return str(tmp_path / name)

    return write


def test_series_of_the_usual_modalities_are_listed(server, start):
    store = start()
    assert isinstance(store, DICOMWebDatastore)
    uids = list(dict.fromkeys(i.SeriesInstanceUID for i in server.instances if i.Modality in ("CT", "MR")))
    assert store.list_images() == store.get_unlabeled_images() == uids
    assert store.status() == {"total": 2, "completed": 0, "label_tags": {}}
    assert len(start(filters=[{}]).list_images()) == 3


def test_a_series_whose_uid_is_no_name_is_not_listed(server, start):
    for instance, uid in zip(server.instances[::6], ("", "../1", "1/2"), strict=True):
        instance.SeriesInstanceUID = uid
    assert len(start().list_images()) == 2


def test_the_list_is_asked_for_again_after_a_while(server, start):
    store = start(expiry_s=0.2)
    store.list_images()
    count = len(server.calls)
    store.list_images()
    assert len(server.calls) == count
    server.instances += series("US", seed=30)
    time.sleep(0.25)
    assert len(store.list_images()) == 3


def test_an_image_is_copied_once_in_the_grid_of_its_series(server, start):
    store = start()
    uid = store.list_images()[0]
    path = Path(store.get_image_uri(uid))
    image, original = read_volume(path), read_volume(path.parent / uid)
    np.testing.assert_array_equal(image.voxels, original.voxels)
    np.testing.assert_allclose(image.affine, original.affine, atol=1e-5)
    assert len(list((path.parent / uid).glob("*.dcm"))) == 6
    assert store.get_image_info(uid)["Modality"] == "CT"
    count = server.calls.count("retrieve")
    assert start().get_image_uri(uid) == str(path)
    assert server.calls.count("retrieve") == count
    assert store.get_image_uri("1.2.3") == ""
    with pytest.raises(InputError, match="is no image id"):
        store.get_image_uri("../1")


def test_a_copy_that_was_broken_off_is_made_again(server, start, monkeypatch):
    store = start()
    uid = store.list_images()[0]

    def broken(study, series):
        yield server.instances[0]
        raise requests.ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(server, "retrieve_series", broken)
        with pytest.raises(requests.ConnectionError):
            store.get_image_uri(uid)
    assert read_volume(store.get_image_uri(uid)).grid == (12, 10, 6)


@pytest.mark.parametrize("name", ["upload.nii.gz", "upload.nrrd"])
def test_a_final_label_goes_to_the_server_and_comes_back_voxel_for_voxel(server, start, upload, tmp_path, name):
    store = start()
    uid = store.list_images()[0]
    store.save_label(uid, upload(store, uid, name), FINAL, {"label_info": INFO})
    event = store._journal.latest()[uid, FINAL]
    (stored,) = server.segmentations()
    assert stored.SeriesInstanceUID == event.details["SeriesInstanceUID"]
    assert [segment.SegmentLabel for segment in stored.SegmentSequence] == ["liver", "spleen"]
    assert store.get_labeled_images() == [uid] and store.told == [(uid, event.sha256)]

    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "journal")
    other = start()
    image = Path(other.get_image_uri(uid))
    label = read_labels(other.get_label_uri(uid, FINAL))
    np.testing.assert_array_equal(label.voxels, np.array([0, 0, 1, 0, 0, 2])[drawn(image)])
    np.testing.assert_array_equal(label.affine, read_volume(image).affine)
    assert other.get_label_info(uid, FINAL)["label_info"] == [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]
    assert len(other.told) == 1 and len(server.segmentations()) == 1
    assert start().told == []


def test_other_tags_stay_here(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    store.save_label(uid, upload(store, uid), "original", {"SeriesInstanceUID": "1.2.3"})
    assert server.segmentations() == [] and store.get_unlabeled_images() == store.list_images()


def test_segmentations_of_others_are_taken_in_once_and_the_newest_counts(server, start, upload, tmp_path):
    store = start()
    uid = store.list_images()[0]
    folder = Path(store.get_image_uri(uid)).parent / uid
    label = Path(upload(store, uid))
    older = write_segmentation(label, folder, INFO, generate_uid())
    newer = write_segmentation(label, folder, [{"name": "kidney", "idx": 2}], generate_uid())
    older.ContentDate, newer.ContentDate = "20200101", "20210101"
    server.instances += [newer, older]
    store.refresh()
    assert store._journal.latest()[uid, FINAL].details["SeriesInstanceUID"] == newer.SeriesInstanceUID
    assert [entry["name"] for entry in store.get_label_info(uid, FINAL)["label_info"]] == ["kidney", "structure_5"]
    store.remove_label(uid, FINAL)
    store.refresh()
    assert start().get_labeled_images() == []
    assert len(store.told) == 2 and len(server.segmentations()) == 2


def test_a_segmentation_in_another_grid_is_refused_once(server, start, upload, caplog):
    store = start()
    first, _ = store.list_images()
    folder = Path(store.get_image_uri(first)).parent / first
    wrong = write_segmentation(Path(upload(store, first)), folder, INFO, generate_uid())
    for frame in wrong.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [float(value) + 40 for value in position]
    server.instances.append(wrong)
    store.refresh()
    store.refresh()
    assert store.get_labeled_images() == [] and caplog.text.count("has another grid") == 1
    assert start().told == []


def test_a_damaged_segmentation_is_an_input_error(tmp_path):
    (tmp_path / "seg.dcm").write_bytes(bytes(200))
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4)), tmp_path / "image.nii")
    with pytest.raises(InputError, match="cannot be read as a label"):
        read_segmentation(tmp_path / "seg.dcm", tmp_path / "image.nii", tmp_path / "label.nii.gz")


def test_an_unreachable_server_keeps_the_label_before(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    first = upload(store, uid)
    store.save_label(uid, first, FINAL, {"label_info": INFO})
    latest = store._journal.latest()
    server.offline = True
    with pytest.raises(requests.ConnectionError):
        store.save_label(uid, first, FINAL, {"label_info": INFO})
    assert store._journal.latest() == latest and store._journal.pending() == []
    again = start()
    server.offline = False
    again.refresh()
    assert again.get_labeled_images() == [uid] and len(server.segmentations()) == 1


def test_a_refusal_of_the_server_is_said(server, start, upload, monkeypatch):
    store = start()
    uid = store.list_images()[0]
    answer = Dataset()
    answer.FailedSOPSequence = [Dataset()]
    monkeypatch.setattr(server, "store_instances", lambda datasets: answer)
    with pytest.raises(OFLError, match="refused the segmentation"):
        store.save_label(uid, upload(store, uid), FINAL, {"label_info": INFO})
    assert store.get_labeled_images() == []


def test_a_label_that_cannot_be_a_segmentation_is_said(server, start, tmp_path):
    store = start()
    uid = store.list_images()[0]
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(OFLError, match="cannot be converted to DICOM SEG"):
        store.save_label(uid, str(tmp_path / "empty.nii.gz"), FINAL, {})
    assert store.get_labeled_images() == [] and server.segmentations() == []


def test_a_save_that_was_journaled_only_reaches_the_server_at_the_next_start(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    details = {"label_info": INFO, "SeriesInstanceUID": generate_uid()}
    store._journal.record_save(uid, FINAL, Path(upload(store, uid)), details)
    again = start()
    (stored,) = server.segmentations()
    assert stored.SeriesInstanceUID == details["SeriesInstanceUID"]
    assert again.get_labeled_images() == [uid] and len(again.told) == 1
    start()
    assert len(server.segmentations()) == 1


def test_a_label_that_is_just_being_stored_is_not_taken_in_as_that_of_another(server, start, upload, monkeypatch):
    store = start()
    uid = store.list_images()[0]
    refreshing = threading.Thread(target=store.refresh)

    def store_instances(datasets):
        server.instances += datasets
        asked = len(server.calls)
        refreshing.start()
        while "metadata" not in server.calls[asked:]:
            time.sleep(0.01)
        return Dataset()

    monkeypatch.setattr(server, "store_instances", store_instances)
    store.save_label(uid, upload(store, uid), FINAL, {"label_info": INFO})
    refreshing.join()
    assert len(store.told) == len(store._journal.history()) == 1


def test_segmentations_that_are_no_label_of_an_image_here_are_passed_over(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    folder = Path(store.get_image_uri(uid)).parent / uid
    stranger, lost = (write_segmentation(Path(upload(store, uid)), folder, INFO, generate_uid()) for _ in range(2))
    stranger.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"
    del lost.ReferencedSeriesSequence
    several = [write_segmentation(Path(upload(store, uid)), folder, INFO, "1.2.4") for _ in range(2)]
    server.instances += [stranger, lost, *several]
    store.refresh()
    (refused,) = store._journal.history()
    assert refused.details["SeriesInstanceUID"] == "1.2.4"
    assert store.get_labeled_images() == []


def test_unknown_images_and_uploads_of_images_are_refused(start, upload, tmp_path):
    store = start()
    label = upload(store, store.list_images()[0])
    with pytest.raises(ImageNotFoundException, match=r"no image '1\.2\.3'"):
        store.save_label("1.2.3", label, FINAL, {})
    with pytest.raises(InputError, match="Store the images there"):
        store.add_image("x", label, {})


def test_labels_of_others_are_seen_while_the_server_runs(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    folder = Path(store.get_image_uri(uid)).parent / uid
    store.watch(period_s=0.1)
    server.instances.append(write_segmentation(Path(upload(store, uid)), folder, INFO, generate_uid()))
    limit = time.monotonic() + 60
    while not store.told:
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)
    assert store.get_labeled_images() == [uid]


def test_the_real_series_goes_there_and_back(data_dir, tmp_path):
    files = sorted((data_dir / "dicom_lidc_0314_ct" / "dicom" / "CT").iterdir())[:8]
    server = Server(pydicom.dcmread(path) for path in files)
    store = JournaledDICOMWebDatastore(server, tmp_path / "cache", LabelJournal(tmp_path / "journal"))
    (uid,) = store.list_images()
    image = read_volume(store.get_image_uri(uid))
    bone = (image.voxels > 200).astype(np.uint8)
    write_labels(tmp_path / "bone.nrrd", bone, image)
    store.save_label(uid, str(tmp_path / "bone.nrrd"), FINAL, {"label_info": [{"name": "bone", "idx": 1}]})
    (stored,) = server.segmentations()
    stored.save_as(tmp_path / "seg.dcm", write_like_original=False)
    names = read_segmentation(tmp_path / "seg.dcm", Path(store.get_image_uri(uid)), tmp_path / "back.nii.gz")
    assert names == [{"name": "bone", "idx": 1}]
    np.testing.assert_array_equal(read_labels(tmp_path / "back.nii.gz").voxels, bone)


def test_connect_takes_the_settings(monkeypatch, tmp_path):
    monkeypatch.setattr(dicomweb.settings, "MONAI_LABEL_QIDO_PREFIX", "qido")
    journal = LabelJournal(tmp_path / "journal")
    store = connect("http://127.0.0.1:9/dicom-web/", tmp_path / "cache", journal)
    assert store.name() == "http://127.0.0.1:9/dicom-web"
    assert store._client.qido_url_prefix == "qido"
    assert [wanted["Modality"] for wanted in store._filters] == ["CT", "MR", "US"]
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_SEARCH_FILTER", '{"Modality": "PT"}')
    monkeypatch.setattr(dicomweb.settings, "MONAI_LABEL_DICOMWEB_SEARCH_FILTER", {"Modality": "PT"})
    assert connect("http://127.0.0.1:9", tmp_path / "cache", journal)._filters == [{"Modality": "PT"}]
