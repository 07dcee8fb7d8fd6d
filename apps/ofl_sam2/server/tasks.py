"""Training, batch inference and the choice of the next image, checked before MONAI Label starts them."""

import torch
from fastapi import APIRouter, HTTPException
from monailabel.endpoints import activelearning as monai_activelearning
from monailabel.endpoints import batch_infer as monai_batch
from monailabel.endpoints import scoring as monai_scoring
from monailabel.endpoints import train as monai_train
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.others.generic import file_checksum

from server.forms import Admin, Annotator, AnyUser, Options
from server.images import single_file
from server.keys import check_params
from server.lookup import app, require_task

router = APIRouter()


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"], summary="The next image to label, {} when none")
def next_sample(user: AnyUser, strategy: str, params: Options = None):
    """With `path`, `name` and `checksum` of the file to load; clients without access to `path` download it."""
    require_task("strategy", app()._strategies, strategy)
    sample = monai_activelearning.sample(strategy, params, user.username)
    if not sample:
        return {}
    path, name = single_file(sample["id"])
    return {**sample, "path": str(path), "name": name, "checksum": file_checksum(path)}


@router.post("/train/{model}", tags=["Train"], summary="Train on all final labels")
def train(user: Admin, model: str, params: Options = None, run_sync: bool = False, enqueue: bool = False):
    """A task in a process of its own; GET /train/ tells how far it is."""
    require_task("trainer", app()._trainers, model)
    check_params(params or {})
    if not enqueue:
        _require_idle("train", "training", "/train/")
    return monai_train.run_model(model, params, run_sync, enqueue)


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


def _require_idle(kind: str, name: str, address: str) -> None:
    """Raise HTTPException 429 while a task of this kind runs."""
    running, _ = AsyncTask.status(kind, check_if_running=True)
    if running:
        raise HTTPException(429, f"A {name} runs already. Wait for its end, or stop it with DELETE {address}.")
