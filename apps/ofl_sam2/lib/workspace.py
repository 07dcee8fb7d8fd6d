"""Everything the app keeps below its model root, shared by its tasks."""

import logging
import threading
from functools import cached_property
from pathlib import Path

from lib.jobs import Jobs
from lib.options import Options
from lib.results import RecentResults
from lib.scores import Scores
from lib.single_files import SingleFiles
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.errors import ModelError, OFLError
from ofl_sam2.learner.load import shipped_learner
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.model_index import read_index
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.service.serving import Serving
from ofl_sam2.service.snapshots import SnapshotStore
from ofl_sam2.service.structures import StructureRegistry
from ofl_sam2.settings import Settings

logger = logging.getLogger(__name__)

_DEFAULT_BACKBONE = "nano"
_MEMORY_BYTES = 128 << 20
_RESULT_BYTES = 64 << 20


class Workspace:
    """The parts below the model root. Nothing is loaded before it is needed, and constructing it writes no model.

    Attributes:
        results: what was segmented lately.
        segmenting: held while this process segments, since one segmentation fills the machine.

    Args:
        options: configuration of the app.

    Raises:
        OFLError: the model root is no folder, or cannot be made.
    """

    def __init__(self, options: Options) -> None:
        root = options.model_root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OFLError(
                f"--conf model_root {root} cannot be used: {error.strerror}. Choose a folder that you may write to."
            ) from error
        self.options = options
        self.registry = StructureRegistry(root / "structures.json", options.labels)
        self.snapshots = SnapshotStore(root / "snapshots")
        self.jobs = Jobs(root / "user_waits.lock")
        self.scores = Scores(root / "scores.json")
        self.segmenting = threading.Lock()
        self.results = RecentResults(_RESULT_BYTES)
        self._unlearned: VolumeSegmenter | None = None

    @property
    def cache_folder(self) -> Path:
        """Where everything lies that can be computed or fetched again."""
        return self.options.model_root / "cache"

    @cached_property
    def cache(self) -> FeatureCache:
        """Frozen features on disk, bounded by `cache_gb`."""
        return FeatureCache(
            self.cache_folder / "features", max_bytes=int(self.options.cache_gb * 1e9), memory_bytes=_MEMORY_BYTES
        )

    @cached_property
    def single_files(self) -> SingleFiles:
        """Images that are folders, as files for clients; bounded by a quarter of `cache_gb`."""
        return SingleFiles(self.cache_folder / "downloads", max_bytes=int(self.options.cache_gb * 1e9 / 4))

    @cached_property
    def serving(self) -> Serving:
        """The newest whole snapshot, loaded when asked for."""
        return Serving(self.snapshots, self.cache, self.options.device)

    def open_base(self) -> VolumeSegmenter:
        """A segmenter that has learned nothing yet.

        Raises:
            InputError: unknown backbone or impossible size.
            WeightsError: its weights are not here.
        """
        name = self.options.backbone or _DEFAULT_BACKBONE
        backbone = load_backbone(name, self.options.image_size, self.options.device)
        learner = shipped_learner(name, backbone.width).to(self.options.device)
        return VolumeSegmenter(backbone, learner, Settings(ct_window=self.options.ct_window), self.cache)

    def encoder(self) -> VolumeSegmenter:
        """What computes features: the segmenter that is served, or one that has learned nothing while there is none."""
        if self.snapshots.current() is not None:
            self._unlearned = None
            return self.serving.current()[1]
        self._unlearned = self._unlearned or self.open_base()
        return self._unlearned

    def check_backbone(self) -> None:
        """Refuse a backbone, input size or CT window other than what the current snapshot was learned with.

        A damaged snapshot is no reason not to start: the server reports it and can roll back.

        Raises:
            ModelError: they differ.
        """
        try:
            current = self.snapshots.current()
            saved = read_index(current.folder) if current else None
        except ModelError as error:
            logger.error("%s", error)
            return
        if saved is None:
            return
        wanted = self.options.backbone or saved.backbone, self.options.image_size or saved.image_size
        if wanted != (saved.backbone, saved.image_size):
            raise ModelError(
                f"{self.options.model_root} was learned with {saved.backbone} at {saved.image_size} pixels, not with "
                f"{wanted[0]} at {wanted[1]}. Change --conf backbone or image_size, or give another --conf model_root."
            )
        window, learned = self.options.ct_window, saved.settings.ct_window
        if window and window != learned:
            raise ModelError(
                f"{self.options.model_root} was learned with the CT window {learned}, not with {window}. "
                "Leave --conf ct_window out, or give another --conf model_root."
            )
