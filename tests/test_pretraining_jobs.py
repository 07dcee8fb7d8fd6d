"""Pretraining as the commands do it."""

from functools import partial

import pytest

from ofl_sam2 import pretraining_jobs
from ofl_sam2.learner.load import read_learner
from ofl_sam2.pretraining_jobs import pretrain_nano
from ofl_sam2.progress import CancelToken
from ofl_sam2.training import pretraining
from ofl_sam2.training.pretraining import Stage


@pytest.fixture
def quick_stages(monkeypatch):
    stages = (Stage("joint", 0.5, 64, 1, 1, 1e-4, True, True), Stage("learner", 0.5, 64, 1, 1, 1e-4, False, True))
    monkeypatch.setattr(pretraining_jobs, "pretrain", partial(pretraining.pretrain, stages=stages, workers=0))


@pytest.mark.usefixtures("quick_stages")
def test_a_cancelled_pretraining_still_writes_its_weights(tmp_path):
    cancel = CancelToken()
    cancel.cancel()
    output = tmp_path / "new.safetensors"
    assert pretrain_nano(output, 1.0, "cpu", None, further=False, seed=0, cancel=cancel) == 0
    assert output.is_file()
    assert read_learner(tmp_path / "new_learner.safetensors").channels == 128
    assert (tmp_path / "new.checkpoint.pt").is_file()
