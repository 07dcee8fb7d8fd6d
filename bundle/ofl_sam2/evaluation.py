"""Reports of scores: of each case and structure, their means, as JSON and as a table; folders are scored as a whole."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ofl_sam2.dataset import default_structures, find_cases, in_grid_of
from ofl_sam2.errors import InputError
from ofl_sam2.files import read_labels
from ofl_sam2.metrics import METRICS, EmptyConvention, Scores, score
from ofl_sam2.volume import SliceStack, Volume, choose_axis


@dataclass(frozen=True)
class CaseScore:
    """The scores of one case."""

    case: str
    scores: Scores

    def mean(self, metric: str) -> float:
        """Mean over the structures, without undefined values; NaN if all are undefined."""
        return _mean(values[metric] for values in self.scores.values())


@dataclass(frozen=True)
class Report:
    """The scores of several cases on the same structures and metrics.

    Attributes:
        cases: one entry a case.
        empty: what Dice is where the reference is empty.
        tolerance: of surface Dice, mm.
        not_predicted: cases with a reference and no prediction, which are in no mean.
        not_scored: label values in predictions that are no structure here.
    """

    cases: tuple[CaseScore, ...]
    empty: EmptyConvention = EmptyConvention.STANDARD
    tolerance: float = 1.0
    not_predicted: tuple[str, ...] = ()
    not_scored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.cases:
            raise InputError("There are no cases to report on.")

    @property
    def structures(self) -> tuple[str, ...]:
        return tuple(self.cases[0].scores)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(next(iter(self.cases[0].scores.values())))

    def values(self, structure: str, metric: str) -> list[float]:
        """One value a case, in the order of the cases; NaN where undefined."""
        return [case.scores[structure][metric] for case in self.cases]

    def mean_per_structure(self) -> Scores:
        """Mean over the cases, without undefined values."""
        return {s: {m: _mean(self.values(s, m)) for m in self.metrics} for s in self.structures}

    def mean(self) -> dict[str, float]:
        """Mean over the structures of the mean over the cases: every structure weighs the same, however rare."""
        per_structure = self.mean_per_structure()
        return {m: _mean(per_structure[s][m] for s in self.structures) for m in self.metrics}

    def undefined(self) -> dict[str, dict[str, int]]:
        """How many cases have no defined value, and so are in no mean: {structure: {metric: count}}."""
        return {s: {m: sum(map(math.isnan, self.values(s, m))) for m in self.metrics} for s in self.structures}

    def to_json(self) -> str:
        """Everything above as JSON text; NaN becomes null."""
        content = {
            "empty_convention": self.empty.value,
            "surface_dice_tolerance_mm": self.tolerance,
            "not_predicted": self.not_predicted,
            "not_scored": self.not_scored,
            "cases": {case.case: case.scores for case in self.cases},
            "mean_per_structure": self.mean_per_structure(),
            "mean": self.mean(),
            "undefined": self.undefined(),
        }
        return json.dumps(_nan_to_none(content), indent=2, allow_nan=False)

    def table(self) -> Table:
        """One row a case, one column a structure, one line a metric."""
        table = Table("case", "metric")
        for heading in (*self.structures, "mean"):
            table.add_column(heading, justify="right")
        headings = "\n".join(METRICS[metric] for metric in self.metrics)
        for case in self.cases:
            means = {metric: case.mean(metric) for metric in self.metrics}
            table.add_row(case.case, headings, *map(_cell, [*case.scores.values(), means]))
        table.add_section()
        table.add_row("mean", headings, *map(_cell, [*self.mean_per_structure().values(), self.mean()]), style="bold")
        counts = [counts.values() for counts in self.undefined().values()]
        if any(map(any, counts)):
            table.add_row("undefined", headings, *("\n".join(map(str, count)) for count in counts), style="dim")
        return table


def evaluate_folders(
    predictions: Path,
    labels: Path,
    cases: Sequence[str] | None = None,
    metrics: Sequence[str] = ("dice",),
    structures: Mapping[int, str] | None = None,
    empty: EmptyConvention = EmptyConvention.STANDARD,
    tolerance: float = 1.0,
    ignore_empty_slices: bool = False,
) -> Report:
    """Score every label file in `predictions` against the one of the same case name in `labels`.

    Args:
        predictions: folder of label volumes and frame folders.
        labels: folder with a reference for each of them; the report names further references.
        cases: names of the cases to score; None scores every prediction.
        metrics: see `score`; cine and frame sequences allow "dice" only, over all frames that have a reference.
        structures: {label value: name}; None takes the values that occur in the references.
        empty: what Dice is where the reference is empty.
        tolerance: of surface Dice, mm.
        ignore_empty_slices: slices whose reference holds no structure were not drawn, so what is predicted there does
            not count; they are taken along the axis with the thickest slices.

    Raises:
        InputError: a case without a pair, two files of one case, different grids, or distances of frames.
    """
    pairs, not_predicted = _pair(predictions, labels, cases)
    if structures is None:
        found = {int(value) for _, reference in pairs.values() for value in np.unique(read_labels(reference).voxels)}
        structures = default_structures(sorted(found - {0}))
    scored, others = [], set[int]()
    for case, paths in pairs.items():
        prediction = read_labels(paths[0])
        reference = read_labels(paths[1], prediction if prediction.frames else None)
        expected = in_grid_of(reference, prediction)
        if reference.frames and set(metrics) != {"dice"}:
            raise InputError(f"{reference.path} holds frames, which have no size in mm. Score them by 'dice' alone.")
        predicted = _without_undrawn(prediction, expected) if ignore_empty_slices else prediction.voxels
        others |= set(np.unique(predicted).tolist()) - {0, *structures}
        frames = None if reference.labelled is None else (2, reference.labelled)
        scores = score(predicted, expected, prediction.spacing, structures, metrics, frames, empty, tolerance)
        scored.append(CaseScore(case, scores))
    return Report(tuple(scored), empty, tolerance, not_predicted, tuple(sorted(others)))


def _without_undrawn(prediction: Volume, expected: np.ndarray) -> np.ndarray:
    """The predicted labels without the slices in which nothing is expected."""
    stack, predicted = SliceStack(prediction, choose_axis(prediction), 32), prediction.voxels.copy()
    for index in range(len(stack)):
        if not stack.slice_of(expected, index).any():
            stack.slice_of(predicted, index)[...] = 0
    return predicted


def _pair(
    predictions: Path, labels: Path, cases: Sequence[str] | None
) -> tuple[dict[str, tuple[Path, Path]], tuple[str, ...]]:
    """{case name: (prediction, reference)}, and without `cases` the references that have no prediction."""
    chosen = find_cases(predictions, cases=cases)
    references = {case.name: case.image for case in find_cases(labels)}
    missing = [case.name for case in chosen if case.name not in references]
    if missing:
        raise InputError(f"{labels} holds no reference for {', '.join(missing)}. Add them or name the cases to score.")
    pairs = {case.name: (case.image, references.pop(case.name)) for case in chosen}
    return pairs, () if cases is not None else tuple(references)


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _cell(scores: Mapping[str, float]) -> str:
    return "\n".join("-" if math.isnan(v) else f"{v:.1f}" if m == "hd95" else f"{v:.3f}" for m, v in scores.items())


def _nan_to_none(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _nan_to_none(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
