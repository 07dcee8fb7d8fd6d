"""Which series of a DICOMweb server are images, as it said last."""

import re
import threading
import time
from collections.abc import Sequence
from typing import Any

from lib.datastores.archive import Archive, ArchiveError, Series
from lib.datastores.notices import warn_once

_QUICK_S = 0.25
_UID = re.compile(r"[0-9][0-9.]{0,63}")


class Catalog:
    """The series that pass a filter. Any thread may ask.

    Args:
        archive: the server.
        filters: QIDO filters; the results of all of them are listed.
        expiry_s: seconds after which the server is asked again; more where listing takes long.

    Attributes:
        last: SeriesInstanceUID -> series, as the server answered last; empty before it did.
    """

    def __init__(self, archive: Archive, filters: Sequence[dict[str, Any]], expiry_s: float) -> None:
        self._archive, self._filters, self._expiry_s = archive, filters, expiry_s
        self._asking = threading.Lock()
        self._expires = self._gives_up_until = 0.0
        self._failure = ""
        self.last: dict[str, Series] = {}

    def series(self) -> dict[str, Series]:
        """The listed series, as of `expiry_s` seconds ago; longer ago where listing takes over a quarter second.

        Raises:
            ArchiveError: the server does not answer, or refuses. For as long as that took it is not asked again.
        """
        with self._asking:
            asked = time.monotonic()
            if asked < self._gives_up_until:
                raise ArchiveError(self._failure)
            if asked > self._expires:
                try:
                    self.last = self._list()
                except ArchiveError as error:
                    failed = time.monotonic()
                    self._gives_up_until, self._failure = failed + (failed - asked), str(error)
                    raise
                took_s = time.monotonic() - asked
                self._expires = asked + took_s + self._expiry_s * max(1.0, took_s / _QUICK_S)
            return self.last

    def _list(self) -> dict[str, Series]:
        found = {uid: series for wanted in self._filters for uid, series in self._archive.series(wanted).items()}
        return {uid: series for uid, series in found.items() if _is_uid(uid)}


def _is_uid(uid: str) -> bool:
    """Whether a series may be listed; others have names that are unfit for files."""
    if _UID.fullmatch(uid):
        return True
    warn_once(f"A series is left out: {uid[:80]!r} is no SeriesInstanceUID.")
    return False
