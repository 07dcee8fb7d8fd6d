"""Predictions stored beside their image, for a viewer to load, correct and export."""

from typing import Any

from fastapi import APIRouter

from server.forms import Annotator, Params
from server.inference import queue
from server.keys import parse_params
from server.lookup import app, require_image, require_task
from server.predictions import dicomweb_studies, predict

router = APIRouter(prefix="/ofl", tags=["OFL-SAM2"])


@router.post(
    "/drafts",
    summary="Segment an image and store the result on the DICOMweb server as a draft",
    responses={
        400: {"description": "No DICOMweb server, or nothing was segmented"},
        404: {"description": "Unknown model or image"},
        502: {"description": "The DICOMweb server does not answer, or refuses"},
        503: {"description": "Busy; Retry-After says when to try again"},
    },
)
def store_draft(user: Annotator, image: str, model: str = "ofl_sam2", params: Params = "{}") -> dict[str, Any]:
    """A DICOM SEG series of its own. It is not learned from; what a person makes of it and exports is."""
    options = parse_params(params)
    require_task("model", app()._infers, model)
    studies = dicomweb_studies()
    require_image(image)
    with queue.turn():
        draft, result = predict(image, model, options, studies.store_draft)
    return {
        "image": image,
        "study": draft.StudyInstanceUID,
        "series": draft.SeriesInstanceUID,
        "description": draft.SeriesDescription,
        "params": result,
    }
