"""The DICOMweb server of the studies, for OHIF: queries, images and storing, and nothing else of that server."""

import re
from collections.abc import Iterator
from typing import Annotated

import requests
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import StreamingResponse
from lib.datastores.archive import TIMEOUT_S, no_answer
from lib.datastores.dicomweb import JournaledDICOMWebDatastore
from monailabel.config import settings

from server.forms import Annotator, AnyUser
from server.lookup import app

router = APIRouter(prefix="/proxy/dicom", tags=["Others"])
_PREFIXES = {
    "qido": settings.MONAI_LABEL_QIDO_PREFIX,
    "wado": settings.MONAI_LABEL_WADO_PREFIX,
    "stow": settings.MONAI_LABEL_STOW_PREFIX,
}
_PART = re.compile(r"(?!\.+$)[\w.,~:@+=-]+", re.ASCII)
_RESOURCES = ("studies", "series", "instances")
_STORE = re.compile(r"studies(/[^/]+)?")
_SENT = ("accept", "accept-encoding", "content-type")
_ANSWERED = ("content-type", "content-encoding", "content-length")
_CHUNK_BYTES = 1 << 18


async def _body(request: Request) -> bytes:
    return await request.body()


@router.get("/{service}/{path:path}", include_in_schema=False)
def retrieve(request: Request, user: AnyUser, service: str, path: str) -> StreamingResponse:
    """Ask for a list, for metadata or for pixels."""
    return _forward(request, service, path)


@router.post("/{service}/{path:path}", include_in_schema=False)
def store(
    request: Request, user: Annotator, service: str, path: str, body: Annotated[bytes, Depends(_body)]
) -> StreamingResponse:
    """Store instances."""
    if not _STORE.fullmatch(path):
        raise HTTPException(404, f"Nothing can be stored at '{path}'. Store at 'studies' or 'studies/UID'.")
    return _forward(request, service, path, body)


def _forward(request: Request, service: str, path: str, body: bytes | None = None) -> StreamingResponse:
    """Send a request on with the login of this server, and answer what comes back while it comes.

    Raises:
        HTTPException: 400 or 404; nothing that may be asked for.
        ArchiveError: the DICOMweb server does not answer.
    """
    address = _address(service, path)
    query = f"?{request.url.query}" if request.url.query else ""
    user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    try:
        answer = requests.request(
            request.method,
            f"{address}{query}",
            headers={name: request.headers.get(name) for name in _SENT},
            auth=(user, password) if user and password else None,
            data=body,
            timeout=TIMEOUT_S,
            stream=True,
        )
    except requests.RequestException as error:
        raise no_answer(app().datastore().name(), error) from error
    headers = {name: answer.headers[name] for name in _ANSWERED if name in answer.headers}
    return StreamingResponse(_chunks(answer), answer.status_code, headers)


def _address(service: str, path: str) -> str:
    """Where a path of ours is on the DICOMweb server, which is always below the root of DICOMweb."""
    studies = app().datastore()
    if service not in _PREFIXES or not isinstance(studies, JournaledDICOMWebDatastore):
        raise HTTPException(404, "There is no such service here: qido, wado and stow are, if the studies are DICOMweb.")
    parts = path.split("/")
    if parts[0] not in _RESOURCES or not all(map(_PART.fullmatch, parts)):
        raise HTTPException(400, f"{path[:200]!r} is no address of DICOMweb. Use one such as 'studies/UID/series'.")
    if service == "qido" and path.endswith("/metadata"):
        service = "wado"
    return "/".join(part.strip("/") for part in (studies.name(), _PREFIXES[service], path) if part)


def _chunks(answer: requests.Response) -> Iterator[bytes]:
    """The body as it comes, compressed or not."""
    with answer:
        yield from answer.raw.stream(_CHUNK_BYTES, decode_content=False)
