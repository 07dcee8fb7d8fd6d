"""The main job from end to end: learn from two labelled volumes, segment the others, score and picture the result."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofl_sam2 import __version__
from ofl_sam2.console import err, out, peak_memory_gb, write_json
from ofl_sam2.dataset import Case, find_cases, load_case
from ofl_sam2.errors import InputError
from ofl_sam2.evaluation import CaseScore, Report
from ofl_sam2.files import read_labels
from ofl_sam2.jobs import check_all_segmented, learn_cases, open_segmenter, segment_images, train_cases
from ofl_sam2.metrics import score
from ofl_sam2.model_index import is_model
from ofl_sam2.overlay import Overlay, case_overlay, summary_figure
from ofl_sam2.progress import CancelToken
from ofl_sam2.training.cohort import STRUCTURES, write_cohort
from ofl_sam2.training.settings import TrainingSettings

SHOTS = 2
_MADE = "demo.json"
_SYNTHETIC_CASES = 8
_MOST_CASES = 20


@dataclass(frozen=True)
class DemoData:
    """Where the volumes are, which to learn from and which to segment.

    Attributes:
        title: what they are.
        folder: holds `images/` and `labels/`.
        shots: cases to learn from.
        others: cases to segment.
        structures: label value -> name.
    """

    title: str
    folder: Path
    shots: tuple[str, ...]
    others: tuple[str, ...]
    structures: dict[int, str]

    def case(self, name: str) -> Case:
        """One of the cases."""
        return find_cases(self.folder / "images", self.folder / "labels", [name])[0]


def run_demo(output: Path, minutes: float, download: bool, cancel: CancelToken) -> None:
    """Run the demo; what is finished already is not done again.

    Args:
        output: folder for model, label maps, pictures and report.
        minutes: training time after learning; 0 for none.
        download: fetch MSD Task04 first.
        cancel: to stop; finished cases are kept.

    Raises:
        InputError: a negative training time, or data that cannot be had or read.
        Cancelled: stopped by `cancel`.
    """
    if not 0 <= minutes < math.inf:
        raise InputError(f"Training for {minutes:g} minutes is not possible. Give a number from 0 for --minutes.")
    data = demo_data(output, download)
    out.print(f"Data: {data.title}. Learning from {', '.join(data.shots)}; {len(data.others)} cases to segment.")
    model, labels = output / "model", output / "labels"
    if not _learned(model, data, minutes):
        _forget(output, data)
        _learn(model, data, minutes, cancel)
    images = [data.case(name).image for name in data.others]
    fresh, failures = segment_images(model, images, labels, True, cancel=cancel)
    check_all_segmented(failures)
    timings = _merged_timings(output / "report.json", fresh)
    report = Report(tuple(_score(data, labels, name) for name in data.others))
    for name in data.others:
        picture = output / "overlays" / f"{name}.png"
        if name in fresh or not picture.exists():
            case_overlay(picture, _overlay(data, labels, name))
    summary = summary_figure(output / "summary.png", report, lambda name: _overlay(data, labels, name))
    _write_report(output, data, report, timings, minutes)
    out.print(report.table())
    seconds = [entry["seconds"] for entry in timings.values()]
    speed = f"{sum(seconds) / len(seconds):.1f} s per volume, " if seconds else ""
    out.print(f"{speed}peak memory {peak_memory_gb():.2f} GB.")
    out.print(f"Label maps: {labels}\nPictures: {output / 'overlays'}, {summary}\nReport: {output / 'report.json'}")


def demo_data(output: Path, download: bool) -> DemoData:
    """Choose the volumes: downloaded, those of OFL_SAM2_DATA, or synthetic ones."""
    if download:
        return _hippocampus(_download(output / "data"))
    folder = Path(os.environ.get("OFL_SAM2_DATA", "")) / "msd_hippocampus"
    if os.environ.get("OFL_SAM2_DATA") and folder.is_dir():
        return _hippocampus(folder)
    err.print("OFL_SAM2_DATA names no folder that holds msd_hippocampus, so the demo uses SYNTHETIC volumes.")
    folder = output / "synthetic_data"
    if not (folder / "labels").is_dir() or len(_labelled_names(folder)) < _SYNTHETIC_CASES:
        write_cohort(folder, _SYNTHETIC_CASES, seed=1)
    names = _labelled_names(folder)
    return DemoData("synthetic volumes (no real anatomy)", folder, names[:SHOTS], names[SHOTS:], STRUCTURES)


def _hippocampus(folder: Path) -> DemoData:
    """MSD Task04; its `splits.json`, where there is one, says what to learn from and what to score on."""
    splits = folder / "splits.json"
    if splits.is_file():
        listed = json.loads(splits.read_text())
        shots, others = listed["dev_shots"][:SHOTS], listed["dev_val"]
    else:
        names = _labelled_names(folder)
        shots, others = names[:SHOTS], names[SHOTS : SHOTS + _MOST_CASES]
    title = "MSD Task04 hippocampus MR (CC-BY-SA 4.0)"
    return DemoData(title, folder, tuple(shots), tuple(others), {1: "anterior", 2: "posterior"})


def _labelled_names(folder: Path) -> tuple[str, ...]:
    return tuple(case.name for case in find_cases(folder / "images", folder / "labels") if case.label)


def _download(root: Path) -> Path:
    """Fetch MSD Task04 by MONAI and return a folder with `images/` and `labels/`."""
    from monai.apps import DecathlonDataset

    root.mkdir(parents=True, exist_ok=True)
    try:
        DecathlonDataset(root, "Task04_Hippocampus", "training", download=True, cache_num=0, val_frac=0.0)
    except Exception as error:
        raise InputError(
            f"MSD Task04 could not be downloaded ({error}). Check the connection, or set OFL_SAM2_DATA to a folder "
            "that holds msd_hippocampus/images and msd_hippocampus/labels."
        ) from error
    task = root / "Task04_Hippocampus"
    for plain, released in (("images", "imagesTr"), ("labels", "labelsTr")):
        if not (task / plain).exists():
            (task / plain).symlink_to(released)
    return task


def _learned(model: Path, data: DemoData, minutes: float) -> bool:
    """Whether the model was learned, and trained for as long, on these cases."""
    made = model / _MADE
    return is_model(model) and made.is_file() and json.loads(made.read_text()) == _recipe(data, minutes)


def _recipe(data: DemoData, minutes: float) -> dict[str, Any]:
    return {"data": data.title, "learned_from": list(data.shots), "training_minutes": minutes}


def _forget(output: Path, data: DemoData) -> None:
    """Remove the results of an earlier model, which would count as done."""
    (output / "model" / _MADE).unlink(missing_ok=True)
    for name in data.others:
        (output / "labels" / f"{name}.nii.gz").unlink(missing_ok=True)
    (output / "report.json").unlink(missing_ok=True)


def _learn(model: Path, data: DemoData, minutes: float, cancel: CancelToken) -> None:
    structures = ",".join(f"{value}={name}" for value, name in data.structures.items())
    places = (data.folder / "images", data.folder / "labels", model)
    segmenter = open_segmenter(model, fresh=True)
    learn_cases(segmenter, *places, data.shots, structures, False, cancel)
    if minutes > 0:
        out.print(f"Training for {minutes:g} minutes.")
        train_cases(segmenter, *places, data.shots, TrainingSettings(minutes=minutes), False, cancel)
    write_json(model / _MADE, _recipe(data, minutes))


def _overlay(data: DemoData, labels: Path, name: str) -> Overlay:
    case = load_case(data.case(name))
    prediction = read_labels(labels / f"{name}.nii.gz").voxels
    return Overlay(case.volume, prediction, data.structures, case.labels)


def _score(data: DemoData, labels: Path, name: str) -> CaseScore:
    case = load_case(data.case(name))
    prediction = read_labels(labels / f"{name}.nii.gz").voxels
    return CaseScore(name, score(prediction, case.labels, case.volume.spacing, data.structures))


def _merged_timings(report: Path, fresh: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Quality and seconds of all cases, those of an earlier run included."""
    earlier = json.loads(report.read_text())["segmentation"] if report.is_file() else {}
    return {**earlier, **fresh}


def _write_report(output: Path, data: DemoData, report: Report, timings: dict[str, Any], minutes: float) -> None:
    write_json(
        output / "report.json",
        {
            "version": __version__,
            **_recipe(data, minutes),
            "scores": json.loads(report.to_json()),
            "segmentation": timings,
            "peak_memory_gb": round(peak_memory_gb(), 3),
        },
    )
