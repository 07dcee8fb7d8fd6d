"""Train few-shot learner and fusion as a MONAI workflow: the library's own training with MONAI's handlers attached."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader, EarlyStopHandler, StatsHandler, TensorBoardHandler
from torch.utils.data import Dataset

from ofl_sam2.atomic import atomic_path
from ofl_sam2.dataset import LabelledCase, LazyCases, parse_structures
from ofl_sam2.errors import InputError
from ofl_sam2.jobs import CHECKPOINT
from ofl_sam2.model_index import is_model, read_index
from ofl_sam2.store import save_model
from ofl_sam2.training.processes import rank, wait, world_size
from ofl_sam2.training.settings import TrainingSettings
from ofl_sam2.training.trainer import train
from ofl_sam2.volume import Volume
from ofl_sam2.workflow.data import case_names
from ofl_sam2.workflow.network import FewShotNetwork, open_model
from ofl_sam2.workflow.run import config_key

_log = logging.getLogger(__name__)


class EpisodicTrainer:
    """Learns the cases of a dataset, trains on episodes of them, and publishes the model.

    `run` does what `ofl-sam2 train` does, an interrupted training goes on, and the model folder is the same. Beside the
    folder lies its state for MONAI's loaders: `model_dir` + ".pt". With several processes (torchrun) they share the
    episodes of each step; the first one writes and logs.

    Args:
        network: takes the trained model over; what a validation runs.
        dataset: gives `LabelledCase`s.
        model_dir: folder of the model; one that exists is extended.
        max_epochs: limit in epochs, if that comes before `minutes`.
        minutes: time limit.
        episodes: per step, at least as many as there are processes.
        seed: of augmentation and episodes.
        structures: what to learn, such as "1=anterior,2=posterior"; default every value.
        backbone, image_size: of a new model, see `open_segmenter`.
        device: "cpu" or "cuda".
        train_handlers: attached to the Ignite engine, whose output is the loss of a step.
        early_stop: a handler of the validation that may stop this training.
        val_cases: names of the cases that are validated on.
    """

    def __init__(
        self,
        network: FewShotNetwork,
        dataset: Dataset[LabelledCase],
        model_dir: str,
        max_epochs: int | None = None,
        minutes: float = 5.0,
        episodes: int = 2,
        seed: int = 0,
        structures: str | None = None,
        backbone: str | None = None,
        image_size: int | None = None,
        device: str = "cpu",
        train_handlers: Sequence[Any] = (),
        early_stop: EarlyStopHandler | None = None,
        val_cases: Sequence[str] | str = (),
    ) -> None:
        with config_key("minutes, max_epochs, episodes and seed"):
            self.settings = TrainingSettings(minutes=minutes, epochs=max_epochs, episodes=episodes, seed=seed)
            if world_size() > episodes:
                raise InputError(
                    f"{world_size()} processes cannot share {episodes} episodes. Give --episodes {world_size()}."
                )
        with config_key("structures"):
            self.structures = parse_structures(structures) if structures else None
        self.network, self.dataset, self.model_dir = network, dataset, Path(model_dir)
        self.open = partial(open_model, self.model_dir, backbone, image_size, device)
        self.handlers, self.early_stop, self.validated = list(train_handlers), early_stop, case_names(val_cases)

    def run(self) -> None:
        """Learn, train, publish.

        Raises:
            InputError, ModelError, WeightsError: with the name of the config key in front.
        """
        cases = self._cases()
        notes = read_index(self.model_dir).notes if is_model(self.model_dir) else {}
        segmenter = self.open()
        with config_key("val_cases"):
            if known := sorted(segmenter.pool.cases.keys() & (self.validated or [])):
                raise InputError(
                    f"{self.model_dir} has learned {', '.join(known)} already, so they do not show how good it is. "
                    "Give another --model_dir, or validate on other cases."
                )
        with config_key("structures"):
            segmenter.learn(cases, self.structures)
        self.network.use(segmenter)
        wait()
        if rank() == 0:
            save_model(segmenter, self.model_dir, notes)
        self._load_state()
        checkpoint, fitted = self.model_dir / CHECKPOINT, notes.get("trained_on", ())
        result = train(segmenter, cases, self.settings, checkpoint, attach=self._attach, fitted=fitted)
        _log.info(
            "Dice of held-out slices %s -> %s: the fitted parameters are %s.",
            result.dice_before,
            result.dice_after,
            "kept" if result.improved else "no better, so the old ones stay",
        )
        if rank() == 0:
            seconds = result.reports[-1].seconds if result.reports else 0.0
            notes = {"trained_seconds": round(seconds, 1), "trained_on": [case.volume.name for case in cases]}
            save_model(segmenter, self.model_dir, notes)
            with atomic_path(f"{self.model_dir}.pt") as temporary:
                torch.save(self.network.state_dict(), temporary)

    def _cases(self) -> LazyCases:
        cases = LazyCases()
        with config_key("train#dataset#data"):
            for number in range(len(self.dataset)):  # type: ignore[arg-type]
                cases.add(self.dataset[number], partial(self._image, number))
            if not cases:
                raise InputError("There is nothing to train on. Name cases that have a label.")
        return cases

    def _image(self, number: int) -> Volume:
        return self.dataset[number].volume

    def _load_state(self) -> None:
        """Let a CheckpointLoader among the handlers act now, before an interrupted training resumes."""
        for handler in self.handlers:
            if isinstance(handler, CheckpointLoader):
                handler(Engine(lambda engine, batch: None))

    def _attach(self, engine: Engine) -> None:
        for handler in self.handlers:
            quiet = isinstance(handler, StatsHandler | TensorBoardHandler) and rank() > 0
            if not quiet and not isinstance(handler, CheckpointLoader):
                handler.attach(engine)
        if self.early_stop is not None:
            self.early_stop.set_trainer(engine)
