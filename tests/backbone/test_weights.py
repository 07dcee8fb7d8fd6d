import hashlib
import os
import pickle
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tenacity import wait_none
from torch import Tensor, nn

from ofl_sam2.backbone import weights
from ofl_sam2.backbone.configs import BACKBONES
from ofl_sam2.backbone.weights import (
    CATALOGUE,
    WeightsEntry,
    fetch,
    load_strict,
    read_state,
    sha256_of,
    state_hash,
    verify,
    weights_path,
)
from ofl_sam2.errors import InputError, WeightsError

CONTENT = bytes(range(256)) * 12_000
TOY = WeightsEntry("toy", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


class Server(ThreadingHTTPServer):
    """Serves `content`; `script` holds what to do to the next requests, `ranges` what they asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.script: list[str | int] = []
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/toy.pt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        action = self.server.script.pop(0) if self.server.script else "serve"
        if isinstance(action, int):
            self.send_error(action)
        elif action.startswith("redirect "):
            self.send_response(302)
            self.send_header("Location", action.removeprefix("redirect "))
            self.end_headers()
        else:
            self.serve(int(asked[6:-1]) if asked and action != "ignore range" else 0, action)

    def serve(self, start: int, action: str) -> None:
        body = self.server.content[start:]
        if start and not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.server.content)}")
        if action != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # the client may have read enough
            self.wfile.write(body[: len(body) // 2] if action == "hang up" else body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder and a catalogue that knows a small file too."""
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(CATALOGUE, "toy", TOY)
    monkeypatch.setattr(weights, "_WAIT", wait_none())
    return tmp_path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"toy.pt.lock"}


# Where weights lie


def test_the_catalogue_names_the_released_models() -> None:
    released = {name: entry for name, entry in CATALOGUE.items() if name != "toy"}
    assert released.keys() == BACKBONES.keys() - {"nano"}
    for name, entry in released.items():
        assert entry.name == name
        assert entry.url == f"https://dl.fbaipublicfiles.com/segment_anything_2/092824/{name}.pt"
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert len({entry.sha256 for entry in released.values()}) == 4


def test_the_environment_names_a_folder_or_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights_path("toy") == folder / "toy.pt"
    existing = folder / "renamed"
    existing.write_bytes(b"")
    for file in (existing, folder / "absent.pt"):
        monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(file))
        assert weights_path("toy") == file
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", "~/weights")
    assert weights_path("toy") == Path.home() / "weights" / "toy.pt"


def test_without_the_environment_weights_lie_in_the_user_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "user_cache_path", lambda name: folder / "cache" / name)
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("OFL_SAM2_WEIGHTS")
        else:
            monkeypatch.setenv("OFL_SAM2_WEIGHTS", unset)
        assert weights_path("toy") == folder / "cache" / "ofl_sam2" / "weights" / "toy.pt"


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    for function in (weights_path, fetch):
        with pytest.raises(InputError, match=r"'nano'.*sam2\.1_hiera_tiny"):
            function("nano")


# Download


def test_a_download_is_verified_published_and_not_repeated(folder: Path, server: Server) -> None:
    assert fetch("toy", url=server.url) == folder / "toy.pt"
    assert (folder / "toy.pt").read_bytes() == CONTENT
    assert names_in(folder) == {"toy.pt"}
    fetch("toy", url=server.url)
    assert len(server.ranges) == 1


def test_the_folder_is_created(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(folder / "a" / "b"))
    assert fetch("toy", url=server.url) == folder / "a" / "b" / "toy.pt"


def test_an_interrupted_download_goes_on_where_it_stopped(folder: Path, server: Server) -> None:
    server.script = ["hang up", "hang up", "no length"]
    fetch("toy", url=server.url)
    half = len(CONTENT) // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]
    assert (folder / "toy.pt").read_bytes() == CONTENT


def test_a_later_call_goes_on_where_an_earlier_one_stopped(folder: Path, server: Server) -> None:
    (folder / "toy.pt.part").write_bytes(CONTENT[:1000])
    fetch("toy", url=server.url)
    assert server.ranges == ["bytes=1000-"]
    assert names_in(folder) == {"toy.pt"}


