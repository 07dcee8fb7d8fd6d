"""Fitting the U-Net: only to what is labelled and not kept apart."""

import weakref
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.transforms import RandSmoothDeformd

from ofl_sam2.backbone.weights import state_hash
from ofl_sam2.learner.plan import Plan
from ofl_sam2.looks import Viewpoint
from ofl_sam2.progress import CancelToken
from ofl_sam2.settings import Settings
from ofl_sam2.training import voxels
from ofl_sam2.training.voxels import fit_unet

VIEWPOINT = Viewpoint(2, True, 64, Settings())


def fit(cases, early=lambda case: case, accept=lambda _: True, **options):
    return fit_unet(VIEWPOINT, cases, (1, 2), early, accept, **{"seconds": 300.0, "steps": 2, **options})


@pytest.fixture
def cases(make_case):
    return make_case("a"), make_case("b", seed=1)


def test_it_learns_what_the_labels_show(cases, make_case):
    unet = fit(cases, steps=40)
    assert not unet.training
    unseen = make_case("c", seed=5)
    found = unet.probabilities(unseen.volume, (1, 2), lambda: None).numpy() > 0.5
    for value, mask in zip((1, 2), found, strict=True):
        true = unseen.labels == value
        assert 2 * (mask & true).sum() / (mask.sum() + true.sum()) > 0.8


def test_a_seed_gives_the_same_twice(cases):
    state = torch.get_rng_state()
    one, again, other = (fit(cases, seed=seed) for seed in (0, 0, 1))
    assert state_hash(one) == state_hash(again) != state_hash(other)
    assert torch.equal(torch.get_rng_state(), state)


def test_time_and_steps_bound_it_and_progress_is_told(cases, monkeypatch):
    steps, loss = [], voxels.marginal_loss
    monkeypatch.setattr(voxels, "marginal_loss", lambda *args: steps.append(1) or loss(*args))
    told = []
    fit(cases, steps=4, report=lambda *entry: told.append(entry))
    assert [share for share, _ in told] == [0.25, 0.5, 0.75, 1]
    assert all(0 < loss < 10 for _, loss in told)
    steps.clear()
    fit(cases, seconds=1e-9, steps=None)
    assert len(steps) == 1


@pytest.mark.parametrize(("room", "size"), [(10**6, 2), (1, 1)])
def test_small_patches_come_in_pairs_and_large_ones_alone(cases, monkeypatch, room, size):
    seen, loss = [], voxels.marginal_loss
    monkeypatch.setattr(voxels, "PATCH_VOXELS", room)
    monkeypatch.setattr(
        voxels, "marginal_loss", lambda unet, images, *rest: seen.append(len(images)) or loss(unet, images, *rest)
    )
    fit(cases)
    assert seen == [size, size]


@pytest.mark.parametrize(
    ("spacing", "patch"), [((1, 5, 1), (32, 6, 24)), ((1, 1, 5), (32, 24, 6)), ((1, 1, 5), (32, 24, 1))]
)
def test_thick_slices_bend_differently_with_their_labels(spacing, patch):
    (bend,) = (one for one in voxels.augmentation(Plan(spacing, patch), patch, 1) if isinstance(one, RandSmoothDeformd))
    bend.set_random_state(0)
    columns = torch.arange(float(patch[0]))[None, :, None, None].expand(1, *patch)
    bent = [bend({"image": columns, "label": columns}) for _ in range(20)]
    moved = [one for one in bent if not torch.equal(one["image"], columns)]
    assert 0 < len(moved) < 20
    for one in moved:
        assert (one["image"] - one["label"]).abs().amax() < 0.501
        slices = one["image"][0].movedim(int(np.argmax(spacing)), 0)
        assert len(slices) == 1 or (slices - slices[0]).abs().amax() > 0.5


def test_shading_is_slow_and_leaves_what_is_darkest():
    image = torch.linspace(-1, 2, 64 * 64 * 8).reshape(1, 64, 64, 8)
    shading = voxels._Shading().set_random_state(0)
    shaded = [shading({"image": image, "label": 3})["image"] for _ in range(20)]
    changed = [one for one in shaded if not torch.allclose(one, image, atol=1e-5)]
    assert 0 < len(changed) < 20
    for one in changed:
        factor = (one + 1)[0, 32:] / (image + 1)[0, 32:]
        assert one.amin() == pytest.approx(-1, abs=1e-3)
        assert factor.std() > 0.01
        assert factor.diff(dim=1).abs().amax() < 0.3


def test_it_can_be_cancelled(cases):
    token = CancelToken()
    assert fit(cases, steps=5, report=lambda *_: token.cancel(), cancel=token) is None


