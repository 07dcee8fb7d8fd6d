"""The inference task `ofl_sam2`: every learned structure of an image, without prompts."""

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.infers.options import InferOptions, offered, read_options
from lib.results import result_key
from lib.scores import Score
from lib.workspace import Workspace
from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.files import image_suffix, read_volume, write_labels
from ofl_sam2.segmenter import Segmentation, VolumeSegmenter, with_settings
from ofl_sam2.service.label_files import LABEL_SUFFIXES
from ofl_sam2.service.snapshots import Snapshot
from ofl_sam2.settings import Settings
from ofl_sam2.volume import Volume

logger = logging.getLogger(__name__)

NOTHING_FOUND = {"background": 0}  # of no names at all, Slicer's module makes all names of the model

_DESCRIPTION = "Segments the structures learned from the saved labels, without prompts (OFL-SAM2)"


class OFLSAM2Infer(InferTask):
    """Segments with the newest whole snapshot; labels saved meanwhile are learned beside it.

    Args:
        workspace: state of the app.
        drafts: whether results can be stored beside their images.
    """

    def __init__(self, workspace: Workspace, drafts: bool = False) -> None:
        super().__init__(InferType.SEGMENTATION, labels={}, dimension=3, description=_DESCRIPTION)
        self._workspace, self._drafts = workspace, drafts

    def is_valid(self) -> bool:
        """Always offered; before the first label a request is refused in words."""
        return True

    def info(self) -> dict[str, Any]:
        """What `/info/` shows: all known structures with their values 1..N."""
        return {**super().info(), "labels": self._workspace.registry.names()}

    def config(self) -> dict[str, Any]:
        """The choices of a client."""
        choices = offered(self._workspace.registry.names(), Settings(), self._workspace.options.device)
        return {**choices, **({"store_draft": ["off", "on"]} if self._drafts else {})}

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Segment `request["image"]`, a path.

        Returns:
            The label map, a temporary file that the caller removes, and what is known about it.

        Raises:
            InputError: nothing has been learned yet, an unreadable image, or unknown options.
            Cancelled: the job was cancelled.
        """
        started = time.perf_counter()
        image_id = str(request.get("image_id") or Path(request["image"]).name)
        kind = "batch" if request.get("batch") else "infer"
        snapshot, segmenter = self._workspace.serving.current()
        options = read_options(request, segmenter.settings, self._workspace.options.device)
        _check_structure(options, segmenter)
        with self._workspace.jobs.running(kind, image_id) as job:
            volume = read_volume(request["image"])
            read = time.perf_counter()
            with self._workspace.segmenting:
                key = result_key(snapshot, volume, options.changes)
                result = self._workspace.results.get(key)
                if result is None:
                    result = with_settings(segmenter, **options.changes).segment(volume, job.progress, job.cancel)
                    self._workspace.results.put(key, result)
        segmented = time.perf_counter()
        if request.get("image_id") and not options.changes:
            try:
                self._workspace.scores.put(image_id, Score(_overall(result), snapshot.version))
            except (OFLError, OSError) as error:  # it only helps to choose the next image
                logger.warning("The quality of %s is not kept: %s", image_id, error)
        labels, names, left_out = _selected(result, options)
        file = _write(labels, volume, request.get("result_extension"))
        finished = time.perf_counter()
        if not segmenter.learner.fitted:
            logger.warning("The learner is not fitted to %s yet: train before you rely on results.", snapshot.folder)
        return file, {
            **_report(result, snapshot),
            "fitted": segmenter.learner.fitted,
            "label_names": names or (NOTHING_FOUND if options.by_position else {}),
            "left_out": left_out,
            "latencies": {
                "pre": round(read - started, 3),
                "infer": round(segmented - read, 3),
                "write": round(finished - segmented, 3),
                "total": round(finished - started, 3),
            },
        }


def _check_structure(options: InferOptions, segmenter: VolumeSegmenter) -> None:
    learned = segmenter.structures.values()
    if options.structure is not None and options.structure not in learned:
        raise InputError(f"The structure '{options.structure}' has not been learned. Learned: {', '.join(learned)}.")


def _selected(result: Segmentation, options: InferOptions) -> tuple[np.ndarray, dict[str, int], list[str]]:
    """The label map a client gets.

    Returns:
        The labels; name -> value of the structures in them; names of the structures left out for their quality.
    """
    wanted = result.structures
    if options.structure is not None:
        wanted = {value: name for value, name in wanted.items() if name == options.structure}
    kept = {value: name for value, name in wanted.items() if result.quality[name] >= options.quality_threshold}
    present = set(np.unique(result.labels).tolist())
    found = [value for value in kept if value in present]
    shown = {value: number if options.by_position else value for number, value in enumerate(found, start=1)}
    lookup = np.zeros(max(result.structures) + 1, result.labels.dtype)
    for value, number in shown.items():
        lookup[value] = number
    names = {kept[value]: number for value, number in shown.items()}
    return lookup[result.labels], names, sorted(set(wanted.values()) - set(kept.values()))


def _report(result: Segmentation, snapshot: Snapshot) -> dict[str, Any]:
    """What is known about a result, as plain values for JSON."""
    names = result.structures.values()
    confidence = np.round(result.confidence.T.astype(float), 3).tolist()
    return {
        "structures": {name: value for value, name in result.structures.items()},
        "volume_ml": {name: round(ml, 4) for name, ml in result.volume_ml.items()},
        "quality": round(_overall(result), 4),
        "structure_quality": {name: round(quality, 4) for name, quality in result.quality.items()},
        "slice_confidence": dict(zip(names, confidence, strict=True)),
        "snapshot": snapshot.version,
        "learned_from": sorted(snapshot.notes.get("learned", {})),
        "trained_on": sorted(snapshot.notes.get("trained_on", {})),
    }


def _overall(result: Segmentation) -> float:
    return float(np.mean(list(result.quality.values())))


def _write(labels: np.ndarray, volume: Volume, extension: str | None) -> str:
    """Write a label map in the grid of its image to a new temporary file."""
    own = image_suffix(volume.path).lower() if volume.path is not None else ""
    suffix = extension or (own if own in LABEL_SUFFIXES else ".nii.gz")
    descriptor, path = tempfile.mkstemp(suffix=suffix, prefix="ofl_sam2_")
    os.close(descriptor)
    try:
        write_labels(path, labels, volume)
    except BaseException:
        os.unlink(path)
        raise
    return path
