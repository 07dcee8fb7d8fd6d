"""Ablations: one switch of the method changed at a time, cross-validated inside the hippocampus dev_shots.

Two labelled volumes, others segmented, several draws; dev_val is not touched. All rows but one look along one axis,
which takes a third of the time. Finished rows are kept in results/ablations.json and measured again when nano's weights
change.

    python benchmarks/ablations.py            # about 20 minutes on one core
    python benchmarks/ablations.py --report   # table and picture of the rows that exist
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from support import HIPPOCAMPUS, RESULTS, data_folder, evaluate, labelled, machine, nano
from support.table import ResumableTable
from support.tasks import folds

from ofl_sam2.atomic import atomic_path, atomic_write_text
from ofl_sam2.overlay import PALETTE
from ofl_sam2.segmenter import VolumeSegmenter, with_settings
from ofl_sam2.settings import Order

SHOTS, FOLDS, QUERIES = 2, 4, 5
BASE = "default, one view"
ABLATIONS: dict[str, dict[str, Any]] = {
    BASE: {},
    "three views": {"side_views": True},
    "SAM2 memory only": {"online_branch": False},
    "plain sum for fusion": {"adaptive_fusion": False},
    "no online update": {"online_update": False},
    "plain steepest descent": {"preconditioned": False},
    "exact ridge": {"exact_ridge": True},
    "first to last": {"order": Order.FIRST_TO_LAST},
    "gamma 0.5": {"gamma": 0.5},
    "gamma 0.7": {"gamma": 0.7},
    "gamma 0.9": {"gamma": 0.9},
    "gamma 0.95": {"gamma": 0.95},
    "2 supports": {"supports": 2, "absent_supports": 1, "memory_supports": 2},
    "4 supports": {"supports": 4, "absent_supports": 2, "memory_supports": 4},
    "8 supports": {"supports": 8, "absent_supports": 4, "memory_supports": 8},
    "12 supports": {"supports": 12, "absent_supports": 6, "memory_supports": 12},
    "no absent supports": {"absent_supports": 0},
    "3 supports in SAM2's memory": {"memory_supports": 3},
    "no recent slices": {"recent": 0},
    "6 recent slices": {"recent": 6},
    "1 step at learn and on slices": {"learn_steps": 1, "first_steps": 1, "update_steps": 1},
    "30, 15 and 9 steps": {"learn_steps": 30, "first_steps": 15, "update_steps": 9},
    "no smoothing": {"smoothing": 0.0},
    "threshold 0.3": {"threshold": 0.3},
    "threshold 0.5": {"threshold": 0.5},
}


def measure(segmenters: list[VolumeSegmenter], cases: list[list], changes: dict[str, Any]) -> dict[str, Any]:
    """Dice of each fold under changed settings."""
    started = time.perf_counter()
    dice = [
        evaluate(with_settings(segmenter, **{"side_views": False, **changes}), own)[0].mean()["dice"]
        for segmenter, own in zip(segmenters, cases, strict=True)
    ]
    return {
        "dice": round(float(np.mean(dice)), 4),
        "folds": [round(float(value), 4) for value in dice],
        "seconds_per_volume": round((time.perf_counter() - started) / sum(map(len, cases)), 2),
        "machine": machine(),
    }


def run(table: ResumableTable) -> None:
    folder = data_folder("msd_hippocampus")
    weights = nano().backbone_hash
    missing = [name for name in ABLATIONS if name not in table or table.rows[name]["weights"] != weights]
    if not missing:
        return
    segmenters, cases = [], []
    for fold, (supports, others) in enumerate(folds(SHOTS, FOLDS)):
        queries = others[QUERIES * fold % len(others) :][:QUERIES]
        segmenters.append(nano(cache_bytes=1 << 30))
        segmenters[-1].learn([labelled(folder, name) for name in supports], HIPPOCAMPUS)
        cases.append([labelled(folder, name) for name in queries])
    for name in missing:
        row = measure(segmenters, cases, ABLATIONS[name])
        table.add(name, {"weights": weights, **row})
        print(f"{name:32s} {row['dice']:.3f}  {row['seconds_per_volume']:.1f} s/volume", flush=True)


def report(rows: dict[str, dict[str, Any]], stem: Path) -> None:
    """Write the table of the default's weights as Markdown and the differences to the default as a picture."""
    base = rows[BASE]
    rows = {name: row for name, row in rows.items() if row["weights"] == base["weights"]}
    lines = [
        f"| {SHOTS} labelled volumes | Dice | difference | lowest - highest of {FOLDS} draws |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        gaps = _gaps(row, base)
        lines.append(f"| {name} | {row['dice']:.3f} | {gaps.mean():+.3f} | {gaps.min():+.3f} - {gaps.max():+.3f} |")
    atomic_write_text(stem.with_suffix(".md"), "\n".join(lines) + "\n")
    figure = Figure(figsize=(7.5, 0.26 * len(rows) + 1.0), layout="constrained", facecolor="white")
    ax = figure.subplots()
    names = [name for name in rows if name != BASE][::-1]
    for place, name in enumerate(names):
        gaps = _gaps(rows[name], base)
        ax.plot(gaps, [place] * len(gaps), "o", color=PALETTE[6], alpha=0.4, markersize=4)
        ax.plot(gaps.mean(), place, "D", color=PALETTE[5], markersize=6)
    ax.axvline(0, color="#999999", linewidth=1)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set_xlabel(f"Dice minus the default's with one view ({base['dice']:.3f})\ndiamond: mean of the draws")
    ax.spines[["top", "right"]].set_visible(False)
    with atomic_path(stem.with_suffix(".png")) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    print(f"-> {stem.name}.md, {stem.name}.png")


def _gaps(row: dict[str, Any], base: dict[str, Any]) -> np.ndarray:
    return np.subtract(row["folds"], base["folds"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write table and picture of the rows that exist")
    only = parser.parse_args().report
    results = ResumableTable(RESULTS / "ablations.json")
    if not only:
        run(results)
    if BASE in results:
        report({name: results.rows[name] for name in ABLATIONS if name in results}, results.path.with_suffix(""))
