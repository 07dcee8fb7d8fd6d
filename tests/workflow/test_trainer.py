"""MONAI's training workflow: the same training as the command line, with handlers attached."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.handlers import CheckpointLoader, EarlyStopHandler

from ofl_sam2.errors import InputError, ModelError
from ofl_sam2.jobs import CHECKPOINT, learn_cases, open_segmenter, train_cases
from ofl_sam2.model_index import read_index
from ofl_sam2.progress import CancelToken
from ofl_sam2.store import load_model
from ofl_sam2.training.settings import TrainingResult, TrainingSettings
from ofl_sam2.workflow.data import LoadCase, labelled_list
from ofl_sam2.workflow.network import FewShotNetwork
from ofl_sam2.workflow.trainer import EpisodicTrainer

QUICK = {"steps_per_epoch": 2, "episodes": 1, "copies": 1}


class Recorder:
    """A handler that keeps the losses and may fail."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.losses: list[float] = []
        self.fail_at = fail_at

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        self.losses.append(engine.state.output)
        if len(self.losses) == self.fail_at:
            raise KeyboardInterrupt


@pytest.fixture
def build(study: Path, make_segmenter, tmp_path: Path):
    """A trainer of the study at 64 pixels into `tmp_path / "model"`."""
    data = labelled_list(str(study / "images"), str(study / "labels"))

    def trainer(**options) -> EpisodicTrainer:
        defaults = {"model_dir": str(tmp_path / "model"), "max_epochs": 1, "image_size": 64}
        dataset = Dataset(data, LoadCase())
        trainer = EpisodicTrainer(FewShotNetwork(make_segmenter), dataset, **{**defaults, **options})
        trainer.settings = replace(trainer.settings, **QUICK)
        return trainer

    return trainer


def learner_file(folder: Path) -> str:
    return json.loads((folder / "model.json").read_text())["learner"]["sha256"]


def test_equals_the_command_line(build, study, tmp_path):
    trainer = build()
    trainer.run()
    folders = study / "images", study / "labels", tmp_path / "cli"
    segmenter = open_segmenter(tmp_path / "cli", image_size=64)
    learn_cases(segmenter, *folders, None, None, False, CancelToken())
    train_cases(segmenter, *folders, ["a", "b"], TrainingSettings(epochs=1, **QUICK), False, CancelToken())
    assert learner_file(tmp_path / "model") == learner_file(tmp_path / "cli")
    assert read_index(tmp_path / "model").pool == read_index(tmp_path / "cli").pool


def test_a_second_training_knows_which_cases_the_first_one_was_fitted_to(build, monkeypatch):
    told = []

    def trained(*_, fitted, **options):
        told.append(list(fitted))
        return TrainingResult([], None, None, False)

    monkeypatch.setattr("ofl_sam2.workflow.trainer.train", trained)
    for _ in range(2):
        build().run()
    assert told == [[], ["a", "b"]]


@pytest.mark.parametrize("validated", [["b"], "b,c"])
def test_what_was_learned_before_is_not_validated_on(build, validated):
    build().run()
    with pytest.raises(InputError, match=r"val_cases: .*has learned b already"):
        build(val_cases=validated).run()
    build(val_cases=["c"]).run()


def test_publishes_a_folder_and_its_state(build, tmp_path):
    trainer = build(structures="2=dim")
    trainer.run()
    published = load_model(tmp_path / "model")
    assert published.structures == {2: "dim"} == trainer.network.segmenter.structures
    assert not (tmp_path / "model" / CHECKPOINT).exists()
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    network = FewShotNetwork(lambda: load_model(tmp_path / "model"))
    own = network.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)


def test_an_interrupted_training_goes_on(build, tmp_path):
    whole = Recorder()
    build(max_epochs=2, train_handlers=[whole], model_dir=str(tmp_path / "whole")).run()
    first, second = Recorder(fail_at=3), Recorder()
    with pytest.raises(KeyboardInterrupt):
        build(max_epochs=2, train_handlers=[first]).run()
    assert (tmp_path / "model" / CHECKPOINT).is_file()
    assert not (tmp_path / "model.pt").exists()
    build(max_epochs=2, train_handlers=[second]).run()
    assert second.losses == whole.losses[2:]
    assert learner_file(tmp_path / "model") == learner_file(tmp_path / "whole")


def test_a_checkpoint_loader_acts_before_the_training(build, tmp_path):
    trainer = build()
    state = {name: torch.full_like(value, 0.01) for name, value in trainer.network.state_dict().items()}
    torch.save(state, tmp_path / "start.pt")
    seen = []

    class Look(Recorder):
        def attach(self, engine: Engine) -> None:
            seen.append(trainer.network.learner.lam.item())

    loader = CheckpointLoader(str(tmp_path / "start.pt"), {"model": trainer.network}, strict=False)
    trainer.handlers = [Look(), loader]
    trainer.run()
    assert seen == [pytest.approx(0.01)]


def test_a_validation_sees_what_is_fitted_so_far(build):
    trainer, seen = build(max_epochs=3), []

    class Validation(Recorder):
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

        def __call__(self, engine: Engine) -> None:
            seen.append(trainer.network.learner.lam.item())

    trainer.handlers = [Validation()]
    before = trainer.network.learner.lam.item()
    trainer.run()
    assert len({before, *seen}) == 4


def test_a_validation_may_stop_it(build):
    recorder = Recorder()
    early_stop = EarlyStopHandler(1, lambda engine: 0.0)

    class Validation(Recorder):
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, early_stop)

    build(max_epochs=5, train_handlers=[Validation(), recorder], early_stop=early_stop).run()
    assert len(recorder.losses) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"minutes": 0}, InputError, "^minutes, max_epochs, episodes and seed: "),
        ({"structures": "1"}, InputError, "^structures: "),
        ({"structures": "7=x"}, InputError, "^structures: No label holds 7=x"),
        ({"backbone": "resnet"}, InputError, "^model_dir, backbone, image_size: Unknown backbone"),
    ],
)
def test_bad_options_are_named(build, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        build(**options).run()
    assert not (tmp_path / "model").exists()


def test_nothing_to_train_on(build, tmp_path):
    trainer = build()
    trainer.dataset = Dataset([], LoadCase())
    with pytest.raises(InputError, match=r"^train#dataset#data: "):
        trainer.run()


def test_a_model_of_another_backbone_size_is_refused(build, tmp_path):
    build().run()
    with pytest.raises(ModelError, match=r"^model_dir, .*at 64 pixels, not with nano at 96"):
        build(image_size=96).run()
