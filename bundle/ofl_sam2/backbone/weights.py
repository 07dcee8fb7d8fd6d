"""SAM2 weights: which files exist, where they lie, how they get there, and how they enter a model.

A file is trusted by its sha256 and parsed only by readers that cannot run code.
"""

import hashlib
import http.client
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLEOFError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors.torch import load_file
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter
from torch import Tensor, nn
from tqdm import tqdm

from ofl_sam2.atomic import publish
from ofl_sam2.backbone.configs import BACKBONES
from ofl_sam2.errors import InputError, WeightsError

ENVIRONMENT = "OFL_SAM2_WEIGHTS"

_CHUNK = 1 << 20  # bytes
_WAIT = wait_exponential_jitter(initial=1, max=30)  # seconds
_PATCH_EMBEDDING = "image_encoder.trunk.patch_embed.proj.weight"


@dataclass(frozen=True)
class WeightsEntry:
    """One released file: `name` as in `BACKBONES`, its sha256 (hex) and its size in bytes."""

    name: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        """Name of the released file."""
        return f"{self.name}.pt"

    @property
    def url(self) -> str:
        """Address of the released file."""
        return f"https://dl.fbaipublicfiles.com/segment_anything_2/092824/{self.file_name}"


_RELEASED = (
    ("sam2.1_hiera_tiny", "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69", 156008466),
    ("sam2.1_hiera_small", "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38", 184416285),
    ("sam2.1_hiera_base_plus", "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5", 323606802),
    ("sam2.1_hiera_large", "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318", 898083611),
)
CATALOGUE = {name: WeightsEntry(name, sha256, size) for name, sha256, size in _RELEASED}


def weights_path(name: str) -> Path:
    """Return where the weights called `name` are looked for, whether or not they are there.

    The environment variable OFL_SAM2_WEIGHTS names a folder, or the file itself; otherwise the user's cache folder.

    Raises:
        InputError: the catalogue has no such name.
    """
    entry = _entry(name)
    if not (chosen := os.environ.get(ENVIRONMENT)):
        return user_cache_path("ofl_sam2") / "weights" / entry.file_name
    path = Path(chosen).expanduser()
    return path if path.is_file() or path.suffix == ".pt" else path / entry.file_name


def fetch(name: str, progress: bool = True, url: str | None = None) -> Path:
    """Return the verified weights file called `name`, downloading it if it is not there.

    An interrupted download goes on where it stopped, also in a later call.

    Args:
        name: name in `CATALOGUE`.
        progress: show a progress bar when standard error is a terminal.
        url: a mirror of the file, https only (plain http for this machine's loopback address); default the release.

    Raises:
        InputError: the catalogue has no such name, or the address is not https.
        WeightsError: the file that is there is damaged, or the file cannot be downloaded; says what to do by hand.
    """
    entry, target = _entry(name), weights_path(name)
    source = _checked_url(url or entry.url)
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(target.name + ".lock")):
                if not target.exists():
                    _download_verified(entry, source, target, progress)
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(f"Cannot download {entry.file_name} from {source}: {error}. {_by_hand(entry)}") from error
    found = verify(target)
    if found != entry:
        raise WeightsError(f"{target} holds the weights of {found.name}, not of {name}. {_by_hand(entry)}")
    return target


def verify(path: Path | str) -> WeightsEntry:
    """Identify a weights file by its sha256.

    Raises:
        WeightsError: the file is missing, truncated, or none of the catalogue.
    """
    path = Path(path)
    expected = CATALOGUE.get(path.stem)
    advice = _by_hand(expected) if expected else f"Known are: {', '.join(CATALOGUE)}."
    if not path.is_file():
        raise WeightsError(f"There is no weights file {path}. {advice}")
    digest = sha256_of(path)
    if found := next((entry for entry in CATALOGUE.values() if entry.sha256 == digest), None):
        return found
    size = path.stat().st_size
    if expected and size < expected.size:
        raise WeightsError(f"{path} is truncated: {size} of {expected.size} bytes. Delete it. {advice}")
    raise WeightsError(f"{path} is none of the known weights: its sha256 is {digest}. Delete or rename it. {advice}")


