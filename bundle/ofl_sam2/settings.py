"""Every switch of the method in one place; the defaults are what `learn`, `train` and `segment` use."""

from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from ofl_sam2.errors import InputError


class Order(str, Enum):
    """In which order the slices of a volume are segmented."""

    OUTWARD = "outward"
    FIRST_TO_LAST = "first_to_last"


@dataclass(frozen=True)
class Settings:
    """How to segment; the ablations of the method are fields of it.

    Attributes:
        online_branch: use the few-shot learner; off, SAM2's memory works alone (training-free retrieval).
        adaptive_fusion: gate both branches; off, their plain sum.
        online_update: learn from accepted slices of the volume at hand.
        exact_ridge: solve the mapping network exactly instead of by steepest descent.
        order: slice order.
        gamma: confidence in [0, 1] from which a segmented slice is learned from.
        supports: labelled slices the learner works on for each query slice, N.
        absent_supports: how many of the supports are slices without the structure.
        memory_supports: how many of the supports also condition SAM2's memory attention.
        recent: accepted query slices kept in SAM2's memory, at most 6.
        query_capacity: accepted query slices kept in the learner's working set.
        query_rate: weight at which an accepted query slice enters the working set.
        support_floor: least share of the weight that all supports keep together.
        learn_steps: steepest-descent steps on the pool at `learn`.
        first_steps, update_steps: steps on the first query slice of a volume and on each one after it.
        pool_slices: labelled slices per structure that `learn` solves on.
        overlap: allow structures to overlap in the result.
    """

    online_branch: bool = True
    adaptive_fusion: bool = True
    online_update: bool = True
    exact_ridge: bool = False
    order: Order = Order.OUTWARD
    gamma: float = 0.8
    supports: int = 6
    absent_supports: int = 1
    memory_supports: int = 4
    recent: int = 4
    query_capacity: int = 20
    query_rate: float = 0.1
    support_floor: float = 0.25
    learn_steps: int = 20
    first_steps: int = 10
    update_steps: int = 3
    pool_slices: int = 32
    overlap: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", Order(self.order))
        if not 0 <= self.gamma <= 1:
            raise InputError(f"gamma is {self.gamma}; it is a confidence between 0 and 1.")
        if self.memory_supports < 1 or self.supports < self.memory_supports:
            raise InputError("supports must be at least memory_supports, and memory_supports at least 1.")
        if not 0 <= self.recent <= 6:
            raise InputError(f"recent is {self.recent}; SAM2 attends to at most 6 recent slices.")

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
            raise InputError(f"Unknown settings: {', '.join(unknown)}. Known: {', '.join(f.name for f in fields(cls))}.")
        return cls(**values)
