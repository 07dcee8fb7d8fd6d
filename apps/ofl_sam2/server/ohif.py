"""OHIF as MONAI Label ships it, repaired: files in folders are found, and "Export DICOM SEG" stores."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from monailabel.endpoints import ohif

from server.forms import AnyUser

_SHIPPED = Path(ohif.__file__).resolve().parent / "static" / "ohif"
_EXTENSION = Path(__file__).with_suffix(".js")
router = APIRouter(prefix="/ohif", tags=["Others"])


@router.get("/{path:path}", include_in_schema=False)
def viewer(path: str, user: AnyUser) -> Response:
    """A file of the viewer; its own addresses, such as `segmentation`, are those of its page."""
    file = (_SHIPPED / path).resolve()
    if not file.is_relative_to(_SHIPPED) or not file.is_file():
        file = _SHIPPED / "index.html"
    if file.name == "app-config.js":
        return Response(file.read_text() + _EXTENSION.read_text(), media_type="text/javascript")
    return FileResponse(file)
