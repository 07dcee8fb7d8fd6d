"""Fixtures of the bundle's tests: the bundle in the checkout, and one downloaded from a local server."""

import functools
import http.server
import importlib.util
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Frozen features of all these tests, instead of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFL_SAM2_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The bundle in the checkout."""
    return ROOT / "bundle"


@pytest.fixture(scope="session")
def packer() -> ModuleType:
    """The packaging script as a module."""
    spec = importlib.util.spec_from_file_location("pack_bundle", ROOT / "tools" / "bundle.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def isolated() -> Run:
    """Run Python with the installed requirements, but neither the checkout nor an installed ofl_sam2.

    Without `site` (-S), the .pth file of an editable installation has no effect.
    """

    def run(*arguments: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-S", *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def downloaded(packer: ModuleType, bundle: Path, isolated: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as `monai.bundle download` delivers it."""
    served, folder = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("empty")
    packer.pack(bundle, served / "ofl_sam2.zip")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/ofl_sam2.zip"
        options = ("--name", "ofl_sam2", "--url", url, "--bundle_dir", folder)
        isolated("-m", "monai.bundle", "download", *options, cwd=folder)
        server.shutdown()
    return folder / "ofl_sam2"
