"""POST /infer/{model}: in a worker thread, so that the server goes on answering, and behind a bounded queue."""

import json

from fastapi import APIRouter, BackgroundTasks, HTTPException
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.endpoints import infer as monai

from server.forms import AnyUser, OptionalUpload, Params
from server.keys import check_upload, parse_params
from server.lookup import app, require_image, require_session, require_task
from server.queue import InferenceQueue

router = APIRouter(tags=["Infer"])
queue = InferenceQueue()


@router.post(
    "/infer/{model}",
    summary="Segment an image of the studies, of a session, or of the request",
    responses={
        200: monai.router.responses[200],
        404: {"description": "Unknown model, image or session"},
        503: {"description": "Busy; Retry-After says when to try again"},
    },
)
def infer(
    background_tasks: BackgroundTasks,
    user: AnyUser,
    model: str,
    image: str = "",
    session_id: str = "",
    params: Params = "{}",
    file: OptionalUpload = None,
    label: OptionalUpload = None,
    output: monai.ResultType | None = None,
):
    """The result comes as form fields `params` (JSON) and `image` (label map), or only one of them by `output`."""
    options = parse_params(params)
    require_task("model", app()._infers, model)
    if session_id:
        require_session(session_id)
    elif file:
        check_upload(file)
    elif image:
        require_image(image)
    else:
        raise HTTPException(400, "Nothing to segment: give image, session_id, or a file.")
    if label:
        check_upload(label)
    if output == monai.ResultType.dicom_seg:
        _check_dicom_seg(options)
    with queue.turn():
        return monai.run_inference(background_tasks, model, image, session_id, json.dumps(options), file, label, output)


def _check_dicom_seg(options: dict) -> None:
    if not isinstance(app().datastore(), DICOMWebDatastore):
        raise HTTPException(400, "DICOM SEG needs studies on a DICOMweb server. Ask for output=image instead.")
    if not options.get("label_info"):
        raise HTTPException(400, "DICOM SEG needs names: give 'label_info' in params.")
