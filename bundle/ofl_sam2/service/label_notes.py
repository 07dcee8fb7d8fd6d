"""What a snapshot says about the labels in it, which labels cannot be learned, and which look wrong."""

import copy
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import cast

import numpy as np

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.errors import InputError
from ofl_sam2.looks import Viewpoint
from ofl_sam2.memory.pool import MAIN
from ofl_sam2.progress import CancelToken
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.service.snapshots import Snapshot

LOW_DICE = 0.3
USUAL_DICE = 0.6


@dataclass
class LabelNotes:
    """What a snapshot says about labels, as JSON values.

    Attributes:
        learned: image -> version of the label in the pool.
        trained_on: image -> version of the label, at the time of the last training.
        agreement: image -> what `agreement` says of the label in the pool.
    """

    learned: dict[str, str] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, snapshot: Snapshot | None) -> "LabelNotes":
        """The notes of a snapshot, to change; empty without one."""
        notes = snapshot.notes if snapshot else {}
        return cls(**{entry.name: dict(notes.get(entry.name, {})) for entry in fields(cls)})

    def learn(self, image: str, sha256: str) -> None:
        """Note a label, new or in the place of an older one; those that look wrong are compared once more."""
        self.forget(image)
        self.learned[image] = sha256

    def forget(self, image: str) -> None:
        """Drop a label, but not that parameters were fitted to it; those that look wrong are compared once more."""
        self.learned.pop(image, None)
        for doubtful in (image, *self.flagged()):
            self.agreement.pop(doubtful, None)

    def unchecked(self) -> list[str]:
        """Images whose agreement is not known yet; a single label has nothing to agree with."""
        return [image for image in self.learned if image not in self.agreement] if len(self.learned) > 1 else []

    def flagged(self) -> dict[str, dict[str, float]]:
        """The part of `agreement` that is suspicious: Dice below 0.3 where the structure's other labels have 0.6."""
        found: dict[str, dict[str, float]] = {}
        for image, agreed in self.agreement.items():
            for value, dice in agreed.items():
                usual = [other[value] for name, other in self.agreement.items() if name != image and value in other]
                if dice < LOW_DICE and usual and median(usual) > USUAL_DICE:
                    found.setdefault(image, {})[value] = dice
        return found

    def fitted_on_removed(self) -> list[str]:
        """Images whose label has changed or gone since the parameters were fitted to it."""
        return [image for image, sha256 in self.trained_on.items() if self.learned.get(image) != sha256]


def check_label(case: LabelledCase, structures: dict[int, str]) -> None:
    """Refuse a label that cannot be learned.

    Args:
        case: the label.
        structures: label value -> name of what labels may hold.

    Raises:
        InputError: another grid, not integer, empty, or values that are no structures.
    """
    name, labels = case.volume.name, case.labels
    if labels.shape != case.volume.grid:
        raise InputError(f"The label of {name} has shape {labels.shape}, its image {case.volume.grid}. Draw it anew.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"The label of {name} holds {labels.dtype} numbers. Save it with integer values.")
    found = set(np.unique(labels).tolist()) - {0}
    if not found:
        raise InputError(f"The label of {name} is empty. Draw at least one structure, or delete it.")
    if unknown := sorted(found - structures.keys()):
        raise InputError(f"The label of {name} holds the values {unknown}, which name no structure. Save it again.")


def agreement(segmenter: VolumeSegmenter, case: LabelledCase, cancel: CancelToken | None = None) -> dict[str, float]:
    """Dice of a label and what the other labels make of its image, on its labelled slices, seen from the main view.

    Args:
        segmenter: is not changed; what it has learned of the same image does not count, nor its U-Net, which knows it.
        case: the label.
        cancel: to stop.

    Returns:
        Label value -> Dice, of the structures that the label holds and the other labels teach.

    Raises:
        Cancelled: stopped by `cancel`.
    """
    others = segmenter.pool.without({case.volume.name})
    judge = copy.copy(segmenter)
    judge.pools, judge.settings, judge.unet = {MAIN: others}, replace(segmenter.settings, overlap=False), None
    judge.structures = {value: name for value, name in segmenter.structures.items() if value in others.values()}
    if not judge.structures.keys() & set(case.values):
        return {}
    judge.solve()
    viewpoint = cast(Viewpoint, judge.viewpoint)
    stack, slices = viewpoint.stack(case.volume), viewpoint.labelled_slices(case)
    predicted, given = (
        np.stack([stack.slice_of(labels, index) for index in slices])
        for labels in (judge.segment(case.volume, cancel=cancel).labels, case.labels)
    )
    return {
        str(value): round(_dice(predicted == value, given == value), 4)
        for value in judge.structures
        if (given == value).any()
    }


def _dice(predicted: np.ndarray, given: np.ndarray) -> float:
    return 2.0 * np.count_nonzero(predicted & given) / (np.count_nonzero(predicted) + np.count_nonzero(given))
