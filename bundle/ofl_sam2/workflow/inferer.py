"""The inferer MONAI sees."""

from typing import Any

from monai.inferers import Inferer
from torch import Tensor

from ofl_sam2.workflow.network import FewShotNetwork


class VolumeInferer(Inferer):
    """Runs a network on whole volumes under the settings an annotator may change.

    Args:
        settings: fields of `ofl_sam2.settings.Settings`; what is not named stays as the model has it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def __call__(self, inputs: Tensor, network: FewShotNetwork, *args: Any, **kwargs: Any) -> Tensor:
        """Segment `inputs` `(B, 1, X, Y, Z)`; see `FewShotNetwork.forward`."""
        return network.segment(inputs, **self.settings)
