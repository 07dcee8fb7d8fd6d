"""A real DICOM server, our server on it, and a browser."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / "app"))

from live_server import LiveServer
from ohif import CHROMIUM, browser_page
from orthanc import Orthanc, missing
from playwright.sync_api import Page


@pytest.fixture(scope="session")
def make_orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Orthanc]]:
    """Start an empty Orthanc, with `users` (name -> password) if given; it is stopped at the end."""
    if reason := missing():
        pytest.skip(reason)
    started = []

    def start(**options: dict[str, str]) -> Orthanc:
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), **options)
        started.append(orthanc)
        orthanc.start()
        return orthanc

    yield start
    for orthanc in started:
        orthanc.stop()


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    """Start our server on a DICOMweb address, with values of `--conf` if given; it is stopped at the end."""
    started = []

    def start(studies: str, **conf: str) -> LiveServer:
        server = LiveServer(tmp_path_factory.mktemp("live"), studies, **conf)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a browser of its own."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    with browser_page() as page:
        yield page
