"""Studies on a DICOMweb server: series are copied here when they are needed, final labels go back as DICOM SEG."""

import hashlib
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
from dicomweb_client import DICOMwebClient
from dicomweb_client.session_utils import create_session_from_user_pass
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX, DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from lib.datastores.files import fits
from lib.datastores.local import FINAL, JournaledLocalDatastore
from lib.datastores.segmentation import read_segmentation, write_segmentation
from lib.datastores.watcher import Repeater
from ofl_sam2.atomic import atomic_path
from ofl_sam2.errors import InputError, OFLError
from ofl_sam2.files import read_volume
from ofl_sam2.service.journal import LabelEvent, LabelJournal, check_image_id

MODALITIES = ("CT", "MR", "US")
_SERIES = "SeriesInstanceUID"
_FILTER = "MONAI_LABEL_DICOMWEB_SEARCH_FILTER"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segmentation:
    """A DICOM SEG series on the server: its UIDs, the series it segments, and when it was made."""

    study: str
    series: str
    image: str
    made: str


def connect(url: str, cache: Path, journal: LabelJournal) -> "JournaledDICOMWebDatastore":
    """Open the studies of a DICOMweb server with MONAI Label's settings (user, password, address prefixes).

    Series of CT, MR and US are listed, unless MONAI_LABEL_DICOMWEB_SEARCH_FILTER says otherwise.
    """
    session = None
    if settings.MONAI_LABEL_DICOMWEB_USERNAME and settings.MONAI_LABEL_DICOMWEB_PASSWORD:
        session = create_session_from_user_pass(
            settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        )
    client = DICOMwebClientX(
        url=url.rstrip("/"),
        session=session,
        qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
        wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
        stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
    )
    if shutil.which("itkimage2segimage") is None:
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if _FILTER in os.environ:
        return JournaledDICOMWebDatastore(client, cache, journal, [settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER])
    return JournaledDICOMWebDatastore(client, cache, journal)


