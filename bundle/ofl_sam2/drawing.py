"""From a volume to its label map: an overview of the whole, then close-ups of small structures."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ofl_sam2.canvas import LOGIT_LIMIT, Canvas
from ofl_sam2.intensity import intensity_for
from ofl_sam2.looks import Viewpoint, windows
from ofl_sam2.memory.pool import View, describe
from ofl_sam2.progress import Watch
from ofl_sam2.propagation import LearnedView, Propagation, SegmentedSlice
from ofl_sam2.quality import Quality
from ofl_sam2.volume import SliceStack, Volume
from ofl_sam2.window import Window

if TYPE_CHECKING:
    from ofl_sam2.segmenter import VolumeSegmenter

MAX_AVERAGED = 64 << 20
CLOSE_UPS = 2
_EPS, _SURFACE = 1e-6, 1.0


class Drawing:
    """Segments one volume: an overview of the whole, then close-ups of small structures."""

    def __init__(self, segmenter: "VolumeSegmenter", viewpoint: Viewpoint, volume: Volume, watch: Watch) -> None:
        self.segmenter, self.viewpoint, self.volume, self.watch = segmenter, viewpoint, volume, watch
        self.values = tuple(segmenter.structures)
        self.grey = intensity_for(volume, segmenter.settings.ct_window)
        self.main = viewpoint.stack(volume)
        self.confidence = torch.zeros(len(self.main), len(self.values))
        self.quality = Quality(len(self.values))
        self.overview: Tensor | None = None
        self.by_unet: Tensor | None = None

    def run(self) -> tuple[Canvas, list[float]]:
        """The label map, and the estimated quality of each structure."""
        close = self.segmenter.active_close_ups
        magnified = close.values if close else ()
        unet = self.segmenter.active_unet
        count = len(self.values)
        if unet and is_averaged(self.volume.grid, count) and is_averaged(unet.shape_of(self.volume), count):
            self.by_unet = unet.probabilities(self.volume, self.values, self.watch.check)
        canvas = Canvas(self.volume.grid, self.values, self.segmenter.settings.overlap, repaint=bool(magnified))
        self._look(canvas, None, self.values, overview=bool(magnified))
        seen: list[tuple[Window, tuple[int, ...]]] = []
        blank = self.overview is not None
        for _ in range(CLOSE_UPS):
            masks = ((value, canvas.mask(value)) for value in magnified)
            before, seen = seen, windows(self.volume, masks)
            moved = [look for look in seen if look not in before]
            if moved:  # what will be drawn anew must not hide the others
                canvas.erase({value for _, focus in moved for value in focus} if before else self.values)
                blank = True
            for window, focus in moved:
                self._look(canvas, window, focus, overview=False)
        framed = {value for _, focus in seen for value in focus}
        rest = tuple(value for value in self.values if value not in framed)
        if blank and rest:
            canvas.erase(rest)
            self._look(canvas, None, rest, overview=False)
        return canvas, self.quality.of(self.confidence).tolist()

    def _look(self, canvas: Canvas, window: Window | None, values: tuple[int, ...], overview: bool) -> None:
        """Draw structures from all views of the volume or a window, from the main one alone for an overview."""
        stacks = self.viewpoint.stacks(self.volume, self.grey, window)
        usable = {view: shown for view in stacks if (shown := self._shown(view, values))}
        grid = next(iter(stacks.values())).volume.grid
        region, rows = window.slices if window else (), [self.values.index(value) for value in values]
        self.quality.forget(rows)
        if not is_averaged(grid, len(values)):
            main, stack = next((view, stack) for view, stack in stacks.items() if view.axis is None)
            for index, probability in self._probabilities(main, stack, values, window):
                part = partial(_slice_of, stack, region, index)
                self._paint(canvas, part, values, probability, probability, (_SURFACE, _SURFACE))
            return
        seen = None if window else self.overview
        if overview or seen is not None:
            usable = {view: shown for view, shown in usable.items() if (view.axis is None) is overview}
        total = torch.zeros(len(values), *grid) if seen is None else seen[rows].float()
        for view, shown in usable.items():
            drawn = [total[values.index(value)].numpy() for value in shown]
            for index, probability in self._probabilities(view, stacks[view], shown, window):
                for row, found in zip(drawn, probability.numpy(), strict=True):
                    stacks[view].slice_of(row, index)[...] += found
        views = [sum(value in shown for shown in usable.values()) + (seen is not None) for value in values]
        total /= _by_structure(views, total)
        if overview:
            self.overview = total.half()
        elif window and self.overview is not None:
            total = (total + self.overview[rows][(slice(None), *region)]) / 2
        second = None if self.by_unet is None else self.by_unet[rows][(slice(None), *region)].float()
        weight = _by_structure(map(self.segmenter.settings.unet_weight, views), total)
        smooth, surface = self._smoothed(total), self._widths(_SURFACE)
        self._paint(canvas, itemgetter(region), values, total, smooth, surface, second, weight)

    def _probabilities(
        self, view: View, stack: SliceStack, values: tuple[int, ...], window: Window | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Index and probabilities `(k, height, width)` of each slice."""
        offset = self.main.slices_before(window) if window else 0
        for result in self._propagate(view, stack, values, offset):
            yield result.index, stack.restore(result.logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).cpu()).sigmoid()

    def _smoothed(self, probabilities: Tensor) -> Tensor:
        """Probabilities `(k, *grid)` after a Gaussian.

        Its axes follow each other as R, A, S, so that rounding does not depend on how the volume is stored.
        """
        order = [*self.volume.order, *range(3, len(self.volume.grid))]
        widths = np.array(self._widths(self.segmenter.settings.smoothing))[order]
        smooth = torch.empty_like(probabilities)
        for row, target in zip(probabilities.numpy(), smooth.numpy(), strict=True):
            gaussian_filter(row.transpose(order), widths, output=target.transpose(order), mode="nearest")
        return smooth

    def _widths(self, voxels: float) -> list[float]:
        """Standard deviations, in voxels of each axis, of a Gaussian as wide in mm along all axes of space.

        Along the finest it is so many voxels wide, along time not at all.
        """
        spacing = np.array(self.volume.spacing[: len(self.volume.spatial_shape)])
        widths = np.zeros(len(self.volume.grid))
        widths[: len(spacing)] = voxels * spacing.min() / spacing
        return list(widths.tolist())

    def _paint(
        self,
        canvas: Canvas,
        part: Callable[[NDArray[Any]], NDArray[Any]],
        values: tuple[int, ...],
        probabilities: Tensor,
        smooth: Tensor,
        surface: Sequence[float],
        second: Tensor | None = None,
        weight: Tensor | float = 0.0,
    ) -> None:
        """Draw what is smoothly likelier than the threshold, and count the quality of what is drawn."""
        scores = scored(smooth, self.segmenter.settings.threshold, second, weight)
        if second is not None:
            probabilities = torch.where(second.isnan(), probabilities, probabilities.lerp(second, weight))
        self.quality.add([self.values.index(value) for value in values], probabilities, scores > 0, surface)
        canvas.paint(part, scores, values)

    def _propagate(
        self, view: View, stack: SliceStack, values: tuple[int, ...], offset: int = 0
    ) -> Iterator[SegmentedSlice]:
        """Segment the slices of a stack; the confidence of the main view is kept."""
        learned = cast(LearnedView, self.segmenter.view(view))
        self.watch.expect(len(stack))
        similarities = []
        for batch in self.segmenter.batches(stack, range(len(stack))):
            self.watch.check()
            similarities.append(learned.pool.similarity(describe(batch.stride16).cpu()))
        columns = [self.values.index(value) for value in values]
        run = Propagation(learned.supports, values, learned.of(values), self.segmenter.settings)
        for result in run.run(lambda index: self.segmenter.encode(stack.images([index])), torch.cat(similarities)):
            if view.axis is None:
                self.confidence[offset + result.index, columns] = result.confidence.cpu()
            yield result
            self.watch.advance()

    def _shown(self, view: View, values: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the structures that can be segmented in a view."""
        learned = self.segmenter.view(view)
        return tuple(value for value in values if value in learned.values) if learned else ()


def is_averaged(grid: Sequence[int], count: int) -> bool:
    """Whether probabilities of so many structures in a grid fit into memory."""
    return count * math.prod(grid) <= MAX_AVERAGED


def scored(
    probabilities: Tensor, threshold: float, second: Tensor | None = None, weight: Tensor | float = 0.0
) -> Tensor:
    """Logits that are positive where a structure is drawn.

    Args:
        probabilities: of the learner, `(k, ...)`.
        threshold: probability from which it draws.
        second: those of the U-Net, which draws from 0.5 on; NaN where it does not know.
        weight: of the U-Net, below 1; of each structure, if its shape can be broadcast.
    """
    scores = probabilities.logit(_EPS) - math.log(threshold / (1 - threshold))
    if second is None:
        return scores
    limit = math.log(1 / _EPS)
    both = (1 - weight) * scores.clamp(-limit, limit) + weight * second.logit(_EPS)
    return torch.where(both.isnan(), scores, both)


def _by_structure(numbers: Iterable[float], maps: Tensor) -> Tensor:
    """A number for each of the maps `(k, ...)`, to be broadcast."""
    return torch.tensor(list(numbers)).reshape(-1, *[1] * (maps.dim() - 1))


def _slice_of(stack: SliceStack, region: tuple[slice, ...], index: int, array: NDArray[Any]) -> NDArray[Any]:
    return stack.slice_of(array[region], index)
