"""Snapshots: whole or not there, numbered once, small, safe between threads and processes."""

import json
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ofl_sam2.errors import InputError, ModelError, OFLError
from ofl_sam2.learner.load import read_learner, read_unet
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.model_index import INDEX, read_index
from ofl_sam2.service.snapshots import SnapshotStore
from ofl_sam2.store import load_model


def names(store: SnapshotStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


def labels_of(folder: Path, volume) -> np.ndarray:
    return load_model(folder).segment(volume).labels


def test_a_store_is_empty_and_writes_nothing_until_something_is_published(store):
    assert store.current() is None
    assert store.list() == ()
    assert not store.folder.exists()


def test_a_published_snapshot_is_an_ordinary_model_and_the_current_one(store, one, query):
    published = store.publish(one, {"learned": {"a": "1234"}})
    assert (published.version, published.folder.name) == (1, "000001")
    assert published.notes == {"learned": {"a": "1234"}}
    assert published.created.endswith("+00:00")
    assert store.current() == published
    assert store.list() == (published,)
    np.testing.assert_array_equal(labels_of(published.folder, query), one.segment(query).labels)


def test_another_store_on_the_folder_sees_the_same(store, one):
    published = store.publish(one, {"reason": "test"})
    assert SnapshotStore(store.folder).current() == published


def test_nothing_learned_is_not_published(store, make_segmenter):
    with pytest.raises(InputError, match="nothing to save"):
        store.publish(make_segmenter(()), {})
    assert store.current() is None
    assert names(store) == {".lock"}


def test_what_did_not_change_is_shared_with_the_snapshot_before(store, one, two):
    before, after = store.publish(one, {}), store.publish(two, {})
    kept = {stored.file for stored in read_index(before.folder).pool} | {read_index(before.folder).learner.file}
    assert {path.name for path in before.folder.iterdir()} == {INDEX, *kept}
    for name in kept:
        assert (before.folder / name).samefile(after.folder / name)
    assert len(list(after.folder.iterdir())) > len(list(before.folder.iterdir()))


def test_a_damaged_file_is_not_handed_on(store, one, two, query):
    before = store.publish(one, {})
    path = before.folder / read_index(before.folder).pool[0].file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    after = store.publish(two, {})
    np.testing.assert_array_equal(labels_of(after.folder, query), two.segment(query).labels)


def test_rolling_back_points_to_the_older_one_and_versions_go_on(store, one, two):
    first, second = store.publish(one, {}), store.publish(two, {})
    assert store.rollback(1) == first
    assert store.current() == first
    assert store.list() == (first, second)
    assert store.publish(one, {}).version == 3
    assert store.rollback(2) == second


@pytest.mark.parametrize("version", [0, -1, 3, 10**9])
def test_an_unknown_version_is_named_with_the_known_ones(store, one, version):
    store.publish(one, {})
    store.publish(one, {})
    with pytest.raises(InputError, match=rf"no snapshot {version}. Choose one of: 1, 2."):
        store.rollback(version)
    assert store.current().version == 2


def test_after_withdrawing_nothing_is_current_until_the_next(store, one):
    store.publish(one, {})
    store.withdraw()
    store.withdraw()
    assert store.current() is None
    assert len(store.list()) == 1
    assert store.publish(one, {}).version == 2
    assert store.current().version == 2


def test_old_snapshots_are_removed_and_their_readers_do_not_notice(tmp_path, installed, one, two, query):
    store = SnapshotStore(tmp_path / "few", keep=2)
    reader = load_model(store.publish(one, {}).folder)
    before = reader.segment(query).labels
    for _ in range(3):
        store.publish(two, {})
    assert names(store) == {"000003", "000004", "current", ".lock"}
    np.testing.assert_array_equal(reader.segment(query).labels, before)


def test_an_old_snapshot_can_be_removed_but_neither_the_current_nor_the_newest(store, one, two):
    for segmenter in (one, two, one):
        store.publish(segmenter, {})
    store.rollback(1)
    for version, message in ((1, "current"), (3, "newest"), (9, "no snapshot 9")):
        with pytest.raises(InputError, match=message):
            store.remove(version)
    store.remove(2)
    assert [snapshot.version for snapshot in store.list()] == [1, 3]
    assert not [path for path in store.folder.glob(".*") if path.is_dir()]
    assert store.publish(two, {}).version == 4


def test_at_least_one_snapshot_is_kept(tmp_path):
    with pytest.raises(InputError, match="Keep at least one"):
        SnapshotStore(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("call", "failing"), [*((c, n) for c in ("fsync", "replace") for n in (1, 2, 3)), ("rename", 1)]
)
def test_a_full_disk_leaves_the_old_snapshot_current_and_no_rubbish(store, one, two, query, monkeypatch, call, failing):
    old = store.publish(one, {})
    original, calls = getattr(os, call), []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) >= failing:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OFLError, match=r"Cannot write .*(disk is full|No space left)"):
            store.publish(two, {})
    assert store.current() == old
    assert not [name for name in names(store) if name.startswith(".") and name != ".lock"]
    new = store.publish(two, {})
    assert store.current() == new
    np.testing.assert_array_equal(labels_of(new.folder, query), two.segment(query).labels)