class JournaledDICOMWebDatastore(JournaledLocalDatastore, DICOMWebDatastore):
    """MONAI Label's DICOMweb datastore with the journal of the local one.

    Image ids are SeriesInstanceUIDs. A series that is needed is kept in `cache` twice: as DICOM files, and as NIfTI in
    the same grid. Segmentations that others store on the server are taken in as labels, oldest first, each once.
    DICOMweb cannot delete: a label that is removed here stays on the server, but is not taken in again.

    Args:
        client: connection to the server.
        cache: folder for copies; each server gets a subfolder.
        journal: of all labels.
        filters: QIDO filters of the series to list; the results of all of them are listed.
        expiry_s: seconds after which the list of series is asked for again.
    """

    def __init__(
        self,
        client: DICOMwebClient,
        cache: Path,
        journal: LabelJournal,
        filters: Sequence[dict[str, Any]] = tuple({"Modality": modality} for modality in MODALITIES),
        expiry_s: float = 10.0,
    ) -> None:
        self._client = client
        self._filters, self._expiry_s = filters, expiry_s
        self._series: tuple[float, dict[str, str]] | None = None
        self._segmented: dict[str, Segmentation] = {}
        self._downloading = threading.Lock()
        super().__init__(cache / hashlib.sha256(client.base_url.encode()).hexdigest()[:16], journal)

    def list_images(self) -> list[str]:
        """The series on the server that pass a filter."""
        return list(self._studies_of_series())

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Series that have a final label."""
        labelled = LocalDatastore.get_labeled_images(self)
        return [image_id for image_id in self.list_images() if image_id in labelled]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Series that have no final label."""
        labelled = LocalDatastore.get_labeled_images(self)
        return [image_id for image_id in self.list_images() if image_id not in labelled]

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Images and final labels as files."""
        return LocalDatastore.datalist(self, full_path)

    def get_image_uri(self, image_id: str) -> str:
        """NIfTI file of a series, which is copied from the server first if need be; empty for an unknown one.

        Raises:
            InputError: the series cannot be read as a volume.
            OSError: the server cannot be reached.
        """
        check_image_id(image_id)
        target = self._images / f"{image_id}.nii.gz"
        with self._downloading:
            if target.exists() and (self._images / image_id).is_dir():
                return str(target)
            if image_id not in self._studies_of_series():
                return ""
            self._download(image_id, target)
        with self._lock:
            self._relist()
            self.update_image_info(image_id, self._dicom_info(image_id))
        return str(target)

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
            OSError: the server cannot be reached.
            ImageNotFoundException, InputError, OFLError: as in a local folder.
        """
        self.get_image_uri(image_id)
        details = dict(label_info or {})
        if label_tag == DefaultLabelTag.FINAL:
            details[_SERIES] = generate_uid()
        return super().save_label(image_id, label_filename, label_tag, details)

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
            OSError: the server cannot be reached.
            OFLError: a label cannot be written.
        """
        series, segmentations = self._studies_of_series(), self._segmentations()
        known = [*self._journal.pending(), *self._journal.history()]
        seen = {event.details.get(_SERIES) for event in known}
        for found in segmentations:
            if found.image in series and found.series not in seen:
                self._take_in_segmentation(found)
        super().refresh()

    def watch(self, period_s: float = 60.0) -> None:
        """From now on look for new segmentations every `period_s` seconds."""
        self._watcher = Repeater(self.refresh, period_s)

    def _studies_of_series(self) -> dict[str, str]:
        """StudyInstanceUID of each listed series, as of `expiry_s` seconds ago at most."""
        if self._series is None or time.monotonic() - self._series[0] > self._expiry_s:
            found = [
                entry for wanted in self._filters for entry in self._client.search_for_series(search_filters=wanted)
            ]
            datasets = map(Dataset.from_json, found)
            series = {str(dataset[_SERIES].value): str(dataset["StudyInstanceUID"].value) for dataset in datasets}
            named = {uid: study for uid, study in series.items() if fits(check_image_id, uid, "A series")}
            self._series = time.monotonic(), named
        return self._series[1]

    def _segmentations(self) -> list[Segmentation]:
        """The DICOM SEG series on the server, oldest first."""
        found = []
        for entry in self._client.search_for_series(search_filters={"Modality": "SEG"}):
            dataset = Dataset.from_json(entry)
            study, series = str(dataset["StudyInstanceUID"].value), str(dataset[_SERIES].value)
            if series not in self._segmented:
                metadata = self._client.retrieve_series_metadata(study, series)
                header = Dataset.from_json(metadata[0]) if metadata else Dataset()
                referenced = header.get("ReferencedSeriesSequence")
                image = str(referenced[0][_SERIES].value) if referenced else ""
                made = f"{header.get('ContentDate', '')}{header.get('ContentTime', '')}"
                self._segmented[series] = Segmentation(study, series, image, made)
            found.append(self._segmented[series])
        return sorted(found, key=lambda segmentation: (segmentation.made, segmentation.series))

    def _take_in_segmentation(self, found: Segmentation) -> None:
        """Save a segmentation as the label of its image; one that cannot be a label is refused, once."""
        details: dict[str, Any] = {_SERIES: found.series, "source": "dicomweb"}
        with TemporaryDirectory() as folder:
            dicom, label = Path(folder) / "segmentation.dcm", Path(folder) / "label.nii.gz"
            instances = self._client.retrieve_series(found.study, found.series)
            for instance in instances[:1]:
                instance.save_as(dicom, write_like_original=False)
            try:
                if len(instances) != 1:
                    raise InputError(f"The series holds {len(instances)} objects, but a label is one.")
                image = Path(self.get_image_uri(found.image))
                details["label_info"] = read_segmentation(dicom, image, label)
            except InputError as error:
                logger.warning("Segmentation %s is passed over: %s", found.series, error)
                if instances:
                    self._journal.record_refused(found.image, FINAL, dicom, details, str(error))
                return
            super().save_label(found.image, str(label), FINAL, details)

    def _find_images(self) -> dict[str, Path]:
        return {path.name[: -len(".nii.gz")]: path for path in sorted(self._images.glob("[!.]*.nii.gz"))}

    def _publish(self, event: LabelEvent) -> None:
        """Store a final label on the server, unless it is there."""
        series = event.details.get(_SERIES) if event.tag == FINAL else None
        if series and not self._client.search_for_series(search_filters={_SERIES: series}):
            label_info = event.details.get("label_info")
            dataset = write_segmentation(self._journal.blob(event), self._images / event.image, label_info, series)
            answer = self._client.store_instances([dataset])
            if answer.get("FailedSOPSequence"):
                raise OFLError(f"The DICOMweb server refused the segmentation of {event.image}. Its log says why.")

    def _download(self, series: str, target: Path) -> None:
        """Copy a series from the server: DICOM files in a folder beside `target`, and `target` itself."""
        folder = self._images / series
        partial = self._images / f".{secrets.token_hex(6)}.partial.{series}"
        if not folder.is_dir():
            partial.mkdir()
            try:
                for number, instance in enumerate(
                    self._client.retrieve_series(self._studies_of_series()[series], series)
                ):
                    instance.save_as(partial / f"{number:06d}.dcm", write_like_original=False)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        volume = read_volume(folder)
        with atomic_path(target) as temporary:
            nib.save(nib.Nifti1Image(volume.voxels, volume.affine), temporary)
