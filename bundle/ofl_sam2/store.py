"""A learned model as a folder: published atomically, checked by sha256, readable without the training data.

`model.json` names everything else by content: `learner-*.safetensors` (learner and fusion), `unet-*.safetensors` (the
U-Net, if one was trained), `pool-*.safetensors` (one a labelled case: frozen features and labels of its slices). It is
replaced last, so a crash leaves the old or the new model. One process at a time saves into a folder.
"""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ofl_sam2.atomic import atomic_path, atomic_write_text
from ofl_sam2.backbone.frozen import ImageFeatures, SAM2Backbone
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.backbone.weights import read_state, sha256_of
from ofl_sam2.errors import InputError, ModelError
from ofl_sam2.learner.load import learner_bytes, read_learner, read_unet, unet_bytes
from ofl_sam2.looks import Viewpoint
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.memory.pool import PooledCase, SupportPool, View
from ofl_sam2.model_index import ADVICE, INDEX, STORED, ModelIndex, StoredCase, StoredFile, read_index
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.settings import Settings

_OWN = re.compile(rf"(\.[0-9a-f]+\.partial\.)?{STORED.pattern}")


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
        raise ModelError(f"{folder / INDEX} is damaged: {error} {ADVICE}") from error
    learner = read_learner(_checked(folder, index.learner)).to(device)
    if learner.channels != backbone.width:
        raise ModelError(f"{folder / index.learner.file} is no learner for {index.backbone}. {ADVICE}")
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
        raise ModelError(f"{folder / INDEX} is damaged: no stored label holds {absent}. {ADVICE}")
    segmenter.solve()
    return segmenter


def _checked(folder: Path, stored: StoredFile) -> Path:
    """The path of a stored file that is there and has the content it had when it was saved."""
    path = folder / stored.file
    if not path.is_file():
        raise ModelError(f"{folder} is not complete: {stored.file} is missing. {ADVICE}")
    if sha256_of(path) != stored.sha256:
        raise ModelError(f"{path} is damaged: its content is not what was saved. {ADVICE}")
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
        raise ModelError(f"{path} does not hold {count} labelled slices of {size} x {size} pixels. {ADVICE}")
    labels = state.pop("labels")
    view = View(stored.axis, close=bool(stored.focus))
    case = PooledCase(stored.case, stored.slices, ImageFeatures(**state), labels, view, stored.focus)
    object.__setattr__(case, "sha256", stored.sha256)
    return case
