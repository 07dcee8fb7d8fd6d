"""The learned model as a download: what was fitted, without features and masks of patients unless asked for."""

import shutil
import tempfile
from pathlib import Path

from fastapi import APIRouter, BackgroundTasks, HTTPException

from ofl_sam2.service.snapshots import Snapshot
from server.downloads import TemporaryFileResponse
from server.forms import Admin
from server.lookup import app, require_task
from server.ofl import describe

router = APIRouter(prefix="/model", tags=["Model"])
_READ_ONLY = "A model is made by saving labels and training, and undone by POST /ofl/snapshots/{version}/rollback."


@router.get("/{model}", summary="Download the newest snapshot as a zip")
def download(background_tasks: BackgroundTasks, user: Admin, model: str, pool: bool = False):
    """With `pool`, it holds frozen features and masks of the labelled slices: protect it as you protect the images."""
    version = _current(model).version
    folder = Path(tempfile.mkdtemp())
    name = f"{model}_{version:06d}.zip"
    try:
        app().snapshots.export(version, folder / name, with_pool=pool)
    except BaseException:
        shutil.rmtree(folder)
        raise
    background_tasks.add_task(shutil.rmtree, folder)
    return TemporaryFileResponse(folder / name, media_type="application/zip", filename=name)


@router.get("/info/{model}", summary="The newest snapshot and what it was learned from")
def info(user: Admin, model: str):
    """What `/ofl/snapshots` says about the current one."""
    return describe(_current(model))


def _current(model: str) -> Snapshot:
    require_task("model", app()._infers, model)
    snapshot = app().snapshots.current()
    if snapshot is None:
        raise HTTPException(404, "Nothing has been learned yet, so there is no model. Save a label first.")
    return snapshot


@router.put("/{model}", summary="Not allowed", include_in_schema=False)
@router.delete("/{model}", summary="Not allowed", include_in_schema=False)
def refuse(user: Admin, model: str):
    """MONAI Label would overwrite or move files of a published snapshot."""
    raise HTTPException(405, _READ_ONLY)
