"""An annotation session over HTTP, as the Slicer module and a script lead it, with a restart in between."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests

from ofl_sam2.files import write_labels
from ofl_sam2.training.cohort import Patient
from ofl_sam2.volume import Volume

NAMES = {1: "organ a", 2: "organ b"}


def dice(found: np.ndarray, reference: np.ndarray) -> float:
    """Mean Dice of the structures."""
    scores = [
        2 * ((found == v) & (reference == v)).sum() / ((found == v).sum() + (reference == v).sum()) for v in NAMES
    ]
    return float(np.mean(scores))


@pytest.fixture(scope="module")
def server(make_server: Callable[..., Any]) -> Any:
    server = make_server()
    assert server.start() < 180
    return server


def submit(server: Any, slicer: Any, patient: Patient) -> None:
    slicer.submit(server.studies / f"{patient.name}.nii.gz", patient.labels, NAMES)
    server.wait_until(lambda status: patient.name in status["learned"])


def test_session_from_the_first_label_to_a_restart(
    server: Any, slicer: Any, cohort_of_eight: list[Patient], tmp_path: Path
) -> None:
    patients = {patient.name: patient for patient in cohort_of_eight}
    first = slicer.next_sample("diverse_first")["id"]
    assert first in patients
    refused = requests.post(f"{server.url}/infer/{slicer.model}?image={first}", timeout=60)
    assert refused.status_code in (400, 409) and "label" in refused.json()["detail"]

    submit(server, slicer, patients[first])
    others = [patient for name, patient in patients.items() if name != first][-2:]
    labels, params = slicer.segment(others[0].name)
    assert labels.shape == others[0].labels.shape and params["label_names"] == {"organ a": 1, "organ b": 2}
    assert params["learned_from"] == [first]
    one_label = [dice(slicer.segment(patient.name)[0], patient.labels) for patient in others]
    assert min(one_label) > 0.4

    second = next(name for name in patients if name != first and name not in [p.name for p in others])
    submit(server, slicer, patients[second])
    results = {patient.name: slicer.segment(patient.name)[0] for patient in others}
    two_labels = [dice(results[patient.name], patient.labels) for patient in others]
    assert np.mean(two_labels) > np.mean(one_label) - 0.05
    version = server.learning()["snapshot"]

    server.stop()
    server.start()
    slicer.connect()
    assert server.wait_until(lambda status: True)["snapshot"] == version
    for name, labels in results.items():
        np.testing.assert_array_equal(slicer.segment(name)[0], labels)


def test_new_structure_of_a_later_case_is_learned(server: Any, slicer: Any, cohort_of_eight: list[Patient]) -> None:
    patient = cohort_of_eight[3]
    labels = patient.labels.copy()
    labels[:6, :6, :6] = 3
    slicer.submit(server.studies / f"{patient.name}.nii.gz", labels, {**NAMES, 3: "corner"})
    server.wait_until(lambda status: patient.name in status["learned"])
    _, params = slicer.segment(cohort_of_eight[4].name)
    assert params["structures"] == {"organ a": 1, "organ b": 2, "corner": 3}
    assert slicer.connect()["models"][slicer.model]["labels"]["corner"] == 3


def test_deleted_label_leaves_the_pool_and_rollback_brings_it_back(
    server: Any, slicer: Any, cohort_of_eight: list[Patient]
) -> None:
    name = cohort_of_eight[3].name
    before = server.learning()["snapshot"]
    answer = requests.delete(f"{server.url}/datastore/label?id={name}&tag=final", timeout=60)
    assert answer.status_code == 200, answer.text
    after = server.wait_until(lambda status: name not in status["learned"])
    assert after["snapshot"] > before
    assert requests.post(f"{server.url}/ofl/snapshots/{before}/rollback", timeout=60).json() == {"version": before}
    assert name in slicer.segment(cohort_of_eight[4].name)[1]["learned_from"]
    requests.post(f"{server.url}/ofl/snapshots/{after['snapshot']}/rollback", timeout=60).raise_for_status()


def test_server_answers_during_an_inference_and_a_job_can_be_cancelled(
    server: Any, slicer: Any, cohort_of_eight: list[Patient], tmp_path: Path
) -> None:
    answers: list[requests.Response] = []
    image = "long"
    long = np.tile(cohort_of_eight[5].image, (1, 1, 40))
    nib.save(nib.Nifti1Image(long, cohort_of_eight[5].affine), tmp_path / "upload.nii.gz")
    slicer.rest.upload_image(str(tmp_path / "upload.nii.gz"), image)

    def infer() -> None:
        answers.append(requests.post(f"{server.url}/infer/{slicer.model}?image={image}", timeout=300))

    thread = threading.Thread(target=infer)
    thread.start()
    jobs: list[dict[str, Any]] = []
    while thread.is_alive() and not jobs:
        assert server.get("/info/").status_code == 200
        jobs = server.get("/ofl/jobs").json()
    assert jobs and jobs[0]["kind"] == "infer"
    assert requests.delete(f"{server.url}/ofl/jobs/{jobs[0]['id']}", timeout=60).status_code == 200
    thread.join()
    assert answers[0].status_code == 409 and "ancel" in answers[0].json()["detail"]
    assert server.get("/ofl/jobs").json() == []
    assert slicer.segment(cohort_of_eight[5].name)[0].any()
    requests.delete(f"{server.url}/datastore/image?id={image}", timeout=60).raise_for_status()


def test_unfit_requests_are_refused_in_words(
    server: Any, slicer: Any, cohort_of_eight: list[Patient], tmp_path: Path
) -> None:
    image = cohort_of_eight[0].name
    status = server.learning()["snapshot"]
    write_labels(tmp_path / "wrong.nrrd", np.ones((5, 6, 7), np.uint8), Volume(np.zeros((5, 6, 7)), np.eye(4), "wrong"))
    wrong = (tmp_path / "wrong.nrrd").read_bytes()
    refused = [
        requests.post(f"{server.url}/infer/other?image={image}", timeout=60),
        requests.post(f"{server.url}/infer/{slicer.model}?image=nobody", timeout=60),
        requests.post(f"{server.url}/infer/{slicer.model}?image={image}", data={"params": "{x"}, timeout=60),
        requests.post(
            f"{server.url}/infer/{slicer.model}?image={image}", data={"params": '{"structures": "x"}'}, timeout=60
        ),
        requests.put(f"{server.url}/datastore/label?image={image}", files={"label": ("a.nrrd", b"x")}, timeout=60),
        requests.put(f"{server.url}/datastore/label?image={image}", files={"label": ("a.nrrd", wrong)}, timeout=60),
        requests.put(f"{server.url}/datastore/label?image=nobody", files={"label": ("a.nrrd", b"x")}, timeout=60),
        requests.delete(f"{server.url}/datastore/label?id=nobody&tag=final", timeout=60),
        server.get("/datastore/label?label=nobody&tag=final"),
        requests.post(f"{server.url}/activelearning/other", json={}, timeout=60),
        requests.post(f"{server.url}/ofl/structures/rename", json={"old": "x", "new": "y"}, timeout=60),
    ]
    for answer in refused:
        assert 400 <= answer.status_code < 500, (answer.url, answer.status_code, answer.text)
        assert isinstance(answer.json()["detail"], str), answer.url
    assert server.learning()["snapshot"] == status


def test_session_image_is_segmented(server: Any, slicer: Any, cohort_of_eight: list[Patient]) -> None:
    patient = cohort_of_eight[6]
    session = slicer.rest.create_session(str(server.studies / f"{patient.name}.nii.gz"))["session_id"]
    labels, _ = slicer.segment("", session)
    np.testing.assert_array_equal(labels, slicer.segment(patient.name)[0])
    slicer.rest.remove_session(session)


def test_training_shows_progress_and_stops(server: Any, slicer: Any) -> None:
    version = server.learning()["snapshot"]
    slicer.train(minutes=5)
    deadline = time.monotonic() + 240
    stats = {"epoch": 0}
    while stats["epoch"] == 0:
        stats = next(iter(slicer.rest.info()["train_stats"].values()))
        assert {"epoch", "total_epochs", "best_metric"} <= stats.keys() and "total_time" not in stats
        assert time.monotonic() < deadline, slicer.rest.train_status()
        time.sleep(0.5)
    assert slicer.rest.train_status(check_if_running=True)
    assert slicer.rest.train_stop()["status"] == "STOPPED"
    assert not slicer.rest.train_status(check_if_running=True)
    assert server.learning()["snapshot"] == version


def test_server_ends_at_once_during_a_training(server: Any, slicer: Any) -> None:
    slicer.train(minutes=5)
    while not slicer.rest.train_status(check_if_running=True):
        time.sleep(0.1)
    server.stop()
    server.start()
    assert not slicer.rest.train_status(check_if_running=True)


@pytest.mark.campaign
def test_second_server_on_the_model_root_is_refused(server: Any, make_server: Callable[..., Any]) -> None:
    second = make_server(server.studies, model_root=server.conf["model_root"])
    second.spawn()
    assert second.process.wait(180) != 0
    assert "Another server uses" in second.log.read_text()
    assert server.learning()["state"] == "idle"