def test_a_whole_part_needs_no_network(folder: Path, server: Server) -> None:
    (folder / "toy.pt.part").write_bytes(CONTENT)
    fetch("toy", url=server.url)
    assert server.ranges == []
    assert (folder / "toy.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("rest", [CONTENT[:1000], CONTENT + b"too long"])
def test_a_server_without_ranges_or_a_part_too_long_starts_over(folder: Path, server: Server, rest: bytes) -> None:
    (folder / "toy.pt.part").write_bytes(rest)
    server.script = ["ignore range"]
    fetch("toy", url=server.url)
    assert (folder / "toy.pt").read_bytes() == CONTENT


def test_temporary_server_errors_are_retried_up_to_a_bound(folder: Path, server: Server) -> None:
    server.script = [503, 429]
    fetch("toy", url=server.url)
    assert len(server.ranges) == 3
    (folder / "toy.pt").unlink()
    server.script = [503] * 100
    with pytest.raises(WeightsError, match="503"):
        fetch("toy", url=server.url)
    assert len(server.ranges) == 3 + 6


def assert_says_what_to_do(message: str, folder: Path) -> None:
    for part in ("toy.pt", str(TOY.size), TOY.sha256, TOY.url, str(folder / "toy.pt"), "OFL_SAM2_WEIGHTS"):
        assert part in message


def test_a_refusal_is_not_retried_and_says_what_to_do(folder: Path, server: Server) -> None:
    server.script = [403]
    with pytest.raises(WeightsError, match="403") as caught:
        fetch("toy", url=server.url)
    assert len(server.ranges) == 1
    assert_says_what_to_do(str(caught.value), folder)


def test_offline_says_what_to_do(folder: Path) -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(WeightsError, match="Connection refused") as caught:
        fetch("toy", url=url)
    assert_says_what_to_do(str(caught.value), folder)
    assert names_in(folder) == set()


def test_a_file_of_the_right_size_and_wrong_content_is_thrown_away(folder: Path, server: Server) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(WeightsError, match="damaged or replaced on the way") as caught:
        fetch("toy", url=server.url)
    assert hashlib.sha256(server.content).hexdigest() in str(caught.value)
    assert names_in(folder) == set()


def test_a_page_in_place_of_the_file_is_refused_and_keeps_what_was_downloaded(folder: Path, server: Server) -> None:
    (folder / "toy.pt.part").write_bytes(CONTENT[:1000])
    server.content = b"<html>Please log in</html>" * 50
    server.script = ["ignore range"]
    with pytest.raises(WeightsError, match=f"offers 1300 bytes instead of {len(CONTENT)}: not this file"):
        fetch("toy", url=server.url)
    assert (folder / "toy.pt.part").read_bytes() == CONTENT[:1000]


def test_an_endless_answer_does_not_fill_the_disk(folder: Path, server: Server) -> None:
    server.content = CONTENT * 3
    server.script = ["no length"]
    fetch("toy", url=server.url)
    assert (folder / "toy.pt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/toy.pt",
        "http://127.0.0.1@example.org/toy.pt",
        "http://127.0.0.1.example.org/toy.pt",
        "ftp://127.0.0.1/toy.pt",
        "file:///etc/passwd",
        "toy.pt",
    ],
)
def test_only_https_is_downloaded(folder: Path, url: str) -> None:
    with pytest.raises(InputError, match="over https only"):
        fetch("toy", url=url)
    assert names_in(folder) == set()


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/toy.pt", "file:///etc/passwd", "ftp://127.0.0.1/toy.pt"])
def test_redirects_away_from_https_are_refused(server: Server, target: str) -> None:
    server.script = [f"redirect {target}"]
    with pytest.raises(WeightsError, match=r"redirected to .*which is not https|not allowed") as caught:
        fetch("toy", url=server.url)
    assert target in str(caught.value)


def test_a_folder_that_cannot_be_made_says_what_to_do(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("in the way")
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(folder / "file" / "weights"))
    with pytest.raises(WeightsError, match=r"Not a directory.*or set OFL_SAM2_WEIGHTS"):
        fetch("toy", url=server.url)


def test_two_calls_at_once_download_once(folder: Path, server: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetch("toy", url=server.url), range(2)))
    assert paths == [folder / "toy.pt"] * 2
    assert len(server.ranges) == 1


