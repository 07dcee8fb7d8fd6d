"""Fixtures of the service: saved models can be loaded again, and a store to publish into."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ofl_sam2.backbone import load
from ofl_sam2.backbone.frozen import SAM2Backbone
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.service.snapshots import SnapshotStore
from ofl_sam2.volume import Volume


@pytest.fixture(scope="module")
def installed(nano: SAM2Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The random nano in the place of the package's own."""
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    save_file(nano.sam2.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "NANO_WEIGHTS", path)
        yield


@pytest.fixture
def store(tmp_path: Path, installed: None) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots")


@pytest.fixture(scope="module")
def one(make_segmenter, make_case) -> VolumeSegmenter:
    return make_segmenter((make_case("a"),))


@pytest.fixture(scope="module")
def two(make_segmenter, make_case) -> VolumeSegmenter:
    return make_segmenter((make_case("a"), make_case("b", seed=1)))


@pytest.fixture(scope="session")
def query(make_case) -> Volume:
    return make_case("query", seed=7).volume
