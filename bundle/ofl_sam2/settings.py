"""Every switch of the method in one place; the defaults are what `learn`, `train` and `segment` use."""

import math
from dataclasses import asdict, dataclass, fields
from enum import Enum
from numbers import Integral, Real
from typing import Any

from ofl_sam2.errors import InputError
from ofl_sam2.intensity import as_window


class Order(str, Enum):
    """In which order the slices of a volume are segmented."""

    OUTWARD = "outward"
    FIRST_TO_LAST = "first_to_last"


_RANGES = {
    "gamma": (0, 1),
    "memory_supports": (1, math.inf),
    "recent": (0, 6),
    "query_rate": (0, 1),
    "support_floor": (0, 1),
    "pool_slices": (1, math.inf),
    "threshold": (0.01, 0.99),
    "unet_views": (0, 100),
}


@dataclass(frozen=True)
class Settings:
    """How to segment; the ablations of the method are fields of it.

    Attributes:
        online_branch: use the few-shot learner; off, SAM2's memory works alone (training-free retrieval).
        adaptive_fusion: gate both branches; off, their plain sum.
        online_update: learn from accepted slices of the volume at hand.
        preconditioned: descend in the metric of the patch covariance; off, plain steepest descent.
        exact_ridge: solve the mapping network exactly instead of by steepest descent.
        order: slice order.
        gamma: confidence in [0, 1] from which a segmented slice is learned from.
        supports: labelled slices the learner works on for each query slice, N.
        absent_supports: how many of the supports are slices without the structure; half of them gave the best Dice
            and the best agreement of quality estimate and Dice in cross-validation.
        memory_supports: how many of the supports, with and without the structure in turn, also condition SAM2's memory
            attention.
        recent: accepted query slices kept in SAM2's memory, at most 6.
        query_capacity: accepted query slices kept in the learner's working set.
        query_rate: weight at which an accepted query slice enters the working set.
        support_floor: least share of the weight that all supports keep together.
        learn_steps: steepest-descent steps on the pool at `learn`.
        first_steps, update_steps: steps on the first query slice of a volume and on each one after it.
        pool_slices: labelled slices per structure that `learn` solves on.
        unet_views: as how many views the 3D U-Net that `train` fitted counts, if it did; 0 goes without. Two is close
            to the best with one view and with three in cross-validation.
        overlap: allow structures to overlap in the result.
        side_views: look at volumes of nearly isotropic voxels along all three axes, and average.
        close_ups: look again, magnified, at small structures.
        smoothing: standard deviation of the Gaussian that smooths the probabilities of a volume, as a multiple of its
            finest voxel spacing.
        threshold: probability from which a voxel is drawn. The highest Dice D is expected at D / 2 (Lipton et al.,
            ECML 2014), which is 0.35 for 0.7.
        ct_window: lowest and highest HU of CT that the model can tell apart; None until the first CT is learned, which
            fixes it (`intensity.window_for`).

    Raises:
        InputError: a value of another type, or out of range.
    """

    online_branch: bool = True
    adaptive_fusion: bool = True
    online_update: bool = True
    preconditioned: bool = True
    exact_ridge: bool = False
    order: Order = Order.OUTWARD
    gamma: float = 0.8
    supports: int = 6
    absent_supports: int = 3
    memory_supports: int = 6
    recent: int = 4
    query_capacity: int = 20
    query_rate: float = 0.1
    support_floor: float = 0.25
    learn_steps: int = 10
    first_steps: int = 5
    update_steps: int = 3
    pool_slices: int = 32
    unet_views: float = 2.0
    overlap: bool = False
    side_views: bool = True
    close_ups: bool = True
    smoothing: float = 0.8
    threshold: float = 0.35
    ct_window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.order not in tuple(Order):
            raise InputError(f"order is {self.order!r}; choose {' or '.join(order.value for order in Order)}.")
        object.__setattr__(self, "order", Order(self.order))
        for field in fields(self):
            if field.name != "ct_window":
                _check(field.name, getattr(self, field.name), type(field.default))
        if self.ct_window is not None:
            window = as_window(self.ct_window)
            if window is None:
                raise InputError(f"ct_window is {self.ct_window!r}; it must be two ascending numbers.")
            object.__setattr__(self, "ct_window", window)
        if not max(self.memory_supports, self.absent_supports + 1) <= self.supports:
            raise InputError(
                f"supports is {self.supports}; it must be at least memory_supports ({self.memory_supports}) "
                f"and more than absent_supports ({self.absent_supports})."
            )

    def unet_weight(self, views: int) -> float:
        """Weight of the U-Net in the average with so many views."""
        return self.unet_views / (self.unet_views + views)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "order": self.order.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Inverse of `to_dict`.

        Raises:
            InputError: a name that is no setting.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in fields(cls))
            raise InputError(f"Unknown settings: {', '.join(unknown)}. Known: {known}.")
        return cls(**values)


def _check(name: str, value: Any, kind: type) -> None:
    """Refuse a value that is not of the kind of its default, or out of range."""
    numeric = kind in (int, float)
    accepted: Any = {int: Integral, float: Real}.get(kind, kind)
    if not isinstance(value, accepted) or (numeric and isinstance(value, bool)):
        raise InputError(f"{name} is {value!r}; it must be of type {kind.__name__}.")
    low, high = _RANGES.get(name, (0, math.inf))
    if numeric and not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise InputError(f"{name} is {value}; it must be {limits}.")
