"""What a measurement took, and what else the machine was doing meanwhile."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from . import machine

BUSY = 0.1


class Usage:
    """Wall time, CPU time of this process and of all others, from when it is made."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._wall, self._own, self._all = time.perf_counter(), time.process_time(), _busy_seconds()

    def conditions(self) -> dict[str, Any]:
        """Machine, commit, load average before, cores that others used since; a note when they were busy."""
        seconds = time.perf_counter() - self._wall
        others = _busy_seconds() - self._all - (time.process_time() - self._own)
        cores_of_others = max(0.0, others / seconds)
        about = {key: value for key, value in machine().items() if key in ("commit", "date", "cores", "torch")}
        about |= {"cpu": cpu_model(), "threads": torch.get_num_threads(), "load_before": round(self.load, 2)}
        about["cores_used_by_others"] = round(cores_of_others, 2)
        if cores_of_others > BUSY * (os.cpu_count() or 1):
            about["note"] = f"other processes kept {cores_of_others:.1f} cores busy"
        return about


def cpu_model() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _busy_seconds() -> float:
    """CPU seconds all processes of the machine have used."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system) if hasattr(times, "nice") else float(times.user + times.system)
