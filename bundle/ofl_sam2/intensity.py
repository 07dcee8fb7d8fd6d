"""Grey values -> [0, 1]: one window per volume."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ofl_sam2.errors import InputError

if TYPE_CHECKING:
    from ofl_sam2.volume import Volume

_SAMPLE_VOXELS = 1_000_000
_PERCENTILES = (0.5, 99.5)
_CT_AIR, _CT_BONE = -500.0, 200.0
SOFT_TISSUE = (-160.0, 240.0)
_MOSTLY = 0.8


@dataclass(frozen=True)
class Intensity:
    """A linear window: `low` and below becomes 0, `high` and above becomes 1.

    Attributes:
        kind: "percentile" when the limits were measured on the volume, "window" when they were given.
        low, high: limits in the volume's own units (HU for CT), low < high.

    Example:
        >>> Intensity("window", -160.0, 240.0).apply(np.array([-1000, 40, 3000])).tolist()
        [0.0, 0.5, 1.0]
    """

    kind: Literal["percentile", "window"]
    low: float
    high: float

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Return `values` (any shape and dtype) scaled to [0, 1]; NaN becomes 0."""
        scaled = (values.astype(np.float64) - self.low) / (self.high - self.low)
        return np.clip(np.nan_to_num(scaled, copy=False), 0.0, 1.0).astype(np.float32)


def intensity_for(volume: "Volume", ct_window: tuple[float, float] | None = None) -> Intensity:
    """Choose the window for `volume`: full range for colour, `ct_window` (HU) for CT, else robust percentiles.

    CT is recognised by its values: integers from air (-500 HU or less) to bone (200 HU or more).

    Args:
        volume: of any kind.
        ct_window: lowest and highest HU; default that of soft tissue, from -160 to 240.
    """
    if volume.colour:
        return Intensity("window", 0.0, _colour_maximum(volume.voxels))
    sample = _finite_sample(volume.in_order(volume.voxels))  # the same, however the volume is stored
    low, high = _limits(volume.voxels)
    if _is_ct(low, high, sample):
        return Intensity("window", *(ct_window or SOFT_TISSUE))
    robust_low, robust_high = np.percentile(sample, _PERCENTILES).tolist() if sample.size else (low, high)
    if robust_low < robust_high:
        return Intensity("percentile", robust_low, robust_high)
    return Intensity("percentile", low, high if high > low else low + max(1.0, abs(low)))


def window_for(volume: "Volume", labels: NDArray[Any]) -> tuple[float, float] | None:
    """The window of soft tissue, wider where a labelled structure lies outside, as lungs and dense bone do; CT only.

    Args:
        volume: a labelled volume.
        labels: its label values.
    """
    if volume.colour or not _is_ct(*_limits(volume.voxels), _finite_sample(volume.voxels)):
        return None
    low, high = SOFT_TISSUE
    for value in np.unique(labels[labels > 0]):
        grey = volume.voxels[labels == value]
        if np.mean((grey > SOFT_TISSUE[0]) & (grey < SOFT_TISSUE[1])) < _MOSTLY:
            lowest, highest = np.percentile(grey, (1, 99)).tolist()
            low, high = min(low, lowest), max(high, highest)
    return low, high


def parse_window(text: str) -> tuple[float, float]:
    """Parse a window.

    Raises:
        InputError: anything but two ascending numbers.

    Example:
        >>> parse_window("-1000, 400")
        (-1000.0, 400.0)
    """
    window = as_window(text.split(","))
    if window is None:
        raise InputError(f"'{text}' is no window. Give the lowest and the highest HU, for example -1000,400.")
    return window


def as_window(limits: Any) -> tuple[float, float] | None:
    """Two ascending numbers; None where the limits are something else."""
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError):
        return None
    return (low, high) if -math.inf < low < high < math.inf else None


def _is_ct(low: float, high: float, sample: NDArray[np.float64]) -> bool:
    return low <= _CT_AIR and high >= _CT_BONE and np.array_equal(sample, np.rint(sample))


def _colour_maximum(voxels: NDArray[Any]) -> float:
    if np.issubdtype(voxels.dtype, np.integer):
        return float(np.iinfo(voxels.dtype).max)
    return max(1.0, _limits(voxels)[1])


def _limits(voxels: NDArray[Any]) -> tuple[float, float]:
    """Smallest and largest finite value, without a copy where all voxels are finite; (0, 0) where none is."""
    low, high = float(voxels.min()), float(voxels.max())
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    finite = voxels[np.isfinite(voxels)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _finite_sample(voxels: NDArray[Any]) -> NDArray[np.float64]:
    """Finite voxels `(n,)` on a regular sub-grid of about a million voxels."""
    step = math.ceil((voxels.size / _SAMPLE_VOXELS) ** (1 / voxels.ndim))
    sample = voxels[(slice(None, None, step),) * voxels.ndim].astype(np.float64)
    return sample[np.isfinite(sample)]
