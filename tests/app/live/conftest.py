"""Real servers on eight small volumes."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ofl_sam2.training.cohort import Patient, cohort

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for live_server and slicer_client

from live_server import LiveServer
from slicer_client import SlicerClient


@pytest.fixture(scope="module")
def cohort_of_eight() -> list[Patient]:
    """Eight volumes (48, 48, 6) of one anatomy with two structures."""
    small = []
    for patient in cohort(8, seed=3):
        step = np.diag([2.0, 2.0, 4.0, 1.0])
        image, labels = patient.image[::2, ::2, ::4], patient.labels[::2, ::2, ::4]
        small.append(Patient(patient.name, image, labels, patient.affine @ step))
    return small


def write_images(folder: Path, patients: list[Patient]) -> Path:
    folder.mkdir()
    for patient in patients:
        nib.save(nib.Nifti1Image(patient.image, patient.affine), folder / f"{patient.name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def make_server(
    tmp_path_factory: pytest.TempPathFactory, cohort_of_eight: list[Patient]
) -> Iterator[Callable[..., LiveServer]]:
    """Build a server (not started) on the eight volumes with a small model, or on `studies`; it always ends."""
    servers = []

    def build(studies: Path | None = None, **conf: str) -> LiveServer:
        folder = tmp_path_factory.mktemp("live")
        if studies is None:
            studies, conf = write_images(folder / "studies", cohort_of_eight), {"image_size": "64", **conf}
        servers.append(LiveServer(folder, studies, **conf))
        return servers[-1]

    yield build
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def slicer(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> SlicerClient:
    """A client as Slicer has it, connected to the `server` of the module."""
    client = SlicerClient(server.url, tmp_path_factory.mktemp("slicer"))
    client.connect()
    return client
