"""Studies on a DICOMweb server: series are copied here when they are needed, final labels go back as DICOM SEG."""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from lib.datastores.archive import Archive, ArchiveError, Series, StoredSegmentation, open_archive
from lib.datastores.copies import SeriesCopies
from lib.datastores.files import find_labels, fits
from lib.datastores.local import FINAL, JournaledLocalDatastore
from lib.datastores.segmentation import Prediction, make_segmentation, read_segmentation
from lib.datastores.watcher import Repeater
from ofl_sam2.dataset import Case, load_case
from ofl_sam2.dicom import read_headers
from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.service.journal import LabelEvent, LabelJournal, check_image_id

MODALITIES = ("CT", "MR", "US")
_SERIES = "SeriesInstanceUID"
_QUICK_S = 0.25
_FILTER = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"

logger = logging.getLogger(__name__)


def connect(url: str, cache: Path, journal: LabelJournal, max_bytes: int = 20 << 30) -> "JournaledDICOMWebDatastore":
    """Open the studies of a DICOMweb server with MONAI Label's settings (user, password, address prefixes).

    Series of CT, MR and US are listed, unless MONAI_LABEL_DICOMWEB_SEARCH_FILTER says otherwise.
    """
    options: dict[str, Any] = {"max_bytes": max_bytes}
    if _FILTER in os.environ:
        options["filters"] = [settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER]
    return JournaledDICOMWebDatastore(open_archive(url), cache, journal, **options)


