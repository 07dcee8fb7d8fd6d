"""Training, batch inference and the choice of the next image, checked before MONAI Label starts them."""

import logging
import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from fastapi import APIRouter, HTTPException
from lib.datastores.archive import ArchiveError
from lib.trainers.ofl_sam2 import read_settings
from monailabel.endpoints import batch_infer as monai_batch
from monailabel.endpoints import scoring as monai_scoring
from monailabel.endpoints import train as monai_train
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.utils.async_tasks import utils as background
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.others.generic import file_checksum

from ofl_sam2.errors import InputError
from ofl_sam2.files import read_volume
from server.forms import Admin, Annotator, AnyUser, Options
from server.images import single_file
from server.keys import check_params
from server.lookup import app, require_task

logger = logging.getLogger(__name__)

router = APIRouter()
_CANDIDATES = 10
_choosing = threading.Lock()


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"], summary="The next image to label, {} when none")
def next_sample(user: AnyUser, strategy: str, params: Options = None):
    """With `path`, `name` and `checksum` of the file to load; clients without access to `path` download it."""
    require_task("strategy", app()._strategies, strategy)
    options = params or {}
    with _choosing:
        found = _readable_sample({**options, "strategy": strategy})
        if found is None:
            return {}
        sample, path, name = found
        info = _note_served(sample["id"], strategy, options.get("client_id", user.username))
    return {**sample, **info, "path": str(path), "name": name, "checksum": file_checksum(path)}


def _readable_sample(request: dict[str, Any]) -> tuple[dict[str, Any], Path, str] | None:
    """What a strategy chooses, and path and name of its file; some images that cannot be read are passed over.

    Raises:
        InputError, ArchiveError: none of them could be read.
    """
    unreadable: dict[str, Exception] = {}
    while len(unreadable) < _CANDIDATES:
        sample = app().next_sample({**request, "passed_over": list(unreadable)})
        if not sample or sample["id"] in unreadable:
            break
        try:
            path, name = single_file(sample["id"])
            _read_once(path, path.stat().st_mtime_ns)
            return sample, path, name
        except (InputError, ArchiveError) as error:
            unreadable[sample["id"]] = error
            logger.warning("Image %s is not handed out: %s", sample["id"], error)
            _note_served(sample["id"], request["strategy"], None)
    if unreadable:
        raise [*unreadable.values()][-1]
    return None


@lru_cache(maxsize=1 << 14)
def _read_once(path: Path, changed: int) -> None:
    """Raise InputError where an image cannot be read as it is now: nobody must find that out after the drawing."""
    read_volume(path)


def _note_served(image: str, strategy: str, client: str | None) -> dict[str, Any]:
    """Note that a strategy chose an image, so that others come first from now on; return what is known about it."""
    studies = app().datastore()
    info = studies.get_image_info(image)
    if info:
        served = {"strategy": {**info.get("strategy", {}), strategy: {"ts": int(time.time()), "client_id": client}}}
        studies.update_image_info(image, served)
        info = {**info, **served}
    return info


@router.post("/train/{model}", tags=["Train"], summary="Train on all final labels")
def train(user: Admin, model: str, params: Options = None, run_sync: bool = False, enqueue: bool = False):
    """A task in a process of its own; GET /train/ tells how far it is."""
    require_task("trainer", app()._trainers, model)
    check_params(params or {})
    read_settings(params or {})
    if not enqueue:
        _require_idle("train", "training", "/train/")
    return monai_train.run_model(model, params, run_sync, enqueue)


@router.post("/train/", include_in_schema=False)
def train_all(user: Admin, params: Options = None, run_sync: bool = False):
    """As `train` for every model, with the options of each under its name; OHIF's *Update Model*."""
    for model in app()._trainers:
        options = (params or {}).get(model) or {}
        if not isinstance(options, dict):
            raise InputError(f"The options of '{model}' are no JSON object. Send one such as {{}}.")
        check_params(options)
        read_settings(options)
    _require_idle("train", "training", "/train/")
    return monai_train.run(params, run_sync)


@router.post("/batch/infer/{model}", tags=["Infer"], summary="Segment many images")
def batch_infer(
    user: Admin,
    model: str,
    images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
    params: Options = None,
    run_sync: bool = False,
):
    """A task in a process of its own; labels are saved with the tag 'original' unless params say otherwise."""
    require_task("model", app()._infers, model)
    options = {"label_tag": "original", "multi_gpu": torch.cuda.is_available(), **(params or {})}
    check_params(options)
    _require_idle("batch_infer", "batch inference", "/batch/infer")
    return monai_batch.run(model, images, options, run_sync)


@router.post("/scoring/{method}", tags=["Scoring"], summary="Estimate the quality of unlabelled images")
def score(user: Annotator, method: str, params: Options = None, run_sync: bool = False):
    """A task in a process of its own; it stops when a user waits."""
    require_task("scoring method", app()._scoring_methods, method)
    check_params(params or {})
    _require_idle("scoring", "scoring", "/scoring/")
    return monai_scoring.run_method(method, params, run_sync)


def end_all() -> None:
    """Kill the running tasks and drop the waiting ones: Python does not end before their threads do."""
    while background.background_executors:
        kind, executor = background.background_executors.popitem()
        executor.shutdown(wait=False, cancel_futures=True)
        with suppress(psutil.NoSuchProcess):  # it has just ended
            AsyncTask.stop(kind)


def _require_idle(kind: str, name: str, address: str) -> None:
    """Raise HTTPException 429 while a task of this kind runs."""
    running, _ = AsyncTask.status(kind, check_if_running=True)
    if running:
        raise HTTPException(429, f"A {name} runs already. Wait for its end, or stop it with DELETE {address}.")
