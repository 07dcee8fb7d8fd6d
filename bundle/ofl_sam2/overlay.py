"""Pictures of segmentations: outlines over slices, a summary of scores, curves.

Matplotlib through its object interface, without pyplot and its global state, so threads may draw side by side.
Slices lie as radiologists read them (anterior or superior up, the patient's right on the left), pixels in true aspect.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from ofl_sam2.atomic import atomic_path
from ofl_sam2.evaluation import Report
from ofl_sam2.metrics import METRICS
from ofl_sam2.volume import SliceStack, Volume

PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
"""Okabe and Ito's colours, which colour-blind readers tell apart, the brightest on grey first."""

_INK, _PAPER, _DARK = "#222222", "#ffffff", "#111111"
_REFERENCE = {"colors": "#ffffff", "linewidths": 1.0, "linestyles": "dashed"}
_DPI = 150
_MARGIN = 0.35
_SIDES = {0: ("A", "P"), 1: ("R", "L"), 2: ("R", "L")}

Window = tuple[slice, slice]


@dataclass(frozen=True, eq=False)
class Overlay:
    """A case to draw.

    Attributes:
        volume: the image.
        prediction: integer labels in the volume's grid.
        structures: {label value: name}; the order gives the colours.
        reference: integer labels in the volume's grid, drawn dashed.
        axis: canonical axis to slice along (0 R, 1 A, 2 S); 2 for frames.
    """

    volume: Volume
    prediction: NDArray[Any] = field(repr=False)
    structures: Mapping[int, str]
    reference: NDArray[Any] | None = field(default=None, repr=False)
    axis: int = 2

    @property
    def labels(self) -> tuple[NDArray[Any], ...]:
        """What is outlined: the prediction, and the reference if there is one."""
        return (self.prediction,) if self.reference is None else (self.prediction, self.reference)


def case_overlay(path: Path | str, overlay: Overlay, title: str = "", slices: int = 8) -> Path:
    """Draw outlines over evenly spaced slices of one case and write the picture as PNG.

    Args:
        path: PNG file to write.
        overlay: the case.
        title: heading; empty for the name of the volume.
        slices: how many slices to show at most, of those that hold the prediction or the reference.

    Returns:
        `path`.

    Raises:
        InputError: labels of another shape than the volume.
    """
    stack = SliceStack(overlay.volume, overlay.axis, size=32)
    indices, window = _choose_slices(stack, overlay, slices)
    columns = min(len(indices), 4)
    rows = math.ceil(len(indices) / columns)
    height = np.clip(2.4 * _aspect(stack, window), 1.2, 4.8)
    figure = _figure(2.4 * columns + 0.2, height * rows + 0.9, _DARK)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, index in zip(axes, indices, strict=False):
        _draw_slice(ax, stack, overlay, index, window)
    figure.suptitle(title or overlay.volume.name, color=_PAPER, fontsize=11)
    _outline_legend(figure, overlay)
    return _save(figure, path)


def summary_figure(
    path: Path | str, report: Report, overlay_of: Callable[[str], Overlay], metric: str = "dice"
) -> Path:
    """Draw the scores of all cases beside pictures of the best, the median and the worst case, as PNG.

    Args:
        path: PNG file to write.
        report: the scores.
        overlay_of: loads a case by name; called for the pictured cases only.
        metric: of the report, which is plotted and ranks the cases.

    Returns:
        `path`.
    """
    ranked = representative(report, metric)
    figure = _figure(11.5, 2.1 * max(len(ranked), 2) + 0.4, _PAPER)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.15))[0]
    _strip_plot(left.subplots(), report, metric)
    right.set_facecolor(_DARK)
    rows = right.subplots(len(ranked), 3, squeeze=False) if ranked else ()
    for axes, (rank, case) in zip(rows, ranked.items(), strict=True):
        overlay = overlay_of(case)
        score = next(entry.mean(metric) for entry in report.cases if entry.case == case)
        _gallery_row(axes, overlay, f"{rank}  {_number(score, metric)}\n{case}")
        if rank == "best":
            _outline_legend(right, overlay)
    return _save(figure, path)


def curve(
    path: Path | str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Path:
    """Draw lines {name: (x, y)} with a marker at each point and write them as PNG; returns `path`."""
    figure = _figure(6.0, 3.8, _PAPER)
    ax = figure.subplots()
    for (name, (x, y)), colour in zip(series.items(), _colours(len(series)), strict=True):
        ax.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, loc="left", fontsize=11)
    _tidy(ax)
    if len(series) > 1:
        ax.legend(frameon=False)
    return _save(figure, path)


