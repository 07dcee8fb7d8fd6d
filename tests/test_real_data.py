"""The main job on real images: loose bounds, far below what the benchmarks measure, that only a broken state misses."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.dataset import Case, load_case
from ofl_sam2.learner.load import shipped_learner
from ofl_sam2.segmenter import VolumeSegmenter, with_settings


def dice(prediction, reference):
    return 2 * (prediction & reference).sum() / (prediction.sum() + reference.sum())


@pytest.fixture(scope="module")
def segmenter():
    backbone = load_backbone("nano")
    return VolumeSegmenter(backbone, shipped_learner("nano", backbone.width))


def test_hippocampus_from_two_labels(data_dir, segmenter):
    folder = data_dir / "msd_hippocampus"
    names = json.loads((folder / "splits.json").read_text())["unit_test"]
    cases = [load_case(Case(n, folder / f"images/{n}.nii.gz", folder / f"labels/{n}.nii.gz")) for n in names[:4]]
    segmenter.learn(cases[:2], {1: "anterior", 2: "posterior"})
    scores = []
    for case in cases[2:]:
        result = segmenter.segment(case.volume)
        assert result.labels.shape == case.volume.voxels.shape
        scores += [dice(result.labels == value, case.labels == value) for value in (1, 2)]
    assert np.mean(scores) > 0.4


def test_cine_sequence_from_one_labelled_frame(data_dir, segmenter):
    folder = data_dir / "sunnybrook_cine" / "sequences"
    name, frames = "SC-HF-I-1_slice05", json.loads((folder / "manifest.json").read_text())["SC-HF-I-1_slice05"]
    case = load_case(Case(name, folder / name / "frames", folder / name / "masks"))
    sequence = VolumeSegmenter(segmenter.backbone, segmenter.learner, cache=segmenter.cache)
    sequence.learn([replace(case, labelled_slices=(frames["ed"],))], {1: "LV cavity"})
    result = sequence.segment(case.volume)
    assert result.labels.shape == case.labels.shape
    assert result.confidence.shape == (20, 1)
    assert dice(result.labels[..., frames["ed"]] == 1, case.labels[..., frames["ed"]] == 1) > 0.5


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_the_learner_helps_on_twenty_hippocampus_cases(data_dir, segmenter):
    folder = data_dir / "msd_hippocampus"
    split = json.loads((folder / "splits.json").read_text())

    def load(name):
        return load_case(Case(name, folder / f"images/{name}.nii.gz", folder / f"labels/{name}.nii.gz"))

    learned = VolumeSegmenter(segmenter.backbone, segmenter.learner, cache=segmenter.cache)
    learned.learn([load(name) for name in split["dev_shots"][:2]], {1: "anterior", 2: "posterior"})
    means = {}
    for online in (True, False):
        used = with_settings(learned, online_branch=online)
        scores = []
        for case in map(load, split["dev_val"]):
            labels = used.segment(case.volume).labels
            scores += [dice(labels == value, case.labels == value) for value in (1, 2)]
        means[online] = np.mean(scores)
    assert means[True] >= 0.60
    assert means[True] > means[False] + 0.05
