"""Files that go once they were sent."""

from typing import Any

from fastapi.responses import FileResponse


class TemporaryFileResponse(FileResponse):
    """A file whose background tasks, which remove it, run also where it could not be sent, as with an unfit range."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        tasks, self.background = self.background, None
        try:
            await super().__call__(scope, receive, send)
        finally:
            if tasks is not None:
                await tasks()
