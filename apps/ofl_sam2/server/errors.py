"""What went wrong, as an HTTP answer: a status, and one sentence in `detail`."""

import errno
import json
import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from lib.datastores.archive import ArchiveError
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException

from ofl_sam2.errors import InputError, OFLError

logger = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    """Register the answers with the server."""
    app.add_exception_handler(OFLError, _own)
    app.add_exception_handler(ArchiveError, _archive)
    app.add_exception_handler(MONAILabelException, _monailabel)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(json.JSONDecodeError, _no_json)
    app.add_exception_handler(OSError, _system)
    app.add_exception_handler(Exception, _unforeseen)


def _answer(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status)


async def _own(request: Request, error: Exception) -> JSONResponse:
    """Input of the client is 400; a file that cannot be written is 507; a cancelled run or a damaged model is 409."""
    if isinstance(error.__cause__, OSError) and not isinstance(error, InputError):
        return _answer(507, str(error))
    return _answer(400 if isinstance(error, InputError) else 409, str(error))


async def _archive(request: Request, error: Exception) -> JSONResponse:
    return _answer(error.status, str(error))


async def _monailabel(request: Request, error: Exception) -> JSONResponse:
    missing = isinstance(error, ImageNotFoundException | LabelNotFoundException)
    return _answer(404 if missing else 400, error.msg)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return _answer(422, f"The request does not fit: {problems}.")


async def _no_json(request: Request, error: Exception) -> JSONResponse:
    return _answer(400, f"The request holds something that is no JSON: {error}.")


async def _system(request: Request, error: Exception) -> JSONResponse:
    """A full disk is the server's state, not its fault; other errors of the system stay visible in the log."""
    logger.error("%s %s", request.method, request.url.path, exc_info=error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _answer(507, "The disk of the server is full; nothing was changed. Make room and try again.")
    return _answer(500, f"The server could not do this: {error.strerror or error}. Its log says more.")


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    """The server writes the traceback to its log."""
    return _answer(500, f"The server could not do this ({type(error).__name__}). Its log says more.")
