"""The parts that requests are made of, who may send them, and files that go once they were sent."""

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

from fastapi import Body, Depends, File, Form, UploadFile
from fastapi.responses import FileResponse
from monailabel.config import settings
from monailabel.endpoints.user import auth
from monailabel.endpoints.user.auth import RBAC, User

Upload = Annotated[UploadFile, File()]
Uploads = Annotated[list[UploadFile], File()]
OptionalUpload = Annotated[UploadFile | None, File()]
Params = Annotated[str, Form(description="a JSON object")]
Options = Annotated[dict[str, Any] | None, Body()]

# MONAI Label names no algorithm, without which PyJWT refuses every token. Keycloak signs with this one.
auth.jwt = SimpleNamespace(decode=partial(auth.jwt.decode, algorithms=["RS256"]))

_annotator = RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)
AnyUser = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
Annotator = Annotated[User, Depends(_annotator)]
Admin = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))]


class TemporaryFileResponse(FileResponse):
    """A file whose background tasks, which remove it, run also where it could not be sent, as with an unfit range."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        tasks, self.background = self.background, None
        try:
            await super().__call__(scope, receive, send)
        finally:
            if tasks is not None:
                await tasks()


def require_annotator(user: User) -> None:
    """As `Annotator`, where only some requests to a route store something; to be called in a worker thread.

    Raises:
        HTTPException: 403.
    """
    asyncio.run(_annotator(user))
