"""Results of late, so that asking again for what did not change costs next to nothing."""

import hashlib
import json
import threading
from collections import OrderedDict
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
    """Segmentations in memory, the least recently used goes first. Any thread may call it.

    Args:
        max_bytes: bound on the label maps kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._results: OrderedDict[str, Segmentation] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Segmentation | None:
        """A kept result."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
            return self._results.get(key)

    def put(self, key: str, result: Segmentation) -> None:
        """Keep a result, if it is not larger than all there is room for."""
        with self._lock:
            self._results[key] = result
            while sum(kept.labels.nbytes for kept in self._results.values()) > self._max_bytes:
                self._results.popitem(last=False)
