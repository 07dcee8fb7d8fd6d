"""Rows of the label-efficiency table as a Markdown table and as curves: Dice over seconds, Dice over K."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from ofl_sam2.atomic import atomic_path
from ofl_sam2.overlay import PALETTE

from .outcomes import METHODS, UNTRAINED
from .table import Row

COMPARED = 300
_MARGIN = 0.15
SECONDS = (3, 10, 30, 100, 300, 1000, 3000)
NAMES = {
    "memory": "SAM2 memory only",
    "learn": "learn",
    "ridge": "learn, exact ridge",
    "train": "learn + train",
    "DynUNet": "DynUNet from scratch",
    "SegResNet": "SegResNet from scratch",
}
COLOURS = dict(zip(METHODS, (PALETTE[1], PALETTE[6], PALETTE[3], PALETTE[2], PALETTE[5], PALETTE[0]), strict=True))
COLUMNS = ("dice", "hd95", "surface_dice", "seconds", "cpu_seconds", "segment_seconds", "steps")


def grouped(rows: Sequence[Row]) -> dict[tuple[str, int, str, float], list[Row]]:
    """Rows that differ in the draw only, in the order of K, method and budget."""
    groups: dict[tuple[str, int, str, float], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r["dataset"], r["k"], METHODS.index(r["method"]), r["budget"], r["draw"])):
        groups[row["dataset"], row["k"], row["method"], row["budget"]].append(row)
    return dict(groups)


def markdown(rows: Sequence[Row]) -> str:
    """A table of means over the draws, the draws themselves, and where other processes disturbed."""
    lines = [
        "| data | K | method | budget (s) | draws | Dice (lowest - highest) | HD95 (mm) | surface Dice | seconds | "
        "CPU seconds | s/volume | steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (dataset, k, method, budget), group in grouped(rows).items():
        dice, hd95, surface, *seconds, steps = (_mean(group, column) for column in COLUMNS)
        low, high = (pick(row["dice"] for row in group) for pick in (min, max))
        spread = f" ({low:.3f} - {high:.3f})" if len(group) > 1 else ""
        busy = " *" if any("note" in row["conditions"] for row in group) else ""
        cells = [
            dataset,
            k,
            NAMES[method] + busy,
            f"{budget:g}" if budget else "-",
            len(group),
            f"{_cell(dice, 3)}{spread}",
        ]
        cells += [_cell(hd95, 2), _cell(surface, 3), *(_cell(value, 1) for value in seconds), _cell(steps, 0)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if any("note" in row["conditions"] for row in rows):
        lines += [
            "",
            "\\* other processes kept the machine busy during at least one draw; see `conditions` in the JSON.",
        ]
    machines = {_machine(row["conditions"]): None for row in rows}
    lines += ["", "Measured on:", "", *(f"- {machine}" for machine in machines)]
    lines += ["", "Labelled volumes of each draw:", ""]
    draws = {(row["dataset"], row["k"], row["draw"]): row for row in rows}
    for (data, k, draw), row in sorted(draws.items()):
        seed = f" (seed {row['seed']})" if row.get("seed") else ""
        lines.append(f"- {data}, K = {k}, draw {draw}: {', '.join(row['supports'])}{seed}")
    return "\n".join(lines) + "\n"


def _machine(conditions: dict) -> str:
    cpu, cores, threads, commit = (conditions[key] for key in ("cpu", "cores", "threads", "commit"))
    return f"{cpu}, {cores} cores, {threads} threads, commit {commit}"


def draw_curves(path: Path, title: str, rows: Sequence[Row]) -> Path:
    """One panel a K with several budgets, Dice of the first draw over wall time until the model is ready; a last one
    Dice over K, mean of the draws, bars span them. What is below the panels stands at their floor, with its Dice.
    """
    groups = grouped(rows)
    sizes = sorted({row["k"] for row in rows})
    budgets = {k: {budget for _, size, _, budget in groups if size == k and budget} for k in sizes}
    timed = [k for k in sizes if len(budgets[k]) > 1] or sizes[:1]
    panels = len(timed) + (len(sizes) > 1)
    columns = math.ceil(math.sqrt(panels))
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(4.2 * columns + 2.0, 3.2 * lines + 0.4), layout="constrained", facecolor="white")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for unused in axes[panels:]:
        unused.set_visible(False)
    first = [row for row in rows if row["draw"] == 0]
    ends = [pick(row["seconds"] for row in first) for pick in (min, max)]
    floor = _floor(rows)
    for ax, k in zip(axes, timed, strict=False):
        _over_seconds(ax, grouped([row for row in first if row["k"] == k]), floor)
        ax.set_title(f"K = {k}, first draw", fontsize=10, loc="left")
        ax.set_xlim(0.8 * ends[0], 1.25 * ends[1])
    if len(sizes) > 1:
        _over_shots(axes[panels - 1], groups, floor)
    axes[0].set_ylim(floor - 0.01)
    figure.supylabel("Dice, mean over structures", fontsize=9)
    handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    shown = [handles[NAMES[method]] for method in METHODS if NAMES[method] in handles]
    figure.legend(handles=shown, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"{title}: Dice over labelled volumes and time", x=0.01, ha="left", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path


def _floor(rows: Sequence[Row]) -> float:
    """Below the untrained methods, or below all where there are none."""
    dice = [row["dice"] for row in rows if row["method"] in UNTRAINED] or [row["dice"] for row in rows]
    return max(0.0, math.floor(20 * (min(dice) - _MARGIN) + 1e-6) / 20)


def _over_seconds(ax: Axes, groups: dict[tuple[str, int, str, float], list[Row]], floor: float) -> None:
    last = max(row["seconds"] for group in groups.values() for row in group)
    for method in METHODS:
        own = [group for key, group in groups.items() if key[2] == method]
        if own:
            _line(ax, method, [_mean(group, "seconds") for group in own], own, floor)
            if method in UNTRAINED:
                ax.hlines(_mean(own[0], "dice"), _mean(own[0], "seconds"), last, COLOURS[method], ":", linewidth=1)
    _logarithmic(ax, "seconds until the model is ready", SECONDS)


def _over_shots(ax: Axes, groups: dict[tuple[str, int, str, float], list[Row]], floor: float) -> None:
    budget = max((key[3] for key in groups if key[3] <= COMPARED), default=0)
    for method in METHODS:
        own = {
            key[1]: group for key, group in groups.items() if key[2:] == (method, 0 if method in UNTRAINED else budget)
        }
        if own:
            _line(ax, method, list(own), list(own.values()), floor)
    ax.set_title(
        f"mean of the draws, training {budget:g} s" if budget else "mean of the draws", fontsize=10, loc="left"
    )
    _logarithmic(ax, "labelled volumes, K", sorted({key[1] for key in groups}))


def _line(ax: Axes, method: str, x: Sequence[float], groups: Sequence[Sequence[Row]], floor: float) -> None:
    dice = [_mean(group, "dice") for group in groups]
    lows = [centre - min(row["dice"] for row in group) for centre, group in zip(dice, groups, strict=True)]
    highs = [max(row["dice"] for row in group) - centre for centre, group in zip(dice, groups, strict=True)]
    style = {
        "color": COLOURS[method],
        "marker": "o",
        "markersize": 4,
        "linewidth": 1.6,
        "elinewidth": 0.8,
        "capsize": 2,
    }
    ax.errorbar(x, dice, yerr=(lows, highs), label=NAMES[method], **style)
    for place, value in zip(x, dice, strict=True):
        if value < floor:
            ax.plot(place, floor, "v", color=COLOURS[method], markersize=5)
            ax.annotate(f"{value:.2f}", (place, floor), (4, 2), textcoords="offset points", fontsize=7)


def _logarithmic(ax: Axes, label: str, ticks: Sequence[float]) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _mean(group: Sequence[Row], column: str) -> float | None:
    values = [row[column] for row in group if row[column] is not None]
    return mean(values) if values else None


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
