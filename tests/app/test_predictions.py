"""Predictions as DICOM SEG: whose names they get, and what is left behind."""

from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from lib.datastores.segmentation import Prediction
from server import predictions

from ofl_sam2.errors import InputError

LEARNED = {"liver": 1, "spleen": 2}


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """Let the app answer a segmentation with these `label_names`; the result is the file and the requests."""

    def prepare(label_names):
        file, requests = tmp_path / "labels.nii.gz", []
        file.touch()
        params = {"label_names": label_names, "structures": LEARNED, "snapshot": 3}

        def infer(request):
            requests.append(request)
            return {"file": str(file), "params": params}

        app = SimpleNamespace(infer=infer, datastore=lambda: None, options=SimpleNamespace(device="cpu"))
        monkeypatch.setattr(predictions, "app", lambda: app)
        return file, requests

    return prepare


@pytest.mark.parametrize(
    ("options", "label_names", "names"),
    [
        ({}, {"liver": 1, "spleen": 2}, {1: "liver", 2: "spleen"}),
        ({"structures": ["all", "liver"]}, {"spleen": 2}, {1: "liver", 2: "spleen"}),
        ({"structures": "spleen"}, {"spleen": 2}, {2: "spleen"}),
        ({"structures": "liver"}, {"liver": 1}, {1: "liver"}),
    ],
)
def test_missing_structures_keep_their_segments_unless_one_was_asked_for(answer, options, label_names, names):
    (file, requests), made = answer(label_names), []
    options = {"gamma": "0.9", "by_position": True, **options}
    predictions.predict("image", "ofl_sam2", options, lambda *arguments: made.append(arguments))
    assert made == [("image", file, names, Prediction("ofl_sam2", 3))] and not file.exists()
    assert (requests[0]["gamma"], requests[0]["result_extension"], requests[0]["by_position"]) == (
        "0.9",
        ".nii.gz",
        False,
    )


def test_an_empty_result_is_refused_and_its_file_removed(answer):
    file, _ = answer({})
    with pytest.raises(InputError, match="No learned structure was found in image"):
        predictions.predict("image", "ofl_sam2", {}, lambda *arguments: pytest.fail("made"))
    assert not file.exists()


def test_folders_have_no_dicom_seg(answer):
    answer({})
    with pytest.raises(HTTPException) as refused:
        predictions.dicomweb_studies()
    assert refused.value.status_code == 400
