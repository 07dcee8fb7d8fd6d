"""Whether a U-Net is to be part of the model."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import cast

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.errors import Cancelled
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.looks import Viewpoint
from ofl_sam2.memory.pool import CLOSE, MAIN, SupportPool, pool_key
from ofl_sam2.progress import CancelToken
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.training.held_out import Entry, HeldOut


class Judge:
    """Whether a U-Net helps in slices that it has not seen: of whole cases if there are two.

    Each structure is judged in the main view or, if it is drawn in close-ups, in these: a U-Net that is better than the
    overview may be worse than what is drawn.

    Args:
        segmenter: has learned the cases.
        cases: the labelled volumes.
        names: of the cases.
        fitted: names of those that parameters were fitted to before.
        cancel: to stop.

    Attributes:
        held_out: these slices.
        dice: on what is scored of them, with the last U-Net asked about.
    """

    def __init__(
        self,
        segmenter: VolumeSegmenter,
        cases: Sequence[LabelledCase],
        names: Sequence[str],
        fitted: Collection[str],
        cancel: CancelToken | None = None,
    ) -> None:
        self.segmenter, self.cases, self.names, self.cancel = segmenter, cases, names, cancel
        pooled = [segmenter.pool.cases[name] for name in names]
        self.held_out = HeldOut.choose(pooled, 2, segmenter.structures, fitted)
        self._scored = self.held_out
        self._before: float | None = None
        self.dice: float | None = None

    def begin(self, limit: float) -> float | None:
        """Choose what can be scored in about so many seconds; return the Dice of it without a U-Net.

        Raises:
            Cancelled: stopped by `cancel`.
        """
        close = self._close_ups() if self.segmenter.settings.close_ups else {}
        whole = HeldOut({**self.held_out.rows, **close}).with_close_ups(self.segmenter)
        self._scored, self._before = whole.affordable(self.segmenter, limit, self.cancel)
        return self._before

    def seen(self, case: LabelledCase) -> LabelledCase | None:
        """What a U-Net may see of a case before it is judged; None if that is nothing."""
        return self.held_out.seen(case, self.segmenter.pool.cases[case.volume.name])

    def helps(self, unet: VoxelUNet) -> bool:
        """Whether the average with a U-Net is better than what the segmenter draws without, and drew at the beginning.

        No if cancelled.
        """
        scored = {self.segmenter.pools[view].cases[key].name for view, key in self._scored.rows}
        with suppress(Cancelled):
            seconds = self._scored.drawn_by(unet, self.segmenter, self._named(scored), self.cancel)
            without, self.dice = self._scored.compared(self.segmenter, seconds, self.cancel)
            if without is not None and self.dice is not None and self._before is not None:
                return self.dice > max(without, self._before)
        return False

    def _named(self, names: Collection[str]) -> Iterator[LabelledCase]:
        """Cases, read one by one."""
        return (self.cases[number] for number, name in enumerate(self.names) if name in names)

    def _close_ups(self) -> dict[Entry, tuple[int, ...]]:
        """The rows of main close-ups that lie in held-out slices."""
        rows, pool = dict[Entry, tuple[int, ...]](), self.segmenter.pools.get(CLOSE, SupportPool())
        viewpoint = cast(Viewpoint, self.segmenter.viewpoint)
        for case in self._named({key for _, key in self.held_out.rows}):
            main, name = self.segmenter.pool.cases[case.volume.name], case.volume.name
            apart = {main.slices[row] for row in self.held_out.rows[MAIN, name]}
            stack = viewpoint.stack(case.volume)
            for look in viewpoint.looks(case):
                key = pool_key(name, look.focus)
                if look.view == CLOSE and look.window and key in pool.cases:
                    before = stack.slices_before(look.window)
                    inside = [row for row, index in enumerate(pool.cases[key].slices) if index + before in apart]
                    if inside:
                        rows[CLOSE, key] = tuple(inside)
        return rows
