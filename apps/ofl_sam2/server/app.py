"""The uvicorn app. It is made after the annotation app, which makes the library `ofl_sam2` importable."""

import errno
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.middleware import Middleware
from monailabel.app import app
from monailabel.endpoints import (
    activelearning,
    batch_infer,
    datastore,
    infer,
    info,
    model,
    ohif,
    proxy,
    scoring,
    session,
    train,
    wsi_infer,
)
from monailabel.interfaces.utils.app import app_instance

_REFUSALS = ("lib.library", "ofl_sam2.errors")
_REPLACED = (activelearning, batch_infer, datastore, infer, info, model, ohif, scoring, session, train)
_REMOVED = (proxy, wsi_infer)


def start() -> None:
    """Build the annotation app and become the one server of its model root.

    Raises:
        SystemExit: what was asked for cannot be done; with the sentence that says why. The modules that define such
            errors can only be imported once the app is built, so they are known by name.
    """
    try:
        app_instance().server_mode(True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            raise
        sys.exit(f"The server does not start. {error}. The studies and the model root must be writable.")
    except Exception as error:
        if not any(kind.__module__ in _REFUSALS for kind in type(error).__mro__):
            raise
        sys.exit(f"The server does not start. {error}")


def install(app: FastAPI, own: list[APIRouter]) -> None:
    """Put our routes in the place of MONAI Label's routes of the same address and method.

    Removed: slide inference, which reads any path; the proxy, which leads to more than the DICOMweb of a server; and
    `/reload`, which starts a second app.
    """
    taken = {(route.path, method) for router in own for route in router.routes for method in route.methods}
    for module in _REPLACED:
        module.router.routes[:] = [
            route for route in module.router.routes if taken.isdisjoint((route.path, m) for m in route.methods)
        ]
    for module in _REMOVED:
        module.router.routes.clear()
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != "/reload"]
    for router in own:
        app.include_router(router)


start()

from server import errors, keys, routes, tasks  # noqa: E402

run_server = app.router.lifespan_context


@asynccontextmanager
async def run(app: FastAPI) -> AsyncIterator[None]:
    """From start to end of the server; tasks in processes of their own end with it."""
    async with run_server(app):
        try:
            yield
        finally:
            tasks.end_all()


app.router.lifespan_context = run
install(app, routes.ROUTERS)
app.user_middleware.append(Middleware(keys.CheckedKeys))
errors.install(app)
