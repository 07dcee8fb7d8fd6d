"""What the commands do, as functions."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from ofl_sam2 import jobs
from ofl_sam2.errors import Cancelled, InputError, ModelError, OFLError
from ofl_sam2.files import read_labels
from ofl_sam2.jobs import (
    CHECKPOINT,
    check_all_segmented,
    check_device,
    default_cache,
    learn_cases,
    open_segmenter,
    segment_images,
    train_cases,
)
from ofl_sam2.memory.pool import MAIN
from ofl_sam2.model_index import read_index
from ofl_sam2.progress import CancelToken
from ofl_sam2.store import load_model
from ofl_sam2.training.held_out import HeldOut
from ofl_sam2.training.settings import TrainingResult, TrainingSettings

QUICK = TrainingSettings(epochs=2, steps_per_epoch=1, episodes=1, copies=1)


@pytest.fixture(scope="module", autouse=True)
def isolated(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFL_SAM2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def study(make_case, tmp_path_factory) -> Path:
    """`images/` of a, b and c and `labels/` of a and b."""
    root = tmp_path_factory.mktemp("study")
    for seed, name in enumerate("abc"):
        case = make_case(name, seed)
        for folder, voxels in (("images", case.volume.voxels), ("labels", case.labels)):
            if (folder, name) != ("labels", "c"):
                (root / folder).mkdir(exist_ok=True)
                nib.save(nib.Nifti1Image(voxels, case.volume.affine), root / folder / f"{name}.nii.gz")
    return root


@pytest.fixture
def learn(study, tmp_path):
    """Learn cases into the model folder of the test; return the segmenter and what was reported."""

    def run(cases=None, structures=None, cancel=None, **options):
        segmenter = open_segmenter(tmp_path / "model", image_size=64, **options)
        places = (study / "images", study / "labels", tmp_path / "model")
        return segmenter, learn_cases(segmenter, *places, cases, structures, False, cancel or CancelToken())

    return run


def train_on(study, model, segmenter, cases, settings=QUICK, cancel=None):
    places = (study / "images", study / "labels", model)
    return train_cases(segmenter, *places, cases, settings, False, cancel or CancelToken())


def test_the_cache_lies_where_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("OFL_SAM2_CACHE", str(tmp_path / "environment"))
    for folder, chosen in ((tmp_path / "option", "option"), (None, "environment")):
        cache = default_cache(folder)
        cache.put(cache.key("x"), {"feature": torch.ones(1)})
        assert list((tmp_path / chosen).rglob("*.safetensors"))
    monkeypatch.delenv("OFL_SAM2_CACHE")
    monkeypatch.setattr(jobs, "user_cache_path", lambda name: tmp_path / "user" / name)
    default_cache().put(cache.key("x"), {"feature": torch.ones(1)})
    assert list((tmp_path / "user" / "ofl_sam2" / "features").rglob("*.safetensors"))


def test_a_device_must_be_there():
    check_device("cpu")
    for device in ("cuda:99", "mps", "gpu", "", "meta"):
        with pytest.raises(InputError, match=f"device '{device}' cannot be used here"):
            check_device(device)


def test_learning_reports_what_was_learned_and_saves_it(learn, tmp_path):
    _, report = learn(["b"], "2=dim,1=bright")
    assert report == {
        "model": str(tmp_path / "model"),
        "backbone": "nano",
        "cases": ["b"],
        "pool": ["b"],
        "slices": 6,
        "structures": {1: "bright", 2: "dim"},
        "fitted": True,
    }
    assert json.loads(json.dumps(report))["cases"] == ["b"]
    _, report = learn()
    assert (report["cases"], sorted(report["pool"]), report["slices"]) == (["a", "b"], ["a", "b"], 12)
    assert report["structures"] == {1: "bright", 2: "dim"}


def test_a_saved_model_is_opened_as_it_is(learn, tmp_path):
    learn(["a"])
    model = tmp_path / "model"
    assert list(open_segmenter(model).pool.cases) == ["a"]
    assert open_segmenter(model, "nano", 64).backbone.image_size == 64
    assert len(open_segmenter(model, image_size=96, fresh=True).pool) == 0
    with pytest.raises(ModelError, match="nano at 64 pixels, not with nano at 96"):
        open_segmenter(model, image_size=96)


def test_a_cancelled_learning_saves_nothing(learn, tmp_path):
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        learn(["a"], cancel=cancel)
    assert not (tmp_path / "model").exists()


def test_images_without_any_label_are_nothing_to_learn_from(learn, study, tmp_path):
    (tmp_path / "labels").mkdir()
    segmenter = open_segmenter(tmp_path / "model", image_size=64)
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "labels" / "z.nii.gz")
    with pytest.raises(InputError, match="labels without an image"):
        learn_cases(segmenter, study / "images", tmp_path / "labels", tmp_path, None, None, False, CancelToken())


def test_training_is_noted_and_a_seed_reproduces_it(learn, study, tmp_path):
    taus = []
    for _ in range(2):
        segmenter, _ = learn(["a", "b"], fresh=True)
        reports = train_on(study, tmp_path / "model", segmenter, ["a", "b"]).reports
        assert [report.epoch for report in reports] == [1, 2]
        taus.append(load_model(tmp_path / "model").view(MAIN).solution.tau)
    assert torch.equal(*taus)
    notes = read_index(tmp_path / "model").notes
    assert notes["trained_on"] == ["a", "b"]
    assert notes["trained_seconds"] >= 0
    assert not (tmp_path / "model" / CHECKPOINT).exists()


def test_an_interrupted_training_is_saved_but_not_called_finished(learn, study, tmp_path, monkeypatch):
    names, settings = ["a", "b"], TrainingSettings(steps_per_epoch=1, copies=1)
    segmenter, _ = learn(names)
    before = segmenter.learner.projection.weight.clone()
    cancel, train = CancelToken(), jobs.train

    def interrupted(segmenter, cases, settings, checkpoint, report, *rest, **options):
        def report_and_cancel(entry):
            report(entry)
            cancel.cancel()

        return train(segmenter, cases, settings, checkpoint, report_and_cancel, *rest, **options)

    monkeypatch.setattr(jobs, "train", interrupted)
    monkeypatch.setattr(HeldOut, "dice", lambda *_: None)
    with pytest.raises(Cancelled, match="what was finished before is kept"):
        train_on(study, tmp_path / "model", segmenter, names, settings, cancel)
    assert "trained_on" not in read_index(tmp_path / "model").notes
    assert not torch.equal(load_model(tmp_path / "model").learner.projection.weight, before)


def test_a_second_training_knows_which_cases_the_first_one_was_fitted_to(learn, study, tmp_path, monkeypatch):
    told = []

    def trained(*_, fitted):
        told.append(list(fitted))
        return TrainingResult([], None, None, False)

    monkeypatch.setattr(jobs, "train", trained)
    for names in (["a"], ["a", "b"]):
        segmenter, _ = learn(names)
        train_on(study, tmp_path / "model", segmenter, names)
    assert told == [[], ["a"]]


def test_segmenting_tells_results_from_failures(learn, study, tmp_path):
    learn(["a", "b"])
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    images = [tmp_path / "bad.nii.gz", study / "images" / "c.nii.gz"]
    results, failures = segment_images(tmp_path / "model", images, tmp_path / "out", resume=False)
    assert set(results) == {"c"}
    assert set(results["c"]) == {"labels", "quality", "volume_ml", "seconds"}
    assert read_labels(results["c"]["labels"]).voxels.shape == (24, 20, 6)
    assert failures["bad"].startswith(f"Cannot read {tmp_path / 'bad.nii.gz'}")
    with pytest.raises(InputError, match=r"1 of the images could not be segmented\. bad: Cannot read"):
        check_all_segmented(failures)
    check_all_segmented({})
    assert segment_images(tmp_path / "model", images[1:], tmp_path / "out", resume=True) == ({}, {})


def test_a_full_disk_is_no_failure_of_one_image(learn, study, tmp_path, monkeypatch):
    learn(["a"])
    tried = []

    def refuse(path, *arguments):
        tried.append(path)
        raise OFLError("the disk is full")

    monkeypatch.setattr(jobs, "write_labels", refuse)
    images = [study / "images" / f"{name}.nii.gz" for name in "abc"]
    with pytest.raises(OFLError, match="the disk is full"):
        segment_images(tmp_path / "model", images, tmp_path / "out", resume=False)
    assert len(tried) == 1


def test_a_cancelled_segmentation_keeps_what_was_finished(learn, study, tmp_path, monkeypatch):
    learn(["a"])
    cancel, write = CancelToken(), jobs.write_labels
    monkeypatch.setattr(jobs, "write_labels", lambda *arguments: (write(*arguments), cancel.cancel()))
    images = [study / "images" / f"{name}.nii.gz" for name in "abc"]
    with pytest.raises(Cancelled):
        segment_images(tmp_path / "model", images, tmp_path / "out", resume=False, cancel=cancel)
    assert os.listdir(tmp_path / "out") == ["a.nii.gz"]


def test_label_maps_are_named_like_their_images(learn, study, tmp_path):
    """Names are settled before anything is read, so that `resume` costs nothing."""
    learn(["a"])
    frames = tmp_path / "cine"
    frames.mkdir()
    Image.new("L", (8, 8)).save(frames / "0.png")
    expected = {"a.nrrd": "a.nrrd", "b.MHA": "b.mha", "c.mhd": "c.nii.gz", "d.nii": "d.nii.gz", "cine": "cine"}
    output = tmp_path / "out"
    output.mkdir()
    for name in expected.values():
        (output / name).touch()
    images = [tmp_path / name for name in expected]
    assert segment_images(tmp_path / "model", images, output, resume=True) == ({}, {})
