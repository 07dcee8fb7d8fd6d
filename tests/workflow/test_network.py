"""The network MONAI sees: what comes out, what its state is, and when it solves anew."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from ofl_sam2.errors import InputError, ModelError, WeightsError
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.store import save_model
from ofl_sam2.workflow.inferer import VolumeInferer
from ofl_sam2.workflow.network import FewShotNetwork, few_shot_network


@pytest.fixture
def network(make_segmenter) -> FewShotNetwork:
    return FewShotNetwork(make_segmenter)


def batch_of(*cases) -> MetaTensor:
    """Cases as a DataLoader gives them."""
    images = [torch.from_numpy(case.volume.voxels)[None] for case in cases]
    affines = torch.stack([torch.from_numpy(case.volume.affine) for case in cases])
    meta = {"filename_or_obj": [f"images/{case.volume.name}.nii.gz" for case in cases]}
    batch = MetaTensor(torch.stack(images), affine=affines, meta=meta)
    batch.is_batch = True
    return batch


def test_forward_gives_what_the_segmenter_gives(network, make_segmenter, make_case):
    cases = make_case("a"), make_case("b", seed=1)
    labels = network(batch_of(*cases))
    assert labels.dtype == torch.uint8 and labels.shape == (2, 1, 24, 20, 6)
    for row, case in zip(labels, cases, strict=True):
        assert np.array_equal(row[0].numpy(), make_segmenter().segment(case.volume).labels)


def test_the_affine_counts(network, make_case):
    case = make_case("a")
    turned = make_case("a", affine=np.diag([-1.0, 1.0, 4.0, 1.0]))
    assert not torch.equal(network(batch_of(case)), network(batch_of(turned)))


def test_plain_tensor_has_voxels_of_one_millimetre(network, make_case):
    case = make_case("a", affine=np.eye(4))
    assert torch.equal(network(torch.from_numpy(case.volume.voxels)[None, None]), network(batch_of(case)).as_tensor())


def test_one_voxel_is_a_volume(network):
    assert network(torch.rand(1, 1, 1, 1, 1)).shape == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8, 8), (1, 1, 8, 8), (8, 8)])
def test_other_shapes_are_refused(network, shape):
    with pytest.raises(InputError, match="one channel"):
        network(torch.zeros(shape))


def test_state_is_learner_and_fusion_only(network):
    assert set(network.state_dict()) == {f"learner.{name}" for name in network.segmenter.learner.state_dict()}
    assert not any("sam2" in name for name in network.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_with_wrong_names_is_refused(network, strict):
    state = network.state_dict()
    renamed = {f"net.{name}": value for name, value in state.items()}
    for wrong in ({}, renamed, {**state, "learner.more": torch.zeros(1)}):
        with pytest.raises(WeightsError, match="few-shot network"):
            network.load_state_dict(wrong, strict=strict)


def test_a_loaded_state_is_solved_on_the_pool(network, make_case):
    before = network(batch_of(make_case("b", seed=1)))
    fitted = {name: value + 0.05 * torch.ones_like(value) for name, value in network.state_dict().items()}
    network.load_state_dict(fitted)
    assert not torch.equal(before, network(batch_of(make_case("b", seed=1))))


def test_it_solves_only_when_something_changed(network, make_case, monkeypatch):
    batch, solved = batch_of(make_case("a")), []
    solve = VolumeSegmenter.solve
    monkeypatch.setattr(VolumeSegmenter, "solve", lambda self: (solved.append(self), solve(self)))
    network(batch)
    assert solved == []
    with torch.no_grad():
        next(network.learner.parameters()).mul_(1.01)
    network(batch)
    network(batch)
    assert solved == [network.segmenter]


def test_inferer_changes_settings_for_the_call(network, make_segmenter, make_case):
    case = make_case("b", seed=1)
    plain = network(batch_of(case))
    changed = VolumeInferer(gamma=0.0, online_update=False)(batch_of(case), network)
    expected = make_segmenter(gamma=0.0, online_update=False).segment(case.volume).labels
    assert np.array_equal(changed[0, 0].numpy(), expected)
    assert torch.equal(network(batch_of(case)), plain)


def test_inferer_refuses_what_is_no_setting(network, make_case):
    with pytest.raises(TypeError, match="gama"):
        VolumeInferer(gama=0.5)(batch_of(make_case("a")), network)


def test_a_copy_is_independent(network, make_case):
    twin = copy.deepcopy(network)
    batch = batch_of(make_case("a"))
    assert torch.equal(twin(batch), network(batch))
    with torch.no_grad():
        next(twin.learner.parameters()).zero_()
    assert next(network.learner.parameters()).any()


def test_a_state_belongs_to_the_model_as_published_now(make_segmenter, make_case):
    published = [make_segmenter()]
    network = FewShotNetwork(lambda: published[-1])
    published.append(make_segmenter((make_case("a", values=(1,)),)))
    network.load_state_dict(network.state_dict())
    assert network.segmenter is published[-1]


def test_supports_are_learned(study: Path):
    network = few_shot_network(
        support_images=str(study / "images"),
        support_labels=str(study / "labels"),
        support_cases=("a",),
        structures="2=dim",
        image_size=64,
    )
    assert network.segmenter.structures == {2: "dim"}


def test_supports_extend_a_model(study: Path, tmp_path: Path):
    folders = {"support_images": str(study / "images"), "support_labels": str(study / "labels")}
    save_model(few_shot_network(**folders, support_cases="a", image_size=64).segmenter, tmp_path / "m")
    alone = few_shot_network(model_dir=str(tmp_path / "m"))
    both = few_shot_network(model_dir=str(tmp_path / "m"), **folders, support_cases=["b"], structures="1=bright,2=dim")
    assert both.segmenter.structures == {1: "bright", 2: "dim"}
    assert both.segmenter.structures != alone.segmenter.structures


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"support_images": None}, InputError, "support_images and support_labels: .*both"),
        ({"support_images": None, "support_labels": None}, InputError, "^support_cases and structures: .*nothing"),
        ({"support_images": "absent"}, InputError, "support_images and support_labels: absent is not a folder"),
        ({"support_cases": ["c.1"]}, InputError, "support_labels: .*no label for c.1"),
        ({"structures": "liver"}, InputError, "structures: .*VALUE=NAME"),
        ({"structures": "9=liver"}, InputError, "structures: No label holds 9=liver"),
        ({"backbone": "resnet"}, InputError, "^backbone, image_size: Unknown backbone 'resnet'"),
        ({"image_size": 50}, InputError, "image_size: Image size 50"),
        ({"device": "tpu"}, InputError, "^device: .*'tpu'"),
        ({"model_dir": "absent"}, ModelError, "^model_dir: absent holds no model"),
    ],
)
def test_bad_options_are_named(study: Path, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.chdir(tmp_path)
    options = {
        "support_images": str(study / "images"),
        "support_labels": str(study / "labels"),
        "image_size": 64,
        "structures": "1=bright",
    }
    with pytest.raises(error, match=message):
        few_shot_network(**{**options, **changes})


def test_no_label_among_the_supports(study: Path, tmp_path: Path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "notes.txt").write_text("none")
    learn = partial(few_shot_network, support_images=str(study / "images"), image_size=64)
    with pytest.raises(InputError, match=r"support_labels: .*holds no images"):
        learn(support_labels=str(tmp_path / "labels"))


def test_absent_weights_say_what_to_do(study: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", str(tmp_path))
    options = {"support_images": str(study / "images"), "support_labels": str(study / "labels")}
    with pytest.raises(WeightsError, match=r"^backbone, image_size: The weights of sam2.1_hiera_tiny are not here"):
        few_shot_network(**options, backbone="sam2.1_hiera_tiny")
    (tmp_path / "sam2.1_hiera_tiny.pt").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"^backbone, image_size: .*truncated"):
        few_shot_network(**options, backbone="sam2.1_hiera_tiny")
