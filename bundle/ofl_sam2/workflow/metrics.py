"""The scores of `ofl-sam2 evaluate` as a MONAI metric: the same numbers, in mm where they are distances."""

import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from torch import Tensor

from ofl_sam2.dataset import same_place
from ofl_sam2.errors import InputError
from ofl_sam2.metrics import score
from ofl_sam2.workflow.network import FewShotNetwork


class CaseScore(CumulativeIterationMetric):
    """One metric of every case and structure.

    Args:
        metric: "dice", "hd95" (mm) or "surface_dice" (tolerance 1 mm).
        network: names the structures to score.
    """

    def __init__(self, metric: str, network: FewShotNetwork) -> None:
        super().__init__()
        self.metric, self.network = metric, network

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None) -> Tensor:
        """Score label maps `(B, 1, X, Y, Z)`; NaN where undefined, `(B, K)`."""
        if not isinstance(y, MetaTensor):
            raise InputError(f"{self.metric} needs references with a place in space: load them with LoadImaged.")
        affine = _affine(y)
        if isinstance(y_pred, MetaTensor) and not same_place(_affine(y_pred), affine):
            raise InputError(
                f"{y.meta.get('filename_or_obj', 'A reference')} is stored in another orientation or place than its "
                "image, so their voxels do not match. Resample the label to the image's grid."
            )
        i, j, k = voxel_sizes(affine).tolist()
        structures = self.network.segmenter.structures
        rows = []
        for prediction, reference in zip(y_pred[:, 0], y.as_tensor()[:, 0], strict=True):
            labels = prediction.cpu().numpy(), np.rint(reference.cpu().numpy())  # as `read_labels` rounds
            scores = score(*labels, (i, j, k), structures, (self.metric,))
            rows.append([scores[name][self.metric] for name in structures.values()])
        return torch.tensor(rows, dtype=torch.float64)

    def aggregate(self) -> Tensor:
        """Mean over the structures of the mean over the cases, without undefined values."""
        return self.get_buffer().nanmean(0).nanmean()


def _affine(maps: MetaTensor) -> NDArray[np.float64]:
    affine = maps.affine.cpu().numpy()
    return affine[0] if affine.ndim == 3 else affine
