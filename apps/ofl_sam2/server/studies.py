"""What MONAI Label does to app and studies, in worker threads: it may wait for a DICOMweb server, or for a lock."""

import os
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Form
from fastapi.responses import FileResponse
from monailabel.endpoints import datastore as monai
from monailabel.endpoints.info import app_info

from server.downloads import TemporaryFileResponse
from server.forms import Admin, Annotator, AnyUser

router = APIRouter()
Info = Annotated[str, Form(description="a JSON object")]


@router.get("/info/", tags=["App"], summary="Models, trainers, strategies, options, and how much is labelled")
def info(user: AnyUser) -> dict[str, Any]:
    """What clients read when they connect."""
    return app_info()


@router.get("/datastore/", tags=["Datastore"], summary="How much is labelled, or the list of images and labels")
def overview(user: AnyUser, output: monai.ResultType | None = None) -> Any:
    """`all` lists images and labels, `train` pairs of files, `stats` counts."""
    return monai.datastore(output)


@router.get("/datastore/dataset", tags=["Datastore"], summary="Download all labelled images with their labels as a zip")
def dataset(background_tasks: BackgroundTasks, user: Annotator, limit_cases: int | None = None) -> FileResponse:
    """Series that are not here yet are copied from the DICOMweb server first."""
    path = monai.download_dataset(limit_cases).path
    background_tasks.add_task(os.unlink, path)
    return TemporaryFileResponse(path, media_type="application/zip", filename="dataset.zip")


@router.put("/datastore/image/info", tags=["Datastore"], summary="Add to what is known about an image")
def describe_image(user: Annotator, image: str, info: Info = "{}") -> None:
    """Entries of the same name are replaced."""
    monai.update_image_info(image, info, user.username)


@router.put("/datastore/label/info", tags=["Datastore"], summary="Add to what is known about a label")
def describe_label(user: Annotator, label: str, tag: str, info: Info = "{}") -> None:
    """Entries of the same name are replaced."""
    monai.update_label_info(label, tag, info, user.username)


@router.delete("/datastore/", include_in_schema=False)
@router.delete("/datastore/image", tags=["Datastore"], summary="Remove an image and its labels")
def remove_image(user: Admin, id: str) -> dict[str, Any]:
    """Its labels are forgotten within seconds; images on a DICOMweb server are deleted there."""
    return monai.remove_image(id, user.username)


@router.delete("/datastore/label", tags=["Datastore"], summary="Remove a label")
def remove_label(user: Admin, id: str, tag: str) -> dict[str, Any]:
    """The label is forgotten within seconds."""
    return monai.remove_label(id, tag, user.username)
