"""Reports of scores, and folders that are scored."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ofl_sam2.errors import InputError
from ofl_sam2.evaluation import CaseScore, Report, evaluate_folders
from ofl_sam2.metrics import METRICS, EmptyConvention

MakeCube = Callable[..., np.ndarray]
SPACING = (0.5, 1.0, 3.0)
ORGAN = {1: "organ"}


@pytest.fixture
def report() -> Report:
    return Report(
        (
            CaseScore("a", {"liver": {"dice": 0.9, "hd95": 2.0}, "spleen": {"dice": 0.5, "hd95": math.nan}}),
            CaseScore("b", {"liver": {"dice": 0.7, "hd95": 4.0}, "spleen": {"dice": math.nan, "hd95": math.nan}}),
        )
    )


def test_every_structure_weighs_the_same_in_the_mean(report: Report) -> None:
    means = report.mean_per_structure()
    assert means["liver"] == pytest.approx({"dice": 0.8, "hd95": 3.0})
    assert means["spleen"] == pytest.approx({"dice": 0.5, "hd95": math.nan}, nan_ok=True)
    assert report.mean() == pytest.approx({"dice": 0.65, "hd95": 3.0})
    assert [case.mean("dice") for case in report.cases] == pytest.approx([0.7, 0.7])


def test_undefined_values_are_counted(report: Report) -> None:
    assert report.undefined() == {"liver": {"dice": 0, "hd95": 0}, "spleen": {"dice": 1, "hd95": 2}}


def test_json_is_standard_and_complete(report: Report) -> None:
    content = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert content["empty_convention"] == "standard"
    assert content["cases"]["b"]["spleen"] == {"dice": None, "hd95": None}
    assert content["mean"] == pytest.approx({"dice": 0.65, "hd95": 3.0})
    assert content["mean_per_structure"]["spleen"]["hd95"] is None
    assert content["undefined"]["spleen"] == {"dice": 1, "hd95": 2}


def test_table_shows_cases_means_and_undefined_values(report: Report) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table())
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["┃", "case", "┃", "metric", "┃", "liver", "┃", "spleen", "┃", "mean", "┃"] in lines
    assert ["│", "a", "│", "Dice", "│", "0.900", "│", "0.500", "│", "0.700", "│"] in lines
    assert ["│", "mean", "│", "Dice", "│", "0.800", "│", "0.500", "│", "0.650", "│"] in lines
    assert ["│", "undefined", "│", "Dice", "│", "0", "│", "1", "│", "│"] in lines


def test_a_report_without_cases_is_refused() -> None:
    with pytest.raises(InputError, match="no cases"):
        Report(())


def save(path: Path, labels: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.diag([*spacing, 1.0])), path)


def save_frames(folder: Path, masks: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for name, mask in masks.items():
        Image.fromarray(mask).save(folder / f"{name}.png")


def test_folders_are_paired_by_case_name(tmp_path: Path, cube: MakeCube) -> None:
    for case, shift in (("p1", 0), ("p2", 2), ("p10", 4)):
        save(tmp_path / "labels" / f"{case}.nii.gz", cube((8, 8, 8)))
        save(tmp_path / "predictions" / f"{case}.nii", cube((8 + shift, 8, 8)))
    save(tmp_path / "labels" / "training.nii.gz", 2 * cube((8, 8, 8)))
    report = evaluate_folders(tmp_path / "predictions", tmp_path / "labels", metrics=("dice", "hd95"))
    assert [case.case for case in report.cases] == ["p1", "p2", "p10"]
    assert report.structures == ("structure_1",)
    assert report.values("structure_1", "dice") == pytest.approx([1.0, 0.75, 0.5])
    assert report.values("structure_1", "hd95") == pytest.approx([0.0, 1.0, 2.0])


def test_chosen_cases_structures_and_convention(tmp_path: Path, cube: MakeCube) -> None:
    for case in ("a", "b"):
        save(tmp_path / "labels" / f"{case}.nii.gz", cube((8, 8, 8)))
        save(tmp_path / "predictions" / f"{case}.nii.gz", 2 * cube((8, 8, 8)))
    folders = tmp_path / "predictions", tmp_path / "labels"
    names = {1: "liver", 2: "spleen"}
    report = evaluate_folders(*folders, cases=["b"], structures=names, empty=EmptyConvention.SAMED)
    assert [case.case for case in report.cases] == ["b"]
    assert report.cases[0].scores == {"liver": {"dice": 0.0}, "spleen": {"dice": 1.0}}
    assert report.empty is EmptyConvention.SAMED


def test_frames_without_a_reference_do_not_count(tmp_path: Path) -> None:
    plane = np.zeros((6, 9), np.uint8)
    plane[1:4, 2:7] = 1
    save_frames(tmp_path / "predictions" / "video", {"f1": plane, "f2": 0 * plane, "f3": 0 * plane})
    save_frames(tmp_path / "labels" / "video", {"f1": plane, "f3": plane})
    folders = tmp_path / "predictions", tmp_path / "labels"
    assert evaluate_folders(*folders).mean()["dice"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="no size in mm"):
        evaluate_folders(*folders, metrics=("hd95",))


def test_a_prediction_without_reference_is_named(tmp_path: Path, cube: MakeCube) -> None:
    save(tmp_path / "labels" / "a.nii.gz", cube((8, 8, 8)))
    for case in ("a", "b", "c"):
        save(tmp_path / "predictions" / f"{case}.nii.gz", cube((8, 8, 8)))
    with pytest.raises(InputError, match="no reference for b, c"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "labels")
    with pytest.raises(InputError, match="missing"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "labels", cases=["missing"])


@pytest.mark.parametrize(("shape", "spacing"), [((24, 24, 23), SPACING), ((24, 24, 24), (0.5, 1.0, 3.3))])
def test_another_grid_is_refused(tmp_path: Path, shape: tuple, spacing: tuple, cube: MakeCube) -> None:
    save(tmp_path / "labels" / "a.nii.gz", cube((8, 8, 8)))
    save(tmp_path / "predictions" / "a.nii.gz", cube((8, 8, 8), shape=shape), spacing)
    with pytest.raises(InputError, match=r"has shape|different places in space"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "labels")


def test_what_is_in_no_score_is_named(tmp_path: Path, cube: MakeCube) -> None:
    for case in ("a", "b", "c"):
        save(tmp_path / "labels" / f"{case}.nii.gz", cube((8, 8, 8)))
    predicted = cube((8, 8, 8))
    predicted[0, 0, 0] = 3
    save(tmp_path / "predictions" / "a.nii.gz", predicted)
    report = evaluate_folders(tmp_path / "predictions", tmp_path / "labels", tolerance=2.0)
    assert (report.not_predicted, report.not_scored) == (("b", "c"), (3,))
    content = json.loads(report.to_json())
    assert (content["not_predicted"], content["not_scored"]) == (["b", "c"], [3])
    assert content["surface_dice_tolerance_mm"] == 2.0


def test_slices_that_nobody_drew_in_need_not_count(tmp_path: Path, cube: MakeCube) -> None:
    drawn, spacing = cube((8, 8, 8)), (1.0, 1.0, 4.0)
    partly = drawn.copy()
    partly[:, :, 12:] = 0
    save(tmp_path / "labels" / "a.nii.gz", partly, spacing)
    save(tmp_path / "predictions" / "a.nii.gz", drawn, spacing)
    folders = tmp_path / "predictions", tmp_path / "labels"
    assert evaluate_folders(*folders).mean()["dice"] == pytest.approx(2 / 3)
    assert evaluate_folders(*folders, ignore_empty_slices=True).mean()["dice"] == 1.0


def test_a_reference_may_be_stored_in_another_order(tmp_path: Path, cube: MakeCube) -> None:
    save(tmp_path / "predictions" / "a.nii.gz", cube((3, 8, 8)))
    image = nib.load(tmp_path / "predictions" / "a.nii.gz")
    (tmp_path / "labels").mkdir()
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("SAL", (("L", "R"), ("P", "A"), ("I", "S"))))
    nib.save(turned, tmp_path / "labels" / "a.nii.gz")
    report = evaluate_folders(tmp_path / "predictions", tmp_path / "labels", metrics=tuple(METRICS))
    assert report.cases[0].scores["structure_1"] == {"dice": 1.0, "hd95": 0.0, "surface_dice": 1.0}
