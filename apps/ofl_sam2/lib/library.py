"""Find the library `ofl_sam2`, which comes with the bundle, and make it importable."""

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

REQUIRED_VERSION = "0.1.0"
_PACKAGE = "ofl_sam2"
_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


class LibraryError(ImportError):
    """The library is not here, or does not fit; the message says what to do."""


def add_library(app_dir: Path, bundle: str | None = None) -> Path:
    """Put the bundle that holds the library in front of the module search path.

    Args:
        app_dir: folder of the app.
        bundle: folder of a bundle, the value of `--conf bundle`.

    Returns:
        The folder that the library is imported from.

    Raises:
        LibraryError: there is no library, or not the version that this app was made for.
    """
    folder = find_bundle(app_dir, bundle)
    package = folder / _PACKAGE
    found = _VERSION.search((package / "__init__.py").read_text(encoding="utf-8"))
    if found is None or found.group(1) != REQUIRED_VERSION:
        version = found.group(1) if found else "unknown"
        raise LibraryError(
            f"{package} has version {version}, but this app was made for {REQUIRED_VERSION}. "
            f"Download the bundle of version {REQUIRED_VERSION} and name its folder with --conf bundle PATH."
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    imported = Path(str(importlib.import_module(_PACKAGE).__file__)).resolve().parent
    if imported != package.resolve():
        raise LibraryError(f"{_PACKAGE} was imported from {imported} before the app could take it from {package}.")
    return folder


def find_bundle(app_dir: Path, bundle: str | None = None) -> Path:
    """The folder that holds the package: `bundle`, else the app's own, the checkout's, or where pip installed it.

    Raises:
        LibraryError: it is nowhere, or not where `bundle` says.
    """
    if bundle:
        if not _holds_library(Path(bundle)):
            raise LibraryError(f"--conf bundle {bundle}: there is no {_PACKAGE}/__init__.py in this folder.")
        return Path(bundle)
    downloaded, checkout = app_dir / "model" / _PACKAGE, (app_dir / ".." / ".." / "bundle").resolve()
    for folder in (downloaded, checkout):
        if _holds_library(folder):
            return folder
    installed = find_spec(_PACKAGE)
    if installed is None or installed.origin is None:
        raise LibraryError(
            f"The library {_PACKAGE} is not here. Download the bundle to {downloaded}, "
            "or name its folder with --conf bundle PATH."
        )
    return Path(installed.origin).parents[1]


def _holds_library(folder: Path) -> bool:
    return (folder / _PACKAGE / "__init__.py").is_file()
