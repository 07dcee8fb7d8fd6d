"""The parts that requests are made of, and who may send them."""

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any

from fastapi import Body, Depends, File, Form, UploadFile
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


def require_annotator(user: User) -> None:
    """As `Annotator`, where only some requests to a route store something; to be called in a worker thread.

    Raises:
        HTTPException: 403.
    """
    asyncio.run(_annotator(user))
