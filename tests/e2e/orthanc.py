"""Debian's Orthanc with its DICOMweb plugin as a process of a test."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import requests

_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_START_SECONDS = 60


def missing() -> str:
    """Why no Orthanc can run here; empty when one can.

    Orthanc 1.10 listens on every interface whatever its configuration says, so it may run only where there is no other.
    """
    if shutil.which("Orthanc", path=_search_path()) is None or not _PLUGIN.exists():
        return "Orthanc with DICOMweb is not installed: apt-get install orthanc orthanc-dicomweb"
    others = sorted(name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo")
    if others:
        return f"Orthanc would listen on {', '.join(others)}: run this in a network namespace with lo only (make e2e)"
    return ""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _search_path() -> str:
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin"


class Orthanc:
    """A DICOM server that can be started, stopped and asked; its DICOM port is closed.

    Args:
        folder: for the storage, the configuration and the log.
        users: name -> password of those who may log in; everybody may when empty.
    """

    def __init__(self, folder: Path, users: Mapping[str, str] | None = None) -> None:
        self.log, self._configuration = folder / "orthanc.log", folder / "orthanc.json"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._session = requests.Session()
        self._session.auth = next(iter((users or {}).items()), None)
        self._configuration.write_text(
            json.dumps(
                {
                    "Name": "test",
                    "StorageDirectory": str(folder / "storage"),
                    "IndexDirectory": str(folder / "storage"),
                    "Plugins": [str(_PLUGIN)],
                    "HttpPort": self.port,
                    "DicomServerEnabled": False,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": bool(users),
                    "RegisteredUsers": dict(users or {}),
                    "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "StudiesMetadata": "Full"},
                }
            )
        )

    @property
    def root(self) -> str:
        """Address of Orthanc's own API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Address of DICOMweb, as `make serve STUDIES=` takes it."""
        return f"{self.root}/dicom-web"

    def start(self) -> None:
        """Start and wait until it answers. The storage stays as it was when it was stopped."""
        command = [shutil.which("Orthanc", path=_search_path()) or "Orthanc", str(self._configuration)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < end:
            with suppress(requests.ConnectionError):
                self._ask("GET", "/system")
                return
            time.sleep(0.1)
        raise AssertionError(f"Orthanc did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> None:
        """End the process; the storage stays."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(30)
            self._process = None

    def upload(self, paths: Iterable[Path]) -> None:
        """Store DICOM files."""
        for path in paths:
            self._ask("POST", "/instances", data=path.read_bytes())

    def series(self, modality: str = "", study: str = "") -> list[dict[str, str]]:
        """The main DICOM tags of the series on the server, of one modality or one StudyInstanceUID if given."""
        wanted = {"Modality": modality, "StudyInstanceUID": study}
        found = self._find("Series", expand=True, **{name: value for name, value in wanted.items() if value})
        return [series["MainDicomTags"] for series in found]

    def count(self, modality: str) -> int:
        """How many instances of a modality the server holds."""
        return len(self._find("Instance", Modality=modality))

    def instances(self, series: str) -> list[bytes]:
        """The DICOM files of a SeriesInstanceUID."""
        found = self._find("Instance", SeriesInstanceUID=series)
        return [self._ask("GET", f"/instances/{instance}/file").content for instance in found]

    def delete(self, series: str) -> None:
        """Delete a SeriesInstanceUID."""
        for found in self._find("Series", SeriesInstanceUID=series):
            self._ask("DELETE", f"/series/{found}")

    def _find(self, level: str, expand: bool = False, **query: str) -> list[Any]:
        return self._ask("POST", "/tools/find", json={"Level": level, "Expand": expand, "Query": query}).json()

    def _ask(self, method: str, address: str, **options: Any) -> requests.Response:
        answer = self._session.request(method, f"{self.root}{address}", timeout=60, **options)
        answer.raise_for_status()
        return answer
