"""A learned model as a folder: published atomically, checked by sha256, readable without the training data.

`model.json` names everything else by content: `learner-*.safetensors` (learner and fusion), `unet-*.safetensors` (the
U-Net, if one was trained), `pool-*.safetensors` (one a labelled case: frozen features and labels of its slices). It is
replaced last, so a crash leaves the old or the new model. One process at a time saves into a folder.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save

from ofl_sam2 import __version__
from ofl_sam2.atomic import atomic_path, atomic_write_text
from ofl_sam2.backbone.frozen import ImageFeatures, SAM2Backbone
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.backbone.weights import read_state, sha256_of
from ofl_sam2.dataset import MAX_VALUE
from ofl_sam2.errors import InputError, ModelError
from ofl_sam2.learner.load import learner_bytes, read_learner, read_unet, unet_bytes
from ofl_sam2.looks import Viewpoint
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.memory.pool import PooledCase, SupportPool, View
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.settings import Settings

FORMAT = 3
INDEX = "model.json"
_FILE = re.compile(r"(learner|unet|pool)-[0-9a-f]{16}\.safetensors")
_OWN = re.compile(rf"(\.[0-9a-f]+\.partial\.)?{_FILE.pattern}")
_FORMER_SETTINGS = ("refinement", "unet")
_ADVICE = "Restore the folder from a copy, or learn again with --fresh."

T = TypeVar("T")


@dataclass(frozen=True)
class StoredFile:
    """A file of a model folder: its name there and its sha256 (hex)."""

    file: str
    sha256: str


@dataclass(frozen=True)
class StoredCase(StoredFile):
    """A labelled case in a pool: its name, which slices of which view are labelled, what a close-up is made for."""

    case: str
    slices: tuple[int, ...]
    axis: int | None
    focus: tuple[int, ...]


@dataclass(frozen=True)
class ModelIndex:
    """What `model.json` says.

    Attributes:
        backbone, backbone_hash, image_size: the frozen SAM2 and the side of its input in pixels.
        axis, through_plane: slicing, as in `VolumeSegmenter`.
        structures: label value -> name.
        settings: the switches of the method.
        learner: learner and fusion.
        unet: the U-Net, if one was trained.
        pool: the labelled cases, an entry for each view of them.
        notes: free entries, such as how long was trained.
    """

    backbone: str
    backbone_hash: str
    image_size: int
    axis: int
    through_plane: bool
    structures: dict[int, str]
    settings: Settings
    learner: StoredFile
    unet: StoredFile | None
    pool: tuple[StoredCase, ...]
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of `model.json`."""
        content = {
            "format": FORMAT,
            "version": __version__,
            "backbone": {"name": self.backbone, "hash": self.backbone_hash, "image_size": self.image_size},
            "slicing": {"axis": self.axis, "through_plane": self.through_plane},
            "structures": self.structures,
            "settings": self.settings.to_dict(),
            "learner": vars(self.learner),
            "unet": self.unet and vars(self.unet),
            "pool": [vars(case) for case in self.pool],
            "notes": self.notes,
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> "ModelIndex":
        """Inverse of `to_json`, after JSON was read.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing, of another type, or out of range.
        """
        index = cls(
            backbone=_typed(content["backbone"]["name"], str),
            backbone_hash=_typed(content["backbone"]["hash"], str),
            image_size=_typed(content["backbone"]["image_size"], int),
            axis=_typed(content["slicing"]["axis"], int),
            through_plane=_typed(content["slicing"]["through_plane"], bool),
            structures={int(value): _typed(name, str) for value, name in content["structures"].items()},
            settings=Settings.from_dict({k: v for k, v in content["settings"].items() if k not in _FORMER_SETTINGS}),
            learner=_stored_file(content["learner"]),
            unet=_stored_file(entry) if (entry := content.get("unet")) is not None else None,
            pool=tuple(_stored_case(entry) for entry in _typed(content["pool"], list)),
            notes=_typed(content["notes"], dict),
        )
        if index.axis not in (0, 1, 2):
            raise ValueError(f"axis {index.axis}")
        if not all(case.slices for case in index.pool) or not index.pool:
            raise ValueError("no labelled slices")
        if not all(0 < value <= MAX_VALUE for value in index.structures) or not index.structures:
            raise ValueError(f"structures {index.structures}")
        return index


def is_model(folder: Path) -> bool:
    """Whether the folder holds a saved model."""
    return (folder / INDEX).is_file()


def save_model(
    segmenter: VolumeSegmenter, folder: Path, notes: dict[str, Any] | None = None, reuse: Path | None = None
) -> None:
    """Write a learned segmenter into `folder` and remove what the new model no longer names.

    Args:
        segmenter: has learned.
        folder: created if absent.
        notes: free entries for `model.json`, such as how long was trained.
        reuse: folder of another model on the same file system; files of the same content are linked, not written.

    Raises:
        InputError: nothing has been learned yet.
        OFLError: the folder cannot be written; the old model is intact.
    """
    if segmenter.viewpoint is None:
        raise InputError("There is nothing to save: learn from at least one labelled volume first.")
    unet = segmenter.unet
    index = ModelIndex(
        segmenter.backbone.config.name,
        segmenter.backbone_hash,
        segmenter.backbone.image_size,
        segmenter.viewpoint.axis,
        segmenter.viewpoint.through_plane,
        segmenter.structures,
        segmenter.settings,
        _write_named(folder, "learner", learner_bytes(segmenter.learner), reuse),
        _write_named(folder, "unet", unet_bytes(unet), reuse) if unet else None,
        tuple(_write_case(folder, c, reuse) for pool in segmenter.pools.values() for c in pool.cases.values()),
        notes or {},
    )
    atomic_write_text(folder / INDEX, index.to_json())
    named = {stored.file for stored in (index.learner, index.unet, *index.pool) if stored}
    for path in folder.iterdir():
        if _OWN.fullmatch(path.name) and path.name not in named:
            with suppress(OSError):
                path.unlink()


def load_model(
    folder: Path,
    device: str = "cpu",
    cache: FeatureCache | None = None,
    like: VolumeSegmenter | None = None,
    **changes: Any,
) -> VolumeSegmenter:
    """Read a saved model.

    Args:
        folder: written by `save_model`.
        device: "cpu" or "cuda".
        cache: frozen features by content.
        like: a model on the device; backbone and cases that are the same are taken from it.
        changes: settings that differ from the saved ones.

    Raises:
        ModelError: no model there, damaged, of a newer version, or learned with other backbone weights.
        WeightsError: the backbone's weights are not here.
        InputError: `changes` that are no settings.
    """
    index = read_index(folder)
    settings = Settings.from_dict({**index.settings.to_dict(), **changes})
    backbone = like.backbone if like else None
    try:
        if backbone is None or (backbone.config.name, backbone.image_size) != (index.backbone, index.image_size):
            backbone = load_backbone(index.backbone, index.image_size, device)
    except InputError as error:
        raise ModelError(f"{folder / INDEX} is damaged: {error} {_ADVICE}") from error
    learner = read_learner(_checked(folder, index.learner)).to(device)
    if learner.channels != backbone.width:
        raise ModelError(f"{folder / index.learner.file} is no learner for {index.backbone}. {_ADVICE}")
    segmenter = VolumeSegmenter(backbone, learner, settings, cache)
    if index.unet:
        segmenter.unet = read_unet(_checked(folder, index.unet)).to(device)
    if segmenter.backbone_hash != index.backbone_hash:
        raise ModelError(
            f"{folder} was learned with other weights of {index.backbone} than the ones installed. "
            "Install those weights, or learn again with --fresh."
        )
    read = {case.sha256: case for pool in (like.pools.values() if like else ()) for case in pool.cases.values()}
    for stored in index.pool:
        case = read.get(stored.sha256)
        if case is None or _stored_as(case, stored) != stored:
            case = _read_case(folder, stored, backbone)
        segmenter.pools.setdefault(case.view, SupportPool()).add(case)
    segmenter.viewpoint = Viewpoint(index.axis, index.through_plane, backbone.image_size, settings)
    segmenter.structures = dict(sorted(index.structures.items()))
    absent = sorted(set(index.structures) - set(segmenter.pool.values()))
    if absent:
        raise ModelError(f"{folder / INDEX} is damaged: no stored label holds {absent}. {_ADVICE}")
    segmenter.solve()
    return segmenter


def read_index(folder: Path) -> ModelIndex:
    """Read `model.json` and check that this version understands it.

    Raises:
        ModelError: no model there, damaged, or of a newer version.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ModelError(f"{folder} holds no model: {INDEX} is missing. Run 'ofl-sam2 learn --model {folder}' first.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if _typed(content["format"], int) > FORMAT:
            raise ModelError(
                f"{folder} was written by version {content.get('version')}, which is newer than this one "
                f"({__version__}). Upgrade ofl-sam2."
            )
        return ModelIndex.from_content(content)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}). {_ADVICE}") from error


def _typed(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _stored_file(entry: dict[str, Any]) -> StoredFile:
    """File and sha256 of an entry; the file lies in the model folder itself, whatever the entry says."""
    name, sha256 = _typed(entry["file"], str), _typed(entry["sha256"], str)
    if not _FILE.fullmatch(name):
        raise ValueError(f"'{name}' is no name of a file in a model folder")
    return StoredFile(name, sha256)


def _stored_case(entry: dict[str, Any]) -> StoredCase:
    slices, focus = (tuple(_typed(n, int) for n in _typed(entry[name], list)) for name in ("slices", "focus"))
    if entry["axis"] not in (None, 0, 1, 2):
        raise ValueError(f"axis {entry['axis']}")
    stored = vars(_stored_file(entry))
    return StoredCase(**stored, case=_typed(entry["case"], str), slices=slices, axis=entry["axis"], focus=focus)


def _checked(folder: Path, stored: StoredFile) -> Path:
    """The path of a stored file that is there and has the content it had when it was saved."""
    path = folder / stored.file
    if not path.is_file():
        raise ModelError(f"{folder} is not complete: {stored.file} is missing. {_ADVICE}")
    if sha256_of(path) != stored.sha256:
        raise ModelError(f"{path} is damaged: its content is not what was saved. {_ADVICE}")
    return path


def _write_named(folder: Path, kind: str, content: bytes, reuse: Path | None) -> StoredFile:
    """Write a file under a name made of its content, or link it from `reuse`, unless it is there already."""
    digest = hashlib.sha256(content).hexdigest()
    stored = _linked(folder, kind, digest, reuse)
    if stored is None or sha256_of(folder / stored.file) != digest:
        stored = StoredFile(_file_name(kind, digest), digest)
        with atomic_path(folder / stored.file) as temporary:
            temporary.write_bytes(content)
    return stored


def _linked(folder: Path, kind: str, digest: str, reuse: Path | None) -> StoredFile | None:
    """The file of this content if it is in `folder`, or can be linked there from `reuse`."""
    target = folder / _file_name(kind, digest)
    if reuse is not None and not target.is_file():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            os.link(reuse / target.name, target)
    return StoredFile(target.name, digest) if target.is_file() else None


def _file_name(kind: str, digest: str) -> str:
    return f"{kind}-{digest[:16]}.safetensors"


def _write_case(folder: Path, case: PooledCase, reuse: Path | None) -> StoredCase:
    """Write a case, or link the file that it was read from."""
    stored = _linked(folder, "pool", case.sha256, reuse) if case.sha256 else None
    if stored is None:
        tensors = {**vars(case.features), "labels": case.labels}
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        stored = _write_named(folder, "pool", content, reuse)
    return _stored_as(case, stored)


def _stored_as(case: PooledCase, file: StoredFile) -> StoredCase:
    """What the index says of a case in a file."""
    return StoredCase(file.file, file.sha256, case.name, case.slices, case.view.axis, case.focus)


def _read_case(folder: Path, stored: StoredCase, backbone: SAM2Backbone) -> PooledCase:
    """Read the slices of a case; the tensors stay on disk until they are touched."""
    path = _checked(folder, stored)
    state = read_state(path)
    count, size, width = len(stored.slices), backbone.image_size, backbone.width
    expected = {
        "stride4": (count, width // 8, size // 4, size // 4),
        "stride8": (count, width // 4, size // 8, size // 8),
        "stride16": (count, width, size // 16, size // 16),
        "labels": (count, size, size),
    }
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
        raise ModelError(f"{path} does not hold {count} labelled slices of {size} x {size} pixels. {_ADVICE}")
    labels = state.pop("labels")
    view = View(stored.axis, close=bool(stored.focus))
    case = PooledCase(stored.case, stored.slices, ImageFeatures(**state), labels, view, stored.focus)
    object.__setattr__(case, "sha256", stored.sha256)
    return case
