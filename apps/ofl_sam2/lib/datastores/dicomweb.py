"""Studies on a DICOMweb server: series are copied here when they are needed, final labels go back as DICOM SEG."""

import hashlib
import threading
from collections.abc import Callable, Container, Sequence
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

from lib.datastores.archive import Archive, Series, StoredSegmentation, open_archive
from lib.datastores.catalog import Catalog
from lib.datastores.copies import SeriesCopies
from lib.datastores.files import find_labels
from lib.datastores.foreign import ForeignSegmentations
from lib.datastores.local import FINAL, JournaledLocalDatastore
from lib.datastores.notices import warn_once
from lib.datastores.segmentation import Prediction, make_segmentation, read_segmentation
from lib.datastores.watcher import Repeater
from ofl_sam2.dataset import Case, load_case
from ofl_sam2.dicom import read_headers
from ofl_sam2.errors import InputError
from ofl_sam2.service.journal import Key, LabelEvent, LabelJournal, check_image_id

MODALITIES = ("CT", "MR", "US")
_SERIES = "SeriesInstanceUID"
_FILTER = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"


def connect(url: str, cache: Path, journal: LabelJournal, max_bytes: int = 20 << 30) -> "JournaledDICOMWebDatastore":
    """Open the studies of a DICOMweb server with MONAI Label's settings (user, password, address prefixes).

    Series of CT, MR and US are listed, unless MONAI_LABEL_DICOMWEB_SEARCH_FILTER says otherwise.
    """
    options: dict[str, Any] = {"max_bytes": max_bytes}
    if _FILTER in settings.model_fields_set:
        options["filters"] = [settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER]
    return JournaledDICOMWebDatastore(open_archive(url), cache, journal, **options)


