"""Training, batch inference and the choice of the next image, checked before MONAI Label starts them."""

import torch
from fastapi import APIRouter
from monailabel.endpoints import activelearning as monai_activelearning
from monailabel.endpoints import batch_infer as monai_batch
from monailabel.endpoints import train as monai_train
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType

from server.forms import Admin, AnyUser, Options
from server.keys import check_params
from server.lookup import app, require_task

router = APIRouter()


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"], summary="The next image to label, {} when none")
def next_sample(user: AnyUser, strategy: str, params: Options = None):
    """Strategies may look at the images, so this runs in a worker thread."""
    require_task("strategy", app()._strategies, strategy)
    return monai_activelearning.sample(strategy, params, user.username)


@router.post("/train/{model}", tags=["Train"], summary="Train on all final labels")
def train(user: Admin, model: str, params: Options = None, run_sync: bool = False, enqueue: bool = False):
    """A task in a process of its own; GET /train/ tells how far it is."""
    require_task("trainer", app()._trainers, model)
    check_params(params or {})
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
    return monai_batch.run(model, images, options, run_sync)
