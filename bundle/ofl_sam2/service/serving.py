"""The model that answers requests: the newest snapshot, loaded once."""

import threading

from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.service.snapshots import Snapshot, SnapshotStore
from ofl_sam2.store import load_model


class Serving:
    """Hands out the current snapshot. Any thread may call it.

    Threads share the segmenter they are given: they segment with it, and learn only on a copy (`copy.copy` is enough,
    because learning replaces what a segmenter holds and changes none of it). Whoever is still segmenting when a newer
    snapshot comes keeps the older segmenter. Nobody waits for learning, only for one who loads the same snapshot.

    Args:
        snapshots: where the snapshots are.
        cache: frozen features by content.
        device: "cpu" or "cuda".
    """

    def __init__(self, snapshots: SnapshotStore, cache: FeatureCache | None = None, device: str = "cpu") -> None:
        self.snapshots = snapshots
        self._cache, self._device = cache, device
        self._loaded: tuple[Snapshot, VolumeSegmenter] | None = None
        self._lock = threading.Lock()

    def current(self) -> tuple[Snapshot, VolumeSegmenter]:
        """The current snapshot, and the segmenter loaded from it.

        Raises:
            InputError: nothing has been learned yet.
            ModelError: the snapshot is damaged, or was learned with other backbone weights.
            WeightsError: the backbone's weights are not here.
        """
        with self._lock:
            while (snapshot := self.snapshots.current()) is not None:
                if self._loaded is not None and self._loaded[0] == snapshot:
                    return self._loaded
                try:
                    before = self._loaded[1] if self._loaded else None
                    self._loaded = snapshot, load_model(snapshot.folder, self._device, self._cache, before)
                    return self._loaded
                except (OFLError, OSError):
                    if snapshot == self.snapshots.current():  # else it was removed while it was loaded
                        raise
            self._loaded = None
        raise InputError("Nothing has been learned yet. Save the label of at least one image first.")