def test_progress_is_shown_on_a_terminal_only_if_wanted(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fetch("toy", progress=True, url=server.url)
    assert "toy.pt: 100%" in capsys.readouterr().err
    (folder / "toy.pt").unlink()
    fetch("toy", progress=False, url=server.url)
    assert capsys.readouterr().err == ""


# Verification


def test_verify_identifies_by_content_not_by_name(folder: Path) -> None:
    path = folder / "sam2.1_hiera_large.pt"
    path.write_bytes(CONTENT)
    assert verify(path) == TOY
    with pytest.raises(WeightsError, match=r"holds the weights of toy, not of sam2\.1_hiera_large"):
        fetch("sam2.1_hiera_large")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no weights file"),
        (CONTENT[:-1], f"truncated: {len(CONTENT) - 1} of {len(CONTENT)} bytes. Delete it"),
        (b"x" + CONTENT[1:], "none of the known weights: its sha256 is "),
        (CONTENT + b"x", "none of the known weights: its sha256 is "),
    ],
)
def test_verify_says_what_is_wrong_and_what_to_do(folder: Path, content: bytes | None, words: str) -> None:
    path = folder / "toy.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(words)) as caught:
        verify(path)
    assert_says_what_to_do(str(caught.value), folder)
    if content is not None:
        with pytest.raises(WeightsError, match=re.escape(words)):
            fetch("toy", url="https://not-asked.invalid/")
        assert path.read_bytes() == content


def test_verify_lists_the_known_names_for_a_file_of_another_name(folder: Path) -> None:
    (folder / "mine.pt").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"Known are: sam2\.1_hiera_tiny, "):
        verify(folder / "mine.pt")


def test_sha256_of_a_file_longer_than_a_chunk(folder: Path) -> None:
    (folder / "file").write_bytes(CONTENT)
    assert sha256_of(folder / "file") == TOY.sha256
    (folder / "file").write_bytes(b"")
    assert sha256_of(folder / "file") == hashlib.sha256().hexdigest()


