"""The configs under MONAI's own checks, unchanged: metadata, network input and output, properties."""

import json
import os
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, create_workflow, load, verify_metadata, verify_net_in_out
from packaging.requirements import Requirement

from ofl_sam2.errors import WeightsError
from ofl_sam2.files import read_volume
from ofl_sam2.settings import Settings
from ofl_sam2.store import load_model

# The required keys and the types of meta_schema_20240725, for machines that cannot reach its address.
SCHEMA = Path(__file__).parent / "meta_schema_20240725_fields.json"


@pytest.fixture
def metadata(bundle) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text())


def configs(bundle: Path, *names: str) -> list[str]:
    return [str(bundle / "configs" / f"{name}.json") for name in names]


def test_verify_metadata(bundle):
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=SCHEMA)


def test_verify_metadata_can_fail(bundle, metadata, tmp_path):
    del metadata["network_data_format"]["inputs"]["image"]["dtype"]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=SCHEMA)


@pytest.mark.parametrize("config", ["inference", "train"])
def test_verify_net_in_out(bundle, config):
    (file,) = configs(bundle, config)
    meta = str(bundle / "configs" / "metadata.json")
    verify_net_in_out("network_def", meta, file, device="cpu", bundle_root=str(bundle))
    verify_net_in_out("network_def", meta, file, device="cpu", any=12, bundle_root=str(bundle))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("infer", ["inference"]),
        ("infer", ["inference", "batch_inference"]),
        ("infer", ["inference", "evaluate"]),
        ("train", ["train"]),
    ],
)
def test_check_properties(bundle, tmp_path, kind, names):
    options = {"bundle_root": str(bundle), "output_dir": str(tmp_path)}
    workflow = create_workflow(config_file=configs(bundle, *names), workflow_type=kind, **options)
    assert workflow.check_properties() == []
    assert workflow.network_def is not None


def test_load_gives_the_example_network(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ofl_sam2").symlink_to(bundle)
    volume = read_volume(bundle / "examples" / "images" / "synthetic_001.nii.gz")
    image = torch.from_numpy(volume.voxels)[None, None]
    maps = [
        load("ofl_sam2", bundle_dir=tmp_path, workflow_type=kind, device="cpu")(image[..., 9:12])
        for kind in ("train", "inference")
    ]
    assert maps[0].shape == (1, 1, 96, 96, 3) and maps[0].any()
    assert torch.equal(maps[0], maps[1])


def test_a_state_with_wrong_keys_is_an_error(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = load("ofl_sam2", bundle_dir=link(bundle, tmp_path), workflow_type="inference", device="cpu")
    with pytest.raises(WeightsError, match="missing"):
        network.load_state_dict({"conv.weight": torch.zeros(1)}, strict=False)


def link(bundle: Path, folder: Path) -> Path:
    (folder / "ofl_sam2").symlink_to(bundle)
    return folder


def test_displayed_options_are_the_settings_of_the_example(bundle):
    shown = ConfigParser.load_config_file(configs(bundle, "inference")[0])["displayable_configs"]
    settings = load_model(bundle / "models" / "example").settings.to_dict()
    assert shown == {name: settings[name] for name in shown} == {name: Settings().to_dict()[name] for name in shown}


def test_required_packages_are_the_tested_ones(bundle, metadata):
    lines = (bundle.parent / "requirements.txt").read_text().splitlines()
    pins = {}
    for requirement in (Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
            pins[requirement.name] = next(iter(requirement.specifier)).version
    own = metadata["required_packages_version"]
    assert {name: own[name] for name in own if name in pins} == {name: pins[name] for name in own if name in pins}
    assert (metadata["monai_version"], metadata["pytorch_version"], metadata["numpy_version"]) == (
        pins["monai"],
        pins["torch"],
        pins["numpy"],
    )


def test_the_zoo_finds_what_it_looks_for(bundle, metadata):
    for name in (
        "LICENSE",
        "configs/metadata.json",
        "configs/inference.json",
        "configs/logging.conf",
        "models/model.pt",
    ):
        assert (bundle / name).is_file()
    assert (bundle / "LICENSE").read_bytes() == (bundle.parent / "LICENSE").read_bytes()
    assert metadata["version"] in metadata["changelog"]
    assert [path.name for path in (bundle / "models").glob("*.pt")] == ["model.pt"]


def test_bundled_weights_are_found(bundle, tmp_path, monkeypatch):
    from ofl_sam2.workflow import network

    monkeypatch.setattr(network, "BUNDLE", tmp_path)
    monkeypatch.delenv("OFL_SAM2_WEIGHTS", raising=False)
    network.use_bundled_weights()
    assert "OFL_SAM2_WEIGHTS" not in os.environ
    (tmp_path / "weights").mkdir()
    network.use_bundled_weights()
    assert "OFL_SAM2_WEIGHTS" not in os.environ
    (tmp_path / "weights" / "sam2.1_hiera_tiny.pt").touch()
    monkeypatch.setenv("OFL_SAM2_WEIGHTS", "elsewhere")
    network.use_bundled_weights()
    assert os.environ["OFL_SAM2_WEIGHTS"] == "elsewhere"
    monkeypatch.delenv("OFL_SAM2_WEIGHTS")
    network.use_bundled_weights()
    assert os.environ["OFL_SAM2_WEIGHTS"] == str(tmp_path / "weights")
