"""The app: studies, journal, learning and tasks put together.

    save label -> journal -> studies -> learning thread -> snapshot -> infer, train, score

One server process of a model root learns. The processes of training, batch inference and scoring build the same app,
which starts nothing and changes nothing until it is told that it is the server.
"""

import logging
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import remove_file
from monailabel.utils.sessions import Sessions

from lib.cases import FINAL, image_path, labelled_case, read_case, result_tag
from lib.configs.ofl_sam2 import OFLSAM2
from lib.datastores.archive import ArchiveError
from lib.datastores.dicomweb import JournaledDICOMWebDatastore, connect
from lib.datastores.local import JournaledLocalDatastore
from lib.infers.batch import BatchInfer
from lib.options import Options
from lib.workspace import Workspace
from ofl_sam2 import __version__
from ofl_sam2.atomic import atomic_write_text
from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.service.journal import LabelEvent, LabelJournal
from ofl_sam2.service.learning import LearningService

logger = logging.getLogger(__name__)

_NAME = "ofl_sam2"
_REFUSED = 5
_KEPT = ("label_names", "quality", "structure_quality", "volume_ml", "snapshot", "latencies")
_DESCRIPTION = "Learns structures from the labels you save and segments the other images without prompts"


class OFLSAM2App(MONAILabelApp):
    """Online few-shot learning with SAM2 for MONAI Label.

    Attributes:
        workspace: state below the model root; `registry`, `snapshots`, `serving` and `jobs` are parts of it.
        journal: who saved which label when, and the labels that there are.
        service: learns labels in a thread of its own.

    Args:
        app_dir: folder of the app.
        studies: folder of images, or address of a DICOMweb server.
        conf: see `Options`.

    Raises:
        InputError: configuration that cannot be read, or studies that are no folder.
        ModelError: the model root was learned with another backbone.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.options = Options.from_conf(Path(app_dir), conf)
        self.workspace = Workspace(self.options)
        self.workspace.check_backbone()
        self.registry, self.snapshots = self.workspace.registry, self.workspace.snapshots
        self.serving, self.jobs = self.workspace.serving, self.workspace.jobs
        self.journal = LabelJournal(self.options.model_root / "journal")
        self._tasks = OFLSAM2(self.workspace)
        self._server_lock = FileLock(self.options.model_root / "server.lock", thread_local=False)
        super().__init__(app_dir, studies, conf, name="OFL-SAM2", description=_DESCRIPTION, version=__version__)
        self._auto_update_scoring = not self.options.skip_scoring
        self.service = LearningService(
            self.serving,
            self.registry,
            self.workspace.open_base,
            lambda image_id: read_case(self.datastore(), self.registry, image_id),
            lambda error: isinstance(error, ArchiveError) and error.status != HTTPStatus.NOT_FOUND,
        )

    def init_datastore(self) -> Datastore:
        """The studies, with a journal before every save.

        Raises:
            InputError: they are neither a folder nor a DICOMweb server.
        """
        if self.studies.startswith(("http://", "https://")):
            max_bytes = int(self.options.series_gb * 1e9)
            return connect(self.studies, self.workspace.cache_folder / "dicomweb", self.journal, max_bytes)
        if not Path(self.studies).is_dir():
            raise InputError(f"{self.studies} is no folder. Name the folder that holds the images.")
        return JournaledLocalDatastore(self.studies, self.journal)

    def init_infers(self) -> dict[str, InferTask]:
        """The inference task; results can be stored as drafts on a DICOMweb server."""
        return {_NAME: self._tasks.infer(drafts=isinstance(self.datastore(), JournaledDICOMWebDatastore))}

    def init_trainers(self) -> dict[str, TrainTask]:
        """The training task."""
        return {_NAME: self._tasks.trainer()}

    def init_strategies(self) -> dict[str, Strategy]:
        """The active learning strategies."""
        return self._tasks.strategy()

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """The scoring method."""
        return self._tasks.scoring_method()

    def init_batch_infer(self) -> BatchInfer:
        """One image after the other."""
        return BatchInfer()

    def server_mode(self, mode: bool) -> None:
        """Become the one server of this model root.

        Raises:
            OFLError: another server has it, or it holds labels of other studies.
        """
        if mode and not self._server_lock.is_locked:
            try:
                self._server_lock.acquire(timeout=0)
            except Timeout as error:
                raise OFLError(
                    f"Another server uses {self.options.model_root} already. "
                    "Stop it, or start this one with another --conf model_root PATH."
                ) from error
            try:
                self._keep_to_studies()
            except OFLError:
                self._server_lock.release()
                raise
        super().server_mode(mode)

    def on_init_complete(self) -> None:
        """Bring studies, journal and learned state together, and learn from now on."""
        studies = self.datastore()
        studies.on_label = lambda image_id, event: self.service.learn(image_id, event.version)
        studies.on_delete = self.service.forget
        if isinstance(studies, JournaledDICOMWebDatastore):
            studies.check = self._check_label
        studies.reconcile()
        self.journal.prune()
        latest = self.journal.latest()
        self.service.reconcile({image: event.version for (image, tag), event in latest.items() if tag == FINAL})
        self.service.start()
        if settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD:
            studies.watch()
        super().on_init_complete()

    def close(self) -> None:
        """Stop to watch and to learn, and let another server have the model root."""
        self.datastore().close()
        self.service.close()
        self._server_lock.release()

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a strategy chooses as the next image to label; {} when none. The image is not fetched."""
        sample = self._strategies[request["strategy"]](request, self.datastore()) or {}
        if sample and self._auto_update_scoring:
            self.async_scoring(None)
        return sample

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Segment an image of the studies, or one that lies at a path (an upload, a session).

        Args:
            request: `model`, `image` (id or path), options; with `save_label` the result of an image of the studies is
                saved under `label_tag`.
            datastore: studies; default those of the app.

        Returns:
            `file` with the label map, `label` (its id if it was saved, else the file), `tag` and `params`.

        Raises:
            MONAILabelException: unknown model or image.
            InputError: see `OFLSAM2Infer`.
        """
        task = self._infers.get(request.get("model", ""))
        if task is None:
            known = ", ".join(self._infers)
            raise MONAILabelException(
                MONAILabelError.INVALID_INPUT, f"There is no model '{request.get('model')}' here. Use {known}."
            )
        studies, image = datastore or self.datastore(), str(request.get("image") or "")
        in_studies = image in studies.list_images()
        if not in_studies and not Path(image).is_absolute():
            raise ImageNotFoundException(f"The studies hold no image '{image}'. Refresh the list of images.")
        path, tag = image_path(studies, image) if in_studies else Path(image), result_tag(request)
        if self.snapshots.current() is None:
            self._explain_nothing_learned()
        file, params = task({**request, "image": str(path), "image_id": image if in_studies else None})
        label = file
        if in_studies and request.get("save_label"):
            names = [{"name": name, "idx": value} for name, value in params["label_names"].items()]
            details = {
                "model": request["model"],
                "label_info": names,
                "label_names": params["label_names"],
                "params": {name: params[name] for name in _KEPT},
            }
            try:
                label = studies.save_label(image, file, tag, details)
            except BaseException:
                remove_file(file)
                raise
        return {"label": label, "tag": tag, "file": file, "params": params}

    def status(self) -> dict[str, Any]:
        """What is served, learned and running, and which labels were refused last, as plain values for JSON."""
        learning = self.service.status()
        return {
            "version": __version__,
            "snapshot": learning.pop("snapshot"),
            "structures": self.registry.names(),
            "jobs": [job.to_dict() for job in self.jobs.list()],
            "device": self.options.device,
            "learning": learning,
            "refused": [_refusal(event, reason) for event, reason in self.journal.refusals()[-_REFUSED:]],
        }

    def _keep_to_studies(self) -> None:
        """Note where the studies are. Others may use the ids of images labelled here for other images."""
        note, folder = self.options.model_root / "studies.txt", Path(self.studies).resolve()
        studies = str(folder) if folder.is_dir() else self.studies.rstrip("/")
        before = note.read_text(encoding="utf-8").strip() if note.exists() else studies
        same = before == studies
        if folder.is_dir() and not same:
            moved = not Path(before).is_dir()
            same = self.datastore().holds_a_journaled_label() if moved else folder.samefile(before)
        if self.journal.latest() and not same:
            raise OFLError(
                f"{self.options.model_root} holds labels of the studies in {before}, not in {studies}. Give these "
                f"their own with --conf model_root PATH. If they are a copy of the others, remove {note} first."
            )
        atomic_write_text(note, f"{studies}\n")

    def _check_label(self, image_id: str, label: Path, label_info: list[dict[str, Any]]) -> None:
        """Refuse a label that cannot be learned from."""
        labelled_case(image_id, image_path(self.datastore(), image_id), label, label_info, self.registry)

    def _explain_nothing_learned(self) -> None:
        """Raise InputError if a label was saved and is not learned yet, with the reason if it cannot be."""
        if not any(tag == FINAL for _, tag in self.journal.latest()):
            return
        status = self.service.status()
        reasons = [status["problem"]] if status["problem"] else list(status["errors"].values())
        if reasons:
            raise InputError(f"The first label cannot be learned: {reasons[0]}")
        if status["state"] in ("waiting", "learning"):
            raise InputError("The first label is still being learned. Try again in a few seconds.")

    def cleanup_sessions(self) -> None:
        """Remove uploads that have expired, also those of an earlier server, and what is left of broken ones."""
        sessions = self.sessions()
        if sessions is None:
            return
        for folder in [path for path in Path(sessions.store_path).glob("*") if path.is_dir()]:
            try:
                known = sessions.get_session(folder.name, update_ts=False)
                ends = known.last_access_ts + known.expiry if known else folder.stat().st_mtime + sessions.expiry
            except (AttributeError, OSError, ValueError) as error:
                logger.warning("The session %s cannot be read, and is removed: %s", folder, error)
                ends = 0
            if ends < time.time():
                sessions.remove_session(folder.name)

    def _load_sessions(self, load: bool = False) -> Sessions | None:
        """Uploaded images, in the cache of the app unless MONAI Label was told another place."""
        if not load:
            return None
        folder = settings.MONAI_LABEL_SESSION_PATH or str(self.workspace.cache_folder / "sessions")
        return Sessions(folder, settings.MONAI_LABEL_SESSION_EXPIRY)


def _refusal(event: LabelEvent, reason: str) -> dict[str, str | None]:
    series = event.details.get("SeriesInstanceUID")
    return {"image": event.image, "series": series, "sha256": event.sha256, "time": event.time, "reason": reason}
