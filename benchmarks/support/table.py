"""A table that grows row by row in a JSON file, so that a long measurement can be stopped and goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofl_sam2.atomic import atomic_write_text
from ofl_sam2.errors import InputError

Row = dict[str, Any]


class ResumableTable:
    """Rows with a key each; every new row is on disk, whole, before `add` returns.

    Args:
        path: JSON file; need not exist.

    Raises:
        InputError: the file is no table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = self._read()

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Write a finished row; rows another process has added meanwhile stay."""
        self.rows = {**self._read(), key: dict(row)}
        atomic_write_text(self.path, json.dumps({"rows": self.rows}, indent=1, allow_nan=False) + "\n")

    def _read(self) -> dict[str, Row]:
        if not self.path.is_file():
            return {}
        try:
            return dict(json.loads(self.path.read_text())["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is no table of results. Move it away and run again.") from error
