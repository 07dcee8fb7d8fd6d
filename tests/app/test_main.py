import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelException

from ofl_sam2.errors import InputError, ModelError, OFLError
from ofl_sam2.files import read_labels, read_volume, write_labels

Build = Callable[..., Any]
Save = Callable[..., None]


@pytest.fixture
def learn_one(make_app: Build, save: Save, label_files: dict[str, Path]) -> Callable[..., None]:
    """Let a server with this configuration learn one label, and end."""

    def learn(**conf: str) -> None:
        app = make_app(server=True, **conf)
        save(app, "synthetic_000", label_files["synthetic_000"])
        app.close()

    return learn


def test_monai_label_sees_every_task(make_app: Build) -> None:
    info = make_app().info()
    assert list(info["models"]) == list(info["trainers"]) == ["ofl_sam2"]
    assert list(info["strategies"]) == ["most_uncertain", "diverse_first", "random", "sequential"]
    assert list(info["scoring"]) == ["quality"] and info["datastore"]["total"] == 4
    assert info["labels"] == [] and info["train_stats"] == {"ofl_sam2": {}}
    json.dumps(info)


def test_building_the_app_loads_no_model(make_app: Build, tmp_path: Path) -> None:
    app = make_app(labels="liver,spleen")
    assert app.serving._loaded is None and app.workspace._unlearned is None and app.snapshots.current() is None
    assert app.info()["labels"] == ["liver", "spleen"]


def test_save_label_and_the_next_image_is_segmented(
    make_app: Build, save: Save, label_files: dict[str, Path], tmp_path: Path
) -> None:
    app = make_app(server=True)
    with pytest.raises(InputError, match="Nothing has been learned yet"):
        app.infer({"model": "ofl_sam2", "image": "synthetic_002"})
    save(app, "synthetic_000", label_files["synthetic_000"])
    first = app.infer({"model": "ofl_sam2", "image": "synthetic_002"})
    assert first["params"]["learned_from"] == ["synthetic_000"]
    assert set(np.unique(read_labels(first["file"]).voxels)) <= {0, 1, 2}
    save(app, "synthetic_001", label_files["synthetic_001"])
    second = app.infer({"model": "ofl_sam2", "image": "synthetic_002"})
    assert second["params"]["learned_from"] == ["synthetic_000", "synthetic_001"]
    assert second["params"]["snapshot"] > first["params"]["snapshot"]
    assert app.info()["labels"] == ["organ a", "organ b"]
    assert app.status()["learning"]["state"] == "idle" and app.status()["structures"] == {"organ a": 1, "organ b": 2}
    json.dumps(app.status())


def test_request_while_the_first_label_is_learned_is_told_to_wait(
    make_app: Build, label_files: dict[str, Path], tmp_path: Path
) -> None:
    app = make_app()
    app.on_init_complete()
    with app.snapshots.lock():
        app.datastore().save_label("synthetic_000", str(label_files["synthetic_000"]), "final", {})
        with pytest.raises(InputError, match="still being learned"):
            app.infer({"model": "ofl_sam2", "image": "synthetic_002"})
    assert app.service.wait_idle(120)
    assert app.infer({"model": "ofl_sam2", "image": "synthetic_002"})["params"]["snapshot"] == 1


def test_values_of_the_client_do_not_matter(make_app: Build, save: Save, label_files: dict[str, Path]) -> None:
    app = make_app(server=True, labels="organ b")
    save(app, "synthetic_000", label_files["synthetic_000"])
    assert app.registry.names() == {"organ b": 1, "organ a": 2}
    given = read_labels(label_files["synthetic_000"]).voxels
    case = app.service._read_case("synthetic_000")
    assert np.array_equal(case.labels, np.array([0, 2, 1])[given])
    assert case.volume.name == "synthetic_000"


