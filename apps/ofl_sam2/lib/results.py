"""Results of late, so that asking again for what did not change costs next to nothing."""

import hashlib
import json
import threading
import zlib
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np

from ofl_sam2.segmenter import Segmentation
from ofl_sam2.service.snapshots import Snapshot
from ofl_sam2.volume import Volume


def result_key(snapshot: Snapshot, volume: Volume, changes: dict[str, Any]) -> str:
    """Identifies a result by what it depends on: snapshot, image and changed settings."""
    said = json.dumps(
        [snapshot.version, volume.voxels.shape, str(volume.voxels.dtype), volume.frames, changes], default=str
    )
    digest = hashlib.sha256(said.encode())
    digest.update(np.ascontiguousarray(volume.affine).tobytes())
    digest.update(np.ascontiguousarray(volume.voxels).data)
    return digest.hexdigest()


class RecentResults:
    """Segmentations in memory, their label maps packed; the least recently used goes first. Any thread may call it.

    Args:
        max_bytes: bound on the packed label maps.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._results: OrderedDict[str, tuple[bytes, Segmentation]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Segmentation | None:
        """A kept result."""
        with self._lock:
            if key not in self._results:
                return None
            self._results.move_to_end(key)
            packed, result = self._results[key]
        labels = np.frombuffer(zlib.decompress(packed), result.labels.dtype)
        return replace(result, labels=labels.reshape(result.labels.shape))

    def put(self, key: str, result: Segmentation) -> None:
        """Keep a result, if it is not larger than all there is room for."""
        packed = zlib.compress(np.ascontiguousarray(result.labels), level=1)
        if len(packed) > self._max_bytes:
            return
        shape_only = np.broadcast_to(np.zeros((), result.labels.dtype), result.labels.shape)
        with self._lock:
            self._results[key] = packed, replace(result, labels=shape_only)
            while sum(len(kept) for kept, _ in self._results.values()) > self._max_bytes:
                self._results.popitem(last=False)
