"""Images to and from clients: each goes out as one file, whatever it is in the studies."""

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse
from lib.cases import image_path
from monailabel.utils.others.generic import file_checksum, get_mime_type

from ofl_sam2.files import case_name
from ofl_sam2.service.journal import check_image_id
from server.forms import Annotator, AnyUser, Params, Upload
from server.keys import check_name, parse_params, received
from server.lookup import app, require_image

router = APIRouter(prefix="/datastore", tags=["Datastore"])
_ALGORITHMS = ("SHA256", "SHA512", "MD5")


@router.put("/", include_in_schema=False)
@router.put("/image", summary="Add an image to the studies")
def add_image(user: Annotator, file: Upload, image: str = "", params: Params = "{}"):
    """The id is `image`, or the name of the file without its suffix."""
    details = {**parse_params(params), "user": user.username}
    name = image or case_name(check_name(file))
    check_image_id(name)
    with received(file, name) as path:
        return {"image": app().datastore().add_image(name, str(path), details)}


@router.get("/image", summary="Download an image as one file", responses={404: {"description": "Unknown image"}})
def download(user: AnyUser, image: str):
    """DICOM series and frames come as NIfTI in their own grid: labels drawn on it fit the image."""
    path, name = single_file(image)
    return FileResponse(path, media_type=get_mime_type(str(path)), filename=name)


@router.head("/image", summary="Check that an image is there", responses={404: {"description": "Not this image"}})
def check(user: AnyUser, image: str, check_sum: str = ""):
    """`check_sum` is that of the download, for example `SHA256:...`."""
    path, _ = single_file(image)
    algorithm, _, digest = check_sum.rpartition(":")
    if algorithm not in ("", *_ALGORITHMS):
        raise HTTPException(400, f"'{algorithm}' is no checksum known here. Use one of {', '.join(_ALGORITHMS)}.")
    if digest and file_checksum(path, algorithm or _ALGORITHMS[0]).rpartition(":")[2] != digest.lower():
        raise HTTPException(404, f"The image '{image}' has another checksum. Download it again.")


def single_file(image: str) -> tuple[Path, str]:
    """An image of the studies as one file, and the name of that file for clients.

    Raises:
        HTTPException: 404; no such image.
        InputError: it cannot be read, or is gone.
    """
    require_image(image)
    original = image_path(app().datastore(), image)
    path = app().workspace.single_files.of(original)
    return path, path.name if path == original else f"{image}.nii.gz"