def test_files_are_written_where_they_cannot_be_linked(store, one, two, query, monkeypatch):
    def refuse(*paths):
        raise PermissionError(1, "Operation not permitted")

    store.publish(one, {})
    monkeypatch.setattr(os, "link", refuse)
    np.testing.assert_array_equal(labels_of(store.publish(two, {}).folder, query), two.segment(query).labels)


def test_a_file_in_the_place_of_the_folder_is_refused_in_words(tmp_path, one):
    (tmp_path / "snapshots").write_text("mine")
    with pytest.raises(OFLError, match=r"Cannot write to .*snapshots: File exists"):
        SnapshotStore(tmp_path / "snapshots").publish(one, {})


def test_what_a_crashed_publisher_left_is_removed_by_the_next(store, one):
    for name in (".partial-000002-abcd", ".removed-000000-abcd"):
        (store.folder / name).mkdir(parents=True)
        (store.folder / name / INDEX).write_text("half")
    (store.folder / ".abcd.partial.current").write_text("2")
    assert store.current() is None
    store.publish(one, {})
    assert names(store) == {"000001", "current", ".lock"}


@pytest.mark.parametrize("text", [b"", b"two", b"\xff", b"9"])
def test_a_damaged_pointer_is_said_and_repaired_by_rolling_back(store, one, text):
    store.publish(one, {})
    (store.folder / "current").write_bytes(text)
    with pytest.raises(ModelError):
        store.current()
    store.rollback(1)
    assert store.current().version == 1


def test_a_damaged_snapshot_is_left_out_of_the_list(store, one, caplog):
    store.publish(one, {})
    store.publish(one, {})
    (store.folder / "000001" / INDEX).write_text("{")
    assert [snapshot.version for snapshot in store.list()] == [2]
    assert "Snapshot 1 is left out of the list" in caplog.text
    with pytest.raises(ModelError, match="damaged"):
        store.rollback(1)
    assert store.current().version == 2


def test_reading_never_fails_while_snapshots_come_and_go(tmp_path, installed, one):
    store, done, seen = SnapshotStore(tmp_path / "one", keep=1), threading.Event(), []
    store.publish(one, {})

    def read() -> None:
        while not done.is_set():
            seen.append(store.current().version)
            store.list()

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(8):
        store.publish(one, {})
    done.set()
    reader.join()
    assert seen == sorted(seen)
    assert store.current().version == 9


def test_threads_and_processes_that_publish_at_once_lose_nothing(store, make_segmenter, make_case):
    """Each adds one case after the other to what is current at that moment."""

    def add(own: SnapshotStore, author: str) -> None:
        for number in range(2):
            with own.lock():
                newest = own.current()
                segmenter = load_model(newest.folder) if newest else make_segmenter(())
                segmenter.learn([make_case(f"{author}{number}", seed=number)])
                own.publish(segmenter, {"cases": [*(newest.notes["cases"] if newest else []), f"{author}{number}"]})

    children = [_fork(lambda author=author: add(SnapshotStore(store.folder), author)) for author in "ab"]
    thread = threading.Thread(target=add, args=(store, "c"))
    thread.start()
    thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    expected = {f"{author}{number}" for author in "abc" for number in range(2)}
    current = store.current()
    assert current.version == 6
    assert set(load_model(current.folder).pool.cases) == set(current.notes["cases"]) == expected


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def test_the_exported_parameters_hold_nothing_of_a_patient(store, two, tmp_path, monkeypatch):
    monkeypatch.setattr(two, "unet", VoxelUNet(Plan((1.0, 1.0, 4.0), (24, 20, 6)), (1,)))
    store.publish(two, {"learned": {"Miller^Anna": "12"}})
    store.export(1, tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert len(archive.namelist()) == 3
        archive.extractall(tmp_path / "model")
    content = json.loads((tmp_path / "model" / INDEX).read_text())
    assert (content["pool"], content["notes"], content["backbone"]["name"]) == ([], {}, "nano")
    assert b"Miller" not in (tmp_path / "model.zip").read_bytes()
    learner = read_learner(tmp_path / "model" / content["learner"]["file"])
    assert (learner.lam == two.learner.lam).all()
    assert read_unet(tmp_path / "model" / content["unet"]["file"]).values == (1,)


def test_a_snapshot_exported_with_its_pool_is_a_model(store, two, tmp_path, query):
    store.publish(two, {"reason": "test"})
    for name in ("one.zip", "other.zip"):
        store.export(1, tmp_path / name, with_pool=True)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "other.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        archive.extractall(tmp_path / "model")
    np.testing.assert_array_equal(labels_of(tmp_path / "model", query), two.segment(query).labels)
    assert read_index(tmp_path / "model").notes["reason"] == "test"


def test_what_cannot_be_exported_is_said(store, two, tmp_path):
    snapshot = store.publish(two, {})
    with pytest.raises(InputError, match="There is no snapshot 2"):
        store.export(2, tmp_path / "model.zip")
    (snapshot.folder / read_index(snapshot.folder).learner.file).unlink()
    with pytest.raises(ModelError, match=r"learner-.* is missing"):
        store.export(1, tmp_path / "model.zip")
    assert not list(tmp_path.glob("*.zip"))
