"""SIGKILL at random moments while labels are saved and learned: no acknowledged label is lost, each start succeeds."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from ofl_sam2.files import read_labels, write_labels
from ofl_sam2.training.cohort import Patient
from ofl_sam2.volume import Volume


class Saver(threading.Thread):
    """Saves labels that differ from each other until the server is gone; remembers what was sent and acknowledged."""

    def __init__(self, server: Any, patients: list[Patient], folder: Path, seed: int) -> None:
        super().__init__()
        self.server, self.patients, self.folder = server, patients, folder
        self.random = random.Random(seed)
        self.acknowledged: dict[str, int] = {}
        self.sent: dict[str, int] = {}
        self.problem: str | None = None

    def run(self) -> None:
        while True:
            patient = self.random.choice(self.patients)
            mark = self.random.randrange(1, 1 << 20)
            self.sent[patient.name] = mark
            try:
                answer = requests.put(
                    f"{self.server.url}/datastore/label?image={patient.name}",
                    files={"label": ("label.nrrd", marked(patient, mark, self.folder))},
                    timeout=60,
                )
            except requests.RequestException:
                return
            if answer.status_code != 200:
                self.problem = answer.text
                return
            self.acknowledged[patient.name] = mark


def marked(patient: Patient, mark: int, folder: Path) -> bytes:
    """The label of a patient, with `mark` written into its first 20 voxels in binary digits (1 and 2)."""
    labels = patient.labels.copy()
    labels[:20, 0, 0] = [1 + (mark >> bit & 1) for bit in range(20)]
    write_labels(folder / "sent.nrrd", labels, Volume(patient.image, patient.affine, patient.name))
    return (folder / "sent.nrrd").read_bytes()


def mark_of(server: Any, name: str, folder: Path) -> int:
    answer = server.get(f"/datastore/label?label={name}&tag=final")
    assert answer.status_code == 200, f"the label of {name} is lost: {answer.text}"
    (folder / "got.nrrd").write_bytes(answer.content)
    return sum(int(value - 1) << bit for bit, value in enumerate(read_labels(folder / "got.nrrd").voxels[:20, 0, 0]))


def check_kills(make_server: Callable[..., Any], patients: list[Patient], folder: Path, times: int) -> None:
    server, chance = make_server(), random.Random(0)
    known: dict[str, int] = {}
    server.start()
    for number in range(times):
        saver = Saver(server, patients, folder, seed=number)
        saver.start()
        time.sleep(chance.uniform(0.2, 4))
        server.kill()
        saver.join()
        assert saver.problem is None
        server.start()
        for name, mark in {**known, **saver.acknowledged}.items():
            found = mark_of(server, name, folder)
            assert found in {mark, saver.sent.get(name)}, f"{name} after kill {number + 1}"
            known[name] = found
    status = server.wait_until(lambda s: known.keys() <= s["learned"].keys())
    assert not status["errors"] and status["problem"] is None


@pytest.mark.timeout(900)
def test_killed_once(make_server: Callable[..., Any], cohort_of_eight: list[Patient], tmp_path: Path) -> None:
    check_kills(make_server, cohort_of_eight, tmp_path, times=1)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_killed_twenty_times(make_server: Callable[..., Any], cohort_of_eight: list[Patient], tmp_path: Path) -> None:
    check_kills(make_server, cohort_of_eight, tmp_path, times=20)
