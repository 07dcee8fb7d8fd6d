"""Learners ready for use: fresh, shipped with a backbone, or read from a file; U-Nets likewise."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ofl_sam2.backbone.weights import load_strict, read_state
from ofl_sam2.errors import InputError, WeightsError
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.learner.plan import DEEPEST, Plan
from ofl_sam2.learner.unet import MOST_VOXELS, Trunk, VoxelUNet
from ofl_sam2.settings import Settings

WEIGHTS = Path(__file__).parents[1] / "weights"
_MOST_CHANNELS = 4096
_MOST_STRUCTURES = 255
_FORMER_PATCH_VOXELS = 160_000


def shipped_learner(backbone: str, channels: int) -> FewShotLearner:
    """The learner meta-trained for a backbone; a fresh one where none is shipped.

    Args:
        backbone: name of the backbone.
        channels: C of its stride-16 feature.
    """
    path = WEIGHTS / f"{backbone}_learner.safetensors"
    return read_learner(path) if path.is_file() else FewShotLearner(channels)


def begin_pretrained(unet: VoxelUNet) -> VoxelUNet:
    """Give a fresh U-Net the weights that the package ships, in all that it shares with the pretrained one."""
    Trunk(unet.net).begin(read_state(WEIGHTS / "unet.safetensors"))
    return unet


def learner_bytes(learner: FewShotLearner) -> bytes:
    """A learner with its shape as the content of a safetensors file; the same learner gives the same bytes."""
    return _bytes(learner, {name: str(getattr(learner, name)) for name in ("channels", "inputs", "encoding", "kind")})


def unet_bytes(unet: VoxelUNet) -> bytes:
    """As `learner_bytes`, of a U-Net."""
    shape = {
        name: getattr(unet, name) for name in ("values", "colour", "patch_voxels", "deepest", "ct_window")
    } | asdict(unet.plan)
    return _bytes(unet, {name: json.dumps(value) for name, value in shape.items()})


def _bytes(module: nn.Module, shape: dict[str, str]) -> bytes:
    content = save({name: value.cpu().contiguous() for name, value in module.state_dict().items()}, shape)
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()  # `save` writes any order
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def read_learner(path: Path, sha256: str | None = None) -> FewShotLearner:
    """Read a learner; the sha256, if given, is checked before anything is parsed.

    Raises:
        WeightsError: the file is missing, damaged, or no learner.
    """
    state = read_state(path, sha256)
    try:
        with safe_open(path, "pt") as file:
            shape = file.metadata() or {}
        channels, inputs, encoding = (int(shape[name]) for name in ("channels", "inputs", "encoding"))
        if not all(0 < width <= _MOST_CHANNELS for width in (channels, inputs, encoding)):
            raise ValueError(f"{channels}, {inputs} and {encoding} channels")
        learner = FewShotLearner(channels, inputs, encoding, label_generator=shape["kind"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is no few-shot learner (header: {error}). Train or learn again.") from error
    load_strict(learner, state, source=str(path))
    return learner


def read_unet(path: Path, sha256: str | None = None) -> VoxelUNet:
    """As `read_learner`, of a U-Net.

    Raises:
        WeightsError: the file is missing, damaged, or no U-Net.
    """
    state = read_state(path, sha256)
    try:
        with safe_open(path, "pt") as file:
            header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        spacing, values = tuple(map(float, header["spacing"])), tuple(map(int, header["values"]))
        shape, colour = tuple(map(int, header["shape"])), bool(header["colour"])
        patch_voxels = int(header.get("patch_voxels", _FORMER_PATCH_VOXELS))
        deepest = int(header.get("deepest", DEEPEST))
        if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
            raise ValueError(f"spacing {spacing}")
        if len(shape) != 3 or not (min(shape) > 0 and math.prod(shape) <= MOST_VOXELS):
            raise ValueError(f"shape {shape}")
        if not 0 < len(values) == len(set(values)) <= _MOST_STRUCTURES:
            raise ValueError(f"{len(values)} structures")
        if not 0 < patch_voxels <= MOST_VOXELS:
            raise ValueError(f"patches of {patch_voxels} voxels")
        if not 0 <= deepest <= DEEPEST:
            raise ValueError(f"patches that are halved {deepest} times")
        ct_window = Settings(ct_window=header.get("ct_window")).ct_window
        unet = VoxelUNet(Plan(spacing, shape), values, colour, patch_voxels, deepest, ct_window)
    except (SafetensorError, InputError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"{path} is no U-Net (header: {error}). Train again.") from error
    load_strict(unet, state, source=str(path))
    return unet.eval()
