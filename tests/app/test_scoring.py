from collections.abc import Callable
from typing import Any

import pytest
from lib.infers.ofl_sam2 import OFLSAM2Infer
from lib.jobs import Jobs
from lib.scores import Score
from lib.scoring.quality import QualityScoring
from lib.workspace import Workspace

from ofl_sam2.errors import InputError

Make = Callable[..., Any]


def test_refused_before_the_first_label(fresh_workspace: Workspace, make_studies: Make) -> None:
    with pytest.raises(InputError, match="Nothing has been learned yet"):
        QualityScoring(fresh_workspace)({}, make_studies())


def test_unlabelled_images_get_the_estimate_of_an_inference(workspace: Workspace, make_studies: Make) -> None:
    data = make_studies(labelled=["synthetic_000", "synthetic_001"])
    outcome = QualityScoring(workspace)({}, data)
    assert outcome == {"scored": 2, "failed": {}, "stopped": False}
    scores = workspace.scores.read()
    assert set(scores) == {"synthetic_002", "synthetic_003"}
    _, params = OFLSAM2Infer(workspace)({"image": data.get_image_uri("synthetic_002")})
    assert scores["synthetic_002"].quality == pytest.approx(params["quality"], abs=1e-4)
    assert scores["synthetic_002"].version == 1


def test_only_what_the_current_snapshot_has_not_scored(workspace: Workspace, make_studies: Make) -> None:
    workspace.scores.put("synthetic_002", Score(0.123, 1))
    workspace.scores.put("synthetic_003", Score(0.123, 0))
    data = make_studies(labelled=["synthetic_000", "synthetic_001"])
    assert QualityScoring(workspace)({}, data)["scored"] == 1
    assert workspace.scores.read()["synthetic_002"].quality == 0.123
    assert workspace.scores.read()["synthetic_003"].quality != 0.123


def test_unreadable_image_is_reported(workspace: Workspace, make_studies: Make) -> None:
    data = make_studies(labelled=["synthetic_000", "synthetic_001"])
    (data.folder / "broken.nii.gz").write_bytes(b"no image")
    data.vanished.add("synthetic_003")
    outcome = QualityScoring(workspace)({}, data)
    assert outcome["scored"] == 1 and "Cannot read" in outcome["failed"]["broken"]
    assert "is no more" in outcome["failed"]["synthetic_003"]


def test_gives_way_to_a_user_of_the_server(workspace: Workspace, make_studies: Make) -> None:
    server = Jobs(workspace.options.model_root / "user_waits.lock")
    data = make_studies()
    with server.running("infer", "case"):
        assert QualityScoring(workspace)({}, data) == {"scored": 0, "failed": {}, "stopped": True}
    assert workspace.scores.read() == {} and workspace.jobs.list() == []
    assert QualityScoring(workspace)({}, data)["stopped"] is False


def test_gives_way_in_the_middle_of_an_image(
    workspace: Workspace, make_studies: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def user_waits() -> bool:
        asked.append(None)
        return len(asked) > 3

    monkeypatch.setattr(workspace.jobs, "user_waits", user_waits)
    outcome = QualityScoring(workspace)({}, make_studies())
    assert outcome["stopped"] and outcome["scored"] == 0 and workspace.scores.read() == {}
