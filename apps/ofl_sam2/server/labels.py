"""Uploads: labels and sessions. A label is checked before it takes the place of an older one."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException
from lib.cases import FINAL, image_path, labelled_case
from monailabel.endpoints import session as monai_session

from ofl_sam2.errors import InputError
from ofl_sam2.files import read_labels
from ofl_sam2.service.label_files import check_label_file
from server.forms import Annotator, AnyUser, Params, Upload, Uploads
from server.keys import check_name, parse_params, received
from server.lookup import app, require_image

router = APIRouter()


@router.put(
    "/datastore/label",
    tags=["Datastore"],
    summary="Save a label; the next segmentation has learned from it",
    responses={400: {"description": "The label does not fit its image"}, 404: {"description": "Unknown image"}},
)
def save_label(user: Annotator, image: str, label: Upload, params: Params = "{}", tag: str = FINAL):
    """A label that cannot be learned from is refused and kept in the journal; the label saved before stays."""
    details, tag = {**parse_params(params), "user": user.username}, tag or FINAL
    require_image(image)
    with received(label, image) as path:
        if tag == FINAL:
            _check_label(image, path, details)
            if not details.get("label_info"):
                details["label_info"] = _own_names(path)
        label_id = app().datastore().save_label(image, str(path), tag, details)
    answer = app().on_save_label(image, label_id) or {}
    return {**answer, "image": image, "label": label_id}


def _check_label(image: str, path: Path, details: dict) -> None:
    original = image_path(app().datastore(), image)
    try:
        check_label_file(path)
        labelled_case(image, original, path, details.get("label_info"), app().registry)
    except InputError as error:
        sentence = str(error).replace(str(path), f"the label of '{image}'").replace(str(original), "the image")
        app().journal.record_refused(image, FINAL, path, details, sentence)
        raise InputError(sentence[0].upper() + sentence[1:]) from error


def _own_names(path: Path) -> list[dict[str, Any]]:
    """Names of a label's values that are the app's own; none if the structure of a value was merged into another."""
    names = {value: name for name, value in app().registry.names().items()}
    values = [int(value) for value in np.unique(read_labels(path).voxels) if value]
    return [{"name": names[value], "idx": value} for value in values] if names.keys() >= set(values) else []


@router.put(
    "/session/",
    tags=["Session"],
    summary="Upload an image for a while, to segment it without adding it to the studies",
)
def create_session(user: AnyUser, files: Uploads, uncompress: bool = False, expiry: int = 0):
    """Several files, or an archive with `uncompress`, become a folder: a DICOM series or frames."""
    sessions = app().sessions()
    if sessions is None:
        raise HTTPException(406, "Sessions are switched off on this server (MONAI_LABEL_SESSIONS).")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "image"
        folder.mkdir()
        for file in files:
            target = folder / check_name(file)
            if target.exists():
                raise HTTPException(400, f"Two files are called {target.name}. Send them in an archive.")
            with target.open("wb") as content:
                shutil.copyfileobj(file.file, content)
        if uncompress and len(files) == 1:
            folder = _unpacked(folder / check_name(files[0]), Path(parent) / "unpacked")
        entries = list(folder.iterdir())
        session_id, session = sessions.add_session(str(entries[0] if len(entries) == 1 else folder), expiry)
    return {"session_id": session_id, "session_info": session.to_json()}


@router.get("/session/{session_id}", tags=["Session"], summary="What is known of a session")
def get_session(user: AnyUser, session_id: str, update_ts: bool = False, image: bool = False):
    """Or its image. Of an expired one nothing is known, `{}`: Slicer's panel uploads the image again then."""
    try:
        return monai_session.get_session(session_id, update_ts, image)
    except HTTPException as error:
        if error.status_code != 404 or image:
            raise
        return {}


def _unpacked(archive: Path, folder: Path) -> Path:
    """Unpack a zip or tar into `folder`; members that would leave it are refused."""
    folder.mkdir()
    try:
        options = {} if archive.suffix == ".zip" else {"filter": "data"}
        shutil.unpack_archive(archive, folder, **options)
    except Exception as error:  # a damaged archive can raise anything that the parsers raise
        raise HTTPException(400, f"Cannot unpack {archive.name}: {error}. Send a zip or tar of image files.") from error
    if not any(folder.iterdir()):
        raise HTTPException(400, f"{archive.name} holds no file. Send a zip or tar of image files.")
    return folder
