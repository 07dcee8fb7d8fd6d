"""Segmentations on a DICOMweb server that the journal does not know yet."""

from collections.abc import Container
from datetime import datetime, timedelta
from pathlib import Path

from lib.datastores.archive import Archive, ArchiveError, StoredSegmentation
from lib.datastores.notices import warn_once
from ofl_sam2.errors import InputError
from ofl_sam2.service.journal import LabelEvent, LabelJournal

_FINAL = "final"
_TIME_ZONES = timedelta(hours=14)


class ForeignSegmentations:
    """What others stored on the server behind `archive`; whoever uses it must take turns.

    Args:
        archive: the server.
        journal: of the labels; series that it names are known.
    """

    def __init__(self, archive: Archive, journal: LabelJournal) -> None:
        self._archive, self._journal = archive, journal
        self._described: dict[str, StoredSegmentation] = {}

    def new(self, studies: Container[str]) -> list[StoredSegmentation]:
        """The segmentations of studies (UIDs) that the journal does not know, oldest first.

        Those that cannot be read are logged.

        Raises:
            ArchiveError: the server does not answer, or refuses.
        """
        stored = self._archive.series({"Modality": "SEG"})
        known = {event.details.get("SeriesInstanceUID") for event in self._journal.history()}
        new = {uid for uid, series in stored.items() if series.study in studies} - known
        for uid in new - self._described.keys():
            try:
                self._described[uid] = self._archive.segmentation(stored[uid])
            except ArchiveError as error:
                warn_once(f"Segmentation {uid} is not looked at until later: {error}")
        found = [self._described[uid] for uid in new if uid in self._described]
        return sorted(found, key=lambda segmentation: (segmentation.made, segmentation.series.uid))

    def download(self, found: StoredSegmentation, target: Path) -> int:
        """Write the first object of a segmentation into a file; the result is how many objects there are.

        Raises:
            ArchiveError: the server does not answer, or refuses.
        """
        instances = list(self._archive.instances(found.series))
        for instance in instances[:1]:
            instance.save_as(target, write_like_original=False)
        return len(instances)

    def check_newer(self, found: StoredSegmentation) -> None:
        """Refuse a segmentation that was made before the label there is, or that is about to be there.

        Whole seconds are compared: when this segmentation was made, with when the label was made if it was one too.
        Where the label was saved here, the segmentation may be older by as much as time zones differ, as many programs
        write local times. A segmentation without a time counts as new.

        Raises:
            InputError: it was.
        """
        saved = self._journal.latest() | {event.key: event for event in self._journal.pending()}
        label = saved.get((found.image, _FINAL))
        if label is None or not found.made:
            return
        made = datetime.fromisoformat(found.made).replace(microsecond=0)
        since, slack = _when_made(label)
        if made + slack < datetime.fromisoformat(since).replace(microsecond=0):
            raise InputError(
                f"It was made at {found.made}, before the label there is ({since}). "
                "Export it again if it is to be the label, and check the clock of the machine that made it."
            )


def _when_made(label: LabelEvent) -> tuple[str, timedelta]:
    """When a label was made, or saved if nobody knows, and how far another clock may be off."""
    made = label.details.get("made")
    try:
        if datetime.fromisoformat(made).tzinfo:
            return made, timedelta()
    except (TypeError, ValueError):
        pass
    return label.time, _TIME_ZONES
