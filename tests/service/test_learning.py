"""The learning thread: labels in, snapshots out, whatever happens to a label, the disk or the process."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.errors import InputError
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.model_index import INDEX
from ofl_sam2.service import learning as module
from ofl_sam2.service.learning import LearningService
from ofl_sam2.service.serving import Serving
from ofl_sam2.service.snapshots import SnapshotStore
from ofl_sam2.service.structures import StructureRegistry
from ofl_sam2.store import load_model
from ofl_sam2.volume import Volume

SECONDS = 120
GRID = (16, 16, 4)
FAST = {"learn_steps": 2, "first_steps": 1, "update_steps": 1, "pool_slices": 4, "close_ups": False}


class Labels:
    """Saved labels, as the app reads them: image -> case, or an error to raise."""

    def __init__(self) -> None:
        self.saved: dict[str, LabelledCase | Exception] = {}
        self.reads: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def read(self, image: str) -> LabelledCase:
        assert self.may_read.wait(SECONDS)
        self.reads.append(image)
        found = self.saved[image]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def labels(make_case) -> Labels:
    found = Labels()
    found.saved = {name: make_case("file of " + name, seed=seed, grid=GRID) for seed, name in enumerate("abc")}
    return found


@pytest.fixture(scope="module")
def query(make_case) -> Volume:
    return make_case("query", seed=7, grid=GRID).volume


@pytest.fixture
def registry(tmp_path) -> StructureRegistry:
    return StructureRegistry(tmp_path / "structures.json", ["bright", "dim"])


@pytest.fixture
def make_service(store, registry, labels, make_segmenter) -> Iterator[Callable[..., LearningService]]:
    """Start a service on the store, as after a restart."""
    started = []

    def build(own: SnapshotStore = store, start: bool = True) -> LearningService:
        service = LearningService(Serving(own), registry, lambda: make_segmenter((), **FAST), labels.read)
        if start:
            service.start()
            started.append(service)
        return service

    yield build
    for service in started:
        service.close()


@pytest.fixture
def service(make_service) -> LearningService:
    return make_service()


def learned(service: LearningService, **labels: str) -> LearningService:
    """After learning image=sha256 one after the other."""
    for image, sha256 in labels.items():
        service.learn(image, sha256)
        assert service.wait_idle(SECONDS)
    return service


def result(store: SnapshotStore, query) -> np.ndarray:
    return load_model(store.current().folder).segment(query).labels


def test_a_saved_label_becomes_a_snapshot(service, store, registry, query):
    learned(service, a="1")
    snapshot = store.current()
    model = load_model(snapshot.folder)
    assert (snapshot.version, snapshot.notes["reason"]) == (1, "learned a")
    assert snapshot.notes["learned"] == {"a": "1"}
    assert model.structures == {1: "bright", 2: "dim"}
    assert set(model.pool.cases) == {"a"}
    assert model.segment(query).labels.any()


def test_the_status_says_what_is_known_in_json(service, store):
    assert json.loads(json.dumps(service.status())) == {
        "state": "idle",
        "learning": None,
        "checking": None,
        "queue": [],
        "errors": {},
        "problem": None,
        "snapshot": None,
        "learned": {},
        "trained_on": {},
        "fitted_on_removed": [],
        "flagged": {},
    }
    learned(service, a="1", b="2")
    status = json.loads(json.dumps(service.status()))
    assert (status["state"], status["snapshot"]) == ("idle", 2)
    assert status["learned"] == {"a": "1", "b": "2"}
    service.close()
    assert service.status()["state"] == "stopped"


def test_more_labels_extend_the_pool_and_saving_again_replaces(service, store, labels, make_case, query):
    learned(service, a="1", b="2")
    before = result(store, query)
    labels.saved["a"] = make_case("a", seed=9, values=(1,), grid=GRID)
    learned(service, a="3")
    model = load_model(store.current().folder)
    assert set(model.pool.cases) == {"a", "b"}
    assert store.current().notes["learned"] == {"a": "3", "b": "2"}
    assert (model.segment(query).labels != before).any()


def test_a_structure_that_appears_later_is_learned_too(service, store, registry, labels, make_case):
    labels.saved["a"] = make_case("a", values=(1,), grid=GRID)
    learned(service, a="1")
    assert load_model(store.current().folder).structures == {1: "bright"}
    learned(service, b="1")
    assert load_model(store.current().folder).structures == {1: "bright", 2: "dim"}


def test_a_structure_may_be_named_like_the_default_name_of_another_value(service, store, registry, labels, make_case):
    registry.rename("bright", "structure_2")
    labels.saved["a"] = make_case("a", values=(1,), grid=GRID)
    learned(service, a="1", b="1")
    assert service.status()["errors"] == {}
    assert load_model(store.current().folder).structures == {1: "structure_2", 2: "dim"}


def test_a_forgotten_label_leaves_pool_and_notes(service, store):
    learned(service, a="1", b="2")
    service.forget("a")
    service.forget("never saved")
    assert service.wait_idle(SECONDS)
    assert set(load_model(store.current().folder).pool.cases) == {"b"}
    assert store.current().notes["learned"] == {"b": "2"}
    assert store.current().notes["reason"] == "forgot a"


def test_without_the_last_label_nothing_is_served_and_learning_starts_anew(service, store, make_segmenter, query):
    learned(service, a="1", b="1")
    fresh = result(store, query)
    service.forget("a")
    service.forget("b")
    assert service.wait_idle(SECONDS)
    assert store.current() is None
    assert service.status()["learned"] == {}
    learned(service, b="1", a="1")
    np.testing.assert_array_equal(result(store, query), fresh)


def test_what_is_queued_twice_is_done_once(make_service, store, labels):
    service = make_service(start=False)
    for sha256 in "123":
        service.learn("a", sha256)
    service.learn("b", "1")
    service.forget("b")
    assert service.status()["queue"] == ["a", "b"]
    service.start()
    assert service.wait_idle(SECONDS)
    service.close()
    assert labels.reads == ["a"]
    assert store.current().notes["learned"] == {"a": "3"}


def test_nothing_to_do_publishes_nothing(service, store):
    learned(service, a="1")
    service.forget("b")
    service.structures_changed()
    service.reconcile({"a": "1"})
    assert service.wait_idle(SECONDS)
    assert store.current().version == 1


def with_labels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[LabelledCase], LabelledCase]:
    return lambda case: replace(case, labels=change(case.labels))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda case: InputError("b is not there. Draw it."), "b is not there. Draw it."),
        (lambda case: OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (lambda case: MemoryError("too large"), "MemoryError: too large"),
        (with_labels(lambda labels: labels[:, :, 1:]), "The label of b has shape (16, 16, 3), its image (16, 16, 4)"),
        (with_labels(lambda labels: labels.astype(float)), "holds float64 numbers"),
        (with_labels(np.zeros_like), "The label of b is empty"),
        (with_labels(lambda labels: labels * 3), "holds the values [3, 6], which name no structure"),
    ],
)
def test_a_label_that_cannot_be_learned_is_reported_and_the_others_are_learned(
    make_service, store, labels, make_case, spoil, sentence
):
    good = labels.saved["b"]
    service = learned(make_service(), b="1")
    labels.saved["b"] = spoil(good)
    for image in "abc":
        service.learn(image, "2")
    assert service.wait_idle(SECONDS)
    assert list(service.status()["errors"]) == ["b"]
    assert sentence in service.status()["errors"]["b"]
    assert service.status()["learned"] == {"b": "1", "a": "2", "c": "2"}
    assert set(load_model(store.current().folder).pool.cases) == {"a", "b", "c"}
    labels.saved["b"] = good
    learned(service, b="3")
    assert service.status()["errors"] == {}
    assert service.status()["learned"]["b"] == "3"


def test_a_first_label_that_cannot_be_learned_leaves_nothing_learned(service, store, labels):
    labels.saved["a"] = InputError("broken")
    learned(service, a="1")
    assert store.current() is None
    assert service.status()["errors"] == {"a": "broken"}


def test_a_label_that_disagrees_is_learned_and_flagged_until_it_is_saved_again(service, store, labels, monkeypatch):
    agreed = {"a": {"1": 0.7}, "b": {"1": 0.9, "2": 0.9}, "c": {"1": 0.1, "2": 0.5}}
    monkeypatch.setattr(module, "agreement", lambda segmenter, case, cancel: agreed[case.volume.name])
    learned(service, a="1", b="1", c="1")
    assert service.status()["flagged"] == {"c": {"bright": 0.1}}
    assert set(load_model(store.current().folder).pool.cases) == {"a", "b", "c"}
    agreed["c"] = {"1": 0.8}
    learned(service, c="2")
    assert service.status()["flagged"] == {}
    agreed["b"] = {"2": 0.2}
    learned(service, b="2")
    assert service.status()["flagged"] == {}


def test_what_was_flagged_is_flagged_after_a_restart(make_service, store, monkeypatch):
    checked = []

    def agreement(segmenter, case, cancel):
        checked.append(case.volume.name)
        return {"1": 0.1 if case.volume.name == "b" else 0.9}

    monkeypatch.setattr(module, "agreement", agreement)
    service = learned(make_service(), a="1", b="1")
    assert checked == ["a", "b"]
    learned(service, c="1")
    service.close()
    assert store.current().notes["agreement"] == {"a": {"1": 0.9}}
    service = make_service()
    service.reconcile({"a": "1", "b": "1", "c": "1"})
    assert service.wait_idle(SECONDS)
    assert checked == ["a", "b", "b", "c", "b", "c"]
    assert service.status()["flagged"] == {"b": {"bright": 0.1}}


def test_checking_gives_way_to_a_new_label(service, store, monkeypatch):
    started = threading.Event()

    def agreement(segmenter, case, cancel):
        started.set()
        while "c" not in store.current().notes["learned"]:
            cancel.check()
        return {}

    monkeypatch.setattr(module, "agreement", agreement)
    service.learn("a", "1")
    service.learn("b", "1")
    assert started.wait(SECONDS)
    assert (service.status()["state"], service.status()["checking"]) == ("checking", "a")
    learned(service, c="1")
    assert service.status()["errors"] == {}
    assert set(store.current().notes["learned"]) == set("abc")


def test_a_label_that_cannot_be_read_again_is_not_checked(service, store, labels, monkeypatch, caplog):
    def agreement(segmenter, case, cancel):
        raise InputError("vanished")

    monkeypatch.setattr(module, "agreement", agreement)
    learned(service, a="1", b="1")
    assert "The label of a was not compared with the others: vanished" in caplog.text
    assert (service.status()["state"], service.status()["errors"]) == ("idle", {})


@pytest.fixture
def patient(monkeypatch) -> None:
    """Nothing is tried again but when a new label comes."""
    monkeypatch.setattr(module, "RETRY_SECONDS", SECONDS)


def wait_for(service: LearningService, state: str) -> dict:
    for _ in range(SECONDS * 20):
        if (status := service.status())["state"] == state and (state != "waiting" or status["problem"]):
            return status
        threading.Event().wait(0.05)
    raise AssertionError(service.status())


def full_disk(*paths):
    raise OSError(28, "No space left on device")


def test_on_a_full_disk_labels_wait_and_are_learned_with_the_next(service, store, query, monkeypatch, patient):
    learned(service, a="1")
    before = result(store, query)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        service.learn("b", "1")
        status = wait_for(service, "waiting")
        assert not service.wait_idle(0.01)
    assert "disk is full" in status["problem"]
    assert (status["queue"], status["snapshot"]) == (["b"], 1)
    np.testing.assert_array_equal(result(store, query), before)
    service.learn("c", "1")
    assert service.wait_idle(SECONDS)
    assert service.status()["problem"] is None
    assert service.status()["learned"] == {"a": "1", "b": "1", "c": "1"}


def test_on_a_full_disk_it_is_tried_again_by_itself(service, monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        service.learn("a", "1")
        wait_for(service, "waiting")
    assert service.wait_idle(SECONDS)
    assert service.status()["learned"] == {"a": "1"}


def test_a_damaged_snapshot_stops_learning_until_it_is_rolled_back(make_service, store, patient):
    learned(make_service(), a="1", b="1")
    (store.current().folder / INDEX).write_text("{")
    service = make_service()
    service.reconcile({"a": "1", "b": "1", "c": "1"})
    assert "is damaged" in wait_for(service, "waiting")["problem"]
    store.rollback(1)
    service.structures_changed()
    assert service.wait_idle(SECONDS)
    assert service.status()["problem"] is None
    assert service.status()["learned"] == {"a": "1", "b": "1", "c": "1"}


def test_after_a_restart_the_same_masks_and_only_the_differences_are_learned(make_service, store, labels, query):
    service = learned(make_service(), a="1", b="1", c="1")
    service.close()
    before = result(store, query)
    service = make_service()
    service.reconcile({"a": "1", "b": "1", "c": "1"})
    assert service.wait_idle(SECONDS)
    np.testing.assert_array_equal(result(store, query), before)
    assert store.current().version == 3
    service.reconcile({"b": "2", "c": "1"})
    assert service.wait_idle(SECONDS)
    assert store.current().notes["reason"] == "forgot a; learned b"
    assert service.status()["learned"] == {"b": "2", "c": "1"}


def test_learned_anew_in_another_order_the_state_is_the_same(make_service, store, tmp_path, query):
    learned(make_service(), a="1", b="1", c="1")
    other = SnapshotStore(tmp_path / "other")
    service = make_service(other)
    service.reconcile({"c": "1", "a": "1", "b": "1"})
    assert service.wait_idle(SECONDS)
    np.testing.assert_array_equal(result(other, query), result(store, query))
    files = [{path.name for path in own.current().folder.iterdir()} for own in (store, other)]
    assert files[0] == files[1]


def test_what_a_training_published_is_what_is_learned_on(service, store):
    learned(service, a="1", b="1")
    with store.lock():
        snapshot = store.current()
        trained = load_model(snapshot.folder)
        with torch.no_grad():
            trained.learner.lam.mul_(2)
        trained.solve()
        store.publish(trained, {**snapshot.notes, "trained_on": {"a": "1", "b": "1"}, "reason": "training"})
    learned(service, c="1")
    assert torch.equal(load_model(store.current().folder).learner.lam, trained.learner.lam)
    assert service.status()["trained_on"] == {"a": "1", "b": "1"}
    assert service.status()["fitted_on_removed"] == []
    service.forget("a")
    learned(service, b="2")
    assert service.status()["fitted_on_removed"] == ["a", "b"]


def test_it_waits_while_another_makes_a_snapshot(service, store, labels):
    with store.lock():
        service.learn("a", "1")
        assert not service.wait_idle(0.3)
        assert labels.reads == []
    assert service.wait_idle(SECONDS)
    assert labels.reads == ["a"]


def test_renamed_structures_are_published_without_learning_again(service, store, registry, labels):
    learned(service, a="1")
    labels.reads.clear()
    registry.rename("bright", "liver")
    service.structures_changed()
    assert service.wait_idle(SECONDS)
    assert load_model(store.current().folder).structures == {1: "liver", 2: "dim"}
    assert store.current().notes["reason"] == "structures changed"
    assert labels.reads == []


@pytest.mark.parametrize("readable", [True, False])
def test_labels_of_merged_structures_are_learned_again(service, store, registry, labels, make_case, readable):
    labels.saved["a"] = make_case("a", values=(1,), grid=GRID)
    learned(service, a="1", b="1")
    registry.merge("dim", "bright")
    values = registry.remap(labels.saved["b"].labels)
    labels.saved["b"] = replace(labels.saved["b"], labels=values, values=(1,)) if readable else InputError("gone")
    service.structures_changed()
    assert service.wait_idle(SECONDS)
    assert store.current().notes["reason"] == ("learned b" if readable else "structures changed")
    model = load_model(store.current().folder)
    assert model.structures == {1: "bright"}
    assert set(model.pool.cases) == ({"a", "b"} if readable else {"a"})
    assert service.status()["learned"] == ({"a": "1", "b": "1"} if readable else {"a": "1"})
    assert service.status()["errors"] == ({} if readable else {"b": "gone"})


def test_while_a_label_is_learned_the_older_snapshot_is_served(store, registry, labels, make_segmenter, query):
    serving = Serving(store)
    service = LearningService(serving, registry, lambda: make_segmenter((), **FAST), labels.read)
    service.start()
    learned(service, a="1")
    labels.may_read.clear()
    service.learn("b", "1")
    status = wait_for(service, "learning")
    assert (status["learning"], status["snapshot"]) == ("b", 1)
    snapshot, segmenter = serving.current()
    before = segmenter.segment(query).labels
    labels.may_read.set()
    assert service.wait_idle(SECONDS)
    assert (snapshot.version, serving.current()[0].version) == (1, 2)
    np.testing.assert_array_equal(segmenter.segment(query).labels, before)
    service.close()


def test_closing_does_not_wait_for_the_queue(make_service, store, labels):
    service = make_service()
    labels.may_read.clear()
    for image in "abc":
        service.learn(image, "1")
    wait_for(service, "learning")
    threading.Timer(0.2, labels.may_read.set).start()
    service.close()
    assert service.status()["state"] == "stopped"
    assert store.current() is None
    restarted = make_service()
    restarted.reconcile(dict.fromkeys("abc", "1"))
    assert restarted.wait_idle(SECONDS)
    assert set(restarted.status()["learned"]) == set("abc")


def test_closing_before_the_start_is_nothing(make_service):
    make_service(start=False).close()


def test_a_unet_that_tells_merged_structures_apart_goes(service, store, registry, labels):
    learned(service, a="1")
    with store.lock():
        trained = load_model(store.current().folder)
        trained.unet = VoxelUNet(Plan((1.0, 1.0, 4.0), GRID), (1, 2)).eval()
        store.publish(trained, dict(store.current().notes))
    registry.rename("bright", "liver")
    service.structures_changed()
    assert service.wait_idle(SECONDS)
    assert load_model(store.current().folder).unet is not None
    registry.merge("dim", "liver")
    labels.saved["a"] = replace(labels.saved["a"], labels=registry.remap(labels.saved["a"].labels), values=(1,))
    service.structures_changed()
    assert service.wait_idle(SECONDS)
    assert load_model(store.current().folder).unet is None


def test_what_may_pass_by_itself_is_tried_again(store, registry, labels, make_segmenter, monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.05)
    serving, passes = Serving(store), lambda error: isinstance(error, TimeoutError)
    service = LearningService(serving, registry, lambda: make_segmenter((), **FAST), labels.read, passes)
    case, labels.saved["a"], labels.saved["b"] = labels.saved["a"], TimeoutError("no answer"), ValueError("damaged")
    service.start()
    learned(service, a="1", b="1")
    assert set(service.status()["errors"]) == {"a", "b"}
    labels.saved["a"] = case
    wait_for_labels(service, {"a": "1"})
    assert service.wait_idle(SECONDS)
    assert set(service.status()["errors"]) == {"b"} and labels.reads.count("b") == 1
    service.close()


def wait_for_labels(service, wanted):
    limit = time.monotonic() + SECONDS
    while service.status()["learned"] != wanted:
        assert time.monotonic() < limit, service.status()
        time.sleep(0.02)


def test_a_label_that_looked_wrong_is_compared_with_those_that_came_since(service, labels, monkeypatch):
    truth = {"a": 0.9, "b": 0.1}
    monkeypatch.setattr(module, "agreement", lambda segmenter, case, cancel: {"1": truth[case.volume.name]})
    learned(service, a="1", b="1")
    assert set(service.status()["flagged"]) == {"b"}
    truth |= {"b": 0.8, "c": 0.8}
    learned(service, c="1")
    assert service.status()["flagged"] == {}
