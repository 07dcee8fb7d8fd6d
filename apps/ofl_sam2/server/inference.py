"""POST /infer/{model}: in a worker thread, so that the server goes on answering, and behind a bounded queue."""

import asyncio
import json
from io import BytesIO
from typing import Any

from fastapi import APIRouter, BackgroundTasks, HTTPException, Response
from fastapi.responses import FileResponse
from lib.infers.options import BY_POSITION, wants_draft
from monailabel.endpoints import infer as monai

from server.downloads import TemporaryFileResponse
from server.forms import AnyUser, OptionalUpload, Params, require_annotator
from server.keys import check_upload, parse_params
from server.lookup import app, require_image, require_session, require_task
from server.predictions import dicomweb_studies, predict
from server.queue import InferenceQueue

_SLICER_DTYPE = "uint8"  # its module asks for that and for the names of what is found, and counts the names

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
    """The result comes as form fields `params` (JSON) and `image` (label map), or only one of them by `output`.

    With `store_draft` on in `params` it is also stored on the DICOMweb server, with `save_label` as a label of the tag
    `original`; both take the role of an annotator.
    """
    options = parse_params(params)
    for_slicer = output in (None, monai.ResultType.all) and options.get("result_dtype") == _SLICER_DTYPE
    options[BY_POSITION] = for_slicer and not options.get("save_label")
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
        return _dicom_seg(image, model, options)
    drafts = None
    if wants_draft(options) or options.get("save_label"):
        require_annotator(user)
    if wants_draft(options):
        drafts = dicomweb_studies()
        require_image(image)
    with queue.turn():
        if drafts:
            predict(image, model, options, drafts.store_draft)
        try:
            answer = monai.run_inference(
                background_tasks, model, image, session_id, json.dumps(options), file, label, output
            )
        except BaseException:
            asyncio.run(background_tasks())  # they remove what was uploaded, and run by themselves after answers only
            raise
    if isinstance(answer, FileResponse):
        return TemporaryFileResponse(answer.path, media_type=answer.media_type, filename=answer.filename)
    return answer


def _dicom_seg(image: str, model: str, options: dict[str, Any]) -> Response:
    """The result as a DICOM SEG, which is stored nowhere."""
    studies = dicomweb_studies()
    require_image(image)
    with queue.turn():
        dataset, _ = predict(image, model, options, studies.segmentation)
    content = BytesIO()
    dataset.save_as(content, write_like_original=False)
    name = f'attachment; filename="{image}.dcm"'
    return Response(content.getvalue(), media_type="application/dicom", headers={"Content-Disposition": name})
