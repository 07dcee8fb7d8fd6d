"""Which tasks the app offers, in the shape MONAI Label expects."""

from monailabel.interfaces.config import TaskConfig
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from lib.activelearning.strategies import strategies
from lib.infers.ofl_sam2 import OFLSAM2Infer
from lib.scoring.quality import QualityScoring
from lib.trainers.ofl_sam2 import OFLSAM2Trainer
from lib.workspace import Workspace


class OFLSAM2(TaskConfig):
    """The tasks of one model.

    Args:
        workspace: state of the app.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()
        self._workspace = workspace

    def infer(self, drafts: bool = False) -> OFLSAM2Infer:
        """The inference task; `drafts` lets a client have results stored beside their images."""
        return OFLSAM2Infer(self._workspace, drafts)

    def trainer(self) -> OFLSAM2Trainer:
        """The training task."""
        return OFLSAM2Trainer(self._workspace)

    def strategy(self) -> dict[str, Strategy]:
        """The active learning strategies."""
        return strategies(self._workspace)

    def scoring_method(self) -> dict[str, ScoringMethod]:
        """The scoring method."""
        return {"quality": QualityScoring(self._workspace)}
