"""Many users at once: nothing is lost, and the model is the one that one user alone would have made."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.dataset import LabelledCase
from ofl_sam2.files import read_labels
from ofl_sam2.learner.load import shipped_learner
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.cohort import Patient
from ofl_sam2.volume import Volume

NAMES = {1: "organ a", 2: "organ b"}
MAX_GROWTH = 400 << 20


class User(threading.Thread):
    """Segments images at random, saves the label of an own image again and again, and asks for `/info/`."""

    def __init__(self, server: Any, patients: list[Patient], number: int, folder: Path, seconds: float) -> None:
        super().__init__()
        from slicer_client import SlicerClient

        folder.mkdir()
        self.server, self.patients, self.own = server, patients, patients[number]
        self.slicer = SlicerClient(server.url, folder)
        self.random = random.Random(number)
        self.seconds = seconds
        self.segmented = self.saved = self.busy = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self.slicer.connect()
            end = time.monotonic() + self.seconds
            while time.monotonic() < end or not (self.saved and self.segmented):
                self.random.choice([self.segment, self.save, self.slicer.rest.info])()
        except BaseException as error:
            self.problem = error

    def segment(self) -> None:
        patient = self.random.choice(self.patients)
        answer = requests.post(
            f"{self.server.url}/infer/{self.slicer.model}?image={patient.name}&output=json", timeout=300
        )
        if answer.status_code == 503:
            self.busy += 1
            time.sleep(min(float(answer.headers["Retry-After"]), 2))
        else:
            assert answer.status_code == 200, answer.text
            assert set(answer.json()["slice_confidence"]) == set(NAMES.values())
            self.segmented += 1

    def save(self) -> None:
        self.slicer.submit(self.server.studies / f"{self.own.name}.nii.gz", self.own.labels, NAMES)
        self.saved += 1


def library_alone(patients: list[Patient]) -> dict[str, np.ndarray]:
    """What the library makes of the labels of some patients, learned one after the other, without any server."""
    torch.set_num_threads(1)
    backbone = load_backbone("nano", 64)
    segmenter = VolumeSegmenter(backbone, shipped_learner("nano", backbone.width))
    volumes = [Volume(p.image, p.affine, p.name) for p in patients]
    for patient, volume in zip(patients, volumes, strict=True):
        segmenter.learn([LabelledCase(volume, patient.labels, (1, 2))], NAMES)
    return {volume.name: segmenter.segment(volume).labels for volume in volumes}


def check_load(server: Any, patients: list[Patient], folder: Path, seconds: float) -> None:
    server.start()
    crowd = [User(server, patients, number, folder / f"user_{number}", seconds) for number in range(len(patients))]
    first = crowd[0]
    first.slicer.connect()
    first.save()
    server.wait_until(lambda status: first.own.name in status["learned"])
    before = server.rss()
    for user in crowd:
        user.start()
    for user in crowd:
        user.join()
    assert not [user.problem for user in crowd if user.problem]
    assert server.rss() < before + MAX_GROWTH
    status = server.wait_until(lambda status: {user.own.name for user in crowd} == set(status["learned"]))
    assert not status["errors"] and status["problem"] is None
    expected = library_alone(patients)
    for user in crowd:
        content = server.get(f"/datastore/label?label={user.own.name}&tag=final").content
        (folder / "label.nrrd").write_bytes(content)
        np.testing.assert_array_equal(read_labels(folder / "label.nrrd").voxels, user.own.labels)
        np.testing.assert_array_equal(first.slicer.segment(user.own.name)[0], expected[user.own.name])
    counts = [(user.segmented, user.saved, user.busy) for user in crowd]
    print(f"segmented, saved, busy of each user: {counts}; RSS {before / 1e6:.0f} to {server.rss() / 1e6:.0f} MB")


def test_three_users_at_once(make_server: Callable[..., Any], cohort_of_eight: list[Patient], tmp_path: Path) -> None:
    check_load(make_server(), cohort_of_eight[:3], tmp_path, seconds=5)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_eight_users_for_two_minutes(
    make_server: Callable[..., Any], cohort_of_eight: list[Patient], tmp_path: Path
) -> None:
    check_load(make_server(), cohort_of_eight, tmp_path, seconds=120)
