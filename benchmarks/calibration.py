"""How far to trust nano's quality estimates: predicted quality against true Dice, per slice and per volume.

Hippocampus MR, learned from two labelled volumes. Choices such as `gamma` follow from cross-validation inside
dev_shots (the default); `--split dev_val` is for the one report.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from support import HIPPOCAMPUS, RESULTS, data_folder, labelled, nano, score_case, splits, write
from support.tasks import folds

from ofl_sam2.atomic import atomic_path
from ofl_sam2.dataset import LabelledCase
from ofl_sam2.overlay import PALETTE
from ofl_sam2.segmenter import Segmentation, VolumeSegmenter

SHOTS, FOLDS, BINS = 2, 4, 10
GAMMAS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Estimates:
    """Predicted quality and true Dice of the same things, each `(N,)` in [0, 1]."""

    predicted: np.ndarray
    dice: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Estimates"]) -> "Estimates":
        return cls(np.concatenate([p.predicted for p in parts]), np.concatenate([p.dice for p in parts]))

    def calibration_error(self) -> float:
        """Expected calibration error: mean distance of predicted and true within equal bins of the prediction."""
        bins = np.clip((self.predicted * BINS).astype(int), 0, BINS - 1)
        gaps = [abs((self.predicted - self.dice)[bins == number].sum()) for number in range(BINS)]
        return float(sum(gaps) / len(self.dice))

    def accepted(self) -> dict[str, dict[str, float | None]]:
        """For each gamma: the share of predictions that reach it, and the mean true Dice of those."""
        table = {}
        for gamma in GAMMAS:
            taken = self.predicted >= gamma
            dice = round(float(self.dice[taken].mean()), 4) if taken.any() else None
            table[f"{gamma:g}"] = {"share": round(float(taken.mean()), 4), "dice": dice}
        return table

    def summary(self) -> dict[str, object]:
        """All figures."""
        return {
            "count": len(self.dice),
            "mean_predicted": round(float(self.predicted.mean()), 4),
            "mean_dice": round(float(self.dice.mean()), 4),
            "calibration_error": round(self.calibration_error(), 4),
            "spearman": round(float(spearmanr(self.predicted, self.dice).statistic), 4),
        }


def folds_of(split: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(labelled volumes, volumes to segment): the others of dev_shots, or all of dev_val."""
    inside = folds(SHOTS, FOLDS)
    return inside if split == "dev_shots" else [(chosen, tuple(splits()["dev_val"])) for chosen, _ in inside]


def of_slices(segmenter: VolumeSegmenter, case: LabelledCase, result: Segmentation) -> tuple[Estimates, Estimates]:
    """One estimate a slice and structure: all of them, and those where prediction or reference hold the structure.

    A slice that both leave empty is right: its Dice counts as 1.
    """
    stack = segmenter.stack(case.volume)
    dice, filled = np.ones_like(result.confidence), np.zeros(result.confidence.shape, bool)
    for column, value in enumerate(result.structures):
        for index in range(len(stack)):
            predicted, true = (stack.slice_of(labels, index) == value for labels in (result.labels, case.labels))
            if size := np.count_nonzero(predicted) + np.count_nonzero(true):
                dice[index, column] = 2 * np.count_nonzero(predicted & true) / size
                filled[index, column] = True
    every = Estimates(result.confidence.ravel(), dice.ravel())
    return every, Estimates(result.confidence[filled], dice[filled])


def of_volume(case: LabelledCase, result: Segmentation) -> Estimates:
    """One estimate, the mean over the structures."""
    scored = score_case(case, result)
    quality = np.mean(list(result.quality.values()))
    return Estimates(np.array([quality]), np.array([scored.mean("dice")]))


def main(split: str, queries: int | None) -> None:
    folder = data_folder("msd_hippocampus")
    parts: dict[str, list[Estimates]] = {"slices": [], "slices with the structure": [], "volumes": []}
    listed = []
    for supports, names in folds_of(split):
        segmenter = nano()
        segmenter.learn([labelled(folder, name) for name in supports], HIPPOCAMPUS)
        for case in (labelled(folder, name) for name in names[:queries]):
            result = segmenter.segment(case.volume)
            found = (*of_slices(segmenter, case, result), of_volume(case, result))
            for unit, estimates in zip(parts.values(), found, strict=True):
                unit.append(estimates)
        own = Estimates.join(parts["volumes"][-len(names[:queries]) :])
        listed.append({"learned_from": supports, "segmented": names[:queries], "volumes": own.summary()})
        print(f"{', '.join(supports)}: {len(names[:queries])} volumes segmented", flush=True)
    joined = {unit: Estimates.join(estimates) for unit, estimates in parts.items()}
    content = {unit: {**values.summary(), "accepted_by_gamma": values.accepted()} for unit, values in joined.items()}
    within = round(float(np.mean([fold["volumes"]["spearman"] for fold in listed])), 4)
    content["volumes"]["spearman_within_folds"] = within
    for unit, values in joined.items():
        show(unit, values)
    print(f"volumes, mean rank correlation within the {len(listed)} models: {within:.2f}")
    name = f"calibration_{split}" if queries is None else f"calibration_{split}_{queries}_queries"
    scatter(RESULTS / f"{name}.png", joined, split)
    write(name, {"folds": listed, **content})


def show(unit: str, values: Estimates) -> None:
    """Print the figures, and which gamma accepts which share at which true Dice."""
    print(unit, values.summary())
    print("gamma   share    Dice")
    for gamma, row in values.accepted().items():
        dice = "-" if row["dice"] is None else f"{row['dice']:.3f}"
        print(f"{gamma:>5}   {row['share']:.3f}   {dice:>5}")


def scatter(path: Path, estimates: dict[str, Estimates], split: str) -> None:
    """Predicted against true, a panel each for slices and volumes, with the mean of each bin."""
    figure = Figure(figsize=(13.5, 5.4), layout="constrained", facecolor="white")
    for ax, (unit, values) in zip(figure.subplots(1, len(estimates)), estimates.items(), strict=True):
        _panel(ax, unit, values)
    figure.suptitle(
        f"hippocampus, {split}, K = {SHOTS}: predicted quality and true Dice", x=0.01, ha="left", fontsize=11
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _panel(ax: Axes, unit: str, values: Estimates) -> None:
    figures = values.summary()
    few = len(values.dice) < 300
    ax.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    ax.scatter(
        values.predicted, values.dice, s=22 if few else 5, alpha=0.7 if few else 0.25, color=PALETTE[6], linewidth=0
    )
    bins = np.clip((values.predicted * BINS).astype(int), 0, BINS - 1)
    means = [(values.predicted[bins == n].mean(), values.dice[bins == n].mean()) for n in np.unique(bins)]
    ax.plot(
        *zip(*means, strict=True), color=PALETTE[5], marker="o", markersize=5, linewidth=1.4, label="mean of each bin"
    )
    ax.set(xlabel="predicted quality", ylabel="true Dice", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    ax.set_box_aspect(1)
    error, rank = figures["calibration_error"], figures["spearman"]
    ax.set_title(
        f"{len(values.dice)} {unit}\nSpearman {rank:.2f}, calibration error {error:.3f}", fontsize=10, loc="left"
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right", fontsize=9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("dev_shots", "dev_val"), default="dev_shots")
    parser.add_argument(
        "--queries", type=int, help="segment the first N only, in files of their own: to try things out"
    )
    main(**vars(parser.parse_args()))
