"""Checkpoints of a pretraining."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ofl_sam2.errors import InputError


def resume(path: Path, take: Callable[[dict[str, Any]], object]) -> None:
    """Hand the content of a checkpoint to `take`.

    Raises:
        InputError: there is none, or it is damaged or `take` cannot use it.
    """
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path} to resume from. Leave --resume out to start anew.")
    try:
        take(torch.load(path, weights_only=True, map_location="cpu"))
    except Exception as error:
        raise InputError(f"The checkpoint {path} cannot be used: damaged, or of another version.") from error
