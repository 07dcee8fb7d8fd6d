"""What `--conf` can say, checked once at start."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from monailabel.utils.others.generic import strtobool

from ofl_sam2.backbone.build import check_image_size
from ofl_sam2.backbone.configs import backbone_config
from ofl_sam2.errors import InputError
from ofl_sam2.intensity import parse_window
from ofl_sam2.jobs import check_device


@dataclass(frozen=True)
class Options:
    """The configuration of the app.

    Attributes:
        model_root: folder of everything the app remembers: journal, snapshots, structures, cache.
        backbone: name of the frozen SAM2 that learning starts with.
        image_size: side of its input in pixels; default by backbone.
        ct_window: lowest and highest HU that learning tells apart in CT; default by the first label.
        labels: structures known from the start, in the order of their values.
        device: "cpu" or "cuda".
        cache_gb: bound of the feature cache in GB.
        series_gb: bound of the series copied from a DICOMweb server in GB.
        skip_scoring: leave out the scoring that MONAI Label starts by itself at each start, sample and training.
    """

    model_root: Path
    backbone: str | None = None
    image_size: int | None = None
    ct_window: tuple[float, float] | None = None
    labels: tuple[str, ...] = ()
    device: str = "cpu"
    cache_gb: float = 4.0
    series_gb: float = 20.0
    skip_scoring: bool = True

    @classmethod
    def from_conf(cls, app_dir: Path, conf: dict[str, str]) -> "Options":
        """Read the `--conf` values; `bundle` is read before (`lib.library`), names of others are passed over.

        Raises:
            InputError: a value that cannot be used, with its name, or a device that is not there.
        """
        given: dict[str, Any] = {"model_root": app_dir / "model"}
        readers = {
            "model_root": lambda text: Path(text).expanduser().resolve(),
            "backbone": lambda text: backbone_config(text).name,
            "image_size": lambda text: check_image_size(int(text)),
            "ct_window": parse_window,
            "labels": _names,
            "device": str,
            "cache_gb": _size,
            "series_gb": _size,
            "skip_scoring": lambda text: bool(strtobool(text)),
        }
        for field in fields(cls):
            if field.name in conf:
                try:
                    given[field.name] = readers[field.name](str(conf[field.name]).strip())
                except (InputError, ValueError) as error:
                    reason = str(error).rstrip(".")
                    raise InputError(f"--conf {field.name} {conf[field.name]} cannot be used: {reason}.") from error
        options = cls(**given)
        check_device(options.device)
        return options


def _size(text: str) -> float:
    """A number from 0 up."""
    if not 0 <= float(text) < math.inf:
        raise ValueError("give a number of GB from 0 up")
    return float(text)


def _names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or "=" in text or len({name.casefold() for name in names}) < len(names):
        raise ValueError("write different names separated by commas, such as liver,spleen; they get the values 1, 2")
    return names
