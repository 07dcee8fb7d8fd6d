"""MONAI Label's own `monaibundle` app serves the downloaded bundle, and trains it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import requests

from ofl_sam2.files import read_volume
from ofl_sam2.model_index import read_index
from ofl_sam2.store import load_model

# MONAI Label imports torchvision, whose build for CUDA expects these operators of a torch without CUDA.
TORCHVISION_OPERATORS = """
import torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.fixture(scope="module")
def app(downloaded: Path, tmp_path_factory) -> Path:
    """The sample app with the bundle in its model folder."""
    folder = tmp_path_factory.mktemp("label") / "monaibundle"
    shutil.copytree(Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle", folder)
    shutil.copytree(downloaded, folder / "model" / "ofl_sam2")
    return folder


@pytest.fixture(scope="module")
def studies(downloaded: Path, tmp_path_factory) -> Path:
    """Six slices of each example volume, the first one with a final label."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "labels" / "final").mkdir(parents=True)
    for name in ("synthetic_000", "synthetic_001"):
        nib.save(
            nib.load(downloaded / "examples" / "images" / f"{name}.nii.gz").slicer[:, :, 8:14],
            folder / f"{name}.nii.gz",
        )
    label = nib.load(downloaded / "examples" / "labels" / "synthetic_000.nii.gz").slicer[:, :, 8:14]
    nib.save(label, folder / "labels" / "final" / "synthetic_000.nii.gz")
    return folder


@pytest.fixture(scope="module")
def server(app: Path, studies: Path, tmp_path_factory) -> Iterator[str]:
    """The address of a running server."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(TORCHVISION_OPERATORS)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", app, "--studies", studies]
    command += ["--host", "127.0.0.1", "--port", port, "--conf", "models", "ofl_sam2", "--conf", "zoo_source", "local"]
    command += ["--conf", "sam2", "false"]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    log = (app / "server.log").open("w")
    with log, subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment, cwd=app) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            wait(lambda: answers(address), 120, process)
            yield address
        finally:
            process.terminate()


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/info/", timeout=60).ok
    except requests.ConnectionError:
        return False


def wait(done, seconds: float, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.5)


def infer(address: str, folder: Path) -> np.ndarray:
    params = {"result_extension": ".nrrd", "result_dtype": "uint8", "device": "cpu"}
    answer = requests.post(
        f"{address}/infer/ofl_sam2?image=synthetic_001&output=image", data={"params": json.dumps(params)}, timeout=200
    )
    assert answer.status_code == 200, answer.text
    (folder / "result.nrrd").write_bytes(answer.content)
    return nrrd.read(str(folder / "result.nrrd"))[0]


def test_the_bundle_is_offered(server):
    info = requests.get(f"{server}/info/", timeout=60).json()
    model = info["models"]["ofl_sam2"]
    assert model["type"] == "segmentation" and model["dimension"] == 3
    assert model["labels"] == {"synthetic organ a": 1, "synthetic organ b": 2}
    assert {"online_update", "gamma"} <= model["config"].keys()
    assert "ofl_sam2" in info["trainers"]


def test_infer_gives_the_label_map_of_the_example(server, app, studies, tmp_path):
    expected = load_model(app / "model" / "ofl_sam2" / "models" / "example")
    labels = expected.segment(read_volume(studies / "synthetic_001.nii.gz")).labels
    assert np.array_equal(infer(server, tmp_path), labels)


@pytest.mark.campaign
def test_train_publishes_what_the_next_inference_uses(server, app, studies, tmp_path):
    request = {"name": "ofl_sam2", "max_epochs": 1, "val_split": 0, "device": "cpu"}
    assert requests.post(f"{server}/train/ofl_sam2", json=request, timeout=60).ok
    wait(lambda: requests.get(f"{server}/train/", timeout=60).json()["status"] in ("DONE", "ERROR"), 280)
    model = app / "model" / "ofl_sam2" / "models" / "model"
    assert read_index(model).notes["trained_on"] == ["synthetic_000"]
    labels = load_model(model).segment(read_volume(studies / "synthetic_001.nii.gz")).labels
    assert np.array_equal(infer(server, tmp_path), labels)
