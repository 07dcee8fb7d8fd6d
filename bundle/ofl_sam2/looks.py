"""Where to look: along the main axis, along the others where voxels are nearly isotropic, close up at what is small."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofl_sam2.backbone.build import STRIDE
from ofl_sam2.dataset import LabelledCase
from ofl_sam2.intensity import Intensity, intensity_for
from ofl_sam2.memory.pool import View, evenly
from ofl_sam2.settings import Settings
from ofl_sam2.volume import SliceStack, Volume, choose_axis, is_anisotropic, is_nearly_isotropic
from ofl_sam2.window import Window, close_ups

MAX_SIDE_SLICES = 320


@dataclass(frozen=True)
class Look:
    """A stack of labelled slices.

    Attributes:
        view: along which axis, and whether it is a close-up.
        focus: the label values a close-up is made for.
        stack: the slices.
        labels: label values in the grid of `stack`.
        slices: which slices of the stack are labelled.
        window: what of the volume a close-up shows.
    """

    view: View
    focus: tuple[int, ...]
    stack: SliceStack
    labels: NDArray[Any] = field(repr=False)
    slices: tuple[int, ...]
    window: Window | None


@dataclass(frozen=True)
class Viewpoint:
    """How a model slices volumes.

    Attributes:
        axis: canonical axis of the main slices, fixed by the first labelled case.
        through_plane: that case had thick slices; then every volume of thick slices is cut along its own.
        size: side of the network's input in pixels.
        settings: whether there are side views and close-ups, and the window for CT.
    """

    axis: int
    through_plane: bool
    size: int
    settings: Settings

    @classmethod
    def of(cls, volume: Volume, size: int, settings: Settings) -> "Viewpoint":
        """The through-plane direction of a volume, or an axis where it has none."""
        return cls(choose_axis(volume), is_anisotropic(volume), size, settings)

    def main_axis(self, volume: Volume) -> int:
        """Canonical axis of the main slices of a volume."""
        thick = volume.frames or (self.through_plane and is_anisotropic(volume))
        return choose_axis(volume) if thick else self.axis

    def stack(self, volume: Volume) -> SliceStack:
        """The main slices of a whole volume."""
        return SliceStack(volume, self.main_axis(volume), self.size, ct_window=self.settings.ct_window)

    def labelled_slices(self, case: LabelledCase) -> tuple[int, ...]:
        """The main slices of a case that count as labelled."""
        stack = self.stack(case.volume)
        counted = tuple(range(len(stack))) if case.labelled_slices is None else case.labelled_slices
        if not case.ignore_empty_slices:
            return counted
        return tuple(index for index in counted if stack.slice_of(case.labels, index).any())

    def stacks(self, volume: Volume, grey: Intensity, window: Window | None = None) -> dict[View, SliceStack]:
        """All stacks through a volume, or through a window of it."""
        part, close, main = volume.cropped(window) if window else volume, window is not None, self.main_axis(volume)
        stacks = {View(None, close): SliceStack(part, main, self.size, grey)}
        if self.settings.side_views and is_nearly_isotropic(part) and main == self.axis:
            sides = (SliceStack(part, axis, self.size, grey) for axis in range(3) if axis != main)
            stacks |= {View(side.axis, close): side for side in sides if _is_worth_it(side)}
        return stacks

    def looks(self, case: LabelledCase) -> Iterator[Look]:
        """Every look at a labelled case, the main one first. Side views need a label on every slice."""
        case, grey = self._seen(case), intensity_for(case.volume, self.settings.ct_window)
        yield from self._looks(case, grey, None, ())
        if self.settings.close_ups:
            masks = ((value, case.labels == value) for value in case.values)
            for window, focus in windows(case.volume, masks):
                yield from self._looks(case, grey, window, focus)

    def _seen(self, case: LabelledCase) -> LabelledCase:
        """The case without what is drawn in slices that do not count as labelled."""
        if case.labelled_slices is None and not case.ignore_empty_slices:
            return case
        stack, slices, labels = self.stack(case.volume), self.labelled_slices(case), np.zeros_like(case.labels)
        for index in slices:
            stack.slice_of(labels, index)[...] = stack.slice_of(case.labels, index)
        return replace(case, labels=labels, labelled_slices=slices, ignore_empty_slices=False)

    def _looks(
        self, case: LabelledCase, grey: Intensity, window: Window | None, focus: tuple[int, ...]
    ) -> Iterator[Look]:
        if window is not None and case.labelled_slices is not None:
            window = _all_slices(window, self.stack(case.volume))
        labels = case.labels if window is None else case.labels[window.slices]
        for view, stack in self.stacks(case.volume, grey, window).items():
            if view.axis is None:
                every = tuple(range(len(stack)))
                labelled = every if case.labelled_slices is None else case.labelled_slices
                yield Look(view, focus, stack, labels, labelled, window)
            elif case.labelled_slices is None:
                yield Look(view, focus, stack, labels, _telling(stack, labels), window)


def _is_worth_it(side: SliceStack) -> bool:
    """Whether a stack has not too many slices, and these fill at least a cell of the network along both sides."""
    _, _, height, width = side.geometry.content
    return len(side) <= MAX_SIDE_SLICES and min(height, width) >= STRIDE


def windows(volume: Volume, masks: Iterator[tuple[int, NDArray[Any]]]) -> list[tuple[Window, tuple[int, ...]]]:
    """Close-ups of a volume, see `close_ups`; structures of a sequence are framed over all times."""
    still = volume.spatial_shape
    over_time = ((value, mask.any(axis=-1) if mask.ndim > len(still) else mask) for value, mask in masks)
    return close_ups(over_time, still, volume.spacing[: len(still)])


def _all_slices(window: Window, stack: SliceStack) -> Window:
    """The window through every slice of a stack, so that slices keep their numbers."""
    lower, upper, through = list(window.lower), list(window.upper), stack.through
    if through < len(lower):
        lower[through], upper[through] = 0, stack.volume.grid[through]
    return Window(tuple(lower), tuple(upper))


def _telling(stack: SliceStack, labels: NDArray[Any]) -> tuple[int, ...]:
    """Slices with a structure, and as many without, evenly spread."""
    filled = [bool(stack.slice_of(labels, index).any()) for index in range(len(stack))]
    empty: Sequence[int] = np.flatnonzero(np.logical_not(filled)).tolist()
    count = min(len(empty), max(4, sum(filled)))
    chosen = set(evenly(empty, count))
    return tuple(index for index, has in enumerate(filled) if has or index in chosen)
