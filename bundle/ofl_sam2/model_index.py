"""What `model.json` of a model folder says, and the checks of what was read from it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ofl_sam2 import __version__
from ofl_sam2.dataset import MAX_VALUE
from ofl_sam2.errors import ModelError
from ofl_sam2.settings import Settings

FORMAT = 3
INDEX = "model.json"
STORED = re.compile(r"(learner|unet|pool)-[0-9a-f]{16}\.safetensors")
ADVICE = "Restore the folder from a copy, or learn again with --fresh."
_FORMER_SETTINGS = ("refinement", "unet")

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
        raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}). {ADVICE}") from error


def _typed(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _stored_file(entry: dict[str, Any]) -> StoredFile:
    """File and sha256 of an entry; the file lies in the model folder itself, whatever the entry says."""
    name, sha256 = _typed(entry["file"], str), _typed(entry["sha256"], str)
    if not STORED.fullmatch(name):
        raise ValueError(f"'{name}' is no name of a file in a model folder")
    return StoredFile(name, sha256)


def _stored_case(entry: dict[str, Any]) -> StoredCase:
    slices, focus = (tuple(_typed(n, int) for n in _typed(entry[name], list)) for name in ("slices", "focus"))
    if entry["axis"] not in (None, 0, 1, 2):
        raise ValueError(f"axis {entry['axis']}")
    stored = vars(_stored_file(entry))
    return StoredCase(**stored, case=_typed(entry["case"], str), slices=slices, axis=entry["axis"], focus=focus)
