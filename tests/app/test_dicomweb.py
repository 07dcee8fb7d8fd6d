"""Studies on a DICOMweb server that lives in this process: copies, labels there and back voxel for voxel, failures."""

import os
import re
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
from lib.activelearning.coverage import Coverage
from lib.datastores.archive import Archive, ArchiveError
from lib.datastores.copies import SeriesCopies
from lib.datastores.dicomweb import JournaledDICOMWebDatastore, connect
from lib.datastores.segmentation import Prediction, read_segmentation
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.exception import ImageNotFoundException
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

sys.path.append(str(Path(__file__).parent))
from dicom_series import make_series

from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.files import read_labels, read_volume, write_labels
from ofl_sam2.service.journal import LabelJournal

FINAL = "final"
TIMES = ("ContentDate", "ContentTime", "TimezoneOffsetFromUTC")
NAMES = {2: "liver", 3: "unused", 5: "spleen"}
INFO = [{"name": name, "idx": value} for value, name in NAMES.items()]


class Server:
    """What of a DICOMweb client the archive uses, on a list of instances; `page` limits the results of a search."""

    base_url = "http://dicomweb.test"

    def __init__(self, instances, page=1000):
        self.instances, self.page = list(instances), page
        self.offline = False
        self.calls = []

    def set_http_retry_params(self, retry):
        assert not retry

    def _matching(self, call, **wanted):
        self.calls.append(call)
        if self.offline:
            raise requests.ConnectionError("no route to host")
        return [i for i in self.instances if all(i.get(name) == value for name, value in wanted.items())]

    def search_for_series(self, limit, offset, search_filters):
        by_series = {}
        for instance in self._matching("search", **search_filters):
            by_series.setdefault(instance.SeriesInstanceUID, []).append(instance)
        names = ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "NumberOfSeriesRelatedInstances")
        found = list(by_series.values())[offset : offset + min(limit, self.page)]
        for instances in found:
            instances[0].NumberOfSeriesRelatedInstances = len(instances)
        return [_header(instances[0], *names) for instances in found]

    def iter_series(self, study, series, media_types):
        assert media_types == (("application/dicom", "*"),)
        yield from self._matching("retrieve", StudyInstanceUID=study, SeriesInstanceUID=series)

    def retrieve_series_metadata(self, study, series):
        names = ("ReferencedSeriesSequence", *TIMES, "Manufacturer", "ContentLabel")
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


def drawn(image: Path) -> np.ndarray:
    """Labels 2 and 5 that touch neither the first nor the last slice."""
    labels = np.zeros(read_volume(image).grid, np.uint8)
    labels[2:6, 3:7, 1:4] = 2
    labels[7:11, 1:9, 2:5] = 5
    labels[8, 4, 3] = 2
    return labels


@pytest.fixture
def server():
    return Server([*make_series(), *make_series("MR", seed=10), *make_series("XA", seed=20)])


@pytest.fixture
def start(server, tmp_path):
    stores = []

    def build(reconcile=True, **options):
        store = JournaledDICOMWebDatastore(
            Archive(server), tmp_path / "cache", LabelJournal(tmp_path / "journal"), **options
        )
        store.told = []
        store.on_label = lambda image_id, event: store.told.append((image_id, event.sha256))
        if reconcile:
            store.reconcile()
        if reconcile and not server.offline:
            store.refresh()
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
    for instance, uid in zip(server.instances[::6], ("labels", "../1", "1/2"), strict=True):
        instance.SeriesInstanceUID = uid
    assert len(start().list_images()) == 2