@pytest.mark.parametrize("accepted", [True, False])
def test_labels_that_are_kept_apart_are_learned_once_it_was_accepted(cases, monkeypatch, accepted):
    seen, batch = [], voxels._batch
    monkeypatch.setattr(voxels, "_batch", lambda samples, *rest: seen.append(len(samples)) or batch(samples, *rest))

    def accept(unet):
        seen.append("asked")
        return accepted and not unet.training

    unet = fit(cases, lambda case: case if case is cases[0] else None, accept, steps=5)
    assert seen == [*[1] * (voxels._FIRST_PATCHES // 2 + 2), "asked", *([2] * 3 if accepted else [])]
    assert (unet is not None) == accepted


def test_slices_that_are_kept_apart_are_learned_once_it_was_accepted(cases, monkeypatch):
    seen, samples = [], voxels._samples
    monkeypatch.setattr(voxels, "_samples", lambda *args: seen.append(args[2].labelled_slices) or samples(*args))
    fit(cases, lambda case: case if case is cases[0] else replace(case, labelled_slices=(0, 2)))
    assert seen == [None, (0, 2), None]


def test_cases_are_read_one_by_one(cases):
    class Read(Sequence):
        most, here = 0, weakref.WeakSet()

        def __len__(self):
            return 12

        def __getitem__(self, index):
            if not 0 <= index < 12:
                raise IndexError(index)
            case = replace(cases[index % 2], volume=replace(cases[index % 2].volume, name=f"case {index}"))
            self.here.add(case)
            self.most = max(self.most, len(self.here))
            return case

    read = Read()
    assert fit(read) is not None
    assert read.most <= 2


def test_a_case_whose_slices_a_coarser_grid_passes_over_is_left_out(cases, make_case):
    fine = make_case("fine", grid=(24, 20, 12), affine=np.diag([1.0, 1.0, 2.0, 1.0]), labelled_slices=(4,))
    unet = fit(cases)
    assert unet.shape_of(fine.volume)[2] == 6
    assert voxels._samples(unet, VIEWPOINT, fine, 1) == []
    assert len(voxels._samples(unet, VIEWPOINT, replace(fine, labelled_slices=(4, 5)), 1)) == 1


def test_a_volume_that_is_enormous_on_the_grid_of_the_others_is_left_out(cases, make_case):
    huge = make_case("huge", grid=(40, 40, 40), affine=np.diag([20.0, 20.0, 80.0, 1.0]))
    assert voxels._samples(fit(cases), VIEWPOINT, huge, 1) == []


@pytest.mark.parametrize("axes", ["as stored", "turned"])
def test_unlabelled_slices_are_unknown(make_case, axes):
    affine = np.diag([1.0, 1.0, 4.0, 1.0]) if axes == "as stored" else np.diag([1.0, -1.0, -4.0, 1.0])
    case = make_case("a", labelled_slices=(0, 3), affine=affine)
    classes = voxels._classes(VIEWPOINT, case, (1, 2))
    stored = classes if axes == "as stored" else classes[:, ::-1, ::-1]
    known = [0, 3] if axes == "as stored" else [5, 2]
    assert np.array_equal(stored[:, :, known], case.labels[:, :, known])
    assert (np.delete(stored, known, axis=2) == 3).all()


def test_as_many_structures_as_a_label_can_hold_have_a_number(make_case):
    classes = voxels._classes(VIEWPOINT, make_case("a", labelled_slices=(2,)), tuple(range(255, 0, -1)))
    assert set(np.unique(classes)) == {0, 254, 255, 256}


def test_samples_are_on_the_grid_of_the_network_and_at_least_a_patch(make_case):
    case = make_case("a", grid=(24, 20, 6, 3), labelled_slices=(4, 8), values=(2,))
    unet = fit([case], steps=1)
    one, other = voxels._samples(unet, VIEWPOINT, case, most=5)
    assert one.taught.tolist() == [0, 1]
    for sample in (one, other):
        image, label = sample.parts["image"], sample.parts["label"]
        assert image.shape == label.shape
        assert all(size >= side for size, side in zip(image.shape[1:], unet.patch, strict=True))
        assert set(label.unique().tolist()) <= {0, 2, 3}
        assert len(sample.parts["label_cls_indices"]) == 3
    assert len(voxels._samples(unet, VIEWPOINT, case, most=1)) == 1


def test_background_may_be_a_structure_that_is_not_labelled_in_its_case(cases):
    unet = fit(cases, steps=1).train()
    images = torch.randn(1, 1, *unet.patch)
    labels, taught = torch.zeros(1, 1, *unet.patch), torch.tensor([[1.0, 0.0]])

    class Sure(torch.nn.Module):
        def __init__(self, channel):
            super().__init__()
            self.channel = channel

        def forward(self, images):
            logits = torch.zeros(1, 1, 3, *unet.patch)
            logits[:, :, self.channel] = 30
            return logits

    losses = []
    for channel in range(3):
        unet.net = Sure(channel)
        losses.append(voxels.marginal_loss(unet, images, labels, taught).item())
    assert losses[0] == pytest.approx(0, abs=0.01) == losses[2]
    assert losses[1] > 10
    unet.net = Sure(1)
    assert voxels.marginal_loss(unet, images, torch.full_like(labels, 3), taught).item() == pytest.approx(0, abs=0.01)


def test_heads_begin_with_what_the_features_tell_of_the_labels(cases):
    unet = fit(cases, steps=1).train()
    images = torch.randn(2, 1, *unet.patch)
    labels, taught = (images > 1).float() + (images < -1) * 2, torch.ones(2, 2)
    before = voxels.marginal_loss(unet, images, labels, taught)
    voxels._begin_heads(unet, [(images[:1], labels[:1], taught[:1]), (images[1:], labels[1:], taught[1:])])
    assert voxels.marginal_loss(unet, images, labels, taught) < 0.8 * before


@pytest.mark.parametrize(("label", "taught"), [(3, (1, 1)), (0, (1, 0))])
def test_heads_stay_as_they_are_where_nothing_is_known(cases, label, taught):
    unet = fit(cases, steps=1).train()
    images = torch.randn(1, 1, *unet.patch)
    before = state_hash(unet)
    voxels._begin_heads(unet, [(images, torch.full_like(images, label), torch.tensor([taught], dtype=torch.float))])
    assert state_hash(unet) == before


@pytest.mark.parametrize("count", [3, 200])
def test_the_number_of_volumes_is_bounded(make_case, monkeypatch, count):
    monkeypatch.setattr(voxels, "MOST_VOLUMES", 2)
    read = []

    class Cases(list):
        def __getitem__(self, number):
            read.append(number)
            return super().__getitem__(number)

    case = make_case("a")
    assert fit(Cases([case] * count), steps=1) is not None
    assert len(set(read)) == 2