def test_restart_gives_the_same_masks(make_app: Build, save: Save, label_files: dict[str, Path]) -> None:
    app = make_app(server=True)
    for image in ("synthetic_000", "synthetic_001"):
        save(app, image, label_files[image])
    before = read_labels(app.infer({"model": "ofl_sam2", "image": "synthetic_003"})["file"]).voxels
    version = app.snapshots.current().version
    app.close()
    again = make_app(server=True)
    assert again.service.wait_idle(120) and again.snapshots.current().version == version
    assert np.array_equal(
        read_labels(again.infer({"model": "ofl_sam2", "image": "synthetic_003"})["file"]).voxels, before
    )


def test_deleted_label_leaves_the_pool(make_app: Build, save: Save, label_files: dict[str, Path]) -> None:
    app = make_app(server=True)
    for image in ("synthetic_000", "synthetic_001"):
        save(app, image, label_files[image])
    app.datastore().remove_label("synthetic_000", "final")
    assert app.service.wait_idle(120)
    result = app.infer({"model": "ofl_sam2", "image": "synthetic_003"})
    assert result["params"]["learned_from"] == ["synthetic_001"]


def test_second_server_on_one_model_root_is_refused(make_app: Build) -> None:
    first = make_app(server=True)
    second = make_app()
    with pytest.raises(OFLError, match=r"Another server uses .*--conf model_root"):
        second.server_mode(True)
    first.server_mode(True)
    first.close()
    second.server_mode(True)


def test_labels_do_not_get_into_other_studies(
    make_app: Build, save: Save, label_files: dict[str, Path], studies: Path, tmp_path: Path
) -> None:
    others = shutil.copytree(studies, tmp_path / "others")
    unlabelled = make_app(server=True, source=str(others))
    unlabelled.close()
    first = make_app(server=True)
    save(first, "synthetic_000", label_files["synthetic_000"])
    first.close()
    with pytest.raises(OFLError, match=r"holds labels of the studies in .*studies, not in .*others\. .*model_root"):
        make_app(server=True, source=str(others))
    assert not list(others.rglob("labels/final/*"))
    make_app(source=str(others)).close()
    assert (tmp_path / "model" / "studies.txt").read_text() == f"{studies}\n"
    elsewhere = studies.rename(tmp_path / "elsewhere")
    with pytest.raises(OFLError, match=r"holds labels of the studies"):
        make_app(server=True, source=str(others))
    moved = elsewhere.rename(tmp_path / "moved")
    again = make_app(server=True, source=str(moved))
    assert again.service.wait_idle(120) and again.service.status()["learned"].keys() == {"synthetic_000"}


def test_studies_and_model_root_that_are_no_folders_are_refused(make_app: Build, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match=r"is no folder\. Name the folder"):
        make_app(source=str(file))
    with pytest.raises(OFLError, match=r"cannot be used: File exists\. Choose"):
        make_app(model_root=str(file))


def test_other_backbone_than_the_learned_one_is_refused(make_app: Build, learn_one: Callable[..., None]) -> None:
    learn_one()
    with pytest.raises(ModelError, match="was learned with nano at 64 pixels, not with nano at 128"):
        make_app(image_size="128")


def test_unknown_model_and_image_are_refused(make_app: Build) -> None:
    app = make_app()
    with pytest.raises(MONAILabelException) as refused:
        app.infer({"model": "unet", "image": "synthetic_000"})
    assert refused.value.msg == "There is no model 'unet' here. Use ofl_sam2."
    for image in ("nobody", "", "../synthetic_000"):
        with pytest.raises(ImageNotFoundException):
            app.infer({"model": "ofl_sam2", "image": image})


def test_vanished_image_is_refused(make_app: Build, studies: Path) -> None:
    app = make_app()
    (studies / "synthetic_003.nii.gz").unlink()
    with pytest.raises(InputError, match="no image 'synthetic_003' \\(any more\\)"):
        app.infer({"model": "ofl_sam2", "image": "synthetic_003"})