def test_the_list_is_asked_for_again_after_a_while(server, start):
    store = start(expiry_s=0.2)
    store.list_images()
    count = len(server.calls)
    store.list_images()
    assert len(server.calls) == count
    server.instances += make_series("US", seed=30)
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

    def broken(study, series, media_types):
        yield server.instances[0]
        raise requests.ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(server, "iter_series", broken)
        with pytest.raises(ArchiveError, match="does not answer"):
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
    assert [segment.SegmentLabel for segment in stored.SegmentSequence] == ["liver", "unused", "spleen"]
    assert store.get_labeled_images() == [uid] and store.told == [(uid, event.sha256)]

    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "journal")
    other = start()
    image = Path(other.get_image_uri(uid))
    label = read_labels(other.get_label_uri(uid, FINAL))
    np.testing.assert_array_equal(label.voxels, np.array([0, 0, 1, 0, 0, 3])[drawn(image)])
    np.testing.assert_array_equal(label.affine, read_volume(image).affine)
    assert other.get_label_info(uid, FINAL)["label_info"] == [
        {"name": name, "idx": idx} for idx, name in enumerate(("liver", "unused", "spleen"), start=1)
    ]
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
    label = Path(upload(store, uid))
    older = store.segmentation(uid, label, NAMES)
    newer = store.segmentation(uid, label, {2: "kidney"})
    older.ContentDate, newer.ContentDate = "20200101", "20210101"
    server.instances += [newer, older]
    store.refresh()
    assert store._journal.latest()[uid, FINAL].details["SeriesInstanceUID"] == newer.SeriesInstanceUID
    assert [entry["name"] for entry in store.get_label_info(uid, FINAL)["label_info"]] == ["kidney", "structure_5"]
    store.remove_label(uid, FINAL)
    store.refresh()
    assert start().get_labeled_images() == []
    assert len(store.told) == 1 and len(server.segmentations()) == 2


def test_a_segmentation_in_another_grid_is_refused_once(server, start, upload, caplog):
    store = start()
    first, _ = store.list_images()
    wrong = store.segmentation(first, Path(upload(store, first)), NAMES)
    for frame in wrong.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [float(value) + 40 for value in position]
    server.instances.append(wrong)
    store.refresh()
    store.refresh()
    assert store.get_labeled_images() == [] and caplog.text.count("has another grid") == 1
    assert start().told == []


def test_an_unreachable_server_keeps_the_label_before(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    first = upload(store, uid)
    store.save_label(uid, first, FINAL, {"label_info": INFO})
    latest = store._journal.latest()
    server.offline = True
    with pytest.raises(ArchiveError, match="does not answer"):
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
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), tmp_path / "other.nii.gz")
    with pytest.raises(InputError, match="Resample the label"):
        store.save_label(uid, str(tmp_path / "other.nii.gz"), FINAL, {})
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
    store = start(expiry_s=600)
    uid = store.list_images()[0]
    refreshing = threading.Thread(target=store.refresh)

    def store_instances(datasets):
        server.instances += datasets
        asked = len(server.calls)
        refreshing.start()
        limit = time.monotonic() + 60
        while server.calls[asked:].count("search") < 2:
            assert time.monotonic() < limit, "nothing was searched for"
            time.sleep(0.01)
        return Dataset()

    monkeypatch.setattr(server, "store_instances", store_instances)
    store.save_label(uid, upload(store, uid), FINAL, {"label_info": INFO})
    refreshing.join()
    assert len(store.told) == len(store._journal.history()) == 1


