"""Frozen image features kept between runs and shared between processes, keyed by what they were computed from.

Values are float16 wherever they are kept and float32 of the same rounded numbers wherever they are used, so a first run
(which computes) and a second run (which reads) see identical features. Entries are immutable and appear whole or not at
all (a temporary file, then `os.replace`); a process that finds one damaged or gone computes it again.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import threading
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ofl_sam2.errors import InputError
from ofl_sam2.memory.recent import RecentTensors

_log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{12}\.tmp")
_STALE_SECONDS = 3600.0
_PAUSE_SECONDS = 300.0
_SCANS_PER_BOUND = 16
_HALF_MAX = torch.finfo(torch.float16).max


class FeatureCache:
    """Tensors by content key, on disk and in memory, bounded in bytes; safe to share between threads and processes.

    Args:
        folder: where the entries lie, `folder/ab/<key>.safetensors`; None keeps them in memory only.
        max_bytes: bound of the folder (of the memory, without a folder); the least recently used entries go first.
        memory_bytes: bound of the copies a cache with a folder also keeps in memory.

    A process learns what the others wrote when it scans the folder, after every 1/16 of the bound it writes: several
    processes may exceed the bound by that much and one entry each. A folder that cannot be written is only read for
    five minutes, after a warning in the log.

    Example:
        >>> cache = FeatureCache(None, max_bytes=1 << 20)
        >>> key = cache.key("nano", np.zeros((4, 4)))
        >>> stored = cache.put(key, {"feature": torch.full((1, 2), 0.1)})
        >>> torch.equal(cache.get(key)["feature"], stored["feature"])
        True
    """

    def __init__(self, folder: Path | str | None, max_bytes: int, memory_bytes: int = 256 << 20) -> None:
        if max_bytes < 0 or memory_bytes < 0:
            raise InputError(f"Cache bounds are byte counts from 0 up, not {max_bytes} and {memory_bytes}.")
        self._folder = Path(folder) if folder is not None else None
        self._max_bytes = max_bytes
        self._memory = RecentTensors(max_bytes if folder is None else memory_bytes)
        self._lock = threading.Lock()
        self._writable_from = 0.0
        self._unscanned_bytes = 0
        self._disk_bytes = 0
        if self._folder is not None:
            self._evict(self._folder)

    @staticmethod
    def key(*parts: bytes | str | np.ndarray) -> str:
        """Return the sha256 (hex) of the parts: type, length, dtype and shape count, memory layout does not.

        Raises:
            InputError: a part is of another type, or an array of Python objects.
        """
        digest = hashlib.sha256()
        for part in parts:
            if isinstance(part, np.ndarray) and not part.dtype.hasobject:
                kind, content = f"array {part.dtype.str} {part.shape}", part.tobytes()
            elif isinstance(part, str):
                kind, content = "str", part.encode()
            elif isinstance(part, bytes):
                kind, content = "bytes", part
            else:
                raise InputError(f"A cache key is made of bytes, strings and number arrays, not of {type(part)}.")
            digest.update(f"{kind} {len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors kept under `key` as float32 on the CPU, or None; the caller may change them."""
        path = self._path(key)
        kept = self._memory.get(key)
        if kept is None and path is not None and (kept := _read(path, key)) is not None:
            self._memory.put(key, kept)
        if kept is not None and path is not None:
            with suppress(OSError):
                _touch(path)
        return _widened(kept) if kept is not None else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep `tensors` under `key` and return them as `get` will: rounded to float16, as float32 on the CPU.

        Numbers beyond the range of float16 become its largest, ±65504.

        Raises:
            InputError: a malformed key, or a tensor that is not floating point.
        """
        path = self._path(key)
        rounded = _rounded(tensors)
        self._memory.put(key, rounded)
        if path is not None and time.monotonic() >= self._writable_from:
            self._write(path, key, rounded)
        return _widened(rounded)

    def _path(self, key: str) -> Path | None:
        if not _KEY.fullmatch(key):
            raise InputError(f"'{key}' is not a cache key. Make one with FeatureCache.key(...).")
        return self._folder / key[:2] / f"{key}.safetensors" if self._folder is not None else None

    def _write(self, path: Path, key: str, tensors: dict[str, Tensor]) -> None:
        content = save(tensors, {"key": key, "crc32": _checksum(tensors)})
        if len(content) > self._max_bytes:
            return
        temporary = path.with_name(f".{key}.{secrets.token_hex(6)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            _touch(temporary)
            os.replace(temporary, path)
        except FileNotFoundError:  # someone is emptying the folder
            return
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self._stop_writing(error)
            return
        with self._lock:
            self._disk_bytes += len(content)
            self._unscanned_bytes += len(content)
            due = max(self._disk_bytes, self._unscanned_bytes * _SCANS_PER_BOUND) > self._max_bytes
        if due:
            self._evict(path.parents[1])

    def _stop_writing(self, error: OSError) -> None:
        with self._lock:
            first, self._writable_from = not self._writable_from, time.monotonic() + _PAUSE_SECONDS
        if first:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            _log.warning("Features are not cached in %s for now: %s. Results do not change.", self._folder, reason)

    def _evict(self, folder: Path) -> None:
        """Count the bytes on disk; beyond the bound delete the least recently used, down to 90 % or the newest."""
        with self._lock:
            entries = sorted(_scan(folder))
            total = sum(size for _, size, _ in entries)
            newest = entries[-1][1] if entries else 0
            goal = max(0.9 * self._max_bytes, newest if newest <= self._max_bytes else 0)
            for _, size, path in entries if total > self._max_bytes else []:
                if total <= goal:
                    break
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    total -= size
            self._disk_bytes, self._unscanned_bytes = total, 0


def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"Features are floating point, but '{name}' is {tensor.dtype}.")
    return {
        name: tensor.detach().cpu().float().clamp(-_HALF_MAX, _HALF_MAX).half().contiguous()
        for name, tensor in tensors.items()
    }


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over names and values: without fsync, a power cut can leave a file of the right size with holes."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return the float16 tensors of an entry; one that is not what it should be is deleted."""
    try:
        content = path.read_bytes()  # once: safe_open opens twice, and the file may be replaced in between
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__")
        halves = all(tensor.dtype == torch.float16 for tensor in tensors.values())
        if halves and metadata == {"key": key, "crc32": _checksum(tensors)}:
            return tensors
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _log.debug("Cannot read %s: %s", path, error)
    with suppress(OSError):
        path.unlink()
    return None


def _touch(path: Path) -> None:
    now = time.time_ns()  # the kernel's own stamps are milliseconds apart, too coarse to order uses
    os.utime(path, ns=(now, now))


def _scan(folder: Path) -> list[tuple[int, int, Path]]:
    """List (time of last use in ns, bytes, path) of the entries; delete what crashed writers left behind."""
    found = []
    for path in folder.glob("[0-9a-f][0-9a-f]/*"):
        with suppress(OSError):  # another process was faster
            status = path.stat()
            if _ENTRY.fullmatch(path.name):
                found.append((status.st_mtime_ns, status.st_size, path))
            elif _TEMPORARY.fullmatch(path.name) and time.time() - status.st_mtime > _STALE_SECONDS:
                path.unlink()
    return found
