"""A learned model as a folder: published atomically, checked by sha256, readable without the training data.

`model.json` names everything else by content: `learner-*.safetensors` (learner and fusion), `pool-*.safetensors` (one a
labelled case: frozen features and labels of its slices). It is replaced last, so a crash leaves the old or the new model.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ofl_sam2 import __version__
from ofl_sam2.atomic import atomic_path, atomic_write_text
from ofl_sam2.backbone.frozen import ImageFeatures
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.backbone.weights import read_state, sha256_of
from ofl_sam2.errors import ModelError, OFLError
from ofl_sam2.learner.load import learner_bytes, read_learner
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.memory.pool import PooledCase
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.settings import Settings

FORMAT = 1
INDEX = "model.json"


def is_model(folder: Path) -> bool:
    """Whether the folder holds a saved model."""
    return (folder / INDEX).is_file()


def save_model(segmenter: VolumeSegmenter, folder: Path, notes: dict[str, Any] | None = None) -> None:
    """Write a learned segmenter into `folder` and remove what the new model no longer names.

    Args:
        segmenter: has learned.
        folder: created if absent.
        notes: free entries for `model.json`, such as how long was trained.

    Raises:
        OFLError: the folder cannot be written; the old model is intact.
    """
    index = {
        "format": FORMAT,
        "version": __version__,
        "backbone": {
            "name": segmenter.backbone.config.name,
            "hash": segmenter.backbone_hash,
            "image_size": segmenter.backbone.image_size,
        },
        "slicing": {"axis": segmenter.axis, "through_plane": segmenter.through_plane},
        "structures": {str(value): name for value, name in segmenter.structures.items()},
        "settings": segmenter.settings.to_dict(),
        "learner": _write_named(folder, "learner", learner_bytes(segmenter.learner)),
        "pool": [
            {"case": case.name, "slices": list(case.slices), **_write_case(folder, case)}
            for case in segmenter.pool.cases.values()
        ],
        "notes": notes or {},
    }
    atomic_write_text(folder / INDEX, json.dumps(index, indent=1))
    named = {index["learner"]["file"], *(entry["file"] for entry in index["pool"])}
    for path in folder.glob("*-*.safetensors"):
        if path.name not in named:
            path.unlink(missing_ok=True)


def load_model(
    folder: Path, device: str = "cpu", cache: FeatureCache | None = None, **changes: Any
) -> VolumeSegmenter:
    """Read a saved model.

    Args:
        folder: written by `save_model`.
        device: "cpu" or "cuda".
        cache: frozen features by content.
        changes: settings that differ from the saved ones.

    Raises:
        ModelError: no model there, damaged, of a newer version, or learned with other backbone weights.
        WeightsError: the backbone's weights are not here.
    """
    index = read_index(folder)
    try:
        backbone = load_backbone(index["backbone"]["name"], index["backbone"]["image_size"], device)
        learner = read_learner(folder / index["learner"]["file"], index["learner"]["sha256"]).to(device)
        settings = Settings.from_dict({**index["settings"], **changes})
        segmenter = VolumeSegmenter(backbone, learner, settings, cache)
        if segmenter.backbone_hash != index["backbone"]["hash"]:
            raise ModelError(
                f"{folder} was learned with other weights of {backbone.config.name} than the ones installed. "
                "Install those weights, or learn again."
            )
        for entry in index["pool"]:
            segmenter.pool.add(_read_case(folder, entry))
        segmenter.axis, segmenter.through_plane = index["slicing"]["axis"], index["slicing"]["through_plane"]
        segmenter.structures = {int(value): name for value, name in index["structures"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OFLError):
            raise
        raise ModelError(f"{folder / INDEX} is damaged ({error}). Learn again, or restore the folder.") from error
    segmenter.solve()
    return segmenter


def read_index(folder: Path) -> dict[str, Any]:
    """Read `model.json` and check that this version understands it.

    Raises:
        ModelError: as in `load_model`.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ModelError(f"{folder} holds no model: {INDEX} is missing. Run 'ofl-sam2 learn' with --model {folder} first.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        written = int(index["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Learn again, or restore the folder.") from error
    if written > FORMAT:
        raise ModelError(
            f"{folder} was written by version {index.get('version')}, which is newer than this one ({__version__}). "
            "Upgrade ofl-sam2."
        )
    return index


def _write_named(folder: Path, kind: str, content: bytes) -> dict[str, str]:
    """Write a file under a name made of its content, unless it is there already."""
    digest = hashlib.sha256(content).hexdigest()
    target = folder / f"{kind}-{digest[:16]}.safetensors"
    if not target.is_file() or sha256_of(target) != digest:
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)
    return {"file": target.name, "sha256": digest}


def _write_case(folder: Path, case: PooledCase) -> dict[str, str]:
    tensors = {**vars(case.features), "labels": case.labels}
    return _write_named(folder, "pool", save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


def _read_case(folder: Path, entry: dict[str, Any]) -> PooledCase:
    """Read the slices of a case; the tensors stay on disk until they are touched."""
    state = read_state(folder / entry["file"], entry["sha256"])
    labels = state.pop("labels")
    return PooledCase(entry["case"], tuple(entry["slices"]), ImageFeatures(**state), labels)
