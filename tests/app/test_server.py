"""The routes of the server around an app that only answers: checks, queue, errors, addresses."""

import errno
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jwt
import nibabel as nib
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import HTTPException
from fastapi.testclient import TestClient
from lib.datastores.archive import ArchiveError
from lib.single_files import SingleFiles
from monailabel.config import settings
from monailabel.endpoints.user import auth
from monailabel.endpoints.user.auth import User, get_current_user
from monailabel.interfaces.exception import ImageNotFoundException
from monailabel.utils.async_tasks import utils as background

from ofl_sam2.errors import Cancelled, InputError, ModelError
from ofl_sam2.files import write_labels
from ofl_sam2.volume import Volume

GRID = (12, 10, 4)


class FakeDatastore:
    def __init__(self, folder: Path) -> None:
        self.folder, self.saved, self.fails = folder, [], None
        self.not_here: dict[str, dict[str, Any]] = {}
        self.info: dict[str, dict[str, Any]] = {"case_a": {}, "case b.1": {}}

    def list_images(self) -> list[str]:
        return ["case_a", "case b.1"]

    def get_image_uri(self, image: str) -> str:
        if image in self.not_here:
            self.info[image] = self.not_here.pop(image)
        return str(self.folder / "image.nii.gz") if image in self.list_images() else ""

    def get_image_info(self, image: str) -> dict[str, Any]:
        return {**self.info[image], "path": "elsewhere"} if image in self.info else {}

    def update_image_info(self, image: str, info: dict[str, Any]) -> None:
        if image not in self.info:
            raise ImageNotFoundException(f"There is no image {image}.")
        self.info[image].update(info)

    def get_label_uri(self, label: str, tag: str) -> str:
        return ""

    def save_label(self, image: str, path: str, tag: str, details: dict[str, Any]) -> str:
        if self.fails:
            raise self.fails
        self.saved.append((image, tag, Path(path).suffix, details))
        return image


class FakeRegistry:
    def __init__(self) -> None:
        self.values = {"organ": 1, "vessel": 2}

    def names(self) -> dict[str, int]:
        return self.values

    def remap(self, labels: np.ndarray, label_info: Any) -> np.ndarray:
        if label_info and len({entry["idx"] for entry in label_info}) < len(label_info):
            raise InputError("Two segments have the value 1. Give each its own.")
        return labels

    def rename(self, old: str, new: str) -> None:
        if old not in self.values:
            raise InputError(f"There is no structure '{old}'.")
        self.values[new] = self.values.pop(old)

    def merge(self, name: str, into: str) -> None:
        self.values.pop(name)


class FakeSnapshots:
    def __init__(self) -> None:
        self.kept = [SimpleNamespace(version=v, created=f"day {v}", notes={"reason": "label"}) for v in (3, 4)]
        self.newest: SimpleNamespace | None = self.kept[-1]
        self.removed: list[int] = []

    def current(self) -> SimpleNamespace | None:
        return self.newest

    def list(self) -> list[SimpleNamespace]:
        return self.kept

    def rollback(self, version: int) -> SimpleNamespace:
        self.newest = next(s for s in self.kept if s.version == version)
        return self.newest

    def remove(self, version: int) -> None:
        if version == 4:
            raise InputError(f"Snapshot {version} is the current or the newest one, which stays.")
        self.removed.append(version)

    def export(self, version: int, target: Path, with_pool: bool = False) -> None:
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("model.json", str(version))
            if with_pool:
                archive.writestr("pool.safetensors", "")


