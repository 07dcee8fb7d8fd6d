"""Serving: the newest snapshot, loaded once, never pulled away from under a running inference."""

import copy
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ofl_sam2.errors import InputError, ModelError
from ofl_sam2.service import serving as module
from ofl_sam2.service.serving import Serving
from ofl_sam2.service.snapshots import SnapshotStore


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Names of the folders that were loaded."""
    folders, load_model = [], module.load_model

    def record(folder, *arguments):
        folders.append(folder.name)
        return load_model(folder, *arguments)

    monkeypatch.setattr(module, "load_model", record)
    return folders


def test_before_the_first_label_it_says_what_to_do(store):
    with pytest.raises(InputError, match=r"Nothing has been learned yet. Save the label"):
        Serving(store).current()


def test_a_snapshot_is_loaded_once_whoever_asks(store, one, loads):
    serving, published = Serving(store), store.publish(one, {})
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: serving.current(), range(8)))
    assert loads == ["000001"]
    assert {id(segmenter) for _, segmenter in results} == {id(serving.current()[1])}
    assert all(snapshot == published for snapshot, _ in results)


def test_a_newer_snapshot_is_served_while_the_older_goes_on(store, one, two, query, loads):
    serving = Serving(store)
    store.publish(one, {})
    old = serving.current()[1]
    store.publish(two, {})
    snapshot, new = serving.current()
    assert snapshot.version == 2
    np.testing.assert_array_equal(new.segment(query).labels, two.segment(query).labels)
    np.testing.assert_array_equal(old.segment(query).labels, one.segment(query).labels)
    assert loads == ["000001", "000002"]


def test_rolling_back_and_withdrawing_are_followed(store, one, two):
    serving = Serving(store)
    store.publish(one, {})
    store.publish(two, {})
    assert set(serving.current()[1].pool.cases) == {"a", "b"}
    store.rollback(1)
    assert set(serving.current()[1].pool.cases) == {"a"}
    store.withdraw()
    with pytest.raises(InputError, match="Nothing has been learned"):
        serving.current()


def test_nobody_waits_for_one_who_makes_a_snapshot(store, one):
    serving = Serving(store)
    store.publish(one, {})
    with store.lock(), ThreadPoolExecutor(1) as other:
        assert other.submit(serving.current).result(timeout=60)[0].version == 1


def test_what_is_learned_on_a_copy_does_not_reach_the_served_one(store, one, query, make_case):
    serving = Serving(store)
    store.publish(one, {})
    served = serving.current()[1]
    before = served.segment(query).labels
    working = copy.copy(served)
    working.learn([make_case("b", seed=1, values=(1,)), make_case("a", seed=2, values=(1,))])
    assert set(served.pool.cases) == {"a"}
    assert served.structures == {1: "structure_1", 2: "structure_2"}
    np.testing.assert_array_equal(served.segment(query).labels, before)
    working.forget(["a", "b"])
    np.testing.assert_array_equal(served.segment(query).labels, before)


def test_a_damaged_snapshot_is_refused_until_one_is_served_that_is_whole(store, one, two):
    serving = Serving(store)
    store.publish(one, {})
    damaged = store.publish(two, {})
    next(damaged.folder.glob("learner-*")).unlink()
    with pytest.raises(ModelError, match="not complete"):
        serving.current()
    store.rollback(1)
    assert serving.current()[0].version == 1


def test_a_snapshot_that_vanishes_while_it_is_loaded_is_replaced_by_the_newest(tmp_path, one, installed, monkeypatch):
    store, load_model = SnapshotStore(tmp_path / "snapshots", keep=1), module.load_model
    store.publish(one, {})

    def slow(folder, *arguments):
        if folder.name == "000001":
            store.publish(one, {})
            assert not folder.exists()
        return load_model(folder, *arguments)

    monkeypatch.setattr(module, "load_model", slow)
    assert Serving(store).current()[0].version == 2


def test_another_store_in_the_same_place_is_not_mistaken_for_the_old_one(store, one, two):
    serving = Serving(store)
    store.publish(one, {})
    assert set(serving.current()[1].pool.cases) == {"a"}
    shutil.rmtree(store.folder)
    SnapshotStore(store.folder).publish(two, {})
    assert set(serving.current()[1].pool.cases) == {"a", "b"}


def test_threads_segment_at_once_like_one_after_the_other(store, two, make_case):
    serving = Serving(store)
    store.publish(two, {})
    volumes = [make_case(f"query{seed}", seed=seed).volume for seed in range(4)]
    expected = [two.segment(volume).labels for volume in volumes]
    barrier = threading.Barrier(len(volumes))

    def segment(volume):
        barrier.wait()
        return serving.current()[1].segment(volume).labels

    with ThreadPoolExecutor(len(volumes)) as threads:
        for found, labels in zip(threads.map(segment, volumes), expected, strict=True):
            np.testing.assert_array_equal(found, labels)
