"""Learners ready for use: fresh, shipped with a backbone, or read from a file; refinements likewise."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ofl_sam2.backbone.weights import load_strict, read_state
from ofl_sam2.errors import WeightsError
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.learner.refinement import Refinement

WEIGHTS = Path(__file__).parents[1] / "weights"
_MOST_CHANNELS = 4096
_MOST_STRUCTURES = 65535


def shipped_learner(backbone: str, channels: int) -> FewShotLearner:
    """The learner meta-trained for a backbone; a fresh one where none is shipped.

    Args:
        backbone: name of the backbone.
        channels: C of its stride-16 feature.
    """
    path = WEIGHTS / f"{backbone}_learner.safetensors"
    return read_learner(path) if path.is_file() else FewShotLearner(channels)


def learner_bytes(learner: FewShotLearner) -> bytes:
    """A learner with its shape as the content of a safetensors file; the same learner gives the same bytes."""
    return _bytes(learner, {name: str(getattr(learner, name)) for name in ("channels", "inputs", "encoding", "kind")})


def refinement_bytes(refinement: Refinement) -> bytes:
    """As `learner_bytes`, of a refinement."""
    shape = {"channels": refinement.channels, "width": refinement.width, "values": list(refinement.values)}
    return _bytes(refinement, {name: json.dumps(value) for name, value in shape.items()})


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


def read_refinement(path: Path, sha256: str | None = None) -> Refinement:
    """As `read_learner`, of a refinement.

    Raises:
        WeightsError: the file is missing, damaged, or no refinement.
    """
    state = read_state(path, sha256)
    try:
        with safe_open(path, "pt") as file:
            shape = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        channels, width, values = int(shape["channels"]), int(shape["width"]), tuple(map(int, shape["values"]))
        if not all(0 < number <= _MOST_CHANNELS for number in (channels, width)) or channels % 8:
            raise ValueError(f"{channels} channels and width {width}")
        if not 0 < len(values) == len(set(values)) <= _MOST_STRUCTURES:
            raise ValueError(f"{len(values)} structures")
        refinement = Refinement(channels, values, width)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is no refinement (header: {error}). Train again.") from error
    load_strict(refinement, state, source=str(path))
    return refinement.eval()
