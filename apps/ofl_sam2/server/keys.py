"""Keys of a request that end up in paths: refused before any route sees them if they could leave their folder."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastapi import UploadFile
from fastapi.responses import JSONResponse

from ofl_sam2.errors import InputError
from ofl_sam2.files import image_suffix
from ofl_sam2.service.journal import check_image_id, check_tag
from ofl_sam2.service.label_files import LABEL_SUFFIXES

_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f\x7f]{1,200}")
_SUFFIX = re.compile(r"(\.[A-Za-z0-9]{1,8}){1,3}")
_SESSION = re.compile(r"[0-9a-f-]{1,64}")
_GIVEN_ELSEWHERE = ("image", "model", "session", "session_id")


class CheckedKeys:
    """ASGI middleware: answers 400 to a query that holds an unfit key."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                check_keys(parse_qsl(scope["query_string"].decode("latin-1")))
            except InputError as error:
                await JSONResponse({"detail": str(error)}, 400)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def check_keys(items: Iterable[tuple[str, Any]]) -> None:
    """Refuse values that are unfit for their keys; keys that name nothing in a path are passed over.

    Raises:
        InputError: the first unfit one.
    """
    for key, value in items:
        check = _CHECKS.get(key)
        if check and value not in ("", None):
            if not isinstance(value, str):
                raise InputError(f"'{key}' is {value!r}, which is no text. Give a name.")
            check(value)


def _check_file_name(name: str) -> None:
    if not _FILE_NAME.fullmatch(name):
        raise InputError(f"{name[:80]!r} is no name of a file. Give it without folders.")


def _check_suffix(suffix: str) -> None:
    if not (_SUFFIX.fullmatch(suffix) and suffix.lower().endswith(LABEL_SUFFIXES)):
        raise InputError(f"{suffix[:80]!r} is no suffix of a label map. Use {', '.join(LABEL_SUFFIXES)}.")


def _check_session(session_id: str) -> None:
    if not _SESSION.fullmatch(session_id):
        raise InputError(f"{session_id[:80]!r} is no session. Give the session_id that PUT /session/ answered.")


_CHECKS: dict[str, Callable[[str], None]] = {
    "image": check_image_id,
    "label": check_image_id,
    "id": check_image_id,
    "tag": check_tag,
    "label_tag": check_tag,
    "model_filename": _check_file_name,
    "result_extension": _check_suffix,
    "session_id": _check_session,
}


def parse_params(text: str) -> dict[str, Any]:
    """The JSON object in the form field `params`.

    Raises:
        InputError: no JSON object, or as in `check_params`.
    """
    try:
        params = json.loads(text or "{}")
    except ValueError as error:
        raise InputError(f"The field 'params' is no JSON: {error}. Send an object such as {{}}.") from error
    if not isinstance(params, dict):
        raise InputError("The field 'params' is no JSON object. Send one such as {}.")
    check_params(params)
    return params


def check_params(params: dict[str, Any]) -> None:
    """Refuse a parsed JSON object with unfit keys, or keys that belong into the address.

    Raises:
        InputError: they are named.
    """
    misplaced = [key for key in _GIVEN_ELSEWHERE if key in params]
    if misplaced:
        raise InputError(f"'params' must not hold {', '.join(misplaced)}: give it in the address of the request.")
    check_keys((key, value) for key, value in params.items() if key not in ("id", "label"))


def check_name(upload: UploadFile) -> str:
    """The name of an uploaded file without the folders that clients put in front of it.

    Raises:
        InputError: it is unfit for a file.
    """
    name = (upload.filename or "").replace("\\", "/").rpartition("/")[2]
    _check_file_name(name)
    return name


def check_upload(upload: UploadFile) -> str:
    """The suffix of an uploaded image or label.

    Raises:
        InputError: a name that is unfit for a file, or no suffix of an image.
    """
    suffix = image_suffix(check_name(upload))
    if not suffix:
        raise InputError(f"'{check_name(upload)}' has no suffix of an image. Send a file such as label.nrrd.")
    if suffix.lower() == ".mhd":
        raise InputError(f"'{check_name(upload)}' is a header without voxels. Send one file, such as .mha or .nii.gz.")
    return suffix


@contextmanager
def received(upload: UploadFile, name: str) -> Iterator[Path]:
    """An uploaded file on disk, called `name` plus its own suffix, for as long as the context lasts."""
    suffix = check_upload(upload)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}{suffix}"
        with path.open("wb") as file:
            shutil.copyfileobj(upload.file, file)
        yield path
