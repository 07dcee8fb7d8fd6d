"""Training progress in a file: the training process writes it, the server shows it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
from monailabel.utils.async_tasks.utils import processes, tasks

from ofl_sam2.atomic import atomic_write_text


class TrainingStats:
    """Statistics under the names that MONAI Label's clients read: epoch, total_epochs, best_metric, total_time.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, total_epochs: int) -> None:
        """Start anew; the metric stays that of the training before, if there was one."""
        self._write(
            {
                "process": os.getpid(),
                "start_ts": int(time.time()),
                "state": "preparing",
                "epoch": 0,
                "total_epochs": total_epochs,
                "best_metric": self._read().get("best_metric", 0.0),
            }
        )

    def update(self, **entries: Any) -> None:
        """Change entries."""
        self._write({**self._read(), **entries})

    def finish(self, **entries: Any) -> None:
        """Change entries and say that the training is over."""
        stats = self._read()
        self._write({**stats, **entries, "total_time": _duration(time.time() - stats["start_ts"])})

    def show(self) -> dict[str, Any]:
        """Statistics of the training that runs or was asked for, else of the last one; empty before the first."""
        stats = self._read()
        open_tasks = [task for task in tasks("train") if task["status"] in ("SUBMITTED", "RUNNING")]
        running = [processes("train").get(task["id"]) for task in open_tasks]
        if running and (running[0] is None or running[0].pid != stats.get("process")):
            return {"epoch": 0, "total_epochs": 1, "best_metric": stats.get("best_metric", 0.0), "state": "starting"}
        process = stats.pop("process", None)
        if stats and "total_time" not in stats and not psutil.pid_exists(process):
            seconds = self._path.stat().st_mtime - stats["start_ts"]
            return {**stats, "total_time": _duration(seconds), "state": "stopped", "published": False}
        return stats

    def _read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}

    def _write(self, stats: dict[str, Any]) -> None:
        atomic_write_text(self._path, json.dumps(stats))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
