"""Labels are learned as they are saved, by one background thread, and published as snapshots.

    learn / forget -> queue -> (lock, newest snapshot, check, learn, publish) -> Serving -> compare with other labels

Callers only touch the queue, under one condition that is never held while anything is computed or written. The thread
holds the lock of the snapshots while it makes a snapshot from the current one, so that a training in another process
publishes before or after, never in between. It learns on a copy of the segmenter that is being served.
"""

import copy
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.errors import Cancelled, ModelError, OFLError
from ofl_sam2.progress import CancelToken
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.service.label_notes import LabelNotes, agreement, check_label
from ofl_sam2.service.serving import Serving
from ofl_sam2.service.snapshots import Snapshot
from ofl_sam2.service.structures import StructureRegistry

_log = logging.getLogger(__name__)

BATCH = 4
RETRY_SECONDS = 30.0


class LearningService:
    """Learns labels in the background. Any thread may call it.

    A label that cannot be learned is reported in the status and left out; what was learned of the image before stays.
    When nothing is left to learn, each label is compared with what the other ones make of its image.
    Where nothing can be published (full disk, damaged snapshot) the labels wait and are tried again every 30 s and
    with each new label.

    Args:
        serving: the snapshots, and the model to go on from.
        registry: names of the label values.
        open_base: makes a segmenter that has learned nothing, for the first label.
        read_case: reads the label of an image, its values those of the registry.
        passes: whether what `read_case` raised may pass by itself; then it is tried again every 30 s.
    """

    def __init__(
        self,
        serving: Serving,
        registry: StructureRegistry,
        open_base: Callable[[], VolumeSegmenter],
        read_case: Callable[[str], LabelledCase],
        passes: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        self._serving, self._snapshots, self._registry = serving, serving.snapshots, registry
        self._open_base, self._read_case, self._passes = open_base, read_case, passes
        self._condition = threading.Condition()
        self._queue: dict[str, str | None] = {}
        self._later: dict[str, str | None] = {}
        self._wanted = False
        self._busy = False
        self._now: dict[str, str] = {}
        self._agreement: dict[str, tuple[str, dict[str, float]]] = {}
        self._errors: dict[str, str] = {}
        self._problem: str | None = None
        self._stop, self._interrupt = CancelToken(), CancelToken()
        self._thread = threading.Thread(target=self._run, name="learning", daemon=True)

    def start(self) -> None:
        """Start the thread; what was queued before is learned now."""
        self._thread.start()

    def close(self) -> None:
        """Stop at the next slice and wait for that. What is still queued is found by `reconcile` at the next start."""
        self._stop.cancel()
        with self._condition:
            self._interrupt.cancel()
            self._condition.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def learn(self, image: str, sha256: str) -> None:
        """Queue the label of an image, new or saved again; sha256 is any text that differs when the label does."""
        self._enqueue({image: sha256})

    def forget(self, image: str) -> None:
        """Queue taking the label of an image out of the pool."""
        self._enqueue({image: None})

    def structures_changed(self) -> None:
        """Queue bringing the model in line with structures that were renamed or merged."""
        self._enqueue({})

    def reconcile(self, wanted: dict[str, str]) -> None:
        """Queue what differs between the labels that there are (image -> sha256) and the current snapshot."""
        learned: dict[str, str] = {}
        with suppress(ModelError):  # the thread meets it too, reports it, and tries again
            learned = LabelNotes.of(self._snapshots.current()).learned
        gone: dict[str, str | None] = dict.fromkeys(learned.keys() - wanted.keys())
        self._enqueue(gone | {image: sha256 for image, sha256 in wanted.items() if learned.get(image) != sha256})

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until everything queued is done; return whether it is."""
        with self._condition:
            return self._condition.wait_for(lambda: not (self._busy or self._queue or self._wanted), timeout)

    def status(self) -> dict[str, Any]:
        """What is being learned, what went wrong, and which labels are in the current snapshot; plain JSON values."""
        with self._condition:
            working = "checking" if "checking" in self._now else "learning"
            state = working if self._busy else "waiting" if self._queue or self._wanted else "idle"
            shown = {
                "state": state if self._thread.is_alive() else "stopped",
                "learning": self._now.get("learning"),
                "checking": self._now.get("checking"),
                "queue": list(self._queue),
                "errors": dict(self._errors),
                "problem": self._problem,
            }
        snapshot, names = None, {}
        try:
            names = {str(value): name for value, name in self._structures().items()}
            snapshot = self._snapshots.current()
        except ModelError as error:
            shown["problem"] = str(error)
        notes = self._notes(snapshot)
        return {
            **shown,
            "snapshot": snapshot.version if snapshot else None,
            "learned": notes.learned,
            "trained_on": notes.trained_on,
            "fitted_on_removed": notes.fitted_on_removed(),
            "flagged": {
                image: {names.get(value, value): dice for value, dice in suspicious.items()}
                for image, suspicious in notes.flagged().items()
            },
        }

    def _enqueue(self, tasks: dict[str, str | None]) -> None:
        with self._condition:
            for image, sha256 in tasks.items():
                self._queue.pop(image, None)
                self._later.pop(image, None)
                self._queue[image] = sha256
            self._wanted = True
            self._interrupt.cancel()
            self._condition.notify_all()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._process(batch)
                self._compare()
            except Exception as error:
                self._wait_to_retry(batch, error)
            with self._condition:
                self._busy, self._now = False, {}
                self._condition.notify_all()

    def _next_batch(self) -> dict[str, str | None] | None:
        """What to learn (sha256) and to forget (None) next; None to stop."""
        with self._condition:
            while not self._condition.wait_for(
                lambda: self._stop.cancelled or self._wanted or self._queue, RETRY_SECONDS if self._later else None
            ):
                self._queue, self._later = self._later, {}
            if self._stop.cancelled:
                return None
            batch = {image: self._queue.pop(image) for image in list(self._queue)[:BATCH]}
            self._busy, self._wanted = True, False
            return batch

    def _wait_to_retry(self, batch: dict[str, str | None], error: Exception) -> None:
        with self._condition:
            if self._stop.cancelled:
                return
            something_new = self._wanted
            self._problem = _sentence(error)
            self._queue, self._wanted = batch | self._queue, True
            self._busy, self._now = False, {}
            if not something_new:
                self._condition.wait(RETRY_SECONDS)

    def _process(self, batch: dict[str, str | None]) -> None:
        """Make one snapshot from the current one."""
        with self._snapshots.lock():
            snapshot = self._snapshots.current()
            notes = self._notes(snapshot)
            segmenter = copy.copy(self._serving.current()[1]) if snapshot else self._open_base()
            before = segmenter.structures
            outcome = self._apply(segmenter, notes, self._take_out_merged(segmenter, notes) | batch)
            segmenter.rename(self._structures())
            if outcome.done:
                with self._condition:
                    self._agreement = {image: v for image, v in self._agreement.items() if image in notes.agreement}
            if outcome.done or segmenter.structures != before:
                other = snapshot.notes if snapshot else {}
                self._publish(segmenter, {**other, **vars(notes), "reason": outcome.reason})
        with self._condition:
            self._problem = None
            kept = {image: text for image, text in self._errors.items() if image not in {**batch, **outcome.errors}}
            self._errors = kept | outcome.errors

    def _publish(self, segmenter: VolumeSegmenter, notes: dict[str, Any]) -> None:
        if segmenter.structures:
            self._snapshots.publish(segmenter, notes)
            self._serving.current()
        else:
            self._snapshots.withdraw()

    def _take_out_merged(self, segmenter: VolumeSegmenter, notes: LabelNotes) -> dict[str, str | None]:
        """Forget labels with values that were merged into others, and return them to be learned again.

        A U-Net that tells them apart goes: it would speak against the one where it sees the other.
        """
        merged = segmenter.structures.keys() - self._structures().keys()
        if segmenter.unet is not None and merged & set(segmenter.unet.values):
            segmenter.unet = None
        images = [image for image, case in segmenter.pool.cases.items() if merged & case.known]
        again = {image: notes.learned.get(image) for image in images}
        if images:
            segmenter.forget(images)
        for image in images:
            notes.forget(image)
        return again

    def _apply(self, segmenter: VolumeSegmenter, notes: LabelNotes, batch: dict[str, str | None]) -> "_Outcome":
        outcome = _Outcome()
        for image, sha256 in batch.items():
            with self._condition:
                self._now = {"learning": image}
            try:
                if sha256 is not None:
                    self._learn(segmenter, notes, image, sha256)
                    outcome.done.append(f"learned {image}")
                elif image in segmenter.pool.cases:
                    segmenter.forget([image])
                    notes.forget(image)
                    outcome.done.append(f"forgot {image}")
            except Cancelled:
                raise
            except Exception as error:
                outcome.errors[image] = _sentence(error)
                if self._passes(error):
                    with self._condition:
                        self._later[image] = sha256
        return outcome

    def _learn(self, segmenter: VolumeSegmenter, notes: LabelNotes, image: str, sha256: str) -> None:
        case, structures = self._read(image), self._structures()
        check_label(case, structures)
        learned, segmenter.structures = segmenter.structures, structures
        try:
            segmenter.learn([case], cancel=self._stop)
        except BaseException:
            segmenter.structures = learned
            raise
        notes.learn(image, sha256)

    def _compare(self) -> None:
        """Compare labels with what the others make of their images, until something is queued."""
        snapshot = self._snapshots.current()
        notes = self._notes(snapshot)
        for image in notes.unchecked():
            with self._condition:
                if self._queue or self._wanted or self._stop.cancelled:
                    return
                self._now, self._interrupt = {"checking": image}, CancelToken()
            agreed: dict[str, float] = {}
            try:
                agreed = agreement(self._serving.current()[1], self._read(image), self._interrupt)
            except Cancelled:
                return
            except Exception as error:
                _log.warning("The label of %s was not compared with the others: %s", image, error)
            with self._condition:
                self._agreement[image] = notes.learned[image], agreed

    def _notes(self, snapshot: Snapshot | None) -> LabelNotes:
        """The notes of a snapshot, with what was found out about its labels since."""
        notes = LabelNotes.of(snapshot)
        with self._condition:
            found = dict(self._agreement)
        notes.agreement |= {image: agreed for image, (sha, agreed) in found.items() if notes.learned.get(image) == sha}
        return notes

    def _read(self, image: str) -> LabelledCase:
        case = self._read_case(image)
        return replace(case, volume=replace(case.volume, name=image))

    def _structures(self) -> dict[int, str]:
        return {value: name for name, value in self._registry.names().items()}


@dataclass(frozen=True)
class _Outcome:
    """What was done with a batch, in words, and why the rest could not be done: image -> sentence."""

    done: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        return "; ".join(self.done) or "structures changed"


def _sentence(error: Exception) -> str:
    """An error in words; one that nobody foresaw goes to the log with its traceback."""
    if isinstance(error, OFLError):
        return str(error)
    _log.error("Learning failed.", exc_info=error)
    return f"{type(error).__name__}: {error}"
