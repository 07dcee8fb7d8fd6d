"""Studies in a folder: labels survive crashes and strangers, every format is an image, no name leaves the folder."""

import json
import os
import shutil
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from lib.datastores import local, watcher
from lib.datastores.local import JournaledLocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException
from PIL import Image

from ofl_sam2 import atomic
from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.service.journal import LabelJournal
from ofl_sam2.service.label_files import content_sha256

KEY = ("a", "final")


def nifti(path: Path, value: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.full((4, 4, 2), value, np.uint8), np.eye(4)), path)
    return path


def frames(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(np.full((4, 4), index, np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def studies(tmp_path):
    for name in ("a.nii.gz", "b.01.nii", "c.nrrd"):
        nifti(tmp_path / "studies" / "x.nii.gz")
        (tmp_path / "studies" / "x.nii.gz").rename(tmp_path / "studies" / name)
    return tmp_path / "studies"


@pytest.fixture
def start(studies, tmp_path):
    """Start a server's datastore; `told` of it collects what the hooks say."""
    stores = []

    def build(reconcile: bool = True) -> JournaledLocalDatastore:
        store = JournaledLocalDatastore(studies, LabelJournal(tmp_path / "journal"))
        store.told = []
        store.on_label = lambda image_id, event: store.told.append((image_id, event.sha256))
        store.on_delete = lambda image_id: store.told.append((image_id, None))
        if reconcile:
            store.reconcile()
        stores.append(store)
        return store

    yield build
    for store in stores:
        store.close()


@pytest.fixture
def label(tmp_path):
    return lambda value=1, name="upload.nii.gz": nifti(tmp_path / "uploads" / name, value)


def value(store, key=KEY):
    return int(nib.load(store.get_label_uri(*key)).dataobj[0, 0, 0])


def wait_for(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)


def test_every_format_is_an_image_with_its_own_id(start, studies):
    frames(studies / "cine")
    (studies / "ct" / "series").mkdir(parents=True)
    (studies / "ct" / "series" / "1.dcm").write_bytes(bytes(128) + b"DICM")
    (studies / "ct.v2").mkdir()
    (studies / "notes").mkdir()
    (studies / "notes" / "read.me").write_text("no image")
    (studies / "readme.txt").write_text("no image")
    store = start()
    assert store.list_images() == ["a", "b.01", "c", "cine", "ct"]
    assert Path(store.get_image_uri("ct")) == studies / "ct"
    assert Path(store.get_image_uri("b.01")) == studies / "b.01.nii"
    assert start().list_images() == store.list_images()


def test_two_images_of_one_name_the_listed_one_keeps_its_id(start, studies, caplog):
    store = start()
    shutil.copy(studies / "a.nii.gz", studies / "a.nii")
    store.refresh()
    assert Path(store.get_image_uri("a")) == studies / "a.nii.gz"
    assert "has the same id" in caplog.text


def test_a_saved_label_is_journaled_written_listed_and_told(start, label, tmp_path):
    store = start()
    details = {"label_info": [{"name": "liver", "idx": 1}], "client_id": "ann"}
    assert store.save_label("a", str(label()), DefaultLabelTag.FINAL, details) == "a"
    event = LabelJournal(tmp_path / "journal").latest()[KEY]
    assert event.details == details
    assert content_sha256(Path(store.get_label_uri(*KEY))) == event.sha256
    assert store.told == [("a", event.sha256)]
    assert store.get_label_info(*KEY)["label_info"] == details["label_info"]
    assert store.get_labeled_images() == ["a"] and store.status()["completed"] == 1
    listed = json.loads((Path(store._datastore_config_path)).read_text())
    assert listed["objects"]["a"]["labels"]["final"]["info"]["sha256"] == event.sha256
    assert start().json() == store.json()


def test_saving_again_replaces_also_with_another_suffix(start, label, studies):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    store.save_label("a", str(label(2, "upload.nii")), "final", {})
    assert [path.name for path in (studies / "labels" / "final").iterdir()] == ["a.nii"]
    assert value(store) == 2
    assert value(start()) == 2


def test_other_tags_are_kept_but_not_told(start, label):
    store = start()
    store.save_label("a", str(label(3)), "original", {})
    assert value(store, ("a", "original")) == 3
    assert store.told == [] and store.get_labeled_images() == []


def test_a_label_of_an_unknown_image_changes_nothing(start, label):
    store = start()
    before = store.json()
    with pytest.raises(ImageNotFoundException, match="no image 'x'"):
        store.save_label("x", str(label()), "final", {})
    assert store.json() == before and store._journal.pending() == []


@pytest.mark.parametrize("image_id", ["../a", "labels/final/a", "..", "", "a\n", "/etc/passwd"])
@pytest.mark.parametrize("call", ["save", "add"])
def test_ids_that_leave_the_folder_are_refused(start, label, image_id, call, tmp_path):
    store = start()
    files = sorted(tmp_path.rglob("*"))
    upload = str(label())
    with pytest.raises(InputError, match="is no image id"):
        if call == "save":
            store.save_label(image_id, upload, "final", {})
        else:
            store.add_image(image_id or " /", upload, {})
    assert [path for path in sorted(tmp_path.rglob("*")) if "uploads" not in path.parts] == files


def test_tags_that_leave_the_folder_are_refused(start, label):
    store = start()
    for tag in ("../final", "..", "a b", ""):
        with pytest.raises(InputError, match="is no label tag"):
            store.save_label("a", str(label()), tag, {})
        with pytest.raises(InputError, match="is no label tag"):
            store.remove_label("a", tag)


def test_a_file_that_is_no_label_is_refused(start, label, tmp_path):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    (tmp_path / "label.txt").write_text("no label")
    with pytest.raises(InputError, match="is no label file"):
        store.save_label("a", str(tmp_path / "label.txt"), "final", {})
    assert value(store) == 1


@pytest.mark.parametrize("broken", ["blobs", "datastore_v2.json", "a.nii.gz"])
def test_a_full_disk_keeps_the_old_label_and_is_said(start, label, monkeypatch, broken):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    before = store.json()
    publish = atomic.publish

    def fail(temporary, target):
        if broken in target.parts:
            raise OSError(28, "No space left on device", str(temporary))
        publish(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "publish", fail)
        with pytest.raises(OFLError, match="the disk is full"):
            store.save_label("a", str(label(2)), "final", {})
        assert store.json() == before
    assert value(store) == 1
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "publish", fail)
        with pytest.raises(OFLError, match="the disk is full"):
            store.save_label("a", str(label(1)), "final", {})
    assert value(store) == 1
    assert store._journal.pending() == [] and len(store.told) == 1
    again = start()
    assert again.json() == before and again.told == []
    again.save_label("a", str(label(3)), "final", {})
    assert value(start()) == 3


def test_removing_a_label_is_journaled(start, label, tmp_path):
    store = start()
    store.save_label("a", str(label()), "final", {})
    store.remove_label("a", "final")
    assert store.told[-1] == ("a", None) and store.get_labeled_images() == []
    assert LabelJournal(tmp_path / "journal").latest() == {}
    again = start()
    assert again.get_labeled_images() == [] and again.told == []
    with pytest.raises(LabelNotFoundException, match="no label 'final' of 'a'"):
        again.remove_label("a", "final")


def test_removing_an_image_removes_its_labels_and_of_a_link_only_the_link(start, label, studies, tmp_path):
    nifti(tmp_path / "archive" / "linked.nii.gz")
    (studies / "linked.nii.gz").symlink_to(tmp_path / "archive" / "linked.nii.gz")
    frames(studies / "cine")
    store = start()
    for image_id in ("linked", "cine"):
        store.save_label(image_id, str(label()), "final", {})
        store.remove_image(image_id)
        assert image_id not in store.list_images()
    assert store._journal.latest() == {}
    assert (tmp_path / "archive" / "linked.nii.gz").exists() and not (studies / "cine").exists()
    with pytest.raises(ImageNotFoundException, match="no image 'cine'"):
        store.remove_image("cine")


def test_removing_a_metaimage_removes_its_voxels(start, studies):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.uint8)), str(studies / "pair.mhd"))
    assert (studies / "pair.raw").exists()
    store = start()
    store.remove_image("pair")
    assert not [path.name for path in studies.iterdir() if path.name.startswith("pair")]


