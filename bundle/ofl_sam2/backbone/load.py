"""Backbones ready for use: built, filled with verified weights, frozen."""

from pathlib import Path

import torch

from ofl_sam2.backbone.configs import backbone_config
from ofl_sam2.backbone.frozen import SAM2Backbone
from ofl_sam2.backbone.weights import load_strict, read_state, verify, weights_path
from ofl_sam2.errors import WeightsError
from ofl_sam2.precision import draw_exactly

NANO_WEIGHTS = Path(__file__).parents[1] / "weights" / "nano.safetensors"


def load_backbone(name: str, image_size: int | None = None, device: str = "cpu") -> SAM2Backbone:
    """Load a frozen backbone.

    Args:
        name: see `BACKBONES`; nano's weights are part of the package, the others must have been fetched.
        image_size: side of the square input in pixels; default by backbone and device.
        device: "cpu" or "cuda".

    Raises:
        InputError: unknown name or impossible size.
        WeightsError: weights absent, damaged or of another layout.
    """
    config = backbone_config(name)
    default = config.gpu_size if device.startswith("cuda") else config.cpu_size
    path = NANO_WEIGHTS if name == "nano" else weights_path(name)
    if name == "nano" and not path.is_file():
        raise WeightsError(f"The weights of nano, part of this package, are missing at {path}. Install it again.")
    if not path.is_file():
        raise WeightsError(
            f"The weights of {name} are not here: {path} is missing. "
            f"Run 'ofl-sam2 weights fetch {name}', or set OFL_SAM2_WEIGHTS to the folder that holds them."
        )
    if name != "nano":
        found = verify(path)
        if found.name != name:
            raise WeightsError(f"{path} holds the weights of {found.name}, not of {name}.")
    backbone = SAM2Backbone(config, default if image_size is None else image_size)
    load_strict(backbone.sam2, read_state(path), source=str(path))
    draw_exactly(device)
    return backbone.freeze().to(torch.device(device))
