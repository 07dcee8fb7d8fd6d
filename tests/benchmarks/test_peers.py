"""What networks trained from scratch see, and that their result comes back in the grid of the volume."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from support import peers
from support.peer_data import image_sample, labelled_part, labelled_sample, restored
from support.peers import PEERS, train_peer

from ofl_sam2.errors import InputError
from ofl_sam2.learner.plan import Plan

ISOTROPIC = np.diag([1.0, 1.0, 1.0, 1.0])
STRUCTURES = {1: "bright", 2: "dim"}
TURNED = np.array([[0.0, 0, -4, 30], [-1, 0, 0, 20], [0, 2, 0, 10], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def case(make_case):
    return make_case(grid=(24, 20, 16), affine=ISOTROPIC)


def test_classes_are_numbered_without_gaps(make_case):
    case = make_case()
    label = labelled_sample(case, (2,))["label"]
    assert np.array_equal(label[0].numpy(), case.labels == 2)


def test_only_labelled_slices_are_kept(make_case):
    case = make_case(labelled_slices=(1, 2, 3))
    part = labelled_part(case)
    assert part.labels.shape == (24, 20, 3)
    assert np.array_equal(part.labels, case.labels[:, :, 1:4])
    assert part.volume.affine[2, 3] == case.volume.affine[2, 3] + 4
    with pytest.raises(InputError, match="gaps"):
        labelled_part(make_case(labelled_slices=(1, 3)))


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("affine", [ISOTROPIC, TURNED], ids=["isotropic", "thick, turned"])
def test_prepared_labels_come_back_in_the_grid_of_the_volume(make_case, name, affine):
    case = make_case(grid=(24, 20, 16), affine=affine)
    peer = PEERS[name](Plan.of([case.volume]), 3)
    prepare = peer.prepare(training=True)
    label = prepare(labelled_sample(case, STRUCTURES))["label"]
    probability = torch.nn.functional.one_hot(label[0].as_tensor().long(), 3).movedim(-1, 0).float()
    back = restored(MetaTensor(probability, affine=label.affine), case.volume, STRUCTURES)
    assert np.array_equal(back, case.labels)


@pytest.mark.parametrize("name", PEERS)
def test_patches_hold_image_and_label_of_the_same_place(case, name):
    peer = PEERS[name](Plan.of([case.volume]), 3)
    prepared = peer.prepare(training=True)(labelled_sample(case, STRUCTURES))
    part = peer.augment().set_random_state(3)(prepared)
    part = part[0] if isinstance(part, list) else part
    image, label = part["image"][0], part["label"][0]
    assert image.shape == label.shape == peer.roi
    assert set(label.unique().tolist()) == {0.0, 1.0, 2.0}
    assert image[label == 1].mean() > image[label == 2].mean() > image[label == 0].mean()


@pytest.mark.parametrize("name", PEERS)
def test_training_stops_at_its_budget_and_segments_in_the_grid(make_case, name):
    case = make_case(grid=(16, 16, 16), affine=ISOTROPIC)
    trained = train_peer(name, [case], STRUCTURES, seconds=0.01)
    assert trained.steps == 1
    labels = trained.segment(make_case(grid=(20, 18, 12), affine=TURNED).volume)
    assert labels.shape == (20, 18, 12)
    assert set(np.unique(labels)) <= {0, 1, 2}


def test_dynunet_learns_what_is_bright(case, monkeypatch):
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    trained = train_peer("DynUNet", [case], STRUCTURES, seconds=120)
    assert 30 < trained.steps < 120
    labels = trained.segment(case.volume)
    found, expected = labels > 0, case.labels > 0
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.5


def test_image_samples_keep_their_place(case):
    image = image_sample(case.volume)["image"]
    assert image.shape == (1, 24, 20, 16)
    assert np.allclose(image.affine, case.volume.affine)
