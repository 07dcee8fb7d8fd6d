"""Writes that leave either the old file or the whole new one, whatever happens in between."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ofl_sam2.errors import OFLError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder",
    errno.EISDIR: "a folder of that name is in the way; choose another name",
}


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success fsync it and move it over `target`.

    The temporary name keeps the suffixes of the target, because image writers choose the format by them.

    Raises:
        OFLError: the target cannot be written (full disk, read-only folder), in words.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_path(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [p.name for p in folder.iterdir()]
        ['a.txt']
    """
    target = Path(target)
    temporary = target.parent / f".{secrets.token_hex(6)}.partial.{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        publish(temporary, target)
    except OSError as error:
        if error.errno in _REASONS and _concerns(error, temporary):
            raise OFLError(f"Cannot write {target}: {_REASONS[error.errno]}.") from error
        raise
    finally:
        with suppress(OSError):  # a read-only file system refuses even to unlink what is not there
            temporary.unlink()


def publish(temporary: Path, target: Path) -> None:
    """Fsync the finished file `temporary` and move it over `target`, in the same folder."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    fsync_folder(target.parent)


def atomic_write_text(target: Path | str, text: str) -> None:
    """Write `text` (UTF-8) to `target` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _concerns(error: OSError, temporary: Path) -> bool:
    """Whether `error` is about our writing, not about another file the caller touched meanwhile."""
    if error.filename is None:
        return True
    path = Path(os.fsdecode(error.filename))
    return path == temporary or path in temporary.parents


def fsync_folder(folder: Path) -> None:
    """Make names created in or removed from a folder survive a loss of power."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
