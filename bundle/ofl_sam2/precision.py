"""The numbers that networks compute with in training; what they draw is computed with float32, alike everywhere."""

import torch

_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")


def draw_exactly(device: str | torch.device) -> None:
    """Let convolutions on a GPU compute with float32 instead of TensorFloat-32, in this process."""
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False


def autocast(device: str | torch.device) -> torch.autocast:
    """Context in which layers compute with bfloat16 if the device has units for it, else with float32."""
    kind = torch.device(device).type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has = any(capabilities.get(unit, False) for unit in _BFLOAT16_UNITS)
    else:
        has = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=has)
