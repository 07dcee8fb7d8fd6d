"""The scoring method `quality`: estimates in the background how well unlabelled images would be segmented."""

import logging
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.cases import image_path
from lib.datastores.archive import ArchiveError
from lib.scores import Score
from lib.workspace import Workspace
from ofl_sam2.errors import Cancelled, InputError
from ofl_sam2.files import read_volume
from ofl_sam2.frames import natural_key
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.service.snapshots import Snapshot

logger = logging.getLogger(__name__)


class QualityScoring(ScoringMethod):
    """Fills in the quality estimates that the strategy `most_uncertain` reads; it gives way to users who wait.

    Args:
        workspace: state of the app.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__("Estimates the quality of unlabelled images in the background")
        self._workspace = workspace

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score the unlabelled images that have no score of the current snapshot yet.

        Returns:
            How many were scored, which could not be and why, and whether a user's request stopped it.

        Raises:
            InputError: nothing has been learned yet.
        """
        snapshot, segmenter = self._workspace.serving.current()
        scores = self._workspace.scores.read()
        images = sorted(datastore.get_unlabeled_images(), key=natural_key)
        wanted = [image for image in images if image not in scores or scores[image].version != snapshot.version]
        scored, failed = 0, {}
        for image in wanted:
            try:
                self._score(image, datastore, snapshot, segmenter)
                scored += 1
            except (InputError, ArchiveError) as error:
                failed[image] = str(error)
                logger.warning("%s cannot be scored: %s", image, error)
            except Cancelled:
                logger.info("Scoring stopped after %d of %d images: a user waits", scored, len(wanted))
                return {"scored": scored, "failed": failed, "stopped": True}
        return {"scored": scored, "failed": failed, "stopped": False}

    def _score(self, image: str, datastore: Datastore, snapshot: Snapshot, segmenter: VolumeSegmenter) -> None:
        jobs = self._workspace.jobs
        with jobs.running("scoring", image) as job:

            def progress(done: int, total: int) -> None:
                job.progress(done, total)
                if jobs.user_waits():
                    job.cancel.cancel()

            progress(0, 0)
            job.cancel.check()
            volume = read_volume(image_path(datastore, image))
            with self._workspace.segmenting:
                result = segmenter.segment(volume, progress, job.cancel)
            quality = sum(result.quality.values()) / len(result.quality)
            self._workspace.scores.put(image, Score(quality, snapshot.version))
