"""A DICOMweb server: which series it holds, their instances, and in words what goes wrong with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import requests
from dicomweb_client import DICOMwebClient
from dicomweb_client.session_utils import create_session, create_session_from_user_pass
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from requests.adapters import HTTPAdapter

from lib.datastores.notices import warn_once
from lib.datastores.segmentation import is_draft
from ofl_sam2.errors import OFLError

_PAGE = 500
TIMEOUT_S = (10, 300)
_AS_STORED = (("application/dicom", "*"),)
_NO_DICOM = (requests.RequestException, ValueError, LookupError, TypeError, AttributeError, InvalidDicomError)
_DESCRIBING = ("StudyDate", "StudyTime", "Modality", "RetrieveURL", "PatientID", "StudyInstanceUID")


class ArchiveError(OFLError):
    """The DICOMweb server does not do what was asked; `status` is the HTTP status that tells a client so."""

    def __init__(self, sentence: str, status: int = 502) -> None:
        super().__init__(sentence)
        self.status = status


def no_answer(url: str, error: requests.RequestException) -> ArchiveError:
    """The error that says why the server at `url` cannot be reached."""
    if isinstance(error, requests.exceptions.SSLError):
        advice = "If a hospital's authority signed its certificate, name that in REQUESTS_CA_BUNDLE."
        return ArchiveError(f"No encrypted connection to the DICOMweb server {url}: {error}. {advice}")
    return ArchiveError(f"The DICOMweb server {url} does not answer. Start it, or check the address and the network.")


@dataclass(frozen=True)
class Series:
    """A series on the server.

    Attributes:
        uid, study: SeriesInstanceUID and StudyInstanceUID.
        instances: how many there are; None where the server does not say.
        info: what MONAI Label shows of an image.
    """

    uid: str
    study: str
    instances: int | None
    info: dict[str, str] = field(compare=False)


@dataclass(frozen=True)
class StoredSegmentation:
    """A DICOM SEG series on the server.

    Attributes:
        series: where it is.
        image: SeriesInstanceUID of what it segments; empty where it names none.
        instances: how many instances of that series it refers to.
        made: when, in UTC as the journal writes times; empty where it does not say so. A time without an offset may be
            that of this place or, as OHIF writes it, UTC: it counts as the later of both.
        draft: whether it is a prediction of this app.
    """

    series: Series
    image: str
    instances: int
    made: str
    draft: bool


class Archive:
    """The server behind `client`. Any thread may call it."""

    def __init__(self, client: DICOMwebClient) -> None:
        self._client = client
        client.set_http_retry_params(retry=False)

    @property
    def url(self) -> str:
        """Address of the server."""
        return str(self._client.base_url)

    def series(self, filters: Mapping[str, Any]) -> dict[str, Series]:
        """Series that pass a QIDO filter by SeriesInstanceUID, asked for page by page until nothing new comes.

        Raises:
            ArchiveError: the server does not answer, or refuses.
        """
        found: dict[str, Series] = {}
        offset = 0
        while True:
            with self._asking("the list of series"):
                page = self._client.search_for_series(limit=_PAGE, offset=offset, search_filters=dict(filters))
            listed = {series.uid: series for series in map(_series, page) if series is not None}
            if listed.keys() <= found.keys():
                return found
            found.update(listed)
            offset += len(page)

    def segmentation(self, series: Series) -> StoredSegmentation:
        """What the first instance of a SEG series says about it.

        Raises:
            ArchiveError: as `series`.
        """
        with self._asking(f"series {series.uid}"):
            metadata = self._client.retrieve_series_metadata(series.study, series.uid)
            header = Dataset.from_json(metadata[0], lambda uri: None) if metadata else Dataset()
            referenced = (header.get("ReferencedSeriesSequence") or [Dataset()])[0]
            image = str(referenced.get("SeriesInstanceUID", ""))
            instances = len(referenced.get("ReferencedInstanceSequence", ()))
            return StoredSegmentation(series, image, instances, _made(header), is_draft(header))

    def instances(self, series: Series) -> Iterator[Dataset]:
        """The instances of a series, in the transfer syntax they are stored in.

        Raises:
            ArchiveError: as `series`.
        """
        with self._asking(f"series {series.uid}"):
            yield from self._client.iter_series(series.study, series.uid, media_types=_AS_STORED)

    def store(self, dataset: Dataset) -> None:
        """Store an instance.

        Raises:
            ArchiveError: as `series`, or it was not taken.
        """
        with self._asking("to store a segmentation"):
            answer = self._client.store_instances([dataset])
        if answer.get("FailedSOPSequence"):
            raise ArchiveError(f"The DICOMweb server {self.url} refused the segmentation. Its log says why.")

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Say errors of the connection and of the server in words."""
        server = f"The DICOMweb server {self.url}"
        try:
            yield
        except requests.HTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                sentence = f"{server} refuses the login. Start this server with the right MONAI_LABEL_DICOMWEB_USERNAME"
                raise ArchiveError(f"{sentence} and MONAI_LABEL_DICOMWEB_PASSWORD.") from error
            if status in (404, 410):
                raise ArchiveError(f"{server} does not have {what} (any more). Refresh the list.", 404) from error
            raise ArchiveError(f"{server}, asked for {what}, answered {status}. Its log says why.") from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise no_answer(self.url, error) from error
        except _NO_DICOM as error:
            raise ArchiveError(f"{server}, asked for {what}, answered what is no DICOM: {error}.") from error


def open_archive(url: str) -> Archive:
    """The server at `url`, with MONAI Label's settings for user, password and address prefixes."""
    user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    session = create_session_from_user_pass(user, password) if user and password else create_session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _PatientAdapter())
    return Archive(
        DICOMwebClientX(
            url=url.rstrip("/"),
            session=session,
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
        )
    )


class _PatientAdapter(HTTPAdapter):
    """Gives up on a server that says nothing for minutes, which `DICOMwebClient` would wait for without end."""

    def send(self, request: Any, *args: Any, **options: Any) -> requests.Response:
        return super().send(request, *args, **{**options, "timeout": options.get("timeout") or TIMEOUT_S})


def _series(entry: Mapping[str, Any]) -> Series | None:
    """What the server says of a series; None, which is logged, where that cannot be understood."""
    try:
        dataset = Dataset.from_json(dict(entry))
        uid = str(dataset["SeriesInstanceUID"].value)
        described = {name: str(dataset[name].value) if dataset.get(name) else "UNK" for name in _DESCRIBING}
        count = dataset.get("NumberOfSeriesRelatedInstances")
        info = {"SeriesInstanceUID": uid, **described}
        return Series(uid, described["StudyInstanceUID"], int(count) if count else None, info)
    except _NO_DICOM as error:
        warn_once(f"A series on the DICOMweb server is left out, its entry in the list is no DICOM: {error}")
        return None


def _made(header: Dataset) -> str:
    """When a SEG was made, see `StoredSegmentation`."""
    clock, _, fraction = str(header.get("ContentTime") or "").partition(".")
    offset = str(header.get("TimezoneOffsetFromUTC") or "")
    text = f"{header.get('ContentDate')}{clock:0<6}.{fraction or 0}{offset}"
    try:
        moment = datetime.strptime(text, f"%Y%m%d%H%M%S.%f{'%z' if offset else ''}")
        local = moment.astimezone(timezone.utc)
    except (OverflowError, ValueError):
        return ""
    made = local if offset else max(local, moment.replace(tzinfo=timezone.utc))
    return made.isoformat(timespec="milliseconds")