def sha256_of(path: Path | str) -> str:
    """Return the sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_state(path: Path | str, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from the "model" entry of .pt and .pth, without running code.

    The file's sha256, where given, is checked before anything is parsed. The tensors are on the CPU and may be backed
    by the file itself: copy before changing them.

    Raises:
        WeightsError: the file is missing, is not the expected one, or holds anything but tensors by name.
    """
    path = Path(path)
    if path.suffix not in {".safetensors", ".pt", ".pth"}:
        raise WeightsError(f"Cannot read weights from {path}: use a .safetensors, .pt or .pth file.")
    if not path.is_file():
        raise WeightsError(f"There is no weights file {path}.")
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        raise WeightsError(f"{path} is not the expected file: its sha256 is {found}, not {sha256}. Fetch it again.")
    state = _parse(path)
    if not isinstance(state, dict):
        raise WeightsError(f'{path} has no entry "model" with the weights. Save it as {{"model": model.state_dict()}}.')
    for name, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not (isinstance(name, str) and plain):
            raise WeightsError(f"{path} holds something other than plain tensors, at {name!r}.")
    return state


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`: the same names and shapes, cast to the module's dtypes, all or nothing.

    Raises:
        WeightsError: names or shapes differ; says for which weights (`source`), where, and what layout they seem to be.
    """
    own = module.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "mismatched": [f"{n} {_shown(state[n])} not {_shown(own[n])}" for n in own if _differ(state.get(n), own[n])],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(n)} {kind}, such as {', '.join(n[:3])}" for kind, n in problems.items() if n)
        layout = _layout(state)
        hint = f" They look like {layout}." if layout and layout != _layout(own) else ""
        raise WeightsError(f"The weights of {source} do not fit {type(module).__name__}. {listed}.{hint}")
    module.load_state_dict(state)


def state_hash(module_or_state: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) over sorted names, shapes and float32 values, whatever dtype they are stored in."""
    state = module_or_state.state_dict() if isinstance(module_or_state, nn.Module) else module_or_state
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().cpu().float().contiguous().numpy()
        digest.update(f"{name}\0{values.shape}\0".encode() + values.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _entry(name: str) -> WeightsEntry:
    if name not in CATALOGUE:
        raise InputError(f"There are no downloadable weights called '{name}'. Choose one of: {', '.join(CATALOGUE)}.")
    return CATALOGUE[name]


def _by_hand(entry: WeightsEntry) -> str:
    return (
        f"Get {entry.file_name} ({entry.size} bytes, sha256 {entry.sha256}) from {entry.url} "
        f"and put it at {weights_path(entry.name)}, or set {ENVIRONMENT} to the file or its folder."
    )


def _checked_url(url: str) -> str:
    loopback = urlsplit(url).scheme == "http" and urlsplit(url).hostname in {"127.0.0.1", "::1", "localhost"}
    if not (loopback or urlsplit(url).scheme == "https"):
        raise InputError(f"Weights are downloaded over https only, not from {url}.")
    return url


class _SecureRedirects(HTTPRedirectHandler):
    def redirect_request(self, *answer: Any) -> Request | None:
        if urlsplit(target := answer[-1]).scheme != "https":
            raise URLError(f"redirected to {target}, which is not https")
        return super().redirect_request(*answer)


_OPENER = build_opener(_SecureRedirects)


def _download_verified(entry: WeightsEntry, url: str, target: Path, progress: bool) -> None:
    part = target.with_name(target.name + ".part")
    retry = Retrying(retry=retry_if_exception(_is_transient), stop=stop_after_attempt(6), wait=_WAIT, reraise=True)
    retry(_download, entry, url, part, progress)
    if (digest := sha256_of(part)) != entry.sha256:
        part.unlink()
        raise OSError(f"its sha256 is {digest}, so it was damaged or replaced on the way")
    publish(part, target)


def _download(entry: WeightsEntry, url: str, part: Path, progress: bool) -> None:
    """Append to `part` until it has the size of `entry`."""
    done = part.stat().st_size if part.exists() else 0
    if done == entry.size:
        return
    wanted = {"Range": f"bytes={done}-"} if 0 < done < entry.size else {}
    with _OPENER.open(Request(url, headers=wanted), timeout=30) as response:
        if response.status != 206:
            done = 0
        if response.length is not None and done + response.length != entry.size:
            raise OSError(f"the server offers {done + response.length} bytes instead of {entry.size}: not this file")
        hidden = not progress or None  # None: hidden unless on a terminal
        bar = tqdm(desc=entry.file_name, total=entry.size, initial=done, unit="B", unit_scale=True, disable=hidden)
        with bar, part.open("ab" if done else "wb") as file:
            while chunk := response.read(min(_CHUNK, entry.size - done)):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
    if done < entry.size:
        raise ConnectionResetError(f"the connection ended after {done} of {entry.size} bytes")


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code in {408, 425, 429, 500, 502, 503, 504}
    cause = error.reason if isinstance(error, URLError) else error
    interrupted = (ConnectionError, TimeoutError, http.client.HTTPException, SSLEOFError)
    return isinstance(cause, interrupted) and not isinstance(cause, ConnectionRefusedError)


def _parse(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # parsers raise anything on hostile bytes
        reason = f"It is damaged or holds more than tensors ({type(error).__name__})"
        raise WeightsError(f"{path} was not loaded. {reason}; fetch it again from where you trust it.") from error
    return content.get("model") if isinstance(content, dict) else None


def _differ(given: Tensor | None, own: Tensor) -> bool:
    return given is not None and (given.shape != own.shape or given.is_floating_point() != own.is_floating_point())


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _layout(state: Mapping[str, Tensor]) -> str | None:
    """Name a SAM2 state by its encoder: width and number of blocks tell the models apart."""
    if any(name.startswith("vision_encoder.") for name in state):
        return "a Hugging Face transformers model; take the .pt file of the original release"
    embedding = next((name for name in state if name.endswith(_PATCH_EMBEDDING)), None)
    if embedding is None:
        return None
    prefix = embedding.removesuffix(_PATCH_EMBEDDING)
    stem = f"{prefix}image_encoder.trunk.blocks."
    blocks = {name[len(stem) :].split(".")[0] for name in state if name.startswith(stem)}
    shape = (*state[embedding].shape[:1], len(blocks))
    known = (config.name for config in BACKBONES.values() if (config.embed_dim, sum(config.stages)) == shape)
    model = next(known, "an unknown SAM2 model")
    version = "" if f"{prefix}no_obj_embed_spatial" in state else " of before SAM 2.1"
    return model + version + (f" with every name prefixed by '{prefix}'" if prefix else "")