def test_uploaded_image_is_segmented_in_a_session(
    make_app: Build, save: Save, label_files: dict[str, Path], studies: Path, tmp_path: Path
) -> None:
    app = make_app(server=True)
    save(app, "synthetic_000", label_files["synthetic_000"])
    upload = shutil.copy(studies / "synthetic_002.nii.gz", tmp_path / "upload.nii.gz")
    _, session = app.sessions().add_session(str(upload), 3600)
    assert Path(session.image).is_relative_to(app.options.model_root / "cache")
    uploaded = app.infer({"model": "ofl_sam2", "image": session.image, "save_label": True})
    listed = app.infer({"model": "ofl_sam2", "image": "synthetic_002"})
    assert uploaded["label"] == uploaded["file"]
    assert np.array_equal(read_labels(uploaded["file"]).voxels, read_labels(listed["file"]).voxels)


def test_sessions_of_an_earlier_server_and_broken_ones_go(make_app: Build, studies: Path, tmp_path: Path) -> None:
    first, kept = make_app(), []
    for expiry in (61, 3600):
        upload = shutil.copy(studies / "synthetic_002.nii.gz", tmp_path / "upload.nii.gz")
        kept.append(Path(first.sessions().add_session(str(upload), expiry)[1].path))
    again = make_app()
    broken = [again.options.model_root / "cache" / "sessions" / name for name in ("old", "new", "damaged")]
    for folder in broken:
        folder.mkdir()
    os.utime(broken[0], (1, 1))
    (broken[2] / "meta.info").write_text("{")
    meta = json.loads((kept[0] / "meta.info").read_text())
    (kept[0] / "meta.info").write_text(json.dumps({**meta, "last_access_ts": meta["last_access_ts"] - 100}))
    again.cleanup_sessions()
    assert [path.exists() for path in (*kept, *broken)] == [False, True, False, True, False]