def representative(report: Report, metric: str = "dice") -> dict[str, str]:
    """{"best": case, "median": case, "worst": case} by the mean over structures; fewer with fewer than 3 cases."""
    scored = [case for case in report.cases if not math.isnan(case.mean(metric))]
    if not scored:
        return {}
    ranked = sorted(scored, key=lambda case: case.mean(metric), reverse=metric != "hd95")
    last = len(ranked) - 1
    ranks = {last: "worst", last // 2: "median"} | {0: "best"}
    return {ranks[index]: ranked[index].case for index in sorted(ranks)}


def _choose_slices(stack: SliceStack, overlay: Overlay, count: int) -> tuple[list[int], Window]:
    """At most `count` evenly spaced slices that hold a structure, and the part of them around all structures."""
    values = list(overlay.structures)
    rows, columns = (np.zeros(side, dtype=bool) for side in stack.shape)
    filled = []
    for index in range(len(stack)):
        mask = np.logical_or.reduce([np.isin(stack.slice_of(labels, index), values) for labels in overlay.labels])
        if mask.any():
            filled.append(index)
            rows |= mask.any(axis=1)
            columns |= mask.any(axis=0)
    return _spread(filled or range(len(stack)), count), (_widen(rows), _widen(columns))


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spaced and away from both ends."""
    step = max(len(items) / count, 1.0)
    return [items[int((place + 0.5) * step)] for place in range(min(count, len(items)))]


def _widen(filled: NDArray[np.bool_]) -> slice:
    """The filled stretch with a margin on both sides; everything where nothing is filled."""
    places = np.flatnonzero(filled)
    if not places.size:
        return slice(0, len(filled))
    first, last = int(places[0]), int(places[-1]) + 1
    margin = round(_MARGIN * (last - first)) + 4
    return slice(max(first - margin, 0), min(last + margin, len(filled)))


def _aspect(stack: SliceStack, window: Window) -> float:
    """Height of the window over its width, in mm."""
    height, width = ((part.stop - part.start) * step for part, step in zip(window, stack.pixel_spacing, strict=True))
    return height / width


def _draw_slice(ax: Axes, stack: SliceStack, overlay: Overlay, index: int, window: Window) -> None:
    image = stack.intensity.apply(stack.slice_of(overlay.volume.voxels, index)[window])
    row_step, column_step = stack.pixel_spacing
    ax.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=row_step / column_step, interpolation="bilinear")
    for value, colour in zip(overlay.structures, _colours(len(overlay.structures)), strict=True):
        _outline(ax, stack.slice_of(overlay.prediction, index)[window] == value, colors=colour, linewidths=1.8)
        if overlay.reference is not None:
            _outline(ax, stack.slice_of(overlay.reference, index)[window] == value, **_REFERENCE)
    position, time = divmod(index, stack.times)
    name = "frame" if overlay.volume.frames else "slice"
    _note(ax, 0.03, 0.97, f"{name} {position}" + (f", time {time}" if stack.times > 1 else ""), va="top")
    if not overlay.volume.frames:
        for x, letter, side in zip((0.03, 0.97), _SIDES[overlay.axis], ("left", "right"), strict=True):
            _note(ax, x, 0.5, letter, ha=side, va="center")


def _outline(ax: Axes, mask: NDArray[np.bool_], **style: Any) -> None:
    """Contour of a mask `(H, W)`, closed where the mask touches the border."""
    if mask.any():
        rows, columns = (np.arange(-1, side + 1) for side in mask.shape)
        contour = ax.contour(columns, rows, np.pad(mask, 1).astype(np.float32), levels=[0.5], **style)
        contour.set_path_effects([withStroke(linewidth=style["linewidths"] + 1.2, foreground=_DARK, alpha=0.6)])
        ax.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))


def _note(ax: Axes, x: float, y: float, text: str, **alignment: Any) -> None:
    note = ax.text(x, y, text, transform=ax.transAxes, color=_PAPER, fontsize=7, **alignment)
    note.set_path_effects([withStroke(linewidth=1.8, foreground=_DARK, alpha=0.8)])


def _outline_legend(figure: Figure | SubFigure, overlay: Overlay) -> None:
    named = zip(overlay.structures.values(), _colours(len(overlay.structures)), strict=True)
    handles = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in named]
    if overlay.reference is not None:
        handles.append(Line2D([], [], color=_PAPER, linewidth=1.2, linestyle="dashed", label="reference"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 5),
        frameon=False,
        labelcolor=_PAPER,
        fontsize=9,
    )


def _gallery_row(axes: NDArray[Any], overlay: Overlay, heading: str) -> None:
    stack = SliceStack(overlay.volume, overlay.axis, size=32)
    indices, window = _choose_slices(stack, overlay, len(axes))
    for ax in axes:
        ax.set(xticks=[], yticks=[], facecolor=_DARK)
        ax.spines[:].set_visible(False)
    for ax, index in zip(axes, indices, strict=False):
        _draw_slice(ax, stack, overlay, index, window)
    axes[0].set_ylabel(heading, color=_PAPER, fontsize=9)


def _strip_plot(ax: Axes, report: Report, metric: str) -> None:
    """One dot a case in one column a structure, with the mean as a bar and in numbers below."""
    means = [scores[metric] for scores in report.mean_per_structure().values()]
    jitter = np.random.default_rng(0).uniform(-0.16, 0.16, len(report.cases))
    dots: dict[str, Any] = {"s": 26, "edgecolor": _INK, "linewidth": 0.4, "alpha": 0.85, "clip_on": False}
    for x, (structure, colour) in enumerate(zip(report.structures, _colours(len(means)), strict=True)):
        ax.scatter(x + jitter, report.values(structure, metric), color=colour, zorder=2, **dots)
        ax.hlines(means[x], x - 0.3, x + 0.3, color=_INK, linewidth=2, zorder=3)
    labels = [f"{name}\n{_number(mean, metric)}" for name, mean in zip(report.structures, means, strict=True)]
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(labels) > 4 else {}
    ax.set_xticks(range(len(labels)), labels, **slanted)
    ax.set_xlim(-0.6, len(labels) - 0.4)
    if metric != "hd95":
        ax.set_ylim(top=1.0)
    ax.set_ylabel(METRICS[metric])
    ax.set_title(
        f"{METRICS[metric]}: mean {_number(report.mean()[metric], metric)}, {len(report.cases)} cases",
        loc="left",
        fontsize=11,
    )
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.8)
    ax.set_axisbelow(True)


def _colours(count: int) -> list[str]:
    """Colours of `count` structures; from the eighth on they come again."""
    return [PALETTE[place % len(PALETTE)] for place in range(count)]


def _number(value: float, metric: str) -> str:
    return f"{value:.1f}" if metric == "hd95" else f"{value:.3f}"


def _figure(width: float, height: float, background: str) -> Figure:
    """An empty figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), facecolor=background, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path | str) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
    return Path(path)
