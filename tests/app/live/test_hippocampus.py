"""The whole way on real volumes: label by label, training, batch inference, restart."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from ofl_sam2.dataset import Case, load_case
from ofl_sam2.files import read_labels

NAMES = {1: "anterior", 2: "posterior"}


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_eight_volumes(make_server: Callable[..., Any], data_dir: Path, tmp_path: Path) -> None:
    from slicer_client import SlicerClient

    data = data_dir / "msd_hippocampus"
    names = json.loads((data / "splits.json").read_text())["dev_shots"][:8]
    studies = tmp_path / "studies"
    studies.mkdir()
    for name in names:
        shutil.copy(data / f"images/{name}.nii.gz", studies)
    references = {n: load_case(Case(n, data / f"images/{n}.nii.gz", data / f"labels/{n}.nii.gz")).labels for n in names}
    rest = names[4:]
    server = make_server(studies)
    assert server.start() < 60
    slicer = SlicerClient(server.url, tmp_path)
    slicer.connect()

    def mean_dice() -> float:
        scores = []
        for name in rest:
            found = slicer.segment(name)[0]
            for value in NAMES:
                a, b = found == value, references[name] == value
                scores.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        return float(np.mean(scores))

    assert slicer.next_sample("diverse_first")["id"] in names
    answer = requests.post(f"{server.url}/infer/{slicer.model}?image={names[0]}", timeout=60)
    assert answer.status_code in (400, 409) and "label" in answer.json()["detail"]
    scores, delays = [], []
    for name in names[:4]:
        slicer.submit(studies / f"{name}.nii.gz", references[name], NAMES)
        started = time.monotonic()
        server.wait_until(lambda s, name=name: name in s["learned"], idle=False)
        delays.append(round(time.monotonic() - started, 1))
        scores.append(mean_dice())
    assert scores[-1] > scores[0]

    slicer.train(minutes=2)
    while slicer.rest.train_status(check_if_running=True):
        time.sleep(2)
    trained = mean_dice()
    assert trained > scores[-1] - 0.01
    stats = next(iter(slicer.rest.info()["train_stats"].values()))
    assert 0 <= stats["best_metric"] <= 1 and stats["total_time"]

    requests.post(f"{server.url}/batch/infer/{slicer.model}?images=unlabeled", json={}, timeout=60).raise_for_status()
    while server.get("/batch/infer?check_if_running=true").status_code == 200:
        time.sleep(1)
    before = {name: slicer.segment(name)[0] for name in rest}
    for name, labels in before.items():
        (tmp_path / "batch.nii.gz").write_bytes(server.get(f"/datastore/label?label={name}&tag=original").content)
        np.testing.assert_array_equal(read_labels(tmp_path / "batch.nii.gz").voxels, labels)

    server.stop()
    server.start()
    for name, labels in before.items():
        np.testing.assert_array_equal(slicer.segment(name)[0], labels)
    print(f"Dice with 1 to 4 labels {np.round(scores, 3)}, trained {trained:.3f}; seconds to learn {delays}; {stats}")
