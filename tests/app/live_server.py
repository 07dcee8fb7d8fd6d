"""A real server in a process of its own, on a copy of the app, a free port of 127.0.0.1 and a new model root."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import requests

REPOSITORY = Path(__file__).resolve().parents[2]
_START_SECONDS = 180


class LiveServer:
    """A server that can be started, stopped, killed and asked.

    Args:
        folder: for the copy of the app, the model root, sessions and the log.
        studies: folder of images, or address of a DICOMweb server.
        conf: further values of `--conf`.
    """

    def __init__(self, folder: Path, studies: Path | str, **conf: str) -> None:
        self.folder, self.studies = folder, studies
        self.app = folder / "app"
        self.conf = {"bundle": str(REPOSITORY / "bundle"), "model_root": str(folder / "model"), **conf}
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        ignored = shutil.ignore_patterns("__pycache__", "model", "logs", "bin")
        shutil.copytree(REPOSITORY / "apps" / "ofl_sam2", self.app, ignore=ignored)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spawn(self) -> None:
        """Start the process; the command is that of `make serve`."""
        command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(self.app)]
        command += ["--studies", str(self.studies), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--uvicorn_app", "server.app:app"]
        for name, value in self.conf.items():
            command += ["--conf", name, value]
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.app),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MONAI_LABEL_SESSION_PATH": str(self.folder / "sessions"),
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def start(self) -> float:
        """Start and wait until it answers; return the seconds that took."""
        started = time.monotonic()
        self.spawn()
        while time.monotonic() - started < _START_SECONDS:
            if self.process.poll() is not None:
                break
            try:
                requests.get(f"{self.url}/info/", timeout=10).raise_for_status()
                return time.monotonic() - started
            except requests.ConnectionError:
                time.sleep(0.1)
        raise AssertionError(f"The server did not start:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def stop(self) -> None:
        """SIGTERM, and nothing else is needed."""
        assert self._end(signal.SIGTERM), f"The server did not end:\n{self.tail()}"

    def kill(self) -> None:
        """SIGKILL for the server and the tasks it started."""
        self._end(signal.SIGKILL)

    def _end(self, first: signal.Signals) -> bool:
        """Whether the signal was enough."""
        if self.process is None:
            return True
        self.process.send_signal(first)
        ended = False
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
            ended = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        self.process = None
        return ended

    def rss(self) -> int:
        """Resident memory of the server in bytes, without its tasks."""
        return psutil.Process(self.process.pid).memory_info().rss

    def get(self, address: str, **options: Any) -> requests.Response:
        return requests.get(f"{self.url}{address}", timeout=120, **options)

    def learning(self) -> dict[str, Any]:
        """The part of the status that is about learning, and the version of the snapshot."""
        answer = self.get("/ofl/status")
        answer.raise_for_status()
        return {**answer.json()["learning"], "snapshot": answer.json()["snapshot"]}

    def wait_until(
        self, condition: Callable[[dict[str, Any]], bool], idle: bool = True, seconds: float = 240
    ) -> dict[str, Any]:
        """Wait until the status of learning fulfils a condition, and nothing is left to do; return it."""
        end = time.monotonic() + seconds
        while not (condition(status := self.learning()) and (not idle or status["state"] == "idle")):
            assert time.monotonic() < end, f"{status}\n{self.tail()}"
            time.sleep(0.1)
        return status
