"""What people train from scratch on the same labels: MONAI's DynUNet and MONAI Label's SegResNet, by wall time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.nets import SegResNet
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    CropForegroundd,
    GaussianSmoothd,
    NormalizeIntensityd,
    Orientationd,
    RandSpatialCropd,
    ScaleIntensityd,
    SelectItemsd,
    Spacingd,
    SpatialPadd,
)
from torch import Tensor, nn

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.learner.plan import Plan, rounded_up
from ofl_sam2.learner.unet import dynunet
from ofl_sam2.precision import autocast
from ofl_sam2.training.voxels import augmentation
from ofl_sam2.volume import Volume

from .peer_data import image_sample, labelled_part, labelled_sample, restored

BOTH = ("image", "label")
_PATCH_VOXELS = 160_000


class DynUNetPeer:
    """nnU-Net's recipe with MONAI's DynUNet, in a size that learns within minutes on a CPU.

    As nnU-Net: median spacing, strides and kernels from spacing and patch, z-score, half of the patches around a
    structure, rotation, scaling, elastic deformation, noise, blur, brightness, contrast, low resolution, Dice + cross
    entropy with deep supervision, polynomial decay of the learning rate. Other than nnU-Net: 16 filters at full
    resolution, two patches of up to 160,000 voxels a step, scaling by up to 15 %, AdamW. No mirroring, as structures
    may have left and right twins; slices three times as thick as pixels turn in plane only.
    """

    batch, overlap, padding = 2, 0.5, "constant"

    def __init__(self, plan: Plan, classes: int) -> None:
        self.plan, self.classes = plan, classes
        self.roi = plan.patch(_PATCH_VOXELS)

    def network(self) -> nn.Module:
        return dynunet(self.plan, self.roi, 1, self.classes)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)

    def rate(self, share: float) -> float:
        """Factor of the learning rate after a share of the budget."""
        return (1 - share) ** 0.9

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Of stacked outputs `(B, heads, classes, ...)`."""
        loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True))
        return loss(list(outputs.unbind(1)), labels)

    def prepare(self, training: bool) -> Compose:
        keys, modes = (BOTH, ("bilinear", "nearest")) if training else (("image",), "bilinear")
        steps = [
            Orientationd(keys, "RAS", labels=None),
            Spacingd(keys, self.plan.spacing, mode=modes),
            NormalizeIntensityd("image"),
        ]
        if training:
            steps += [
                SpatialPadd(keys, self.roi),
                ClassesToIndicesd("label", num_classes=self.classes, max_samples_per_class=10_000),
            ]
        return Compose(steps)

    def augment(self) -> Compose:
        return Compose([*augmentation(self.plan, self.roi, self.classes - 1, 0.15), SelectItemsd(BOTH)])


class SegResNetPeer:
    """The radiology app's `segmentation` model: its network, transforms, loss, optimizer and constant learning rate.

    Two values fit the data, as anyone would adapt them: the spacing is the median of the labelled volumes instead of
    1.5 mm, and the region of 96 voxels a side is cut to their size.
    """

    batch, overlap, padding = 1, 0.4, "replicate"

    def __init__(self, plan: Plan, classes: int) -> None:
        self.plan, self.classes = plan, classes
        self.roi = tuple(min(96, rounded_up(size, 8)) for size in plan.shape)

    def network(self) -> nn.Module:
        depth = {"blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1)}
        return SegResNet(3, 32, in_channels=1, out_channels=self.classes, dropout_prob=0.2, **depth)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-5)

    def rate(self, share: float) -> float:
        """Factor of the learning rate: none."""
        return 1.0

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return DiceCELoss(to_onehot_y=True, softmax=True)(outputs, labels)

    def prepare(self, training: bool) -> Compose:
        keys, modes = (BOTH, ("bilinear", "nearest")) if training else (("image",), "bilinear")
        crop = CropForegroundd(keys, source_key="image", margin=10, k_divisible=self.roi)
        return Compose(
            [
                Orientationd(keys, "RAS", labels=None),
                Spacingd(keys, self.plan.spacing, mode=modes),
                NormalizeIntensityd("image", nonzero=True),
                *([crop] if training else []),
                GaussianSmoothd("image", sigma=0.4),
                ScaleIntensityd("image", minv=-1.0, maxv=1.0),
            ]
        )

    def augment(self) -> Compose:
        return Compose([RandSpatialCropd(BOTH, self.roi, random_size=False), SelectItemsd(BOTH)])


Peer = DynUNetPeer | SegResNetPeer
PEERS: dict[str, type[DynUNetPeer] | type[SegResNetPeer]] = {"DynUNet": DynUNetPeer, "SegResNet": SegResNetPeer}


@dataclass(frozen=True)
class TrainedPeer:
    """A trained network, and how many steps that took."""

    peer: Peer
    network: nn.Module
    structures: dict[int, str]
    steps: int

    @torch.no_grad()
    def segment(self, volume: Volume) -> np.ndarray:
        """Label values in the volume's grid."""
        image = self.peer.prepare(training=False)(image_sample(volume))["image"]
        window = {"overlap": self.peer.overlap, "mode": "gaussian", "padding_mode": self.peer.padding}
        logits = sliding_window_inference(image[None].as_tensor(), self.peer.roi, 2, self.network.eval(), **window)
        return restored(MetaTensor(logits[0].softmax(0), affine=image.affine), volume, self.structures)


def train_peer(
    name: str, cases: Sequence[LabelledCase], structures: dict[int, str], seconds: float, seed: int = 0
) -> TrainedPeer:
    """Train from scratch for a wall time that includes the preparation of the data; at least one step.

    It computes with the same numbers as our own networks (`ofl_sam2.precision`).

    Args:
        name: of `PEERS`.
        cases: the labelled volumes; unlabelled slices are cut off.
        structures: {label value: name}.
        seconds: of wall time.
        seed: of the weights and all random transforms.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    cases = [labelled_part(case) for case in cases]
    peer = PEERS[name](Plan.of(case.volume for case in cases), 1 + len(structures))
    network = peer.network().train()
    optimizer = peer.optimizer(network)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: peer.rate(min(1.0, (time.perf_counter() - started) / seconds))
    )
    prepare, augment = peer.prepare(training=True), peer.augment().set_random_state(seed)
    samples, steps = [prepare(labelled_sample(case, structures)) for case in cases], 0
    while not steps or time.perf_counter() - started < seconds:
        images, labels = _batch(samples, augment, peer.batch)
        with autocast(images.device):
            outputs = network(images)
        loss = peer.loss(outputs.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()
        schedule.step()
        steps += 1
    return TrainedPeer(peer, network, dict(structures), steps)


def _batch(samples: Sequence[dict], augment: Compose, size: int) -> tuple[Tensor, Tensor]:
    """Images and labels `(B, 1, ...)` of randomly chosen cases."""
    parts = []
    for index in torch.randint(len(samples), (size,)).tolist():
        part = augment(samples[index])
        parts.append(part[0] if isinstance(part, list) else part)
    images, labels = (torch.stack([part[key].as_tensor() for part in parts]) for key in BOTH)
    return images, labels