class FakeApp:
    """What the server needs of the app. `behave` is called for each inference."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._infers = self._trainers = {"ofl_sam2": None}
        self._strategies, self._scoring_methods = {"random": None}, {"quality": None}
        self.registry, self.snapshots = FakeRegistry(), FakeSnapshots()
        self.changes: list[str] = []
        self.service = SimpleNamespace(structures_changed=lambda: self.changes.append("structures"))
        self.refused: list[tuple[Any, ...]] = []
        self.journal = SimpleNamespace(record_refused=lambda *event: self.refused.append(event))
        self.jobs = SimpleNamespace(list=lambda: [], cancel=lambda job_id: job_id == "known")
        self._datastore = FakeDatastore(folder)
        self.forgotten: list[int] = []
        self.workspace = SimpleNamespace(
            single_files=SingleFiles(folder / "downloads", 1 << 20),
            scores=SimpleNamespace(forget_newer=self.forgotten.append),
        )
        self.requests: list[dict[str, Any]] = []
        self.behave = lambda request: None

    def server_mode(self, mode: bool) -> None: ...

    def on_init_complete(self) -> None: ...

    def info(self) -> dict[str, Any]:
        return {"name": "fake", "trainers": {}}

    def status(self) -> dict[str, Any]:
        return {"snapshot": 4}

    def datastore(self) -> FakeDatastore:
        return self._datastore

    def sessions(self) -> Any:
        from monailabel.utils.sessions import Sessions

        return Sessions(str(self.folder / "sessions"))

    def on_save_label(self, image: str, label: str) -> dict[str, Any]:
        return {"queued": True}

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"id": "case_a"}

    def infer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        self.behave(request)
        return {"file": None, "label": None, "params": {"label_names": {"organ": 1}}}


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """The uvicorn app, imported as the server does it, with a place for a fake annotation app."""
    from monailabel.interfaces.utils import app as instances

    before = dict(instances.apps)
    instances.apps[""] = FakeApp(Path())
    try:
        from server.app import app

        yield app
    finally:
        instances.apps.clear()
        instances.apps.update(before)


@pytest.fixture
def fake(server: Any, tmp_path: Path) -> FakeApp:
    from monailabel.interfaces.utils import app as instances

    image = Volume(np.random.default_rng(0).normal(size=GRID).astype(np.float32), np.eye(4), "image")
    write_labels(tmp_path / "image.nii.gz", (image.voxels > 0).astype(np.uint8), image)
    instances.apps[""] = FakeApp(tmp_path)
    return instances.apps[""]


@pytest.fixture
def client(server: Any, fake: FakeApp) -> Iterator[TestClient]:
    with TestClient(server, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def user(server: Any, monkeypatch: pytest.MonkeyPatch) -> User:
    """Who is logged in, without the role of an annotator."""
    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_ENABLE", True)
    user = User(username="ann", roles=[settings.MONAI_LABEL_AUTH_ROLE_USER])
    monkeypatch.setitem(server.dependency_overrides, get_current_user, lambda: user)
    return user


def label_file(folder: Path, grid: tuple[int, ...] = GRID, value: int = 1, name: str = "x.nrrd") -> bytes:
    labels = np.zeros(grid, np.uint8)
    labels[2:6, 2:6, 1:3] = value
    write_labels(folder / name, labels, Volume(np.zeros(grid, np.float32), np.eye(4), "x"))
    return (folder / name).read_bytes()


def sentence(answer: Any) -> str:
    """The one sentence of an error answer."""
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and detail.endswith(".") and "Traceback" not in detail
    return detail


def test_infer_answers_params(client: TestClient, fake: FakeApp) -> None:
    answer = client.post("/infer/ofl_sam2?image=case_a", data={"params": '{"result_extension": ".nrrd"}'})
    assert answer.status_code == 200 and answer.json() == {"label_names": {"organ": 1}}
    assert fake.requests[0]["image"] == "case_a" and fake.requests[0]["result_extension"] == ".nrrd"


@pytest.mark.parametrize(
    ("address", "params", "expected"),
    [
        ("", {"result_dtype": "uint8"}, True),
        ("&output=all", {"result_dtype": "uint8"}, True),
        ("", {"result_dtype": "uint8", "save_label": True}, False),
        ("&output=image", {"result_dtype": "uint8"}, False),
        ("", {}, False),
        ("", {"by_position": True}, False),
    ],
)
def test_results_are_numbered_by_position_as_slicer_reads_them(
    client: TestClient, fake: FakeApp, address: str, params: dict[str, Any], expected: bool
) -> None:
    client.post(f"/infer/ofl_sam2?image=case_a{address}", data={"params": json.dumps(params)})
    assert fake.requests[0]["by_position"] is expected


@pytest.mark.parametrize(
    ("address", "params", "status", "word"),
    [
        ("/infer/unknown?image=case_a", "{}", 404, "ofl_sam2"),
        ("/infer/ofl_sam2?image=case_z", "{}", 404, "case_z"),
        ("/infer/ofl_sam2", "{}", 400, "Nothing to segment"),
        ("/infer/ofl_sam2?image=case_a", "{broken", 400, "no JSON"),
        ("/infer/ofl_sam2?image=case_a", "[1]", 400, "object"),
        ("/infer/ofl_sam2?image=case_a", '{"image": "/etc/passwd"}', 400, "image"),
        ("/infer/ofl_sam2?image=case_a", '{"result_extension": "/../x"}', 400, "suffix"),
        ("/infer/ofl_sam2?image=case_a", '{"result_extension": ".png"}', 400, ".nii.gz, .nii, .nrrd, .mha"),
        ("/infer/ofl_sam2?image=case_a", '{"model_filename": "../x.pt"}', 400, "without folders"),
        ("/infer/ofl_sam2?image=case_a", '{"label_tag": ["a"]}', 400, "no text"),
        ("/infer/ofl_sam2?image=../case_a", "{}", 400, "slashes"),
        ("/infer/ofl_sam2?image=..", "{}", 400, "slashes"),
        ("/infer/ofl_sam2?session_id=..", "{}", 400, "session"),
        ("/infer/ofl_sam2?session_id=0123", "{}", 404, "expired"),
        ("/infer/ofl_sam2?image=case_a&output=dicom_seg", "{}", 400, "DICOMweb"),
        ("/infer/ofl_sam2?image=case_a&output=pdf", "{}", 422, "output"),
    ],
)
def test_infer_refuses(client: TestClient, fake: FakeApp, address: str, params: str, status: int, word: str) -> None:
    answer = client.post(address, data={"params": params})
    assert answer.status_code == status and word in sentence(answer)
    assert not fake.requests


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("Nothing has been learned yet. Save a label first."), 400),
        (ModelError("The snapshot is damaged. Roll back."), 409),
        (Cancelled("Cancelled."), 409),
        (OSError(errno.ENOSPC, "No space left on device"), 507),
        (PermissionError(errno.EACCES, "Permission denied"), 500),
        (ArchiveError("The DICOMweb server does not answer."), 502),
        (ZeroDivisionError("division by zero"), 500),
    ],
)
def test_errors_of_an_inference_have_a_sentence(
    client: TestClient, fake: FakeApp, error: Exception, status: int
) -> None:
    def fail(request: dict[str, Any]) -> None:
        raise error

    fake.behave = fail
    answer = client.post("/infer/ofl_sam2?image=case_a")
    assert answer.status_code == status and sentence(answer)
    fake.behave = lambda request: None
    assert client.post("/infer/ofl_sam2?image=case_a").status_code == 200


def test_server_answers_during_an_inference_and_refuses_when_full(client: TestClient, fake: FakeApp) -> None:
    running, go_on = threading.Event(), threading.Event()

    def wait(request: dict[str, Any]) -> None:
        running.set()
        assert go_on.wait(30)

    fake.behave = wait
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post("/infer/ofl_sam2?image=case_a").status_code))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    assert running.wait(30)
    while client.get("/ofl/status").json()["queue"] != {"running": 1, "waiting": 4, "limit": 4}:
        pass
    assert client.get("/info/").json()["name"] == "fake"
    busy = client.post("/infer/ofl_sam2?image=case_a")
    assert busy.status_code == 503 and "busy" in sentence(busy) and int(busy.headers["Retry-After"]) > 0
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * 5
    assert client.get("/ofl/status").json()["queue"]["waiting"] == 0


@pytest.mark.parametrize(
    ("method", "address", "waiting", "waits_in"),
    [
        ("GET", "/info/", "app", "info"),
        ("GET", "/datastore/", "studies", "status"),
        ("GET", "/datastore/?output=all", "studies", "json"),
        ("GET", "/datastore/?output=train", "studies", "datalist"),
        ("GET", "/datastore/dataset", "studies", "get_dataset_archive"),
        ("PUT", "/datastore/image/info?image=case_a", "studies", "update_image_info"),
        ("PUT", "/datastore/label/info?label=case_a&tag=final", "studies", "update_label_info"),
        ("DELETE", "/datastore/?id=case_a", "studies", "remove_image"),
        ("DELETE", "/datastore/image?id=case_a", "studies", "remove_image"),
        ("DELETE", "/datastore/label?id=case_a&tag=final", "studies", "remove_label"),
    ],
)
def test_server_answers_while_the_studies_do_not(
    client: TestClient, fake: FakeApp, method: str, address: str, waiting: str, waits_in: str
) -> None:
    called, go_on, in_time = threading.Event(), threading.Event(), []

    def wait(*arguments: Any) -> Any:
        called.set()
        in_time.append(go_on.wait(10))
        return str(fake.folder / "image.nii.gz") if waits_in == "get_dataset_archive" else {}

    setattr(fake if waiting == "app" else fake.datastore(), waits_in, wait)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(client.request(method, address).status_code))
    thread.start()
    assert called.wait(30)
    assert client.get("/ofl/status").status_code == 200
    go_on.set()
    thread.join()
    assert in_time == [True] and answers == [200]


def test_what_was_uploaded_is_removed_also_after_a_failure(client: TestClient, fake: FakeApp, tmp_path: Path) -> None:
    content, seen = label_file(tmp_path), []

    def fail(request: dict[str, Any]) -> None:
        seen.append(Path(request["image"]))
        assert seen[-1].read_bytes() == content
        raise InputError("Nothing has been learned yet. Save a label first.")

    fake.behave = fail
    answer = client.post("/infer/ofl_sam2", files={"file": ("image.nrrd", content)})
    assert answer.status_code == 400 and "Nothing has been learned" in sentence(answer)
    assert len(seen) == 1 and not seen[0].exists()


def test_the_archive_of_the_studies_goes_once_it_was_sent(
    client: TestClient, fake: FakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = tmp_path / "all.zip"
    archive.write_bytes(b"zip")
    monkeypatch.setattr(fake.datastore(), "get_dataset_archive", lambda limit: str(archive), raising=False)
    assert client.get("/datastore/dataset").content == b"zip"
    assert not archive.exists()
    archive.write_bytes(b"zip")
    assert client.get("/datastore/dataset", headers={"Range": "bytes=9-"}).status_code == 416
    assert not archive.exists()


def test_a_signed_token_is_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_ENABLE", True)
    monkeypatch.setattr(auth, "get_public_key", lambda realm: public)
    names = settings.MONAI_LABEL_AUTH_TOKEN_USERNAME, *settings.MONAI_LABEL_AUTH_TOKEN_ROLES.split("#")
    claims: Any = ["annotator"]
    for name in reversed(names[1:]):
        claims = {name: claims}
    user = auth.from_token(jwt.encode({names[0]: "ann", **claims}, key, algorithm="RS256"))
    assert (user.username, user.roles) == ("ann", ["annotator"])
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for forged in (jwt.encode(claims, other, algorithm="RS256"), jwt.encode(claims, None, algorithm="none")):
        with pytest.raises(jwt.InvalidTokenError):
            auth.from_token(forged)


def test_only_annotators_store_results(client: TestClient, user: User) -> None:
    saving = {"params": json.dumps({"save_label": True})}
    assert client.post("/infer/ofl_sam2?image=case_a", data=saving).status_code == 403
    assert client.post("/infer/ofl_sam2?image=case_a").status_code == 200
    user.roles.append(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)
    assert client.post("/infer/ofl_sam2?image=case_a", data=saving).status_code == 200


def test_only_annotators_store_drafts(client: TestClient, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[str] = []
    studies = SimpleNamespace(store_draft=None)
    monkeypatch.setattr("server.inference.dicomweb_studies", lambda: studies)
    monkeypatch.setattr("server.inference.predict", lambda image, *_: stored.append(image))

    def infer(switch: str) -> int:
        params = json.dumps({"store_draft": switch})
        return client.post("/infer/ofl_sam2?image=case_a", data={"params": params}).status_code

    assert (infer("on"), infer("off"), stored) == (403, 200, [])
    user.roles.append(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)
    assert (infer("on"), stored) == (200, ["case_a"])


def test_save_label(client: TestClient, fake: FakeApp, tmp_path: Path) -> None:
    params = {"label_info": [{"name": "organ", "idx": 1}], "client_id": "ann"}
    answer = client.put(
        "/datastore/label?image=case%20b.1",
        data={"params": json.dumps(params)},
        files={"label": ("C:\\data.of\\x.nrrd", label_file(tmp_path))},
    )
    assert answer.json() == {"queued": True, "image": "case b.1", "label": "case b.1"}
    assert fake.datastore().saved == [("case b.1", "final", ".nrrd", {**params, "user": "admin"})]


def test_only_final_labels_must_be_fit_to_learn_from(client: TestClient, fake: FakeApp, tmp_path: Path) -> None:
    empty = label_file(tmp_path, value=0)
    for address, status in [("&tag=original", 200), ("&tag=", 400), ("", 400)]:
        answer = client.put(f"/datastore/label?image=case_a{address}", files={"label": ("x.nrrd", empty)})
        assert answer.status_code == status
    assert [entry[1] for entry in fake.datastore().saved] == ["original"]


def test_unfit_labels_are_refused_and_kept(client: TestClient, fake: FakeApp, tmp_path: Path) -> None:
    twice = json.dumps({"label_info": [{"name": "a", "idx": 1}, {"name": "b", "idx": 1}]})
    nan = np.full(GRID, np.nan, np.float32)
    nib.save(nib.Nifti1Image(nan, np.eye(4)), tmp_path / "nan.nii.gz")
    nib.save(nib.Nifti1Image(nan * 0 + 0.5, np.eye(4)), tmp_path / "half.nii.gz")
    cases = [
        (label_file(tmp_path, (12, 10, 5)), "x.nrrd", "{}"),
        (label_file(tmp_path, value=0), "x.nrrd", "{}"),
        (label_file(tmp_path), "x.nrrd", twice),
        ((tmp_path / "nan.nii.gz").read_bytes(), "x.nii.gz", "{}"),
        ((tmp_path / "half.nii.gz").read_bytes(), "x.nii.gz", "{}"),
        (b"no image", "x.nii.gz", "{}"),
    ]
    for number, (content, name, params) in enumerate(cases, start=1):
        answer = client.put("/datastore/label?image=case_a", data={"params": params}, files={"label": (name, content)})
        assert answer.status_code == 400, answer.text
        assert str(tmp_path.parent) not in sentence(answer)
        assert len(fake.refused) == number
    assert not fake.datastore().saved


@pytest.mark.parametrize(
    ("value", "params", "named"),
    [
        (2, "{}", [{"name": "vessel", "idx": 2}]),
        (2, '{"label_info": []}', [{"name": "vessel", "idx": 2}]),
        (2, '{"label_info": [{"name": "node", "idx": 2}]}', [{"name": "node", "idx": 2}]),
        (7, "{}", []),
    ],
)
def test_values_without_names_are_those_of_the_app(
    client: TestClient, fake: FakeApp, tmp_path: Path, value: int, params: str, named: list[dict[str, Any]]
) -> None:
    label = {"label": ("x.nrrd", label_file(tmp_path, value=value))}
    assert client.put("/datastore/label?image=case_a", data={"params": params}, files=label).status_code == 200
    assert fake.datastore().saved[0][3]["label_info"] == named


def test_save_label_refuses_unfit_requests(client: TestClient, fake: FakeApp, tmp_path: Path) -> None:
    label = label_file(tmp_path)
    for address, name, status in [
        ("?image=case_z", "x.nrrd", 404),
        ("?image=case_a&tag=../up", "x.nrrd", 400),
        ("?image=case_a", "..", 400),
        ("?image=case_a", "x", 400),
    ]:
        answer = client.put(f"/datastore/label{address}", files={"label": (name, label)})
        assert answer.status_code == status and sentence(answer)
    assert client.put("/datastore/label?image=case_a").status_code == 422
    fake.datastore().fails = OSError(errno.ENOSPC, "No space left on device")
    full = client.put("/datastore/label?image=case_a", files={"label": ("x.nrrd", label)})
    assert full.status_code == 507 and "full" in sentence(full)
    assert not fake.datastore().saved


def test_broken_json_is_refused_everywhere(client: TestClient) -> None:
    answer = client.put("/datastore/image/info?image=case_a", data={"info": "{broken"})
    assert answer.status_code == 400 and "no JSON" in sentence(answer)


def test_status_jobs_and_structures(client: TestClient, fake: FakeApp) -> None:
    assert client.get("/ofl/status").json()["snapshot"] == 4
    assert client.get("/ofl/jobs").json() == []
    assert client.delete("/ofl/jobs/known").json()["cancelled"] is True
    assert client.delete("/ofl/jobs/other").status_code == 404
    assert client.get("/ofl/structures").json() == {"organ": 1, "vessel": 2}
    assert client.post("/ofl/structures/rename", json={"old": "organ", "new": "liver"}).json()["liver"] == 1
    assert client.post("/ofl/structures/rename", json={"old": "organ", "new": "x"}).status_code == 400
    assert client.post("/ofl/structures/merge", json={"name": "vessel", "into": "liver"}).json() == {"liver": 1}
    assert fake.changes == ["structures"] * 2


def test_snapshots_and_rollback(client: TestClient, fake: FakeApp) -> None:
    assert [(s["version"], s["current"]) for s in client.get("/ofl/snapshots").json()] == [(3, False), (4, True)]
    assert client.post("/ofl/snapshots/3/rollback").json() == {"version": 3}
    assert fake.forgotten == [3]
    assert fake.snapshots.current().version == 3
    unknown = client.post("/ofl/snapshots/9/rollback")
    assert unknown.status_code == 404 and "3, 4" in sentence(unknown)


def test_old_snapshots_can_be_removed(client: TestClient, fake: FakeApp) -> None:
    unknown = client.delete("/ofl/snapshots/9")
    assert unknown.status_code == 404 and "3, 4" in sentence(unknown)
    kept = client.delete("/ofl/snapshots/4")
    assert kept.status_code == 400 and "newest" in sentence(kept)
    assert client.delete("/ofl/snapshots/3").json() == {"version": 3, "removed": True}
    assert fake.snapshots.removed == [3]


def test_model_comes_without_the_pool_unless_asked(client: TestClient, fake: FakeApp) -> None:
    def names(address: str) -> list[str]:
        return zipfile.ZipFile(io.BytesIO(client.get(address).content)).namelist()

    assert names("/model/ofl_sam2") == ["model.json"]
    assert names("/model/ofl_sam2?pool=true") == ["model.json", "pool.safetensors"]
    assert client.get("/model/info/ofl_sam2").json()["version"] == 4
    assert client.get("/model/other").status_code == 404
    assert client.put("/model/ofl_sam2", files={"file": b"x"}).status_code == 405
    assert client.delete("/model/ofl_sam2").status_code == 405
    fake.snapshots.newest = None
    assert "Save a label" in sentence(client.get("/model/ofl_sam2"))


def test_sessions_take_files_and_archives(client: TestClient) -> None:
    single = client.put("/session/", files={"files": ("a.nii.gz", b"12")}).json()
    assert client.get(f"/session/{single['session_id']}?image=true").content == b"12"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1.png", b"1")
        archive.writestr("2.png", b"2")
    folder = client.put("/session/?uncompress=true", files={"files": ("frames.zip", buffer.getvalue())}).json()
    assert sorted(p.name for p in Path(folder["session_info"]["image"]).iterdir()) == ["1.png", "2.png"]
    assert client.put("/session/", files={"files": ("IM0001", b"12")}).status_code == 200
    below = client.put("/session/", files={"files": ("../../b.nii.gz", b"12")}).json()["session_info"]
    assert Path(below["image"]) == Path(below["path"]) / "b.nii.gz"
    assert client.put("/session/", files={"files": ("a/..", b"12")}).status_code == 400
    zipfile.ZipFile(empty := io.BytesIO(), "w").close()
    for unfit in (b"12", empty.getvalue()):
        refused = client.put("/session/?uncompress=true", files={"files": ("frames.zip", unfit)})
        assert refused.status_code == 400 and "zip" in sentence(refused)


def test_of_a_session_that_is_gone_nothing_is_known(client: TestClient) -> None:
    session = client.put("/session/", files={"files": ("a.nii.gz", b"12")}).json()["session_id"]
    assert client.get(f"/session/{session}").json()["name"] == session
    client.delete(f"/session/{session}")
    gone = client.get(f"/session/{session}")
    assert (gone.status_code, gone.json()) == (200, {})
    assert client.get(f"/session/{session}?image=true").status_code == 404


def test_files_of_one_name_are_no_session(client: TestClient) -> None:
    files = [("files", (f"DIR{number}/IM0001", b"x")) for number in range(2)]
    answer = client.put("/session/", files=files)
    assert answer.status_code == 400 and "Two files are called IM0001" in sentence(answer)


def test_damaged_archives_are_refused_in_words(client: TestClient) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        member = tarfile.TarInfo("image.nii")
        member.size = 100_000
        archive.addfile(member, io.BytesIO(np.random.default_rng(0).bytes(100_000)))
    cut = {"files": ("image.tar.gz", content.getvalue()[:50_000])}
    answer = client.put("/session/?uncompress=true", files=cut)
    assert answer.status_code == 400 and "Cannot unpack" in sentence(answer)


def test_archive_cannot_leave_its_folder(client: TestClient, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        info = tarfile.TarInfo("../../escaped.txt")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"1"))
    content = (tmp_path / "evil.tar").read_bytes()
    answer = client.put("/session/?uncompress=true", files={"files": ("evil.tar", content)})
    assert answer.status_code == 400 and "unpack" in sentence(answer)


def test_images_are_downloaded_as_files(client: TestClient, tmp_path: Path) -> None:
    content = (tmp_path / "image.nii.gz").read_bytes()
    answer = client.get("/datastore/image?image=case_a")
    assert answer.content == content and 'filename="image.nii.gz"' in answer.headers["content-disposition"]
    digest = hashlib.sha256(content).hexdigest()
    for check, status in [("", 200), (digest, 200), (f"SHA256:{digest}", 200), ("MD5:0", 404), ("CRC:0", 400)]:
        assert client.head(f"/datastore/image?image=case_a&check_sum={check}").status_code == status
    assert client.get("/datastore/image?image=case_z").status_code == 404
    (tmp_path / "image.nii.gz").unlink()
    assert "any more" in sentence(client.get("/datastore/image?image=case_a"))


def test_next_sample_names_a_file_to_load(client: TestClient, tmp_path: Path) -> None:
    sample = client.post("/activelearning/random", json={}).json()
    image = tmp_path / "image.nii.gz"
    assert sample["id"] == "case_a" and (sample["path"], sample["name"]) == (str(image), "image.nii.gz")
    assert sample["checksum"] == f"SHA256:{hashlib.sha256(image.read_bytes()).hexdigest()}"


def test_next_sample_tells_what_is_known_once_the_image_is_here(client: TestClient, fake: FakeApp) -> None:
    studies = fake.datastore()
    del studies.info["case_a"]
    studies.not_here["case_a"] = {"StudyInstanceUID": "1.2", "strategy": {"other": {"ts": 1}}}
    sample = client.post("/activelearning/random", json={"client_id": "ann"}).json()
    assert sample["StudyInstanceUID"] == "1.2" and sample["path"] == str(fake.folder / "image.nii.gz")
    served = studies.info["case_a"]["strategy"]
    assert served["other"] == {"ts": 1} and served["random"]["client_id"] == "ann" and served["random"]["ts"] > 1


def test_two_who_ask_at_once_get_different_images(
    client: TestClient, fake: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, at_once = fake.datastore(), threading.Barrier(2)

    def next_sample(request: dict[str, Any]) -> dict[str, Any]:
        chosen = next(image for image in studies.info if "strategy" not in studies.info[image])
        with suppress(threading.BrokenBarrierError):
            at_once.wait(1)
        return {"id": chosen}

    monkeypatch.setattr(fake, "next_sample", next_sample)
    with ThreadPoolExecutor(2) as annotators:
        asked = [annotators.submit(client.post, "/activelearning/random") for _ in range(2)]
    assert {answer.result().json()["id"] for answer in asked} == {"case_a", "case b.1"}


def test_next_sample_passes_over_what_cannot_be_read(
    client: TestClient, fake: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = fake.datastore()
    find = studies.get_image_uri

    def get_image_uri(image: str) -> str:
        if image != "case b.1":
            raise InputError("The series has a single slice.")
        return find(image)

    def next_sample(request: dict[str, Any]) -> dict[str, Any]:
        return {"id": next((image for image in studies.info if "strategy" not in studies.info[image]), "case_a")}

    monkeypatch.setattr(studies, "get_image_uri", get_image_uri)
    monkeypatch.setattr(fake, "next_sample", next_sample)
    assert client.post("/activelearning/random").json()["id"] == "case b.1"
    assert "strategy" in studies.info["case_a"]
    refused = client.post("/activelearning/random")
    assert refused.status_code == 400 and "single slice" in sentence(refused)
    monkeypatch.setattr(fake, "next_sample", lambda request: None)
    assert client.post("/activelearning/random").json() == {}


def test_an_image_that_cannot_be_learned_is_not_handed_out(
    client: TestClient, fake: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = np.full(GRID, np.nan, np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), fake.folder / "nan.nii.gz")
    monkeypatch.setattr(fake.datastore(), "get_image_uri", lambda image: str(fake.folder / "nan.nii.gz"))
    refused = client.post("/activelearning/random")
    assert refused.status_code == 400 and "NaN" in sentence(refused)


def test_a_header_without_voxels_is_no_upload(client: TestClient) -> None:
    header = {"file": ("x.mhd", b"ElementDataFile = /etc/passwd\n")}
    answer = client.put("/datastore/image?image=x", files=header)
    assert answer.status_code == 400 and "header without voxels" in sentence(answer)
    answer = client.post("/infer/ofl_sam2", files=header)
    assert answer.status_code == 400 and "header without voxels" in sentence(answer)


@pytest.mark.parametrize("address", ["/datastore/", "/datastore/image"])
def test_images_are_added_under_safe_names(client: TestClient, fake: FakeApp, address: str) -> None:
    added = []
    fake.datastore().add_image = lambda name, path, info: added.append((name, Path(path).name, info)) or name
    upload = {"file": ("/tmp/x/patient.01.nii.gz", b"12")}
    assert client.put(f"{address}?image=new", files=upload).json() == {"image": "new"}
    assert client.put(address, files=upload).json() == {"image": "patient.01"}
    assert [entry[1] for entry in added] == ["new.nii.gz", "patient.01.nii.gz"]
    assert client.put(f"{address}?image=../x", files=upload).status_code == 400
    assert client.put(address, files={"file": ("x.exe", b"12")}).status_code == 400


def test_tasks_are_checked_before_they_start(client: TestClient) -> None:
    assert "random" in sentence(client.post("/activelearning/other", json={}))
    assert client.post("/train/other", json={}).status_code == 404
    assert client.post("/batch/infer/other", json={}).status_code == 404
    assert client.post("/batch/infer/ofl_sam2", json={"label_tag": "../x"}).status_code == 400
    assert "quality" in sentence(client.post("/scoring/other", json={}))
    assert client.post("/train/ofl_sam2", content="{broken").status_code == 422


@pytest.mark.parametrize(
    ("address", "params"),
    [
        ("/train/ofl_sam2", {"minutes": "abc"}),
        ("/train/", {"ofl_sam2": {"minutes": "abc"}}),
        ("/train/", {"ofl_sam2": {"max_epochs": [1]}}),
        ("/train/", {"ofl_sam2": "abc"}),
    ],
)
def test_training_options_are_checked_before_it_starts(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, address: str, params: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        "monailabel.utils.async_tasks.task.AsyncTask.run", lambda *_, **options: pytest.fail("It was started.")
    )
    answer = client.post(address, json=params)
    assert answer.status_code == 400 and sentence(answer)


def test_all_models_are_trained_with_their_options(
    client: TestClient, fake: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(fake, "info", lambda: {"trainers": {"ofl_sam2": {}}})
    monkeypatch.setattr(
        "monailabel.utils.async_tasks.task.AsyncTask.run",
        lambda kind, request, **options: started.append(request) or ({"id": 1}, None),
    )
    assert client.post("/train/", json={"ofl_sam2": {"minutes": "0.5"}}).json()["ofl_sam2"]["result"] == {"id": 1}
    assert started == [{"model": "ofl_sam2", "minutes": "0.5"}]


@pytest.mark.parametrize("address", ["/train/ofl_sam2", "/train/", "/batch/infer/ofl_sam2", "/scoring/quality"])
def test_one_task_of_a_kind_runs_at_a_time(client: TestClient, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("monailabel.utils.async_tasks.task.AsyncTask.status", lambda *_, **options: ({"id": 1}, None))
    answer = client.post(address, json={})
    assert answer.status_code == 429 and "runs already" in sentence(answer)


def test_tasks_end_with_the_server(server: Any, fake: FakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "background_tasks", {})
    monkeypatch.setattr(background, "background_processes", {})
    endless = [sys.executable, "-c", "import time; time.sleep(600)"]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen(endless, **options))
    monkeypatch.setenv("PYTHONPATH", "")
    with TestClient(server):
        tasks = [background.run_background_task({}, "train") for _ in range(2)]
        executor = background.background_executors["train"]
        while not background.processes("train"):
            time.sleep(0.01)
    executor.shutdown()
    assert [task["status"] for task in tasks] == ["STOPPED", "SUBMITTED"]
    assert not background.processes("train") and not background.background_executors


@pytest.mark.parametrize(
    "address",
    [
        "/datastore/image?image=..%2Fx",
        "/datastore/image?image=..%2Fx&image=case_a",
        "/datastore/label?label=a%00b&tag=final",
        "/datastore/label?label=a&tag=a/b",
        "/session/0?session_id=..",
    ],
)
def test_keys_are_checked_on_every_route(client: TestClient, address: str) -> None:
    assert client.get(address).status_code == 400


def test_own_routes_are_described_once_and_dangerous_ones_are_gone(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert "worker" not in paths["/infer/{model}"] and "Segment an image" in paths["/infer/{model}"]["post"]["summary"]
    assert {
        "/ofl/status",
        "/ofl/jobs/{id}",
        "/ofl/snapshots/{version}/rollback",
        "/ofl/structures/merge",
        "/ofl/drafts",
    } <= set(paths)
    assert not [path for path in paths if "wsi" in path]
    assert client.post("/reload").status_code in (404, 405)
    assert client.post("/infer/wsi_v2/ofl_sam2?image=x").status_code == 404
    assert client.get("/proxy/dicom/qido/studies").status_code == 404
    assert client.get("/proxy/dicom/%2e%2e/system").status_code == 404


def test_viewer_is_served_from_its_folder_only(client: TestClient) -> None:
    page = client.get("/ohif/monai-label?StudyInstanceUIDs=1").text
    assert page.startswith("<!") and client.get("/ohif/").text == page
    assert client.get("/ohif/..%2F..%2F..%2F..%2F..%2F..%2Fetc%2Fpasswd").text == page
    settings = client.get("/ohif/app-config.js")
    assert settings.headers["content-type"].startswith("text/javascript")
    assert "window.config" in settings.text and "ofl-sam2.repairs" in settings.text


def test_cors_is_not_wider_than_monailabel(client: TestClient) -> None:
    refused = client.get("/datastore/image?image=..%2Fx", headers={"Origin": "http://viewer.example"})
    allowed = client.get("/info/", headers={"Origin": "http://viewer.example"})
    name = "access-control-allow-origin"
    assert refused.headers[name] == allowed.headers[name]


def test_queue_counts_and_recovers() -> None:
    from server.queue import InferenceQueue

    queue = InferenceQueue(limit=0)
    with queue.turn(), pytest.raises(HTTPException) as busy, queue.turn():
        pass
    assert busy.value.status_code == 503
    with pytest.raises(ValueError), queue.turn():
        raise ValueError
    with queue.turn():
        assert queue.status().running == 1
    assert queue.status().running == queue.status().waiting == 0


@pytest.mark.parametrize("message", ["Another server uses it already.", "The library is not here."])
def test_a_server_that_cannot_start_says_so_in_one_sentence(
    server: Any, fake: FakeApp, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    from lib.library import LibraryError
    from server.app import start

    def refuse(kind: type[Exception]) -> Callable[[bool], None]:
        def server_mode(mode: bool) -> None:
            raise kind(message)

        return server_mode

    for kind in (InputError, LibraryError):
        monkeypatch.setattr(fake, "server_mode", refuse(kind))
        with pytest.raises(SystemExit) as ended:
            start()
        assert ended.value.code == f"The server does not start. {message}"
    for error in (ValueError(), ConnectionRefusedError(errno.ECONNREFUSED, "no")):
        monkeypatch.setattr(fake, "server_mode", Mock(side_effect=error))
        with pytest.raises(type(error)):
            start()
    monkeypatch.setattr(fake, "server_mode", Mock(side_effect=OSError(errno.EROFS, "Read-only", "/studies/.lock")))
    with pytest.raises(
        SystemExit, match=r"The server does not start\. .*Read-only: '/studies/\.lock'\. The studies and"
    ):
        start()


def test_make_serve_listens_on_this_machine_only() -> None:
    root = Path(__file__).resolve().parents[2]
    command = ["make", "--dry-run", "serve", "STUDIES=a folder", "PORT=8123"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert '--studies "a folder" --host 127.0.0.1 --port 8123 --uvicorn_app server.app:app' in shown