def test_adding_an_image(start, tmp_path):
    store = start()
    assert store.add_image("", str(nifti(tmp_path / "new.case.nii.gz")), {"patient": "x"}) == "new.case"
    assert store.get_image_info("new.case")["patient"] == "x"
    image = sitk.ReadImage(str(tmp_path / "new.case.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / "again.nrrd"))
    assert store.add_image("new.case", str(tmp_path / "again.nrrd"), {}) == "new.case"
    for other in (image + 1, image[:-1]):
        sitk.WriteImage(other, str(tmp_path / "other.nrrd"))
        with pytest.raises(InputError, match=r"another image 'new\.case' already"):
            store.add_image("new.case", str(tmp_path / "other.nrrd"), {})
    with pytest.raises(InputError, match="is no image file"):
        store.add_image("b", str(tmp_path), {})
    assert "new.case" in start().list_images()


def test_a_save_that_was_journaled_only_is_completed(start, label, studies):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    store._journal.record_save("a", "final", label(2), {"label_info": [{"name": "x", "idx": 2}]})
    again = start()
    assert value(again) == 2 and again._journal.pending() == []
    assert again.get_label_info(*KEY)["label_info"] == [{"name": "x", "idx": 2}]
    assert again.told == [("a", again._journal.latest()[KEY].sha256)]


def test_a_save_that_was_written_but_not_noted_is_noted(start, label):
    store = start()
    event = store._journal.record_save("a", "final", label(2), {})
    store._commit(event)
    assert start()._journal.latest() == {KEY: event}


def test_a_damaged_label_is_restored_at_start(start, label):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    path = Path(store.get_label_uri(*KEY))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert value(start()) == 1
    assert path.read_bytes() == whole


def test_a_label_that_is_being_copied_is_left_alone_until_it_is_whole(start, label):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    path, whole = Path(store.get_label_uri(*KEY)), label(2).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    store.refresh()
    assert path.read_bytes() == whole[: len(whole) // 2] and len(store.told) == 1
    path.write_bytes(whole)
    store.refresh()
    assert value(store) == 2 and len(store.told) == 2


def test_a_damaged_label_whose_content_is_lost_too_does_not_stop_the_start(start, label, caplog):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    store._journal.blob(store._journal.latest()[KEY]).unlink()
    Path(store.get_label_uri(*KEY)).write_bytes(b"torn")
    assert start().get_labeled_images() == ["a"]
    assert "missing or damaged" in caplog.text


def test_labels_that_others_saved_or_removed_are_journaled(start, label, studies):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    shutil.copy(label(2), studies / "labels" / "final" / "b.01.nii.gz")
    os.remove(store.get_label_uri(*KEY))
    again = start()
    latest = again._journal.latest()
    assert set(latest) == {("b.01", "final")} and latest["b.01", "final"].details == {"source": "external"}
    assert sorted(again.told) == [("a", None), ("b.01", latest["b.01", "final"].sha256)]
    assert start().told == []


def test_a_folder_of_masks_is_a_label(start, studies):
    frames(studies / "cine")
    frames(studies / "labels" / "final" / "cine")
    store = start()
    assert store.get_labeled_images() == ["cine"]
    event = store._journal.latest()["cine", "final"]
    (studies / "labels" / "final" / "cine" / "1.png").write_bytes(b"torn")
    again = start()
    assert content_sha256(Path(again.get_label_uri("cine", "final"))) == event.sha256
    again.remove_label("cine", "final")
    assert start().get_labeled_images() == []


def test_labels_of_images_that_are_not_here_are_left_alone(start, label, studies, tmp_path):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    shutil.copy(label(2), studies / "labels" / "final" / "stranger.nii.gz")
    other = tmp_path / "other"
    nifti(other / "z.nii.gz")
    elsewhere = JournaledLocalDatastore(other, LabelJournal(tmp_path / "journal"))
    before = store._journal.latest()
    elsewhere.reconcile()
    assert elsewhere.list_images() == ["z"] and elsewhere._journal.latest() == before
    assert set(start()._journal.latest()) == {KEY}


def test_image_and_label_removed_while_the_server_was_off(start, label, studies):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    os.remove(store.get_label_uri(*KEY))
    (studies / "a.nii.gz").unlink()
    again = start()
    assert again._journal.latest() == {} and again.told == [("a", None)]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"name": 1}'])
def test_a_damaged_list_is_put_aside_and_made_anew(start, label, studies, content):
    store = start()
    store.save_label("a", str(label(1)), "final", {"label_info": [{"name": "liver", "idx": 1}]})
    before = store.json()["objects"]["a"]["labels"]["final"]["info"]
    (studies / "datastore_v2.json").write_bytes(content)
    again = start()
    after = again.json()["objects"]["a"]["labels"]["final"]["info"]
    assert after["label_info"] == before["label_info"] and after["sha256"] == before["sha256"]
    assert again.list_images() == store.list_images()
    assert (studies / "datastore_v2.json.damaged").read_bytes() == content
    assert json.loads((studies / "datastore_v2.json").read_bytes())["objects"]


def test_a_list_that_names_files_outside_is_corrected(start, studies):
    store = start()
    content = store.json()
    content["objects"]["../../etc/passwd"] = content["objects"]["a"]
    (studies / "datastore_v2.json").write_text(json.dumps(content))
    assert start().list_images() == ["a", "b.01", "c"]


def test_another_process_changes_nothing_by_starting(start, label, studies):
    shutil.copy(label(2), nifti(studies / "labels" / "final" / "a.nii.gz"))
    store = start(reconcile=False)
    assert store.list_images() == ["a", "b.01", "c"]
    assert store._journal.latest() == {} and not (studies / "datastore_v2.json").exists()


def test_two_processes_keep_each_others_entries(start, label):
    server, batch = start(), start(reconcile=False)
    batch.save_label("a", str(label(1)), "original", {})
    server.update_image_info("b.01", {"score": 1})
    batch.update_image_info("c", {"score": 2})
    server.save_label("c", str(label(2)), "final", {})
    again = start()
    assert again.get_image_info("b.01")["score"] == 1 and again.get_image_info("c")["score"] == 2
    assert again.status()["label_tags"] == {"original": 1, "final": 1}


def test_leftovers_of_killed_writers_are_removed_when_old(start, studies):
    start()
    old, young = (studies / "labels" / "final" / f".{name}.partial.a.nii.gz" for name in ("0a", "0b"))
    for path in (old, young):
        path.write_text("torn")
    os.utime(old, (0, 0))
    start()
    assert young.exists() and not old.exists()


def test_readers_never_see_half_a_list(start, label):
    store = start()
    stop, seen = threading.Event(), set()

    def read():
        while not stop.is_set():
            seen.add(tuple(store.list_images()))
            json.dumps(store.json())
            assert store.get_image_uri("b.01")

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(10):
        store.save_label("a", str(label(index + 1)), "final", {})
        store.refresh()
    stop.set()
    reader.join()
    assert seen == {("a", "b.01", "c")}


def test_the_watcher_sees_what_others_do(start, label, studies):
    store = start()
    store.watch()
    nifti(studies / "new.nii.gz")
    wait_for(lambda: "new" in store.list_images())
    frames(studies / "cine")
    wait_for(lambda: "cine" in store.list_images())
    shutil.copy(label(2), studies / "labels" / "final" / "a.nii.gz")
    wait_for(lambda: store._journal.latest().get(KEY))
    wait_for(lambda: store.told)
    (studies / "labels" / "final" / "a.nii.gz").unlink()
    wait_for(lambda: store.told[-1] == ("a", None))
    store.close()
    nifti(studies / "late.nii.gz")
    time.sleep(0.5)
    assert "late" not in store.list_images()


def test_an_error_does_not_end_the_watcher(start, studies, monkeypatch, caplog):
    store = start()
    calls = []

    def fail():
        calls.append(1)
        raise OSError("no such disk")

    monkeypatch.setattr(store, "refresh", fail)
    store.watch()
    for name in ("d", "e"):
        count = len(calls)
        nifti(studies / f"{name}.nii.gz")
        wait_for(lambda count=count: len(calls) > count)
    assert "no such disk" in caplog.text


def test_a_folder_that_cannot_be_watched_is_looked_at_regularly(start, studies, monkeypatch, caplog):
    def refused(*arguments):
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(watcher.Observer, "start", refused)
    monkeypatch.setattr(local, "_LOOK_PERIOD_S", 0.1)
    store = start()
    store.watch()
    nifti(studies / "new.nii.gz")
    wait_for(lambda: "new" in store.list_images())
    assert "inotify watch limit reached" in caplog.text


def test_the_archive_holds_whole_folders(start, label, studies):
    frames(studies / "cine")
    store = start()
    with pytest.raises(InputError, match="no final label yet"):
        store.get_dataset_archive(None)
    for image_id in ("a", "cine"):
        store.save_label(image_id, str(label()), "final", {})
    path = Path(store.get_dataset_archive(None))
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == [
            "image/a.nii.gz",
            "image/cine/0.png",
            "image/cine/1.png",
            "label/a.nii.gz",
            "label/cine.nii.gz",
            "metadata.json",
        ]
    path.unlink()
    (studies / "a.nii.gz").unlink()
    before = set(path.parent.iterdir())
    with pytest.raises(OSError, match=r"a\.nii\.gz"):
        store.get_dataset_archive(None)
    assert set(path.parent.iterdir()) == before


def test_of_two_files_the_newest_is_the_label_and_a_removal_removes_both(start, label, studies):
    store = start()
    store.save_label("a", str(label(1)), "final", {})
    shutil.copy(label(2, "other.nii"), studies / "labels" / "final" / "a.nii")
    os.utime(studies / "labels" / "final" / "a.nii", (2e9, 2e9))
    store.refresh()
    assert value(store) == 2
    store.remove_label("a", "final")
    assert start().get_labeled_images() == []


@pytest.mark.parametrize("lost", ["labels", "labels/final", "labels/final/*"])
def test_labels_that_are_all_gone_at_once_are_put_back(start, label, studies, caplog, lost):
    store = start()
    for image_id in ("a", "c"):
        store.save_label(image_id, str(label()), "final", {"label_info": []})
    before = store.json()
    for path in studies.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    store.refresh()
    assert "gone at once" in caplog.text and store.get_labeled_images() == ["a", "c"]
    assert value(store) == 1 and store.json() == before and len(store.told) == 2
    store.remove_label("a", "final")
    assert start().get_labeled_images() == ["c"]


def test_studies_that_are_gone_delete_no_label(start, label, studies):
    store = start()
    store.save_label("a", str(label()), "final", {})
    studies.rename(studies.with_name("elsewhere"))
    studies.mkdir()
    with pytest.raises(FileNotFoundError):
        store.refresh()
    assert set(store._journal.latest()) == {KEY} and list(studies.glob("[!.]*")) == []


def numbered(path: Path, *values: int) -> Path:
    """A label with a voxel of each value."""
    voxels = np.zeros((4, 4, 2), np.uint8)
    voxels.reshape(-1)[: len(values)] = values
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def test_a_label_that_is_touched_up_elsewhere_keeps_the_names_of_its_values(start, label, studies):
    store = start()
    given = [{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 2}]
    store.save_label("a", str(numbered(label(), 1, 2)), "final", {"label_info": given})
    numbered(studies / "labels" / "final" / "a.nii.gz", 1, 2, 7)
    store.refresh()
    assert store.get_label_info("a", "final")["label_info"] == [*given, {"name": "structure_7", "idx": 7}]
    numbered(studies / "labels" / "final" / "a.nii.gz", 2)
    store.refresh()
    assert store.get_label_info("a", "final")["label_info"][:2] == given


def test_an_image_in_the_place_of_a_label_names_no_structures(start, label, studies, caplog):
    store = start()
    store.save_label("a", str(label()), "final", {"label_info": [{"name": "liver", "idx": 1}]})
    grey = np.arange(256, dtype=np.uint8).reshape(16, 8, 2)
    nib.save(nib.Nifti1Image(grey, np.eye(4)), studies / "labels" / "final" / "a.nii.gz")
    store.refresh()
    assert "254 values without a name" in caplog.text
    start()
    assert value(store) == 1


def test_final_labels_that_are_all_gone_are_put_back_though_results_remain(start, label, studies):
    store = start()
    for image in ("a", "b.01"):
        store.save_label(image, str(label()), "final", {})
        store.save_label(image, str(label(2)), "original", {})
    for path in (studies / "labels" / "final").iterdir():
        path.unlink()
    store.refresh()
    assert value(store) == 1 and value(store, ("b.01", "final")) == 1


def test_what_changed_is_told_after_a_look_that_failed(start, label, studies, monkeypatch):
    store = start()
    for image in ("a", "b.01"):
        store.save_label(image, str(label()), "final", {})
    store.told.clear()
    (studies / "labels" / "final" / "a.nii.gz").unlink()

    def fail():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_relist", fail)
        with pytest.raises(OSError, match="No space"):
            store.refresh()
    store.refresh()
    assert store.told == [("a", None)]
    assert store.get_label_by_image_id("a", "final") == ""


def test_a_label_in_its_place_counts_as_saved_though_the_journal_cannot_note_it(start, label, monkeypatch):
    store = start()

    def fail(event):
        raise OFLError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store._journal, "record_written", fail)
        assert store.save_label("a", str(label(3)), "final", {}) == "a"
    assert value(store) == 3
    store.refresh()
    assert [image for image, _ in store.told] == ["a"]


def test_an_image_with_a_damaged_header_keeps_its_labels_when_it_cannot_be_removed(start, label, studies):
    (studies / "d.mha").write_bytes(b"damaged")
    store = start()
    store.save_label("d", str(label()), "final", {})
    with pytest.raises(InputError, match="does not say where its voxels are"):
        store.remove_image("d")
    assert value(store, ("d", "final")) == 1


@pytest.mark.parametrize(
    ("kind", "remote"), [("nfs4", True), ("fuse.sshfs", True), ("ext4", False), ("overlay", False)]
)
def test_only_file_systems_of_other_machines_are_looked_at_regularly(tmp_path, monkeypatch, kind, remote):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(watcher.psutil, "disk_partitions", lambda all: mounts)
    (tmp_path / "studies").mkdir()
    assert watcher.is_remote(tmp_path / "studies") is remote
