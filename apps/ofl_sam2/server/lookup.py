"""Find what a request names, or answer that it is not here."""

from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.utils.app import app_instance


def app() -> MONAILabelApp:
    """The annotation app of this server."""
    return app_instance()


def require_image(image: str) -> None:
    """Check that the studies hold an image.

    Raises:
        HTTPException: 404.
    """
    if image not in app().datastore().list_images():
        raise HTTPException(404, f"The studies hold no image '{image}'. GET /datastore/?output=all lists them.")


def require_task(kind: str, tasks: dict[str, Any], name: str) -> None:
    """Check that the app has a model, trainer or strategy of that name.

    Raises:
        HTTPException: 404.
    """
    if name not in tasks:
        raise HTTPException(404, f"There is no {kind} '{name}' here. Use one of: {', '.join(tasks) or 'none'}.")


def require_session(session_id: str) -> None:
    """Check that a session is there and has not expired.

    Raises:
        HTTPException: 404.
    """
    sessions = app().sessions()
    session = sessions.get_session(session_id) if sessions else None
    if session is None or not Path(session.image).exists():
        raise HTTPException(404, f"There is no session '{session_id}', or it has expired. Upload the image again.")
