"""The training task `ofl_sam2`: fits learner, fusion and U-Net to all final labels, in a process of its own."""

import logging
import math
from functools import partial
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from lib.cases import image_path, read_unchanged_case
from lib.datastores.archive import ArchiveError
from lib.jobs import ServerToken
from lib.trainers.stats import TrainingStats
from lib.workspace import Workspace
from ofl_sam2.dataset import LazyCases
from ofl_sam2.errors import InputError
from ofl_sam2.files import read_volume
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.service.structures import StructureRegistry
from ofl_sam2.store import load_model
from ofl_sam2.training.settings import EpochReport, TrainingResult, TrainingSettings
from ofl_sam2.training.trainer import train
from ofl_sam2.volume import Volume

logger = logging.getLogger(__name__)

_DESCRIPTION = "Fits few-shot learner, fusion and a 3D U-Net to all final labels; SAM2 stays frozen (OFL-SAM2)"


class OFLSAM2Trainer(TrainTask):
    """Trains the newest snapshot and publishes the result unless it is no better on held-out slices.

    A training that is killed leaves the snapshots as they are, and a checkpoint of the learner that the next one goes
    on from; its U-Net begins anew.

    Args:
        workspace: state of the app.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(_DESCRIPTION)
        self._workspace = workspace
        self._stats = TrainingStats(workspace.options.model_root / "training.json")

    def config(self) -> dict[str, Any]:
        """What a client can choose; `max_epochs` 0 means that the minutes decide alone."""
        return {"minutes": 5.0, "max_epochs": 0, "seed": 0, "device": [self._workspace.options.device]}

    def stats(self) -> dict[str, Any]:
        """See `TrainingStats.show`."""
        return self._stats.show()

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train.

        Returns:
            The statistics, with Dice before and after, and whether the result was published.

        Raises:
            InputError: no label has been saved yet, or options that are no numbers.
        """
        settings = read_settings(request)
        self._stats.begin(settings.epochs or 1)
        try:
            self._train(settings, datastore)
        except Exception as error:
            self._stats.finish(state="failed", published=False, message=str(error))
            raise
        return self._stats.show()

    def _train(self, settings: TrainingSettings, datastore: Datastore) -> None:
        current = self._workspace.snapshots.current()
        if current is None:
            raise InputError("Nothing has been learned yet, so there is nothing to train. Save a label first.")
        options = self._workspace.options
        segmenter = load_model(current.folder, options.device, self._workspace.cache)

        learned = current.notes.get("learned", {})
        cases, trained_on, left_out = _learn_all(segmenter, datastore, self._workspace.registry, learned)
        if not cases:
            raise InputError("The studies hold no final label to train on. Save one first.")
        self._stats.update(state="encoding", cases=len(cases), left_out=left_out)
        checkpoint, token = options.model_root / "training.pt", ServerToken()
        fitted = current.notes.get("trained_on", {})
        result = train(segmenter, cases, settings, checkpoint, self._report, cancel=token, fitted=fitted)
        token.check()
        version = self._publish(segmenter, trained_on) if result.improved else None
        self._stats.finish(state="done", **_outcome(result, version))

    def _report(self, report: EpochReport) -> None:
        total = max(report.epoch, round(report.epoch / report.share)) if report.share else report.epoch + 1
        self._stats.update(state="training", epoch=report.epoch, total_epochs=total, train_loss=round(report.loss, 4))
        logger.info("Epoch %d of about %d: loss %.4f", report.epoch, total, report.loss)

    def _publish(self, trained: VolumeSegmenter, trained_on: dict[str, str]) -> int:
        """Put the fitted parameters on top of the newest snapshot: labels may have come meanwhile."""
        snapshots, options = self._workspace.snapshots, self._workspace.options
        with snapshots.lock():
            newest = snapshots.current()
            if newest is None:
                raise InputError("Every label was taken back while the training ran; its result is not published.")
            segmenter = load_model(newest.folder, options.device, self._workspace.cache, like=trained)
            segmenter.learner.load_state_dict(trained.learner.state_dict())
            known = set(self._workspace.registry.names().values())
            segmenter.unet = trained.unet if trained.unet and known.issuperset(trained.unet.values) else None
            segmenter.solve()
            notes = {**newest.notes, "trained_on": trained_on, "reason": "training"}
            return snapshots.publish(segmenter, notes).version


def _learn_all(
    segmenter: VolumeSegmenter, datastore: Datastore, registry: StructureRegistry, learned: dict[str, str]
) -> tuple[LazyCases, dict[str, str], dict[str, str]]:
    """Learn the final labels that the snapshot, which has `learned` image -> version, does not know as they are now.

    Returns:
        Cases that can be trained on, and image -> version of their labels; the other images and why not.
    """
    cases = LazyCases()
    trained_on, left_out = dict[str, str](), dict[str, str]()
    for image_id in sorted(datastore.get_labeled_images()):
        try:
            case, version = read_unchanged_case(datastore, registry, image_id)
            if image_id not in segmenter.pool.cases or learned.get(image_id) != version:
                names = {value: name for name, value in registry.names().items()}
                segmenter.rename(names)
                values = {*segmenter.pool.values(), *case.values}
                segmenter.learn([case], {value: name for value, name in names.items() if value in values})
            cases.add(case, partial(_read_image, datastore, image_id))
            trained_on[image_id] = version
        except (InputError, ArchiveError) as error:
            left_out[image_id] = str(error)
    return cases, trained_on, left_out


def _read_image(datastore: Datastore, image_id: str) -> Volume:
    return read_volume(image_path(datastore, image_id))


def read_settings(request: dict[str, Any]) -> TrainingSettings:
    """What the request asks for.

    Raises:
        InputError: values that are no numbers, or none that can be trained with.
    """
    try:
        minutes, epochs = float(request.get("minutes") or 5.0), int(request.get("max_epochs") or 0)
        seed = int(request.get("seed") or 0)
    except (TypeError, ValueError) as error:
        raise InputError(f"minutes, max_epochs and seed must be numbers ({error}).") from error
    if not math.isfinite(minutes):
        raise InputError(f"minutes is {minutes}; it must be a finite number.")
    return TrainingSettings(minutes=minutes, epochs=epochs or None, seed=seed)


def _outcome(result: TrainingResult, version: int | None) -> dict[str, Any]:
    """What the statistics say at the end."""
    before, after = (None if dice is None else round(dice, 4) for dice in (result.dice_before, result.dice_after))
    if before is None or after is None:
        compared = "there are too few labels to hold slices out and compare"
    else:
        compared = f"Dice on held-out slices was {before} before and {after} after the training"
    kept = after if version is not None else before
    published = "Not published" if version is None else f"Published as snapshot {version}"
    return {
        "epoch": len(result.reports),
        "total_epochs": len(result.reports),
        "best_metric": kept or 0.0,
        "dice_before": before,
        "dice_after": after,
        "published": version is not None,
        "message": f"{published}: {compared}.",
    }