def test_segmentations_that_are_no_label_of_an_image_here_are_passed_over(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    label = Path(upload(store, uid))
    stranger, lost = (store.segmentation(uid, label, NAMES) for _ in range(2))
    stranger.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"
    del lost.ReferencedSeriesSequence
    several = [store.segmentation(uid, label, NAMES, uid="1.2.4") for _ in range(2)]
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
    uid = store.list_images()[0]
    store.save_label(uid, label, FINAL, {})
    with pytest.raises(InputError, match="Delete the images there"):
        store.remove_image(uid)
    assert store.get_labeled_images() == [uid]


def test_labels_of_others_are_seen_while_the_server_runs(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    store.watch(period_s=0.1)
    server.instances.append(store.segmentation(uid, Path(upload(store, uid)), NAMES))
    limit = time.monotonic() + 60
    while not store.told:
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)
    assert store.get_labeled_images() == [uid]


def test_the_real_series_goes_there_and_back(data_dir, tmp_path):
    files = sorted((data_dir / "dicom_lidc_0314_ct" / "dicom" / "CT").iterdir())[:8]
    server = Server(pydicom.dcmread(path) for path in files)
    store = JournaledDICOMWebDatastore(Archive(server), tmp_path / "cache", LabelJournal(tmp_path / "journal"))
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
    monkeypatch.setattr(settings, "MONAI_LABEL_QIDO_PREFIX", "qido")
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_USERNAME", "alice")
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_PASSWORD", "secret")
    journal = LabelJournal(tmp_path / "journal")
    store = connect("http://127.0.0.1:9/dicom-web/", tmp_path / "cache", journal)
    assert store.name() == "http://127.0.0.1:9/dicom-web"
    client = store._archive._client
    assert client.qido_url_prefix == "qido" and client._session.auth == ("alice", "secret")
    assert [wanted["Modality"] for wanted in store._catalog._filters] == ["CT", "MR", "US"]
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_SEARCH_FILTER", {"Modality": "PT"})
    assert connect("http://127.0.0.1:9", tmp_path / "cache", journal)._catalog._filters == [{"Modality": "PT"}]


def test_all_pages_of_a_server_that_limits_its_answers_are_listed(server, start):
    server.page = 1
    assert len(start().list_images()) == 2


def test_a_server_that_knows_no_pages_is_asked_twice(server, start, monkeypatch):
    pages = server.search_for_series
    monkeypatch.setattr(server, "search_for_series", lambda limit, offset, **wanted: pages(limit, 0, **wanted))
    assert len(start(reconcile=False).list_images()) == 2


def test_a_series_that_was_still_arriving_is_copied_again(server, start):
    store, everything = start(expiry_s=0), server.instances
    uid = store.list_images()[0]
    for count in (3, 6):
        server.instances = [instance for instance in everything if instance.InstanceNumber <= count]
        store.list_images()
        assert read_volume(store.get_image_uri(uid)).grid[2] == count


def test_a_series_that_is_no_volume_is_refused_in_words_and_not_handed_out(server, start):
    single, localiser = make_series(slices=1), make_series(slices=2, seed=40)
    for instance in localiser:
        instance.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    server.instances += [*single, *localiser]
    store = start()
    assert len(store.list_images()) == 4 and len(store.get_unlabeled_images()) == 3
    for uid, sentence in (
        (single[0].SeriesInstanceUID, "a single slice"),
        (localiser[0].SeriesInstanceUID, "localiser"),
    ):
        for _ in range(2):
            with pytest.raises(InputError, match=f"Series {uid} .*{sentence}"):
                store.get_image_uri(uid)
    assert server.calls.count("retrieve") == 2 and len(store.get_unlabeled_images()) == 2


def test_copies_stay_within_their_bound_and_labels_without_a_copy_stay(start, upload):
    store = start()
    store._copies = SeriesCopies(store._images, max_bytes=0, in_use_s=0)
    first, second = store.list_images()
    store.save_label(first, upload(store, first), FINAL, {"label_info": INFO})
    store.get_image_uri(second)
    assert store._copies.uids() == [second] and store.get_labeled_images() == [first]
    store.refresh()
    assert store.told == [(first, store._journal.latest()[first, FINAL].sha256)]
    store._copies = SeriesCopies(store._images, max_bytes=0)
    (case,) = store.datalist()
    assert read_volume(case["image"]).grid == read_labels(case["label"]).grid
    assert store._copies.uids() == sorted([first, second])


def test_labels_in_a_cache_that_was_deleted_are_made_anew(server, start, upload, tmp_path):
    store = start()
    uid = store.list_images()[0]
    store.save_label(uid, upload(store, uid), FINAL, {"label_info": INFO})
    label = read_labels(store.get_label_uri(uid, FINAL)).voxels
    shutil.rmtree(tmp_path / "cache")
    server.offline = True
    again = start()
    server.offline = False
    again.get_image_uri(uid)
    again.refresh()
    np.testing.assert_array_equal(read_labels(again.get_label_uri(uid, FINAL)).voxels, label)
    assert again.told == [] and again.get_labeled_images() == [uid]


def test_a_draft_is_stored_and_never_learned(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    draft = store.store_draft(uid, Path(upload(store, uid)), NAMES, Prediction("ofl_sam2", 4))
    store.refresh()
    assert server.segmentations() == [draft]
    assert store.told == [] and start().get_labeled_images() == []


def test_a_segmentation_waits_for_its_image(server, start, upload):
    store = start(expiry_s=0)
    uid = store.list_images()[0]
    segmentation = store.segmentation(uid, Path(upload(store, uid)), NAMES)
    all_instances = server.instances
    for present in ([], [i for i in all_instances if i.InstanceNumber < 3]):
        server.instances = [*present, segmentation]
        store.refresh()
        assert store.told == [] and store._journal.history() == []
    server.instances = [*all_instances, segmentation]
    store.refresh()
    assert store.get_labeled_images() == [uid]


def test_one_segmentation_that_cannot_be_fetched_keeps_no_other_back(server, start, upload, monkeypatch):
    store = start()
    first, second = store.list_images()
    broken, whole = (store.segmentation(uid, Path(upload(store, uid)), NAMES) for uid in (first, second))
    server.instances += [broken, whole]
    fetch = server.iter_series

    def iter_series(study, series, media_types):
        if series == broken.SeriesInstanceUID:
            raise http_error(500)
        return fetch(study, series, media_types)

    monkeypatch.setattr(server, "iter_series", iter_series)
    store.refresh()
    assert store.get_labeled_images() == [second]
    monkeypatch.undo()
    store.refresh()
    assert set(store.get_labeled_images()) == {first, second}


def http_error(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("secret details", response=response)


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (http_error(401), "refuses the login", 502),
        (http_error(404), "any more", 404),
        (http_error(500), "answered 500", 502),
        (requests.ReadTimeout("slow"), "does not answer", 502),
        (requests.exceptions.SSLError("self-signed"), "No encrypted connection .* REQUESTS_CA_BUNDLE", 502),
        (requests.JSONDecodeError("no JSON", "<html>", 0), "is no DICOM", 502),
    ],
)
def test_what_goes_wrong_on_the_server_is_one_sentence(server, monkeypatch, error, sentence, status):
    def search_for_series(**options):
        raise error

    monkeypatch.setattr(server, "search_for_series", search_for_series)
    with pytest.raises(ArchiveError, match=sentence) as said:
        Archive(server).series({})
    assert said.value.status == status and "secret" not in str(said.value)


def made(segmentation, year):
    segmentation.ContentDate = f"{year}0101"
    return segmentation


def moved(label: Path) -> Path:
    """Another label of the same image."""
    target, before = label.with_name("moved.nii.gz"), nib.load(label)
    nib.save(nib.Nifti1Image(np.roll(np.asarray(before.dataobj), 1, axis=0), before.affine), target)
    return target


@pytest.mark.parametrize("year", [2001, 2099])
def test_a_segmentation_replaces_the_label_only_if_it_was_made_later(server, start, upload, year):
    store = start()
    uid = store.list_images()[0]
    label = Path(upload(store, uid))
    store.save_label(uid, str(label), FINAL, {"label_info": INFO})
    saved = store._journal.latest()[uid, FINAL]
    server.instances.append(made(store.segmentation(uid, moved(label), NAMES), year))
    store.refresh()
    assert (store._journal.latest()[uid, FINAL] == saved) == (year == 2001)
    assert len(store._journal.refusals()) == (year == 2001)
    later = made(store.segmentation(uid, label, NAMES), 2100)
    server.instances += [later, made(store.segmentation(uid, label, NAMES), 2090)]
    store.refresh()
    assert store._journal.latest()[uid, FINAL].details["SeriesInstanceUID"] == later.SeriesInstanceUID


@pytest.mark.parametrize("date", ["", "19990101"])
def test_a_segmentation_without_a_date_is_replaced_by_a_later_one(server, start, upload, date):
    store = start()
    uid = store.list_images()[0]
    label = Path(upload(store, uid))
    server.instances.append(made(store.segmentation(uid, label, NAMES), 2020))
    server.instances[-1].ContentDate = ""
    store.refresh()
    assert store._journal.latest()[uid, FINAL].details["made"] == ""
    server.instances.append(made(store.segmentation(uid, moved(label), NAMES), 2099))
    server.instances[-1].ContentDate = date or server.instances[-1].ContentDate
    store.refresh()
    taken = store._journal.latest()[uid, FINAL].details["SeriesInstanceUID"]
    assert taken == server.instances[-1 if date == "" else -2].SeriesInstanceUID
    assert len(store._journal.refusals()) == (date != "")


@pytest.mark.parametrize(
    ("clock", "offset", "instant"),
    [
        ("101010", "+0200", "2020-01-01T08:10:10.000+00:00"),
        ("1010", "-0100", "2020-01-01T11:10:00.000+00:00"),
        ("101010.25", "+0000", "2020-01-01T10:10:10.250+00:00"),
        ("later", "", ""),
    ],
)
def test_the_time_of_a_segmentation_is_read(server, start, upload, clock, offset, instant):
    store = start()
    uid = store.list_images()[0]
    segmentation = made(store.segmentation(uid, Path(upload(store, uid)), NAMES), 2020)
    segmentation.ContentTime, segmentation.TimezoneOffsetFromUTC = clock, offset
    server.instances.append(segmentation)
    (found,) = store._foreign.new({series.study for series in store._catalog.series().values()})
    assert found.made == instant


def test_a_time_without_an_offset_is_the_later_of_here_and_utc(server, start, upload, monkeypatch):
    store = start()
    uid = store.list_images()[0]
    server.instances.append(made(store.segmentation(uid, Path(upload(store, uid)), NAMES), 2020))
    server.instances[-1].ContentTime, server.instances[-1].TimezoneOffsetFromUTC = "120000", ""
    for zone, hour in (("UTC-3", 12), ("UTC+3", 15)):  # as POSIX writes them: 3 hours east, 3 hours west
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            store._foreign._described.clear()
            (found,) = store._foreign.new({series.study for series in store._catalog.series().values()})
        time.tzset()
        assert found.made == f"2020-01-01T{hour}:00:00.000+00:00"


def test_a_save_that_failed_is_not_taken_in_later(server, start, upload, monkeypatch):
    store = start()
    uid = store.list_images()[0]
    label = Path(upload(store, uid))

    def store_instances(datasets):
        server.instances += datasets
        raise requests.Timeout("read timed out")

    with monkeypatch.context() as patch:
        patch.setattr(server, "store_instances", store_instances)
        with pytest.raises(ArchiveError, match="does not answer"):
            store.save_label(uid, str(label), FINAL, {"label_info": INFO})
    store.save_label(uid, str(moved(label)), FINAL, {"label_info": INFO})
    latest = store._journal.latest()
    store.refresh()
    assert store._journal.latest() == latest and len(server.segmentations()) == 2 and len(store.told) == 1


def test_headers_that_no_segmentation_can_refer_to_are_said_and_keep_no_other_label_back(server, start, upload):
    store = start()
    broken, whole = store.list_images()
    for instance in server.instances:
        if instance.SeriesInstanceUID == broken:
            del instance.SOPClassUID
    with pytest.raises(InputError, match="Repair its headers"):
        store.save_label(broken, upload(store, broken), FINAL, {"label_info": INFO})
    assert store._journal.pending() == []
    store._journal.record_save(broken, FINAL, Path(upload(store, broken)), {"SeriesInstanceUID": "1.2.3"})
    server.instances.append(store.segmentation(whole, Path(upload(store, whole)), NAMES))
    again = start()
    assert again.get_labeled_images() == [whole]


def test_an_error_of_whatever_kind_gives_a_save_up(server, start, upload, monkeypatch):
    store = start()
    uid = store.list_images()[0]
    monkeypatch.setattr(store, "_publish", lambda event: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save_label(uid, upload(store, uid), FINAL, {"label_info": INFO})
    assert store._journal.pending() == [] and store._journal.latest() == {}


@pytest.mark.parametrize(
    "junk",
    [
        [{"00081115": {"vr": "SQ", "Value": ["x"]}}],
        [{"00081115": {"vr": "SQ", "Value": [{"0020000E": {"vr": "UI", "Value": [7]}}]}}],
        [{"00081115": {"vr": "XX", "Value": [1]}}],
        [{"00081115": None}],
        ["x"],
        {"a": 1},
    ],
)
def test_a_segmentation_with_junk_in_its_header_keeps_no_other_back(server, start, upload, monkeypatch, caplog, junk):
    store = start()
    uid = store.list_images()[0]
    label = Path(upload(store, uid))
    bad, good = store.segmentation(uid, label, NAMES), store.segmentation(uid, label, NAMES)
    server.instances += [bad, good]
    metadata = server.retrieve_series_metadata
    monkeypatch.setattr(
        server, "retrieve_series_metadata", lambda st, se: junk if se == bad.SeriesInstanceUID else metadata(st, se)
    )
    store.refresh()
    store.refresh()
    assert store._journal.latest()[uid, FINAL].details["SeriesInstanceUID"] == good.SeriesInstanceUID
    assert caplog.text.count("is not looked at until later") + caplog.text.count("no series ''") <= 1


def test_a_damaged_entry_keeps_no_series_out_of_the_list(server, start, monkeypatch):
    search = server.search_for_series
    monkeypatch.setattr(server, "search_for_series", lambda **wanted: [*search(**wanted), {"0020000E": 1}, "x"])
    assert len(start(reconcile=False).list_images()) == 2


def test_a_segmentation_that_cannot_be_learned_is_refused(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    label = Path(upload(store, uid))
    store.save_label(uid, str(label), FINAL, {"label_info": INFO})
    latest = store._journal.latest()

    def check(image_id, path, names):
        assert image_id == uid and read_labels(path).voxels.any() and names[0] == {"name": "liver", "idx": 1}
        raise InputError(f"{path} names one structure twice.")

    store.check = check
    server.instances.append(made(store.segmentation(uid, label, NAMES), 2099))
    store.refresh()
    ((_, reason),) = store._journal.refusals()
    assert reason == "the segmentation names one structure twice." and store._journal.latest() == latest


def test_a_label_that_cannot_be_put_back_is_not_deleted(server, start, upload, tmp_path, monkeypatch):
    store = start()
    uid = store.list_images()[0]
    store.save_label(uid, upload(store, uid), FINAL, {"label_info": INFO})
    latest = store._journal.latest()
    shutil.rmtree(next((tmp_path / "cache").iterdir()) / "labels")

    def full(source, target):
        raise OFLError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("lib.datastores.local.copy_label", full)
        again = start()
    assert again._journal.latest() == latest and again._journal.blob(latest[uid, FINAL]).exists()
    again.refresh()
    assert again.get_labeled_images() == [uid] and again.told == []


def test_a_copy_that_could_not_be_converted_leaves_nothing(start, monkeypatch):
    store = start()
    uid = store.list_images()[0]

    def full(image, path):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("lib.datastores.copies.nib.save", full)
        with pytest.raises(OFLError, match="the disk is full"):
            store.get_image_uri(uid)
    assert not store._copies.files(uid).exists() and store._copies.uids() == []
    assert read_volume(store.get_image_uri(uid)).grid == (12, 10, 6)


def test_a_start_does_not_wait_for_the_server(server, start, upload):
    store = start()
    uid = store.list_images()[0]
    label = Path(upload(store, uid))
    server.instances.append(store.segmentation(uid, label, NAMES))
    store._journal.record_save(uid, FINAL, label, {"SeriesInstanceUID": "1.2.3", "label_info": INFO})
    server.calls.clear()
    again = start(reconcile=False)
    again.reconcile()
    assert server.calls == []
    again.watch(period_s=600)
    limit = time.monotonic() + 60
    while not again.told:
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)


def test_the_list_can_be_read_while_a_label_goes_to_the_server(server, start, upload, monkeypatch):
    store = start()
    uid = store.list_images()[0]
    label, stored, read = upload(store, uid), threading.Event(), threading.Event()

    def store_instances(datasets):
        stored.set()
        assert read.wait(60)
        server.instances += datasets
        return Dataset()

    monkeypatch.setattr(server, "store_instances", store_instances)
    saving = threading.Thread(target=store.save_label, args=(uid, label, FINAL, {"label_info": INFO}))
    saving.start()
    assert stored.wait(60)
    assert store.json()["objects"][uid]["labels"] == {}
    read.set()
    saving.join()
    assert store.get_labeled_images() == [uid]


def test_a_server_that_lets_one_wait_is_not_asked_again_at_once(server, start, monkeypatch):
    store = start(expiry_s=0)
    asked = []

    def search_for_series(**wanted):
        asked.append(wanted)
        time.sleep(0.5)
        raise requests.ConnectTimeout("timed out")

    with monkeypatch.context() as patch:
        patch.setattr(server, "search_for_series", search_for_series)
        for _ in range(3):
            with pytest.raises(ArchiveError, match="does not answer"):
                store.list_images()
    assert len(asked) == 1
    time.sleep(0.6)
    assert len(store.list_images()) == 2


def test_a_segmentation_of_a_series_that_is_not_listed_is_logged_once(server, start, upload, caplog):
    store = start()
    uid = store.list_images()[0]
    stranger = store.segmentation(uid, Path(upload(store, uid)), NAMES)
    stranger.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"
    server.instances.append(stranger)
    store.refresh()
    store.refresh()
    assert caplog.text.count("no series '1.2.3'") == 1


def test_the_app_says_which_segmentations_it_refused(server, make_app, monkeypatch, upload):
    monkeypatch.setattr("lib.datastores.dicomweb.open_archive", lambda url: Archive(server))
    app = make_app(server=True, source="http://dicomweb.test")
    store = app.datastore()
    uid = store.list_images()[0]
    twice = store.segmentation(uid, Path(upload(store, uid)), {2: "lesion", 5: "lesion"})
    server.instances.append(twice)
    store.refresh()
    (refused,) = app.status()["refused"]
    assert refused["image"] == uid and refused["series"] == twice.SeriesInstanceUID
    assert "lesion" in refused["reason"] and store.get_labeled_images() == []


def test_segmentations_of_other_studies_are_not_looked_at(server, start, upload, monkeypatch):
    store = start()
    other = store.segmentation(store.list_images()[0], Path(upload(store, store.list_images()[0])), NAMES)
    other.StudyInstanceUID = "1.2.3"
    server.instances.append(other)
    monkeypatch.setattr(server, "retrieve_series_metadata", None)
    store.refresh()
    assert store.get_labeled_images() == []


def test_a_segmentation_of_more_images_than_there_are_is_logged(server, start, upload, caplog):
    store = start(expiry_s=0)
    uid = store.list_images()[0]
    server.instances.append(store.segmentation(uid, Path(upload(store, uid)), NAMES))
    server.instances.remove(next(i for i in server.instances if i.SeriesInstanceUID == uid))
    store.refresh()
    assert re.search(r"refers to \d+ images, but the series holds \d+", caplog.text)
    assert store.get_labeled_images() == []


def test_labels_say_in_which_zone_their_times_are(server, start, upload, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        store = start()
        uid = store.list_images()[0]
        store.save_label(uid, upload(store, uid), "final", {})
        (stored,) = server.segmentations()
        assert stored.TimezoneOffsetFromUTC == "+0900"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_series_keeps_its_descriptor_whenever_it_was_used(start, fresh_workspace):
    store, coverage = start(), Coverage(fresh_workspace)
    uid, encoder = store.list_images()[0], fresh_workspace.encoder()
    coverage.farthest([uid], [], store)
    os.utime(store.get_image_uri(uid), (1, 1))
    assert coverage.known(uid, store, encoder) is not None
    Path(store.get_image_uri(uid)).unlink()
    assert coverage.known(uid, store, encoder) is not None
