"""Data sets of the label-efficiency table: which labelled cases to learn from, which to segment, what counts."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.evaluation import CaseScore, Report
from ofl_sam2.metrics import METRICS, score
from ofl_sam2.volume import SliceStack, choose_axis

from . import HIPPOCAMPUS, data_folder, labelled, splits

DRAWS, SEED = 3, 0


@dataclass(frozen=True)
class Task:
    """Learn from `supports`, segment `queries`; `seed` is that of training."""

    dataset: str
    draw: int
    supports: tuple[str, ...]
    queries: tuple[str, ...]
    seed: int = 0

    @property
    def shots(self) -> int:
        """Number of labelled volumes, K."""
        return len(self.supports)


@dataclass(frozen=True)
class DataSet:
    """Labelled volumes of one kind.

    Attributes:
        folder: with `images/` and `labels/`.
        structures: {label value: name} of what is learned.
        tasks: all draws of all K.
        slices: case name -> slices with a reference, along the third array axis; other cases have one everywhere.
        least_voxels: size from which a structure counts in the means, in the references of all queries.
        tolerance: of surface Dice, mm; about one voxel.
    """

    folder: Path
    structures: dict[int, str]
    tasks: tuple[Task, ...]
    slices: dict[str, list[int]] = field(default_factory=dict)
    least_voxels: int = 0
    tolerance: float = 1.0

    def case(self, name: str) -> LabelledCase:
        """A case of which only the slices with a reference count as labelled."""
        case = labelled(self.folder, name)
        return only_slices(case, self.slices[name]) if name in self.slices else case

    def report(self, cases: Sequence[LabelledCase], predictions: Sequence[np.ndarray]) -> Report:
        """Scores of the structures that are large enough, by all metrics."""
        smallest = {value: min(np.count_nonzero(case.labels == value) for case in cases) for value in self.structures}
        counted = {value: name for value, name in self.structures.items() if smallest[value] >= self.least_voxels}
        return Report(tuple(self._scored(*pair, counted) for pair in zip(cases, predictions, strict=True)))

    def _scored(self, case: LabelledCase, prediction: np.ndarray, structures: dict[int, str]) -> CaseScore:
        name, spacing = case.volume.name, case.volume.spacing
        slices = (2, self.slices[name]) if name in self.slices else None
        scores = score(
            prediction, case.labels, spacing, structures, tuple(METRICS), slices=slices, tolerance=self.tolerance
        )
        return CaseScore(name, scores)


def only_slices(case: LabelledCase, slices: Sequence[int]) -> LabelledCase:
    """Count only these slices (array index along the third axis) as labelled."""
    stack = SliceStack(case.volume, choose_axis(case.volume), size=32)
    marks = np.zeros(case.volume.grid, np.uint8)
    marks[:, :, slices] = 1
    return replace(case, labelled_slices=tuple(i for i in range(len(stack)) if stack.slice_of(marks, i).any()))


def draws(names: Sequence[str], shots: int, count: int = DRAWS, seed: int = SEED) -> list[tuple[str, ...]]:
    """Choose `shots` of the names `count` times, as evenly as possible; once if that is all of them.

    The names are shuffled once; each draw starts elsewhere in that circle.

    Example:
        >>> draws(["a", "b", "c"], 3)
        [('a', 'c', 'b')]
    """
    order = random.Random(seed).sample(list(names), len(names))
    starts = [0] if shots == len(names) else [draw * len(names) // count for draw in range(count)]
    return [tuple(order[(start + place) % len(order)] for place in range(shots)) for start in starts]


def folds(shots: int, count: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(labelled volumes, the others) of each draw: cross-validation inside the hippocampus dev_shots."""
    names = splits()["dev_shots"]
    return [(chosen, tuple(n for n in names if n not in chosen)) for chosen in draws(names, shots, count=count)]


def hippocampus() -> DataSet:
    """MR, two structures: K of dev_shots, scored on all of dev_val."""
    split = splits()
    tasks = _tasks("hippocampus", split["dev_shots"], (1, 2, 4, 8, 16), tuple(split["dev_val"]))
    return DataSet(data_folder("msd_hippocampus"), HIPPOCAMPUS, tasks)


def sunnybrook() -> DataSet:
    """Cine MR of the heart at end diastole: even draws are patient 1 -> 2, odd ones 2 -> 1, each with three seeds."""
    folder = data_folder("sunnybrook_cine")
    listed = json.loads((folder / "cases.json").read_text())
    slices = {f"{name}_ED": entry["ed_slices"] for name, entry in listed.items()}
    one, two = slices
    ways = ((one,), (two,)), ((two,), (one,))
    tasks = tuple(Task("sunnybrook", 2 * seed + way, *ways[way], seed) for seed in range(DRAWS) for way in range(2))
    return DataSet(folder, {1: "LV cavity", 2: "myocardium"}, tasks, slices, tolerance=1.4)


def mouse() -> DataSet:
    """In-vivo MR of the mouse brain: K of three animals -> the fourth; all structures are learned, large ones count."""
    folder = data_folder("mouse_brain_fvb")
    *shots, query = (f"FVB_NCrl_in_vivo_{animal}" for animal in (1, 2, 3, 4))
    lines = (folder / "structure_label_list.txt").read_text().splitlines()
    pairs = (line.split("\t") for line in lines if "\t" in line)
    names = {int(value): name for value, name in pairs if value.isdecimal()}
    sides = {
        **{v: f"{name} right" for v, name in names.items()},
        **{v + 20: f"{name} left" for v, name in names.items()},
    }
    structures = {value: sides[value] for value in labelled(folder, query).values}
    tasks = _tasks("mouse", shots, (1, 2, 3), (query,))
    return DataSet(folder, structures, tasks, least_voxels=500, tolerance=0.16)


def _tasks(dataset: str, names: Sequence[str], sizes: Sequence[int], queries: tuple[str, ...]) -> tuple[Task, ...]:
    return tuple(
        Task(dataset, draw, supports, queries) for shots in sizes for draw, supports in enumerate(draws(names, shots))
    )


DATA_SETS: dict[str, Callable[[], DataSet]] = {"hippocampus": hippocampus, "sunnybrook": sunnybrook, "mouse": mouse}