class JournaledDICOMWebDatastore(JournaledLocalDatastore, DICOMWebDatastore):
    """MONAI Label's DICOMweb datastore with the journal of the local one.

    Image ids are SeriesInstanceUIDs. A series that is needed is copied into `cache`. Segmentations that others store
    on the server are taken in as labels, oldest first, each once; drafts of this app are not. DICOMweb cannot delete:
    a label that is removed here stays on the server, but is not taken in again.

    The server is asked when images are, and by `refresh`; `reconcile` works on the cache alone.

    Args:
        archive: the server.
        cache: folder for copies; each server gets a subfolder.
        journal: of all labels. Labels in the cache are made from it where they are missing.
        filters: QIDO filters of the series to list; the results of all of them are listed.
        max_bytes: bound on the copies of series.
        expiry_s: seconds after which the list of series is asked for again; more where listing takes long.

    Attributes:
        check: called with image id, label file and names of a segmentation that others stored; an `InputError` refuses
            it as a label.
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
        self.check: Callable[[str, Path, list[dict[str, Any]]], None] = lambda image_id, label, names: None
        self._archive, self._foreign = archive, ForeignSegmentations(archive, journal)
        self._catalog = Catalog(archive, filters, expiry_s)
        self._refreshing = threading.Lock()
        self._unusable: dict[Series, str] = {}
        self._fetched: set[Series] = set()
        folder = cache / hashlib.sha256(archive.url.encode()).hexdigest()[:16]
        self._copies = SeriesCopies(folder, max_bytes)
        self._downloading = FileLock(folder / ".download.lock")
        super().__init__(folder, journal)

    def name(self) -> str:
        """Address of the server."""
        return self._archive.url

    def list_images(self) -> list[str]:
        """The series on the server that pass a filter."""
        return list(self._catalog.series())

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Series that have a final label."""
        labelled = LocalDatastore.get_labeled_images(self)
        return [image_id for image_id in self.list_images() if image_id in labelled]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Series that have no final label and may be volumes."""
        labelled = LocalDatastore.get_labeled_images(self)
        return [
            series.uid
            for series in self._catalog.series().values()
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
            series = self._catalog.series().get(image_id)
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

    def remove_image(self, image_id: str) -> None:
        """Refused: DICOMweb cannot delete.

        Raises:
            InputError: always.
        """
        raise InputError("The studies are on a DICOMweb server. Delete the images there.")

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

    def refresh(self) -> None:
        """Take in segmentations that others stored on the server, and what changed in the cache.

        Raises:
            ArchiveError: the server does not answer.
            OFLError: a label cannot be written.
        """
        with self._refreshing:
            images = self._catalog.series()
            for found in self._foreign.new({series.study for series in images.values()}):
                image, name = images.get(found.image), f"Segmentation {found.series.uid}"
                if found.draft:
                    continue
                if image is None:
                    warn_once(f"{name} is passed over: no series '{found.image}', which it refers to, is listed.")
                    continue
                if image.instances is not None and image.instances < found.instances:
                    counts = f"{found.instances} images, but the series holds {image.instances}"
                    warn_once(f"{name} is passed over while it refers to {counts}.")
                    continue
                try:
                    self._take_in_segmentation(found)
                except Exception as error:  # one segmentation, whatever it holds, must keep no other back
                    warn_once(f"{name} is not taken in until later: {error}")
            super().refresh()

    def watch(self, period_s: float = 10.0) -> None:
        """Look for new series and segmentations now and every `period_s` seconds, in a thread."""
        self._watcher = Repeater(self.refresh, period_s)
        self._watcher.wake()

    def _copied(self, image_id: str) -> bool:
        """Whether a copy is here of all instances that the server listed last."""
        series = self._catalog.last.get(image_id)
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

    def _take_in_segmentation(self, found: StoredSegmentation) -> None:
        """Journal a segmentation as the label of its image; one that cannot be a label is refused, once."""
        image, uid = found.image, found.series.uid
        details: dict[str, Any] = {_SERIES: uid, "source": "dicomweb", "made": found.made}
        with TemporaryDirectory() as folder:
            dicom, label = Path(folder) / "segmentation.dcm", Path(folder) / "label.nii.gz"
            count = self._foreign.download(found, dicom)
            try:
                if count != 1:
                    raise InputError(f"The series holds {count} objects, but a label is one.")
                self._foreign.check_newer(found)
                details["label_info"] = read_segmentation(dicom, Path(self.get_image_uri(image)), label)
                self.check(image, label, details["label_info"])
                with self._saving:
                    self._foreign.check_newer(found)
                    self._journal.record_save(image, FINAL, label, details)
            except InputError as error:
                reason = str(error).replace(str(label), "the segmentation")
                warn_once(f"Segmentation {uid} is passed over: {reason}")
                if count:
                    self._journal.record_refused(image, FINAL, dicom, details, reason)

    def _find_images(self) -> dict[str, Path]:
        """Series with a copy here, a label, or one that has to be put here."""
        placed = {image for image, _ in find_labels(self._labels)}
        journaled = {event.image for event in (*self._journal.pending(), *self._journal.latest().values())}
        uids = {*self._copies.uids(), *placed, *(journaled & self._catalog.last.keys())}
        return {uid: self._copies.volume(uid) for uid in sorted(uids)}

    def _complete(self, images: Container[str]) -> None:
        """As in a local folder, but not before the server has been asked for its series."""
        if self._catalog.last:
            super()._complete(images)

    def _settle_missing(self, missing: Sequence[Key], known: Sequence[Key]) -> None:
        """Put labels back: nobody deletes them in a cache."""
        self._put_in_place(missing)

    def _forget_without_image(self, images: Container[str], labels: Container[Key]) -> None:
        """Nothing: a label whose image is not listed now may be missing in a cache, too."""

    def _publish(self, event: LabelEvent) -> None:
        """Store a final label on the server, unless it is there."""
        uid = event.details.get(_SERIES) if event.tag == FINAL else None
        if uid and uid not in self._archive.series({_SERIES: uid}):
            names = {int(entry["idx"]): entry["name"] for entry in event.details.get("label_info") or ()}
            self._archive.store(self.segmentation(event.image, self._journal.blob(event), names, uid=uid))