# Reading


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0]).half()}


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "legacy.pt"])
def test_a_state_is_read_as_it_was_saved(folder: Path, state: dict[str, Tensor], name: str) -> None:
    path = save(state, folder / name)
    read = read_state(path, sha256_of(path).upper())
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_the_hash_is_checked_before_anything_is_parsed(
    folder: Path, state: dict[str, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(state, folder / name)
    monkeypatch.setattr(weights, "_parse", lambda path: pytest.fail("parsed"))
    with pytest.raises(WeightsError, match="is not the expected file"):
        read_state(path, "0" * 64)


class Attack:
    """Unpickling it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "safetensors"])
@pytest.mark.parametrize("trusting", [False, True])
def test_code_in_a_file_is_not_run(
    folder: Path, state: dict[str, Tensor], form: str, trusting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trusting:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace = folder / "trace"
    path = folder / ("attack.safetensors" if form == "safetensors" else "attack.pt")
    content = {"model": {**state, "attack": Attack(trace)}}
    if form in {"zip", "legacy"}:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(WeightsError, match="holds more than tensors"):
        read_state(path, sha256_of(path))
    assert not trace.exists()
    if form == "zip":  # the attack itself works
        torch.load(path, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "legacy.pt"])
@pytest.mark.parametrize("kept", [0, 4, 50, -20])
def test_a_truncated_file_is_refused(folder: Path, state: dict[str, Tensor], name: str, kept: int) -> None:
    path = save(state, folder / name)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=rf"{name} was not loaded\. It is damaged"):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weight": torch.ones(1)}, 'no entry "model"'),
        ([torch.ones(1)], 'no entry "model"'),
        ({"model": torch.ones(1)}, 'no entry "model"'),
        ({"model": {"weight": [1.0]}}, "something other than plain tensors, at 'weight'"),
        ({"model": {3: torch.ones(1)}}, "something other than plain tensors, at 3"),
        ({"model": {"weight": torch.ones(2).to_sparse()}}, "something other than plain tensors"),
        ({"model": {"weight": torch.ones(2, device="meta")}}, "something other than plain tensors"),
    ],
)
def test_other_contents_are_refused(folder: Path, content: object, words: str) -> None:
    torch.save(content, folder / "a.pt")
    with pytest.raises(WeightsError, match=words):
        read_state(folder / "a.pt")


@pytest.mark.parametrize("name", ["a.pkl", "a.bin", "a.ckpt", "a", "a.npz"])
def test_other_formats_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=r"use a \.safetensors, \.pt or \.pth file"):
        read_state(folder / name)


def test_a_missing_file_is_said(folder: Path) -> None:
    with pytest.raises(WeightsError, match="There is no weights file"):
        read_state(folder / "a.pt")


# Loading


def meta_state(name: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors by which a SAM2 layout is told, without values."""
    config = BACKBONES[name]
    shapes = {
        "image_encoder.trunk.patch_embed.proj.weight": (config.embed_dim, 3, 7, 7),
        "no_obj_embed_spatial": (1, 64),
        **{f"image_encoder.trunk.blocks.{index}.norm1.weight": (8,) for index in range(sum(config.stages))},
    }
    return {prefix + key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


class Holder(nn.Module):
    """A module with the given state."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        return self.state


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float16])
def test_weights_are_cast_to_the_dtype_of_the_module(given: torch.dtype, own: torch.dtype) -> None:
    module = nn.Linear(3, 2).to(own)
    state = {"weight": torch.randn(2, 3).to(given), "bias": torch.randn(2).to(given)}
    load_strict(module, state, "test")
    assert module.weight.dtype == own
    assert torch.equal(module.weight, state["weight"].to(own))
    assert module.weight.requires_grad
    state["bias"].zero_()
    assert module.bias.abs().sum() > 0


def test_the_message_lists_the_first_of_every_problem_and_nothing_is_loaded() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {
        "0.weight": torch.ones(2, 4),
        "0.bias": torch.full((2,), 9.0),
        "1.num_batches_tracked": torch.tensor(1.0),
        **{f"extra{index}": torch.ones(1) for index in range(5)},
    }
    with pytest.raises(WeightsError) as caught:
        load_strict(module, state, "toy.pt")
    assert str(caught.value) == (
        "The weights of toy.pt do not fit Sequential. "
        "4 missing, such as 1.weight, 1.bias, 1.running_mean; 5 unexpected, such as extra0, extra1, extra2; "
        "2 mismatched, such as 0.weight float32[2, 4] not float32[2, 3], "
        "1.num_batches_tracked float32[] not int64[]."
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "sam2.1_hiera_base_plus"])
def test_the_message_names_the_layout_the_weights_have(name: str) -> None:
    module = Holder(meta_state("sam2.1_hiera_base_plus"))
    with pytest.raises(WeightsError, match=rf"They look like {re.escape(name)}\.$"):
        load_strict(module, meta_state(name), "a.pt")


def test_the_message_names_prefixes_older_models_and_converted_ones() -> None:
    module = Holder(meta_state("nano"))
    with pytest.raises(WeightsError, match=r"look like nano with every name prefixed by 'module\.'"):
        load_strict(module, meta_state("nano", "module."), "a.pt")
    older = meta_state("nano")
    del older["no_obj_embed_spatial"]
    with pytest.raises(WeightsError, match=r"look like nano of before SAM 2\.1"):
        load_strict(module, older, "a.pt")
    with pytest.raises(WeightsError, match=r"take the \.pt file of the original release"):
        load_strict(module, {"vision_encoder.neck": torch.ones(1)}, "a.safetensors")
    unknown = meta_state("nano") | {"image_encoder.trunk.patch_embed.proj.weight": torch.ones(())}
    with pytest.raises(WeightsError, match="look like an unknown SAM2 model"):
        load_strict(module, unknown, "a.pt")


def test_no_layout_is_named_for_other_weights_or_the_right_layout() -> None:
    module = Holder(meta_state("nano"))
    same_layout = meta_state("nano") | {"extra": torch.ones(1)}
    for state in ({}, {"extra": torch.ones(1)}, same_layout):
        with pytest.raises(WeightsError, match="do not fit Holder") as caught:
            load_strict(module, state, "a.pt")
        assert "look like" not in str(caught.value)


# Identity


def test_the_hash_is_of_names_shapes_and_values_only(state: dict[str, Tensor]) -> None:
    backwards = dict(reversed(state.items()))
    assert state_hash(state) == state_hash(backwards)
    assert state_hash({"a": torch.tensor([0.5]).half()}) == state_hash({"a": torch.tensor([0.5]).double()})
    assert state_hash({"a": torch.arange(6.0).reshape(2, 3).T}) == state_hash(
        {"a": torch.tensor([[0.0, 3], [1, 4], [2, 5]])}
    )
    module = nn.Linear(3, 2)
    assert state_hash(module) == state_hash(module.state_dict())


def test_any_change_changes_the_hash(state: dict[str, Tensor]) -> None:
    changed = state["weight"].clone()
    changed[0, 0] = 1e-30
    others = [
        {**state, "weight": changed},
        {**state, "weight": state["weight"].reshape(3, 2)},
        {"renamed": state["weight"], "bias": state["bias"]},
        {"weight": state["weight"]},
        {},
    ]
    assert len({state_hash(other) for other in [state, *others]}) == 6


def test_the_hash_is_the_same_on_every_machine() -> None:
    state = {"b": torch.zeros(()), "a": torch.tensor([[1.0, 2.0]])}
    content = b"a\0(1, 2)\0\x00\x00\x80\x3f\x00\x00\x00\x40" + b"b\0()\0\x00\x00\x00\x00"
    assert state_hash(state) == hashlib.sha256(content).hexdigest()
