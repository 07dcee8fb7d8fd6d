"""Quality estimates of unlabelled images, shared between the server and its background processes."""

import json
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ofl_sam2.atomic import atomic_write_text


@dataclass(frozen=True)
class Score:
    """Estimated quality in [0, 1] of the result that snapshot `version` gives for an image."""

    quality: float
    version: int


class Scores:
    """A small JSON file: image id -> score. Any thread and process may call it.

    Args:
        path: the file; made when the first score comes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path.with_suffix(".lock"))

    def read(self) -> dict[str, Score]:
        """All scores; a damaged file counts as empty, since scores can be estimated again."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            return {image: Score(float(entry["quality"]), int(entry["version"])) for image, entry in content.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def put(self, image_id: str, score: Score) -> None:
        """Keep the score of an image, unless there is one of a newer snapshot."""
        with self._lock:
            scores = self.read()
            if image_id in scores and scores[image_id].version > score.version:
                return
            self._write({**scores, image_id: score})

    def forget_newer(self, version: int) -> None:
        """Drop the scores of snapshots after this one, which were taken back."""
        with self._lock:
            self._write({image: score for image, score in self.read().items() if score.version <= version})

    def _write(self, scores: dict[str, Score]) -> None:
        atomic_write_text(self._path, json.dumps({image: vars(entry) for image, entry in scores.items()}))
