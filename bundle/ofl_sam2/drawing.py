"""From a volume to its label map: an overview of the whole, then close-ups of small structures."""

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofl_sam2.canvas import LOGIT_LIMIT, Canvas
from ofl_sam2.intensity import intensity_for
from ofl_sam2.looks import Viewpoint, windows
from ofl_sam2.memory.pool import MAIN, View, describe
from ofl_sam2.progress import Watch
from ofl_sam2.propagation import LearnedView, Propagation, SegmentedSlice
from ofl_sam2.quality import ExpectedDice
from ofl_sam2.volume import SliceStack, Volume
from ofl_sam2.window import Window

if TYPE_CHECKING:
    from ofl_sam2.segmenter import VolumeSegmenter

MAX_AVERAGED = 64 << 20
CLOSE_UPS = 2


class Drawing:
    """Segments one volume: an overview of the whole, then close-ups of small structures."""

    def __init__(self, segmenter: "VolumeSegmenter", viewpoint: Viewpoint, volume: Volume, watch: Watch) -> None:
        self.segmenter, self.viewpoint, self.volume, self.watch = segmenter, viewpoint, volume, watch
        self.values = tuple(segmenter.structures)
        self.grey = intensity_for(volume)
        self.main = viewpoint.stack(volume)
        self.confidence = torch.zeros(len(self.main), len(self.values))
        self.expected = ExpectedDice(len(self.values))
        self.overview: NDArray[np.float16] | None = None

    def run(self) -> tuple[Canvas, list[float]]:
        """The label map, and the estimated quality of each structure."""
        close = self.segmenter.view(View(close=True)) if self.segmenter.settings.close_ups else None
        magnified = close.values if close else ()
        canvas = Canvas(self.volume.grid, self.values, self.segmenter.settings.overlap, repaint=bool(magnified))
        self._look(canvas, None, self.values, overview=bool(magnified))
        seen: list[tuple[Window, tuple[int, ...]]] = []
        for _ in range(CLOSE_UPS):
            masks = ((value, canvas.mask(value)) for value in magnified)
            seen, before = windows(self.volume, masks), seen
            for window, focus in seen:
                if (window, focus) not in before:
                    canvas.erase(focus)
                    self._look(canvas, window, focus, overview=False)
        return canvas, self.expected.quality(self.confidence).tolist()

    def _look(self, canvas: Canvas, window: Window | None, values: tuple[int, ...], overview: bool) -> None:
        """Draw structures from all views of the volume or a window, from the main one alone for an overview."""
        stacks = self.viewpoint.stacks(self.volume, self.grey, window)
        usable = {view: stack for view, stack in stacks.items() if self._can_show(view, values)}
        grid = next(iter(stacks.values())).volume.grid
        few = len(values) * math.prod(grid) <= MAX_AVERAGED
        if overview or not few:
            usable = {view: stack for view, stack in usable.items() if view.axis is None}
        if overview and few:
            self.overview = np.zeros((len(values), *grid), np.float16)
        rows = [self.values.index(value) for value in values]
        self.expected.forget(rows)
        if len(usable) == 1 and window is None:
            stack = usable[MAIN]
            for result in self._propagate(MAIN, stack, values):
                logits = self._restored(stack, result)
                self.expected.add(rows, logits)
                if self.overview is not None:
                    for row, found in zip(self.overview, logits.sigmoid().numpy(), strict=True):
                        stack.slice_of(row, result.index)[...] = found
                canvas.paint(partial(stack.slice_of, index=result.index), logits, values)
            return
        total = np.zeros((len(values), *grid), np.float32)
        for view, stack in usable.items():
            for result in self._propagate(view, stack, values, self.main.slices_before(window) if window else 0):
                probability = self._restored(stack, result).sigmoid().numpy()
                for row, found in zip(total, probability, strict=True):
                    stack.slice_of(row, result.index)[...] += found
        total /= len(usable)
        region = window.slices if window else ()
        if window and self.overview is not None:
            total = (total + self.overview[rows][(slice(None), *region)]) / 2
        logits = torch.from_numpy(total).logit_(1e-6)
        self.expected.add(rows, logits)
        canvas.paint(lambda array: array[region], logits, values)

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

    def _can_show(self, view: View, values: tuple[int, ...]) -> bool:
        learned = self.segmenter.view(view)
        return learned is not None and set(values) <= set(learned.values)

    @staticmethod
    def _restored(stack: SliceStack, result: SegmentedSlice) -> Tensor:
        return stack.restore(result.logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).cpu())
