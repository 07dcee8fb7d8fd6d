"""Several training processes as one: `torch.distributed` where a group is initialised, nothing where it is not."""

from collections.abc import Sequence

import torch
from torch import distributed, nn


def rank() -> int:
    """Number of this process, 0 when it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait() -> None:
    """Wait until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def synchronise(parameters: Sequence[nn.Parameter], *numbers: float) -> list[float]:
    """Average the gradients of parameters, in place, and numbers over all processes; return the numbers."""
    if world_size() == 1:
        return list(numbers)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.flatten() for g in gradients), gradients[0].new_tensor(numbers)])
    distributed.all_reduce(flat)
    flat /= world_size()
    parts = flat[: len(flat) - len(numbers)].split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return flat[len(flat) - len(numbers) :].tolist()
