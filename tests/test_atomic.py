import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ofl_sam2 import atomic
from ofl_sam2.atomic import atomic_path, atomic_write_text, publish
from ofl_sam2.errors import OFLError

CRASH = """
import os, sys
from ofl_sam2 import atomic
if sys.argv[2] == "before replace":
    os.replace = lambda *paths: os._exit(7)
with atomic.atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("new, but " if sys.argv[2] == "while writing" else "new and whole")
    if sys.argv[2] == "while writing":
        os._exit(7)
if sys.argv[2] == "after replace":
    os._exit(7)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    file = tmp_path / "result.nii.gz"
    file.write_text("old")
    return file


@pytest.mark.parametrize(
    ("moment", "content"), [("while writing", "old"), ("before replace", "old"), ("after replace", "new and whole")]
)
def test_a_crash_leaves_the_old_file_or_the_whole_new_one(target: Path, moment: str, content: str) -> None:
    package = Path(atomic.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    child = subprocess.run([sys.executable, "-c", CRASH, str(target), moment], env=environment, timeout=60)
    assert child.returncode == 7
    assert target.read_text() == content
    atomic_write_text(target, "next run")
    assert target.read_text() == "next run"


def test_an_exception_leaves_the_old_file_and_nothing_else(target: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_success_replaces_the_file_creates_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "label.nii.gz"
    for text in ("Größe: 1 mm", "2 mm"):
        atomic_write_text(target, text)
        assert target.read_text(encoding="utf-8") == text
    assert list(target.parent.iterdir()) == [target]


def test_the_temporary_name_is_beside_the_target_with_its_suffixes_and_unique(target: Path) -> None:
    with atomic_path(target) as first, atomic_path(target) as second:
        assert first != second
        assert first.parent == target.parent
        assert first.suffixes[-2:] == [".nii", ".gz"]
        first.write_text("one")
        second.write_text("two")
    assert target.read_text() == "one"


def test_the_content_is_synced_before_the_move_and_the_folder_after(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    atomic_write_text(target, "new")
    assert events == ["fsync", "replace", "fsync"]


def test_publish_moves_a_finished_file_over_the_target(target: Path) -> None:
    part = target.with_name("download.part")
    part.write_text("new")
    publish(part, target)
    assert target.read_text() == "new"
    assert not part.exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EROFS, "read-only; choose another folder"),
        (errno.EACCES, "permission denied; choose a folder you may write to"),
        (errno.ENOSPC, "disk is full; free some space"),
        (errno.EDQUOT, "quota is used up"),
    ],
)
def test_an_unwritable_folder_is_said_in_words_even_if_cleaning_up_fails_too(
    target: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OFLError, match=words) as caught:
        atomic_write_text(target, "new")
    assert str(target) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert target.read_text() == "old"


def test_a_full_disk_that_shows_only_when_syncing_keeps_the_old_file(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OFLError, match="disk is full"):
        atomic_write_text(target, "new")
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_in_the_place_of_a_folder_is_said_in_words(target: Path) -> None:
    for below in (target / "label.nii", target / "deeper" / "label.nii"):
        with pytest.raises(OFLError, match="a file stands where a folder is needed"):
            atomic_write_text(below, "new")
    assert target.read_text() == "old"


def test_a_folder_in_the_place_of_the_file_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "label").mkdir()
    with pytest.raises(OFLError, match="a folder of that name is in the way"):
        atomic_write_text(tmp_path / "label", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["label"]


def test_errors_of_other_files_are_not_blamed_on_the_target(target: Path, tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match=r"input\.nii"), atomic_path(target):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/input.nii")
    assert target.read_text() == "old"


def test_writing_nothing_is_an_error_and_keeps_the_old_file(target: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_text() == "old"
