"""The MONAI Label app in this process: studies of tiny synthetic volumes and apps on model roots of their own."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monailabel.config import settings
from monailabel.utils.others.class_utils import get_class_of_subclass_from_file

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.training.cohort import Patient, cohort
from ofl_sam2.volume import Volume

APP_DIR = Path(__file__).resolve().parents[2] / "apps" / "ofl_sam2"
if str(APP_DIR) not in sys.path:
    sys.path.insert(0, str(APP_DIR))

from lib.datastores.archive import ArchiveError  # noqa: E402
from lib.options import Options  # noqa: E402
from lib.workspace import Workspace  # noqa: E402

STRUCTURES = ("organ a", "organ b")


@pytest.fixture(autouse=True)
def result_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that no client takes away go with the test."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.fixture(scope="session")
def app_dir() -> Path:
    """Folder of the app."""
    return APP_DIR


@pytest.fixture(scope="session")
def patients() -> list[Patient]:
    """Four small volumes (32, 32, 8) of one anatomy with two structures."""
    small = []
    for patient in cohort(4, seed=3):
        image, labels = patient.image[::3, ::3, ::3], patient.labels[::3, ::3, ::3]
        small.append(Patient(patient.name, image, labels, patient.affine @ np.diag([3.0, 3.0, 3.0, 1.0])))
    return small


@pytest.fixture
def studies(tmp_path: Path, patients: list[Patient]) -> Path:
    """A folder of the images, as MONAI Label reads it."""
    folder = tmp_path / "studies"
    folder.mkdir()
    for patient in patients:
        nib.save(nib.Nifti1Image(patient.image, patient.affine), folder / f"{patient.name}.nii.gz")
    return folder


@pytest.fixture
def label_files(tmp_path: Path, patients: list[Patient]) -> dict[str, Path]:
    """Label maps of the images, as a client would send them."""
    folder = tmp_path / "labels_of_client"
    folder.mkdir()
    files = {patient.name: folder / f"{patient.name}.nii.gz" for patient in patients}
    for patient in patients:
        nib.save(nib.Nifti1Image(patient.labels, patient.affine), files[patient.name])
    return files


@pytest.fixture
def make_app(
    tmp_path: Path, app_dir: Path, studies: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Build the app as MONAI Label does; with `server=True` also start it as the server does."""
    monkeypatch.setenv("MONAI_LABEL_RELOAD_APP_LIB", "false")
    monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
    apps = []

    def build(server: bool = False, source: str | None = None, **conf: str) -> Any:
        kind = get_class_of_subclass_from_file("main", str(app_dir / "main.py"), "MONAILabelApp")
        given = {"model_root": str(tmp_path / "model"), "image_size": "64", **conf}
        app = kind(str(app_dir), source or str(studies), given)
        apps.append(app)
        if server:
            app.server_mode(True)
            app.on_init_complete()
        return app

    yield build
    for app in apps:
        app.close()


@pytest.fixture
def save() -> Callable[..., Any]:
    """Save a label as a client does, and wait until it has been learned."""

    def save_and_wait(app: Any, image: str, label: Path, label_info: list[dict[str, Any]] | None = None) -> None:
        info = label_info or [{"name": "organ a", "idx": 1}, {"name": "organ b", "idx": 2}]
        label_id = app.datastore().save_label(image, str(label), "final", {"label_info": info})
        app.on_save_label(image, label_id)
        assert app.service.wait_idle(120)

    return save_and_wait


@pytest.fixture(scope="session")
def cases(patients: list[Patient]) -> list[LabelledCase]:
    """The patients as labelled cases."""
    return [
        LabelledCase(Volume(patient.image, patient.affine, patient.name), patient.labels, (1, 2))
        for patient in patients
    ]


@pytest.fixture(scope="session")
def learned_root(tmp_path_factory: pytest.TempPathFactory, cases: list[LabelledCase]) -> Path:
    """A model root whose snapshot 1 was learned from two of the cases."""
    root = tmp_path_factory.mktemp("learned") / "model"
    workspace = Workspace(Options(root, image_size=64, labels=STRUCTURES))
    segmenter = workspace.open_base()
    segmenter.learn(cases[:2], dict(enumerate(STRUCTURES, start=1)))
    workspace.snapshots.publish(segmenter, {"learned": {case.volume.name: "0" * 64 for case in cases[:2]}})
    return root


@pytest.fixture
def workspace(tmp_path: Path, learned_root: Path) -> Workspace:
    """A workspace of its own that starts with what `learned_root` holds."""
    shutil.copytree(learned_root, tmp_path / "model")
    return Workspace(Options(tmp_path / "model", image_size=64))


@pytest.fixture
def fresh_workspace(tmp_path: Path) -> Workspace:
    """A workspace that has learned nothing."""
    return Workspace(Options(tmp_path / "fresh", image_size=64))


class Studies:
    """What the tasks use of a MONAI Label datastore: images in a folder, and which of them have a final label."""

    def __init__(self, folder: Path, labels: dict[str, Path], info: dict[str, Any] | None = None) -> None:
        self.folder, self.labels, self.info = folder, dict(labels), info or {}
        self.image_info: dict[str, dict[str, Any]] = {}
        self.vanished: set[str] = set()

    def list_images(self) -> list[str]:
        return [path.name.removesuffix(".nii.gz") for path in self.folder.glob("*.nii.gz")]

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        return [image for image in self.list_images() if image in self.labels]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        return [image for image in self.list_images() if image not in self.labels]

    def get_image_uri(self, image: str) -> str:
        if image in self.vanished:
            raise ArchiveError(f"The series {image} is no more.", 404)
        return str(self.folder / f"{image}.nii.gz") if image in self.list_images() else ""

    def get_image_info(self, image: str) -> dict[str, Any]:
        path = "" if image in self.vanished else self.get_image_uri(image)
        return {**self.image_info.get(image, {}), "path": path}

    def get_label_by_image_id(self, image: str, tag: str) -> str:
        return image if image in self.labels else ""

    def get_label_uri(self, label: str, tag: str) -> str:
        return str(self.labels[label])

    def get_label_info(self, label: str, tag: str) -> dict[str, Any]:
        return self.info


@pytest.fixture
def make_studies(studies: Path, label_files: dict[str, Path]) -> Callable[..., Studies]:
    """Build the studies as the tasks see them; those in `labelled` have their final label."""

    def build(labelled: Sequence[str] = ()) -> Studies:
        info = {"label_info": [{"name": name, "idx": value} for value, name in enumerate(STRUCTURES, start=1)]}
        return Studies(studies, {image: label_files[image] for image in labelled}, info)

    return build
