"""The archive: what is in it, and that it is the same every time; the example model fits the shipped weights."""

import hashlib
import json
import zipfile

import pytest
import torch

import ofl_sam2
from ofl_sam2.backbone.weights import CATALOGUE
from ofl_sam2.store import load_model
from ofl_sam2.training.cohort import STRUCTURES


def test_same_bytes_every_time(packer, bundle, tmp_path):
    digests = [packer.pack(bundle, tmp_path / name / "a.zip") for name in ("first", "second")]
    assert digests[0] == digests[1] == hashlib.sha256((tmp_path / "first" / "a.zip").read_bytes()).hexdigest()
    assert (tmp_path / "first" / "a.zip.sha256").read_text() == f"{digests[0]}  a.zip\n"


def test_only_what_a_run_needs(packer, bundle, tmp_path):
    (bundle / "ofl_sam2" / "__pycache__").mkdir(exist_ok=True)
    packer.pack(bundle, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
    assert all(name.startswith("ofl_sam2/") for name in names)
    folders = {name.split("/")[1] for name in names}
    assert folders == {"LICENSE", "configs", "docs", "examples", "large_files.yml", "models", "ofl_sam2"}
    suffixes = {name.rsplit(".", 1)[-1] for name in names if name.startswith("ofl_sam2/ofl_sam2/")}
    assert suffixes == {"py", "md", "safetensors"}
    assert sum(info.file_size for info in zipfile.ZipFile(tmp_path / "a.zip").infolist()) < 30e6


def test_versions_agree(packer, bundle, tmp_path):
    packer.check_versions(bundle, bundle.parent / "CHANGELOG.md")
    (tmp_path / "CHANGELOG.md").write_text("## [99.0.0] - Unreleased\n")
    with pytest.raises(SystemExit, match=r"99.0.0"):
        packer.check_versions(bundle, tmp_path / "CHANGELOG.md")


def test_example_was_learned_with_the_shipped_weights(packer):
    assert packer.example_is_current(), "run `make bundle`, which learns the example model anew"


def test_example_is_small_and_synthetic(bundle):
    model = load_model(bundle / "models" / "example")
    assert model.structures == STRUCTURES
    assert list(model.pool.cases) == ["synthetic_000"]
    assert sum(path.stat().st_size for path in (bundle / "models").rglob("*")) < 10e6


def test_model_pt_is_the_learner_of_the_example(bundle):
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    own = load_model(bundle / "models" / "example").learner.state_dict()
    assert state.keys() == {f"learner.{name}" for name in own}
    assert all(torch.equal(state[f"learner.{name}"], value) for name, value in own.items())


def test_metadata_names_the_version_and_the_labels(bundle):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["version"] == ofl_sam2.__version__ == next(iter(metadata["changelog"]))
    labels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert labels == {"0": "background", **{str(value): name for value, name in STRUCTURES.items()}}


def test_large_files_are_those_of_the_catalogue(bundle):
    from monai.bundle import ConfigParser

    listed = ConfigParser.load_config_file(bundle / "large_files.yml")["large_files"]
    expected = [
        {"path": f"weights/{e.file_name}", "url": e.url, "hash_val": e.sha256, "hash_type": "sha256"}
        for e in CATALOGUE.values()
    ]
    assert listed == expected
