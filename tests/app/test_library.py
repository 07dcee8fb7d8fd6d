import sys
from pathlib import Path

import pytest
from lib.library import REQUIRED_VERSION, LibraryError, add_library, find_bundle

import ofl_sam2


def bundle(folder: Path, version: str = REQUIRED_VERSION) -> Path:
    package = folder / "ofl_sam2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""Library."""\n\n__version__ = "{version}"\n')
    return folder


def test_app_fits_the_library_of_this_repository() -> None:
    assert ofl_sam2.__version__ == REQUIRED_VERSION


def test_checkout_is_found(app_dir: Path) -> None:
    assert find_bundle(app_dir) == app_dir.parents[1] / "bundle"


def test_downloaded_bundle_comes_before_the_checkout(tmp_path: Path) -> None:
    app = tmp_path / "apps" / "ofl_sam2"
    bundle(tmp_path / "bundle")
    assert find_bundle(app) == tmp_path / "bundle"
    downloaded = bundle(app / "model" / "ofl_sam2")
    assert find_bundle(app) == downloaded
    assert find_bundle(app, str(bundle(tmp_path / "chosen"))) == tmp_path / "chosen"


def test_copied_app_takes_the_installed_library(tmp_path: Path) -> None:
    assert find_bundle(tmp_path / "a" / "b") == Path(ofl_sam2.__file__).parents[1]


def test_chosen_folder_without_the_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"--conf bundle .*there is no ofl_sam2"):
        find_bundle(tmp_path, str(tmp_path))


def test_other_version_is_refused(tmp_path: Path) -> None:
    before = list(sys.path)
    with pytest.raises(LibraryError, match=f"has version 9.9.9, but this app was made for {REQUIRED_VERSION}"):
        add_library(tmp_path, str(bundle(tmp_path / "b", "9.9.9")))
    assert sys.path == before


def test_library_of_another_place_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(LibraryError, match="was imported from"):
        add_library(tmp_path, str(bundle(tmp_path / "b")))
