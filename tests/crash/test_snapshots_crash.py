"""SIGKILL at any moment: there is always a whole current snapshot, and nothing that was published is lost."""

import itertools
import os
import random
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from ofl_sam2.backbone import load
from ofl_sam2.service.learning import LearningService
from ofl_sam2.service.serving import Serving
from ofl_sam2.service.snapshots import SnapshotStore
from ofl_sam2.service.structures import StructureRegistry
from ofl_sam2.store import load_model

GRID = (16, 16, 4)
FAST = {"learn_steps": 1, "first_steps": 1, "update_steps": 1, "pool_slices": 4, "close_ups": False}
SECONDS = 120


@pytest.fixture(autouse=True)
def installed(nano, tmp_path, monkeypatch) -> None:
    """The random nano in the place of the package's own."""
    save_file(nano.sam2.state_dict(), tmp_path / "nano.safetensors")
    monkeypatch.setattr(load, "NANO_WEIGHTS", tmp_path / "nano.safetensors")


@pytest.fixture
def store(tmp_path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots", keep=3)


@pytest.fixture
def make_service(tmp_path, make_case, make_segmenter) -> Callable[[], LearningService]:
    """A service on the store, in whatever process; label n of an image has the sha256 "n"."""

    def build() -> LearningService:
        store = SnapshotStore(tmp_path / "snapshots", keep=3)
        registry = StructureRegistry(tmp_path / "structures.json", ["bright", "dim"])
        return LearningService(
            Serving(store),
            registry,
            lambda: make_segmenter((), **FAST),
            lambda image: make_case(image, seed=ord(image[0]), grid=GRID),
        )

    return build


def fork(work: Callable[..., None], *arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def assert_whole(store: SnapshotStore) -> None:
    """The current snapshot loads and holds what its notes say."""
    current = store.current()
    assert set(load_model(current.folder).pool.cases) == set(current.notes["learned"])


def rubbish(store: SnapshotStore) -> list[str]:
    return [path.name for path in store.folder.glob(".*") if path.name != ".lock"]


def test_dying_at_any_step_of_publishing_leaves_the_old_or_the_new_snapshot(tmp_path, make_segmenter, make_case):
    """A child dies at the n-th time it opens, links, renames or deletes a file, for every n; keep=1 makes it prune."""
    one = make_segmenter((make_case("a", grid=GRID),), **FAST)
    two = make_segmenter((make_case("a", grid=GRID), make_case("b", seed=1, grid=GRID)), **FAST)
    seen = []
    for point in range(1, 200):
        folder = tmp_path / str(point)
        SnapshotStore(folder).publish(one, {"learned": {"a": "1"}})
        child = fork(_publish_and_die, folder, two, point)
        crashed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        store = SnapshotStore(folder)
        seen.append(store.current().version)
        if point % 5 == 0 or crashed == 0:
            assert_whole(store)
            assert store.publish(one, {}).version > seen[-1]
            assert rubbish(store) == []
        if crashed == 0:
            break
        assert crashed == 7
    assert len(seen) > 15
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def _publish_and_die(folder: Path, segmenter, point: int) -> None:
    store, count = SnapshotStore(folder, keep=1), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        count += event in {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
        if count == point:
            os._exit(7)

    sys.addaudithook(hook)
    store.publish(segmenter, {"learned": {"a": "1", "b": "1"}})


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.campaign)])
def test_killed_while_learning_nothing_published_is_lost(store, make_service, make_case, kills):
    """A child learns and forgets labels and reports each snapshot; it is killed at random moments."""
    moments = random.Random(0)
    for _ in range(kills):
        receiver, sender = os.pipe()
        child = fork(_learn_for_ever, make_service, store.folder, sender)
        os.close(sender)
        published = _read_until_killed(receiver, child, moments.uniform(0, 3))
        os.close(receiver)
        assert store.current().version >= published
        assert_whole(store)
    service = make_service()
    wanted = {"a": "last", "c": "last"}
    service.reconcile(wanted)
    service.start()
    assert service.wait_idle(SECONDS)
    service.close()
    assert store.current().notes["learned"] == wanted
    assert rubbish(store) == []
    volume = make_case("query", seed=7, grid=GRID).volume
    first, again = (load_model(SnapshotStore(store.folder).current().folder).segment(volume) for _ in range(2))
    np.testing.assert_array_equal(first.labels, again.labels)


def _learn_for_ever(make_service: Callable[[], LearningService], folder: Path, sender: int) -> None:
    service = make_service()
    service.start()
    for number in itertools.count():
        service.learn("abc"[number % 3], str(number))
        if number % 4 == 3:
            service.forget("abc"[(number + 1) % 3])
        assert service.wait_idle(SECONDS)
        os.write(sender, f"{SnapshotStore(folder).current().version}\n".encode())


def _read_until_killed(receiver: int, child: int, seconds: float) -> int:
    """Kill `child` some time after its first report; return the last version it reported."""
    ready, _, _ = select.select([receiver], [], [], SECONDS)
    assert ready
    select.select([], [], [], seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return int(os.read(receiver, 1 << 16).split()[-1])
