"""OHIF's way to the DICOMweb server: what goes through, what does not, and what is answered when the server is away."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from lib.datastores.dicomweb import JournaledDICOMWebDatastore
from monailabel.config import settings
from monailabel.endpoints.user.auth import User, get_current_user
from server import errors, proxy

FRAMES = "studies/1.2/series/3.4/instances/5.6/frames/1,2"
MULTIPART = 'multipart/related; type="application/dicom"; boundary=x'


class Studies(JournaledDICOMWebDatastore):
    def __init__(self, url: str) -> None:
        self.url = url

    def name(self) -> str:
        return self.url


class DICOMweb(ThreadingHTTPServer):
    """Notes what it is asked, and answers with a status and some pixels once it may."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.asked, self.may_answer = 200, [], threading.Event()
        self.may_answer.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/dicom-web"


class Handler(BaseHTTPRequestHandler):
    server: DICOMweb

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, self.headers, body))
        self.server.may_answer.wait(30)
        self.send_response(self.server.status)
        self.send_header("Content-Type", MULTIPART)
        self.send_header("Set-Cookie", "secret=1")
        self.end_headers()
        self.wfile.write(b"pixels" * 100_000)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def dicomweb() -> Iterator[DICOMweb]:
    with DICOMweb() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def client(dicomweb: DICOMweb, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_USERNAME", "alice")
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_PASSWORD", "secret")
    use(Studies(dicomweb.url), monkeypatch)
    app = FastAPI()
    app.include_router(proxy.router)
    errors.install(app)
    return TestClient(app, raise_server_exceptions=False)


def use(studies: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class App:
        def datastore(self) -> object:
            return studies

    monkeypatch.setattr(proxy, "app", App)


def test_questions_go_through_with_the_login_of_the_server(client: TestClient, dicomweb: DICOMweb) -> None:
    headers = {"Accept": "multipart/related; type=image/jls", "Authorization": "Bearer of-the-viewer", "Cookie": "a=b"}
    dicomweb.status = 206
    answer = client.get(f"/proxy/dicom/wado/{FRAMES}?quality=80&includefield=00081030,00080060", headers=headers)
    assert (answer.status_code, answer.content) == (206, b"pixels" * 100_000)
    assert answer.headers["content-type"] == MULTIPART and "set-cookie" not in answer.headers
    ((command, path, sent, _),) = dicomweb.asked
    assert (command, path) == ("GET", f"/dicom-web/{FRAMES}?quality=80&includefield=00081030,00080060")
    assert sent["Accept"] == headers["Accept"] and sent["Authorization"].startswith("Basic ") and "Cookie" not in sent


def test_instances_are_stored_as_they_are(client: TestClient, dicomweb: DICOMweb) -> None:
    for path in ("wado/studies", "stow/studies/1.2.3"):
        client.post(f"/proxy/dicom/{path}", content=b"--x\r\n\0\xff", headers={"Content-Type": MULTIPART})
    assert [(path, body) for _, path, _, body in dicomweb.asked] == [
        ("/dicom-web/studies", b"--x\r\n\0\xff"),
        ("/dicom-web/studies/1.2.3", b"--x\r\n\0\xff"),
    ]
    assert dicomweb.asked[0][2]["Content-Type"] == MULTIPART


def test_services_may_have_addresses_of_their_own(
    client: TestClient, dicomweb: DICOMweb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "_PREFIXES", {"qido": "qido-rs", "wado": "/wado-rs/", "stow": None})
    for path in ("qido/studies", "qido/studies/1/metadata", "wado/studies/1", "stow/studies"):
        assert client.get(f"/proxy/dicom/{path}").status_code == 200
    assert [path.removeprefix("/dicom-web/") for _, path, _, _ in dicomweb.asked] == [
        "qido-rs/studies",
        "wado-rs/studies/1/metadata",
        "wado-rs/studies/1",
        "studies",
    ]


@pytest.mark.parametrize(
    "path",
    [
        "%2e%2e/system",
        "%2e%2e/tools/shutdown",
        "wado/servers",
        "wado/%2e%2e/system",
        "wado/studies/%2e%2e/%2e%2e/tools/shutdown",
        "wado/studies/%2E%2e%2F..%2Fsystem",
        "wado/%252e%252e/system",
        "wado/studies%2F%2Fx",
        "wado/.%2Fstudies",
        "wado/studies/..;/x",
        "wado/studies/..%5Cx",
        "wado/studies%3Fx",
        "wado/studies%23x",
        "wado/@127.0.0.1:1%2F%2Fx",
        "wado/studies/x%0d%0aHost: y",
        "wado/",
        "other/studies",
        "studies",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_outside_of_dicomweb_is_reached(client: TestClient, dicomweb: DICOMweb, method: str, path: str) -> None:
    answer = client.request(method, f"/proxy/dicom/{path}", content=b"" if method == "POST" else None)
    assert answer.status_code in (400, 404) and answer.json()["detail"]
    assert not dicomweb.asked


@pytest.mark.parametrize("path", ["servers/other/stow", "studies/1/series", "instances", "studies/"])
def test_only_instances_can_be_sent(client: TestClient, dicomweb: DICOMweb, path: str) -> None:
    assert client.post(f"/proxy/dicom/stow/{path}", content=b"x").status_code == 404
    assert client.put("/proxy/dicom/wado/studies", content=b"x").status_code == 405
    assert client.delete("/proxy/dicom/wado/studies/1").status_code == 405
    assert not dicomweb.asked


def test_a_server_that_is_away_or_silent_is_named(
    client: TestClient, dicomweb: DICOMweb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "TIMEOUT_S", (1, 0.1))
    dicomweb.may_answer.clear()
    silent = client.get("/proxy/dicom/qido/studies")
    use(Studies("http://127.0.0.1:1/dicom-web"), monkeypatch)
    away = client.post("/proxy/dicom/stow/studies", content=b"x")
    for answer in (silent, away):
        assert answer.status_code == 502 and "dicom-web does not answer" in answer.json()["detail"]


def test_studies_in_a_folder_have_no_dicomweb(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    use(object(), monkeypatch)
    assert client.get("/proxy/dicom/qido/studies").status_code == 404


def test_storing_takes_the_role_of_an_annotator(
    client: TestClient, dicomweb: DICOMweb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_ENABLE", True)
    user = User(username="ann", roles=[settings.MONAI_LABEL_AUTH_ROLE_USER])
    client.app.dependency_overrides[get_current_user] = lambda: user
    assert client.get("/proxy/dicom/wado/studies").status_code == 200
    assert client.post("/proxy/dicom/stow/studies", content=b"x").status_code == 403
    user.roles.append(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)
    assert client.post("/proxy/dicom/stow/studies", content=b"x").status_code == 200