class JournaledDICOMWebDatastore(JournaledLocalDatastore, DICOMWebDatastore):
    """MONAI Label's DICOMweb datastore with the journal of the local one.

    Image ids are SeriesInstanceUIDs. A series that is needed is copied into `cache`. Segmentations that others store
    on the server are taken in as labels, oldest first, each once; drafts of this app are not. DICOMweb cannot delete:
    a label that is removed here stays on the server, but is not taken in again.

    Args:
        archive: the server.
        cache: folder for copies; each server gets a subfolder.
        journal: of all labels. Labels in the cache are made from it where they are missing.
        filters: QIDO filters of the series to list; the results of all of them are listed.
        max_bytes: bound on the copies of series.
        expiry_s: seconds after which the list of series is asked for again; more where listing takes long.
    """

    def __init__(
        self,
        archive: Archive,
        cache: Path,
        journal: LabelJournal,
        filters: Sequence[dict[str, Any]] = tuple({"Modality": modality} for modality in MODALITIES),
        max_bytes: int = 20 << 30,
        expiry_s: float = 5.0,
    ) -> None:
        self._archive = archive
        self._filters, self._expiry_s = filters, expiry_s
        self._listed: tuple[float, dict[str, Series]] = 0.0, {}
        self._listing, self._refreshing = threading.Lock(), threading.Lock()
        self._unusable: dict[Series, str] = {}
        self._fetched: set[Series] = set()
        self._segmentations: dict[str, StoredSegmentation] = {}
        folder = cache / hashlib.sha256(archive.url.encode()).hexdigest()[:16]
        self._copies = SeriesCopies(folder, max_bytes)
        self._downloading = FileLock(folder / ".download.lock")
        super().__init__(folder, journal)

    def name(self) -> str:
        """Address of the server."""
        return self._archive.url

    def list_images(self) -> list[str]:
        """The series on the server that pass a filter."""
        return list(self._series())

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Series that have a final label."""
        labelled = LocalDatastore.get_labeled_images(self)
        return [image_id for image_id in self.list_images() if image_id in labelled]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Series that have no final label and may be volumes."""
        labelled = LocalDatastore.get_labeled_images(self)
        return [
            series.uid
            for series in self._series().values()
            if series.uid not in labelled and series.instances != 1 and series not in self._unusable
        ]

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Images and final labels as files."""
        for image_id in self.get_labeled_images():
            self.get_image_uri(image_id)
        return LocalDatastore.datalist(self, full_path)

    def get_image_uri(self, image_id: str) -> str:
        """NIfTI file of a series, which is copied from the server first if need be; empty for an unknown one.

        Raises:
            InputError: the series cannot be read as a volume.
            ArchiveError: the server does not answer, or the series has been deleted.
        """
        check_image_id(image_id)
        if not self._copied(image_id):
            series = self._series().get(image_id)
            if series is None:
                return ""
            with self._downloading:
                if not self._copied(image_id):
                    self._copy(series)
            with self._lock:
                self._relist()
                self.update_image_info(image_id, series.info)
        self._copies.use(image_id)
        return str(self._copies.volume(image_id))

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """File of a label, in the grid of the image; empty where there is none."""
        return LocalDatastore.get_label_uri(self, label_id, label_tag)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Refused: images come from the server.

        Raises:
            InputError: always.
        """
        raise InputError("The studies are on a DICOMweb server. Store the images there.")

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """Journal a label and put it here; a final one is stored on the server as DICOM SEG first.

        Raises:
            ArchiveError: the server does not answer, or refuses.
            ImageNotFoundException, InputError, OFLError: as in a local folder.
        """
        self.get_image_uri(image_id)
        details = dict(label_info or {})
        if label_tag == DefaultLabelTag.FINAL:
            details[_SERIES] = generate_uid(prefix=None)
        return super().save_label(image_id, label_filename, label_tag, details)

    def segmentation(
        self, image_id: str, label: Path, names: dict[int, str], prediction: Prediction | None = None, uid: str = ""
    ) -> Dataset:
        """A label as DICOM SEG, see `make_segmentation`; its SeriesInstanceUID is `uid`, or a new one.

        Raises:
            InputError: as `make_segmentation`, or a label in another grid than the image.
        """
        case = load_case(Case(image_id, Path(self.get_image_uri(image_id)), label))
        headers = read_headers(self._copies.files(image_id))
        return make_segmentation(case.labels, headers, names, uid or generate_uid(prefix=None), prediction)

    def store_draft(self, image_id: str, label: Path, names: dict[int, str], prediction: Prediction) -> Dataset:
        """Store a prediction on the server as a series of its own, which is never learned from.

        Raises:
            InputError: nothing was segmented, or as `segmentation`.
            ArchiveError: the server does not answer, or refuses.
        """
        draft = self.segmentation(image_id, label, names, prediction)
        self._archive.store(draft)
        return draft

    def reconcile(self) -> None:
        """Repair what a crash left, and take in what others stored on the server meanwhile if it answers."""
        super().reconcile()
        try:
            self.refresh()
        except (OSError, OFLError) as error:
            logger.error("The segmentations on the DICOMweb server are not taken in until later: %s", error)

    def refresh(self) -> None:
        """Take in segmentations that others stored on the server, and what changed in the cache.

        Raises:
            ArchiveError: the server does not answer.
            OFLError: a label cannot be written.
        """
        with self._refreshing:
            images = self._series()
            for found in self._new_segmentations():
                image = images.get(found.image)
                if image is None or found.draft or (image.instances or found.instances) < found.instances:
                    continue
                try:
                    self._take_in_segmentation(found)
                except ArchiveError as error:
                    logger.warning("Segmentation %s is not taken in until later: %s", found.series.uid, error)
            super().refresh()

    def watch(self, period_s: float = 10.0) -> None:
        """From now on look for new series and segmentations every `period_s` seconds."""
        self._watcher = Repeater(self.refresh, period_s)

    def _series(self) -> dict[str, Series]:
        """The listed series, as of `expiry_s` seconds ago; longer ago where listing takes over a quarter second."""
        with self._listing:
            asked = time.monotonic()
            if asked > self._listed[0]:
                found = {uid: each for wanted in self._filters for uid, each in self._archive.series(wanted).items()}
                named = {uid: each for uid, each in found.items() if fits(check_image_id, uid, "A series")}
                took_s = time.monotonic() - asked
                self._listed = asked + took_s + self._expiry_s * max(1.0, took_s / _QUICK_S), named
            return self._listed[1]

    def _copied(self, image_id: str) -> bool:
        """Whether a copy is here of all instances that the server listed last."""
        series = self._listed[1].get(image_id)
        counted = series is not None and series not in self._fetched
        return self._copies.has(image_id, series.instances if counted else None)

    def _copy(self, series: Series) -> None:
        """Copy a series; one that is no volume is not asked for again before it has other instances."""
        if series in self._unusable:
            raise InputError(self._unusable[series])
        try:
            self._copies.add(series.uid, self._archive.instances(series))
            self._fetched.add(series)
        except InputError as error:
            self._unusable[series] = str(error)
            raise

    def _new_segmentations(self) -> list[StoredSegmentation]:
        """The segmentations on the server that the journal does not know, oldest first."""
        stored = self._archive.series({"Modality": "SEG"})
        known = [*self._journal.pending(), *self._journal.history()]
        new = stored.keys() - {event.details.get(_SERIES) for event in known}
        for uid in new - self._segmentations.keys():
            try:
                self._segmentations[uid] = self._archive.segmentation(stored[uid])
            except ArchiveError as error:
                logger.warning("Segmentation %s is not looked at until later: %s", uid, error)
        found = [self._segmentations[uid] for uid in new if uid in self._segmentations]
        return sorted(found, key=lambda segmentation: (segmentation.made, segmentation.series.uid))

    def _take_in_segmentation(self, found: StoredSegmentation) -> None:
        """Save a segmentation as the label of its image; one that cannot be a label is refused, once."""
        uid, image = found.series.uid, found.image
        details: dict[str, Any] = {_SERIES: uid, "source": "dicomweb"}
        with TemporaryDirectory() as folder:
            dicom, label = Path(folder) / "segmentation.dcm", Path(folder) / "label.nii.gz"
            instances = list(self._archive.instances(found.series))
            for instance in instances[:1]:
                instance.save_as(dicom, write_like_original=False)
            try:
                if len(instances) != 1:
                    raise InputError(f"The series holds {len(instances)} objects, but a label is one.")
                details["label_info"] = read_segmentation(dicom, Path(self.get_image_uri(image)), label)
            except InputError as error:
                logger.warning("Segmentation %s is passed over: %s", uid, error)
                if instances:
                    self._journal.record_refused(image, FINAL, dicom, details, str(error))
                return
            super().save_label(image, str(label), FINAL, details)

    def _find_images(self) -> dict[str, Path]:
        """Series with a copy here, a label, or a save that has to be finished."""
        labelled = (image for image, _ in find_labels(self._labels))
        pending = (event.image for event in self._journal.pending() if event.image in self._listed[1])
        return {uid: self._copies.volume(uid) for uid in sorted({*self._copies.uids(), *labelled, *pending})}

    def _bring_together(self, repair: bool) -> None:
        """As in a local folder, but labels that are missing are put back: nobody deletes them in a cache."""
        with self._lock:
            here = self._find_images().keys() | self._listed[1].keys()
            placed = find_labels(self._labels)
            for key, event in self._journal.latest().items():
                if key not in placed and event.image in here:
                    self._placed(event)
        super()._bring_together(repair)

    def _publish(self, event: LabelEvent) -> None:
        """Store a final label on the server, unless it is there."""
        uid = event.details.get(_SERIES) if event.tag == FINAL else None
        if uid and uid not in self._archive.series({_SERIES: uid}):
            names = {int(entry["idx"]): entry["name"] for entry in event.details.get("label_info") or ()}
            self._archive.store(self.segmentation(event.image, self._journal.blob(event), names, uid=uid))
