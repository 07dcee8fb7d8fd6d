"""A model folder from a stranger: it reads nothing outside itself, runs no code, and cannot exhaust memory."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ofl_sam2.backbone import load
from ofl_sam2.errors import ModelError, OFLError, WeightsError
from ofl_sam2.model_index import INDEX
from ofl_sam2.store import load_model, save_model


@pytest.fixture(scope="module")
def pristine(nano, make_segmenter, tmp_path_factory):
    """A saved model, with the random nano in the place of the package's own."""
    root = tmp_path_factory.mktemp("attacks")
    save_file(nano.sam2.state_dict(), root / "nano.safetensors")
    save_model(make_segmenter(), root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "NANO_WEIGHTS", root / "nano.safetensors")
        yield root / "model"


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def point(folder: Path, which: str, file: str, content: bytes) -> None:
    """Let the index name `file` with the right sha256."""
    index = json.loads((folder / INDEX).read_text())
    entry = index["learner"] if which == "learner" else index["pool"][0]
    entry.update(file=file, sha256=hashlib.sha256(content).hexdigest())
    (folder / INDEX).write_text(json.dumps(index))


def replace(folder: Path, which: str, content: bytes) -> None:
    """Put `content` into the folder as a file that the index names and whose sha256 is right."""
    name = f"{which}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    (folder / name).write_bytes(content)
    point(folder, which, name, content)


@pytest.mark.parametrize("which", ["learner", "pool"])
@pytest.mark.parametrize(
    "place", ["../outside/{}", "{}/../outside/{{}}", "{absolute}", "sub/{}", "./{}", "..\\{}", "{}\n", "{}\0"]
)
def test_files_outside_the_folder_are_refused_although_their_content_is_right(folder, which, place, tmp_path):
    inside = next(folder.glob(f"{which}-*"))
    outside = tmp_path / "outside" / inside.name
    outside.parent.mkdir()
    shutil.copy(inside, outside)
    (folder / "sub").mkdir()
    shutil.copy(inside, folder / "sub" / inside.name)
    file = place.replace("{absolute}", str(outside)).replace("{{}}", inside.name).replace("{}", inside.name)
    point(folder, which, file, inside.read_bytes())
    with pytest.raises(ModelError, match="is no name of a file in a model folder"):
        load_model(folder)


class Trap:
    """Leaves a trace if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("which", ["learner", "pool"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_in_the_place_of_a_file_is_not_run(folder, which, protocol, tmp_path):
    trace = tmp_path / "trace"
    replace(folder, which, pickle.dumps({"labels": Trap(trace)}, protocol))
    with pytest.raises(WeightsError, match="damaged or holds more than tensors"):
        load_model(folder)
    assert not trace.exists()


def test_a_torch_file_in_the_place_of_a_file_is_not_run(folder, tmp_path):
    trace = tmp_path / "trace"
    torch.save({"model": Trap(trace)}, tmp_path / "trap.pt")
    replace(folder, "pool", (tmp_path / "trap.pt").read_bytes())
    with pytest.raises(WeightsError, match="damaged or holds more than tensors"):
        load_model(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "header",
    [
        {"channels": "1000000000"},
        {"inputs": "-5"},
        {"encoding": "1e3"},
        {"channels": "128; import os"},
        {"kind": "__import__('os')"},
        {"inputs": "3"},
        {},
    ],
)
def test_a_learner_of_an_impossible_shape_is_refused_without_being_built(folder, header):
    state = load_file(next(folder.glob("learner-*")))
    shape = {"channels": "128", "inputs": "32", "encoding": "32", "kind": "mask"}
    replace(folder, "learner", save(state, {**shape, **header} if header else None))
    with pytest.raises(WeightsError, match=r"no few-shot learner|do not fit FewShotLearner"):
        load_model(folder)


@pytest.mark.parametrize("change", ["more", "fewer", "larger", "renamed"])
def test_a_case_of_other_tensors_is_refused(folder, change):
    state = load_file(next(folder.glob("pool-*")))
    if change == "more":
        state["extra"] = torch.zeros(1)
    elif change == "larger":
        state["labels"] = torch.zeros(6, 640, 640, dtype=torch.uint8)
    else:
        labels = state.pop("labels")
        state |= {} if change == "fewer" else {"__class__": labels}
    replace(folder, "pool", save(state))
    with pytest.raises(ModelError, match="does not hold 6 labelled slices"):
        load_model(folder)


def test_names_with_markup_or_control_characters_stay_text(folder):
    index = json.loads((folder / INDEX).read_text())
    index["structures"] = {"1": "[bold]\x1b[31morgan[/]", "2": "../../organ"}
    (folder / INDEX).write_text(json.dumps(index))
    assert load_model(folder).structures == {1: "[bold]\x1b[31morgan[/]", 2: "../../organ"}


def test_random_damage_of_the_index_never_escapes_as_another_error(folder):
    whole = bytearray((folder / INDEX).read_bytes())
    generator = torch.Generator().manual_seed(0)
    survived = 0
    for _ in range(60):
        damaged = bytearray(whole)
        position = int(torch.randint(len(whole), (), generator=generator))
        damaged[position] = int(torch.randint(256, (), generator=generator))
        (folder / INDEX).write_bytes(damaged)
        try:
            load_model(folder)
            survived += 1
        except OFLError as error:
            assert str(folder) in str(error) or "weights" in str(error)
    assert survived < 60