def test_a_result_that_cannot_be_saved_leaves_no_file(
    make_app: Build, save: Save, label_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(server=True)
    save(app, "synthetic_000", label_files["synthetic_000"])

    def full(*_: Any) -> str:
        raise OFLError("The disk is full.")

    monkeypatch.setattr(app.datastore(), "save_label", full)
    with pytest.raises(OFLError, match="full"):
        app.infer({"model": "ofl_sam2", "image": "synthetic_002", "save_label": True})
    results = app.batch_infer({"model": "ofl_sam2", "images": "unlabeled"})
    assert len(results) == 3 and all(result == {"error": "The disk is full."} for result in results.values())
    assert not list((tmp_path / "results").glob("ofl_sam2_*"))


def test_next_sample_is_chosen_and_not_fetched(make_app: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    monkeypatch.setattr(app.datastore(), "get_image_uri", None)
    assert app.next_sample({"strategy": "sequential"}) == {"id": "synthetic_000"}
    assert app.next_sample({"strategy": "sequential", "passed_over": app.datastore().list_images()}) == {}


def test_batch_saves_originals_and_does_not_learn_from_them(
    make_app: Build, save: Save, label_files: dict[str, Path], studies: Path
) -> None:
    app = make_app(server=True)
    save(app, "synthetic_000", label_files["synthetic_000"])
    results = app.batch_infer({"model": "ofl_sam2", "images": "unlabeled"})
    assert sorted(results) == ["synthetic_001", "synthetic_002", "synthetic_003"]
    saved = app.datastore().get_label_uri("synthetic_002", "original")
    assert read_labels(saved).voxels.shape == read_volume(studies / "synthetic_002.nii.gz").grid
    assert app.datastore().get_label_info("synthetic_002", "original")["label_names"]
    assert app.service.wait_idle(120)
    assert list(app.status()["learning"]["learned"]) == ["synthetic_000"]
    assert app.datastore().status()["completed"] == 1
    with pytest.raises(InputError, match="cannot be saved as 'final'"):
        app.batch_infer({"model": "ofl_sam2", "images": "all", "label_tag": "final"})


def test_a_result_does_not_take_the_place_of_a_label(make_app: Build, save: Save, label_files: dict[str, Path]) -> None:
    app = make_app(server=True)
    save(app, "synthetic_000", label_files["synthetic_000"])
    request = {"model": "ofl_sam2", "image": "synthetic_000", "save_label": True, "label_tag": "final"}
    with pytest.raises(InputError, match="cannot be saved as 'final'"):
        app.infer(request)
    assert list(app.journal.latest()) == [("synthetic_000", "final")]
    app.infer({**request, "label_tag": "original"})
    assert list(app.journal.latest()) == [("synthetic_000", "final"), ("synthetic_000", "original")]


def test_label_that_cannot_be_learned_is_kept_and_reported(
    make_app: Build, save: Save, label_files: dict[str, Path], tmp_path: Path
) -> None:
    app = make_app(server=True)
    save(app, "synthetic_000", label_files["synthetic_000"])
    volume = read_volume(label_files["synthetic_001"])
    empty = tmp_path / "empty.nii.gz"
    write_labels(empty, np.zeros(volume.grid, np.uint8), volume)
    save(app, "synthetic_001", empty)
    assert "is empty" in app.status()["learning"]["errors"]["synthetic_001"]
    assert app.datastore().get_label_by_image_id("synthetic_001", "final") == "synthetic_001"
    assert app.infer({"model": "ofl_sam2", "image": "synthetic_002"})["params"]["learned_from"] == ["synthetic_000"]


def test_damaged_snapshot_is_reported_and_can_be_rolled_back(
    make_app: Build, save: Save, label_files: dict[str, Path]
) -> None:
    app = make_app(server=True)
    for image in ("synthetic_000", "synthetic_001"):
        save(app, image, label_files[image])
    app.close()
    current = app.snapshots.current()
    (current.folder / "model.json").write_text("{")
    again = make_app(server=True)
    assert "is damaged" in again.status()["learning"]["problem"]
    with pytest.raises(ModelError, match="is damaged"):
        again.infer({"model": "ofl_sam2", "image": "synthetic_003"})
    again.snapshots.rollback(current.version - 1)
    assert again.infer({"model": "ofl_sam2", "image": "synthetic_003"})["params"]["snapshot"] != current.version


def test_a_first_label_that_cannot_be_learned_says_why(
    make_app: Build, save: Save, label_files: dict[str, Path], tmp_path: Path
) -> None:
    app = make_app(server=True)
    volume, empty = read_volume(label_files["synthetic_001"]), tmp_path / "empty.nii.gz"
    write_labels(empty, np.zeros(volume.grid, np.uint8), volume)
    save(app, "synthetic_001", empty)
    with pytest.raises(InputError, match=r"The first label cannot be learned: .* is empty"):
        app.infer({"model": "ofl_sam2", "image": "synthetic_002"})


def test_labels_of_a_folder_do_not_get_to_a_dicomweb_server(make_app: Build, learn_one: Callable[..., None]) -> None:
    learn_one()
    with pytest.raises(
        OFLError, match=r"holds labels of the studies in .*studies, not in http://127.0.0.1:1/dicom-web"
    ):
        make_app(server=True, source="http://127.0.0.1:1/dicom-web/")


def test_another_ct_window_than_the_learned_one_is_refused(make_app: Build, learn_one: Callable[..., None]) -> None:
    learn_one(ct_window="-1000,400")
    make_app(ct_window="-1000,400")
    make_app()
    with pytest.raises(ModelError, match=r"CT window \(-1000.0, 400.0\), not with \(-160.0, 240.0\)"):
        make_app(ct_window="-160,240")
    with pytest.raises(InputError, match="--conf ct_window 400 cannot be used: '400' is no window"):
        make_app(ct_window="400")
