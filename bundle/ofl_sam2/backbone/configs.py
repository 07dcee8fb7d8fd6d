"""The backbones as frozen settings: the four released SAM2.1 models and `nano`."""

from dataclasses import dataclass

from ofl_sam2.errors import InputError


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of a SAM2 model; everything not named here is as in SAM2.1's own configuration files.

    Attributes:
        name: name in the weights catalogue.
        embed_dim, num_heads, stages, global_attention_blocks, position_grid, windows: of the Hiera encoder.
        width: channels C of the stride-16 feature, of memory attention and of the mask decoder.
        attention_layers, attention_hidden: depth and hidden width of memory attention.
        fuser_scale: initial layer scale of the memory encoder's fuser (matters only when training from scratch).
        track_best_of_three: whether a tracked mask is the best of three candidates (SAM2.1) or the single mask (nano).
        cpu_size, gpu_size: default side of the square input in pixels; any multiple of 32 is allowed.
        mean, std: channel statistics for images in [0, 1].
    """

    name: str
    embed_dim: int
    num_heads: int
    stages: tuple[int, int, int, int]
    global_attention_blocks: tuple[int, ...]
    position_grid: tuple[int, int] = (7, 7)
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    width: int = 256
    memory_width: int = 64
    attention_layers: int = 4
    attention_hidden: int = 2048
    fuser_scale: float = 1e-6
    track_best_of_three: bool = True
    cpu_size: int = 512
    gpu_size: int = 1024
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


_CONFIGS = (
    BackboneConfig(
        "nano",
        embed_dim=32,
        num_heads=1,
        stages=(1, 2, 4, 1),
        global_attention_blocks=(5,),
        windows=(8, 4, 8, 4),
        width=128,
        attention_layers=2,
        attention_hidden=512,
        fuser_scale=0.1,
        track_best_of_three=False,
        cpu_size=256,
        gpu_size=256,
    ),
    BackboneConfig("sam2.1_hiera_tiny", 96, 1, (1, 2, 7, 2), (5, 7, 9)),
    BackboneConfig("sam2.1_hiera_small", 96, 1, (1, 2, 11, 2), (7, 10, 13)),
    BackboneConfig("sam2.1_hiera_base_plus", 112, 2, (2, 3, 16, 3), (12, 16, 20), (14, 14)),
    BackboneConfig("sam2.1_hiera_large", 144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
)
BACKBONES = {config.name: config for config in _CONFIGS}


def backbone_config(name: str) -> BackboneConfig:
    """Return the configuration called `name`.

    Raises:
        InputError: no backbone has that name.

    Example:
        >>> backbone_config("nano").width
        128
    """
    if name not in BACKBONES:
        raise InputError(f"Unknown backbone '{name}'. Choose one of: {', '.join(BACKBONES)}.")
    return BACKBONES[name]
