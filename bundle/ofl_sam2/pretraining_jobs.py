"""What the commands for pretraining do, as functions: they go on from checkpoints, and write files of weights."""

import math
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import nn

from ofl_sam2.atomic import atomic_path
from ofl_sam2.backbone.frozen import SAM2Backbone
from ofl_sam2.console import err, progress
from ofl_sam2.errors import InputError
from ofl_sam2.jobs import check_device
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.learner.load import learner_bytes
from ofl_sam2.progress import CancelToken
from ofl_sam2.training.pretraining import PretrainingState, pretrain
from ofl_sam2.training.voxel_pretraining import VoxelPretraining, pretrain_unet


def pretrain_nano(
    output: Path, minutes: float, device: str, resume: Path | None, further: bool, seed: int, cancel: CancelToken
) -> int:
    """Pretrain nano and write its weights, the learner's beside them, and a checkpoint.

    Args:
        output: where the weights go.
        minutes: budget, what the checkpoint has spent included.
        device: "cpu" or "cuda".
        resume: checkpoint of an earlier run.
        further: start from the weights of the package instead of random ones.
        seed: of the random weights and the synthetic volumes.
        cancel: to stop early; the weights are written.

    Returns:
        The number of steps so far.

    Raises:
        InputError: no time, another suffix than .safetensors, two starting points, or a checkpoint that cannot be
            read.
    """
    _check_pretraining(output, minutes, device)
    if resume and further:
        raise InputError("Give either --resume or --further: a checkpoint knows what it started from.")
    if resume:
        state = PretrainingState.load(resume)
    else:
        state = PretrainingState.shipped() if further else PretrainingState.fresh(seed)
    stage = ""
    with progress("pretrain", unit="%") as done:
        for report in pretrain(state, output.with_suffix(".checkpoint.pt"), minutes, device, seed, cancel=cancel):
            if report.stage != stage:
                stage = report.stage
                err.print(f"Stage '{stage}' begins at step {report.step} with loss {report.loss:.3f}.")
            done(min(100, round(100 * report.share)), 100)
    backbone, learner = state.result().children()
    sam2 = cast(SAM2Backbone, backbone).sam2
    _save_half(sam2, output)
    with atomic_path(output.with_name(f"{output.stem}_learner.safetensors")) as temporary:
        temporary.write_bytes(learner_bytes(cast(FewShotLearner, learner)))
    return state.step


def pretrain_voxels(
    output: Path, minutes: float, device: str, resume: Path | None, seed: int, cancel: CancelToken
) -> int:
    """Pretrain the U-Net and write its weights and a checkpoint; as `pretrain_nano`."""
    _check_pretraining(output, minutes, device)
    if resume:
        state = VoxelPretraining.load(resume)
    else:
        torch.manual_seed(seed)
        state = VoxelPretraining()
    with progress("pretrain", unit="%") as done:
        for share, _ in pretrain_unet(state, output.with_suffix(".checkpoint.pt"), minutes, device, seed, cancel):
            done(round(100 * share), 100)
    _save_half(state.trunk, output)
    return int(state.step)


def _check_pretraining(output: Path, minutes: float, device: str) -> None:
    check_device(device)
    if not 0 < minutes < math.inf:
        raise InputError(f"Pretraining for {minutes:g} minutes is not possible. Give a positive number of --minutes.")
    if output.suffix != ".safetensors":
        raise InputError(f"The weights are written as .safetensors, not as {output.name}. Choose such a name.")


def _save_half(module: nn.Module, output: Path) -> None:
    """Write the weights of a module as float16."""
    weights = {name: tensor.half().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_path(output) as temporary:
        save_file(weights, temporary)
