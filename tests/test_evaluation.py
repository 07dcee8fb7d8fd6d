import io
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from PIL import Image
from rich.console import Console
from torch import from_numpy

from ofl_sam2.errors import InputError
from ofl_sam2.evaluation import METRICS, CaseScore, EmptyConvention, Report, crop_to_union, evaluate_folders, score

SPACING = (0.5, 1.0, 3.0)
ORGAN = {1: "organ"}
ALL = tuple(METRICS)
MASKS = hnp.arrays(np.uint8, st.shared(hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), key="shape"))


def cube(start: tuple[int, int, int], side: int = 8, shape: tuple[int, int, int] = (24, 24, 24)) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(first, first + side) for first in start)] = 1
    return labels


def blobs(seed: int, shape: tuple[int, int, int] = (20, 18, 16)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    labels[3:14, 2:15, 4:12] = rng.integers(0, 3, (11, 13, 8))
    return labels


@pytest.mark.parametrize(("axis", "shift"), [(0, 3), (1, 3), (2, 3), (2, 1)])
def test_shifted_cube_has_the_analytic_scores(axis: int, shift: int) -> None:
    start = [8, 8, 8]
    start[axis] += shift
    scores = score(cube((start[0], start[1], start[2])), cube((8, 8, 8)), SPACING, ORGAN, ("dice", "hd95"))["organ"]
    assert scores["dice"] == pytest.approx((8 - shift) / 8)
    # The far face, over 5 % of the surface, lies exactly the shift away.
    assert scores["hd95"] == pytest.approx(shift * SPACING[axis])


def test_surface_dice_counts_the_area_within_the_tolerance() -> None:
    reference, prediction = cube((4, 4, 4), side=16), cube((6, 4, 4), side=16)
    spacing = (1.0, 1.0, 1.0)
    within = score(prediction, reference, spacing, ORGAN, ("surface_dice",), tolerance=2.0)["organ"]["surface_dice"]
    below = score(prediction, reference, spacing, ORGAN, ("surface_dice",), tolerance=0.5)["organ"]["surface_dice"]
    assert within == 1.0
    # Four faces of each cube agree but for a strip of 2 of 16 mm, two are off by 2 mm. Surface elements lie around the
    # corners of voxels, so half a voxel beside an edge counts with the edge.
    side_face, shifted_face = 14.5 / 16, (16**2 - 15**2) / 16**2
    assert below == pytest.approx((4 * side_face + shifted_face) / 6, abs=0.002)


def test_the_spacing_weighs_surface_dice() -> None:
    prediction, reference = cube((9, 8, 8)), cube((8, 8, 8))
    assert score(prediction, reference, (1.0, 1.0, 1.0), ORGAN, ("surface_dice",))["organ"]["surface_dice"] == 1.0
    assert score(prediction, reference, (2.0, 1.0, 1.0), ORGAN, ("surface_dice",))["organ"]["surface_dice"] < 0.9


def test_metrics_agree_with_monai_on_the_uncropped_volume() -> None:
    prediction, reference = blobs(0), blobs(1)
    scores = score(prediction, reference, SPACING, {1: "a", 2: "b"}, ALL)
    for value, name in ((1, "a"), (2, "b")):
        masks = [from_numpy(labels == value)[None, None] for labels in (prediction, reference)]
        whole = {
            "dice": compute_dice(*(mask.float() for mask in masks)),
            "hd95": compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=SPACING),
            "surface_dice": compute_surface_dice(
                *masks, [1.0], include_background=True, spacing=SPACING, use_subvoxels=True
            ),
        }
        assert scores[name] == pytest.approx({metric: value.item() for metric, value in whole.items()})


def test_a_mask_at_the_border_of_the_image_scores_like_one_inside() -> None:
    small = cube((0, 0, 0), 8, (8, 8, 9)), cube((0, 0, 1), 8, (8, 8, 9))
    large = tuple(np.pad(labels, 5) for labels in small)
    assert score(*small, SPACING, ORGAN, ALL) == score(large[0], large[1], SPACING, ORGAN, ALL)


def test_crop_keeps_every_voxel_and_one_around() -> None:
    prediction, reference = cube((3, 4, 5), 2) == 1, cube((6, 8, 22), 2) == 1
    cropped = crop_to_union(prediction, reference)
    assert [mask.shape for mask in cropped] == [(7, 8, 20)] * 2
    assert [mask.sum() for mask in cropped] == [8, 8]


@pytest.mark.parametrize(
    ("convention", "both_empty", "false_positive"),
    [(EmptyConvention.STANDARD, math.nan, 0.0), (EmptyConvention.SAMED, 0.0, 1.0)],
)
def test_dice_of_an_empty_reference(convention: EmptyConvention, both_empty: float, false_positive: float) -> None:
    nothing, something = np.zeros((24, 24, 24), np.uint8), cube((8, 8, 8))

    def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
        return score(prediction, reference, SPACING, ORGAN, empty=convention)["organ"]["dice"]

    assert dice(nothing, nothing) == pytest.approx(both_empty, nan_ok=True)
    assert dice(something, nothing) == false_positive
    assert dice(nothing, something) == 0.0


@pytest.mark.parametrize("convention", EmptyConvention)
def test_distances_of_empty_masks(convention: EmptyConvention) -> None:
    nothing, something = np.zeros((24, 24, 24), np.uint8), cube((8, 8, 8))
    pairs = [(nothing, nothing), (something, nothing), (nothing, something)]
    scores = [score(*pair, SPACING, ORGAN, ("hd95", "surface_dice"), empty=convention)["organ"] for pair in pairs]
    assert all(math.isnan(entry["hd95"]) for entry in scores)
    assert [entry["surface_dice"] for entry in scores] == pytest.approx([math.nan, 0.0, 0.0], nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(MASKS, MASKS)
def test_dice_is_symmetric_and_between_0_and_1(one: np.ndarray, other: np.ndarray) -> None:
    one, other = one % 2, other % 2
    value = score(one, other, SPACING, ORGAN)["organ"]["dice"]
    assert value == pytest.approx(score(other, one, SPACING, ORGAN)["organ"]["dice"], nan_ok=True)
    assert math.isnan(value) if not (one.any() or other.any()) else 0.0 <= value <= 1.0


@settings(deadline=None, max_examples=40)
@given(MASKS, MASKS)
def test_distances_are_symmetric_and_bounded(one: np.ndarray, other: np.ndarray) -> None:
    one, other = one % 2, other % 2
    forth = score(one, other, SPACING, ORGAN, ("hd95", "surface_dice"))["organ"]
    assert forth == pytest.approx(score(other, one, SPACING, ORGAN, ("hd95", "surface_dice"))["organ"], nan_ok=True)
    if one.any() and other.any():
        assert 0.0 <= forth["hd95"] <= np.linalg.norm(np.multiply(one.shape, SPACING))
        assert 0.0 <= forth["surface_dice"] <= 1.0


def test_only_the_given_slices_count() -> None:
    reference, prediction = cube((8, 8, 8)), cube((8, 8, 8))
    prediction[:, :, 8] = 0
    prediction[0, 0, 20] = 1
    assert score(prediction, reference, SPACING, ORGAN)["organ"]["dice"] < 1.0
    assert score(prediction, reference, SPACING, ORGAN, slices=(2, [9, 11, 15]))["organ"]["dice"] == 1.0
    assert score(prediction, reference, SPACING, ORGAN, ALL, slices=(2, range(9, 16)))["organ"]["hd95"] == 0.0


def test_dice_of_a_4d_sequence() -> None:
    reference = np.stack([cube((8, 8, 8)), cube((8, 8, 8))], axis=-1)
    prediction = reference.copy()
    prediction[..., 1] = 0
    assert score(prediction, reference, SPACING, ORGAN)["organ"]["dice"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 4, 5), {}, "differ in shape"),
        ((4, 4, 4), {"structures": {}}, "no structure to score"),
        ((4, 4, 4), {"metrics": ("dice", "iou")}, r"Unknown metrics \['iou'\]; choose from dice, hd95, surface_dice"),
        ((4, 4, 4), {"metrics": ()}, "Unknown metrics"),
        ((4, 4, 4), {"metrics": ("hd95",), "spacing": (1.0, 0.0, 1.0)}, "positive spacings"),
        ((4, 4, 4), {"metrics": ("hd95",), "slices": (2, [0, 2])}, "consecutive slices"),
    ],
)
def test_unusable_arguments_are_refused(shape: tuple[int, ...], options: dict, message: str) -> None:
    arguments = {"spacing": SPACING, "structures": ORGAN} | options
    with pytest.raises(InputError, match=message):
        score(np.ones(shape, np.uint8), np.ones((4, 4, 4), np.uint8), **arguments)


def test_distances_of_a_sequence_are_refused() -> None:
    with pytest.raises(InputError, match="three axes"):
        score(np.ones((3, 3, 3, 2), np.uint8), np.ones((3, 3, 3, 2), np.uint8), SPACING, ORGAN, ("hd95",))


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


def test_folders_are_paired_by_case_name(tmp_path: Path) -> None:
    for case, shift in (("p1", 0), ("p2", 2), ("p10", 4)):
        save(tmp_path / "labels" / f"{case}.nii.gz", cube((8, 8, 8)))
        save(tmp_path / "predictions" / f"{case}.nii", cube((8 + shift, 8, 8)))
    save(tmp_path / "labels" / "training.nii.gz", 2 * cube((8, 8, 8)))
    report = evaluate_folders(tmp_path / "predictions", tmp_path / "labels", metrics=("dice", "hd95"))
    assert [case.case for case in report.cases] == ["p1", "p2", "p10"]
    assert report.structures == ("structure_1",)
    assert report.values("structure_1", "dice") == pytest.approx([1.0, 0.75, 0.5])
    assert report.values("structure_1", "hd95") == pytest.approx([0.0, 1.0, 2.0])


def test_chosen_cases_structures_and_convention(tmp_path: Path) -> None:
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


def test_a_prediction_without_reference_is_named(tmp_path: Path) -> None:
    save(tmp_path / "labels" / "a.nii.gz", cube((8, 8, 8)))
    for case in ("a", "b", "c"):
        save(tmp_path / "predictions" / f"{case}.nii.gz", cube((8, 8, 8)))
    with pytest.raises(InputError, match="no reference for b, c"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "labels")
    with pytest.raises(InputError, match="missing"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "labels", cases=["missing"])


@pytest.mark.parametrize(("shape", "spacing"), [((24, 24, 23), SPACING), ((24, 24, 24), (0.5, 1.0, 3.3))])
def test_another_grid_is_refused(tmp_path: Path, shape: tuple, spacing: tuple) -> None:
    save(tmp_path / "labels" / "a.nii.gz", cube((8, 8, 8)))
    save(tmp_path / "predictions" / "a.nii.gz", cube((8, 8, 8), shape=shape), spacing)
    with pytest.raises(InputError, match=r"has shape|different places in space"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "labels")


def test_what_is_in_no_score_is_named(tmp_path: Path) -> None:
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


def test_slices_that_nobody_drew_in_need_not_count(tmp_path: Path) -> None:
    drawn, spacing = cube((8, 8, 8)), (1.0, 1.0, 4.0)
    partly = drawn.copy()
    partly[:, :, 12:] = 0
    save(tmp_path / "labels" / "a.nii.gz", partly, spacing)
    save(tmp_path / "predictions" / "a.nii.gz", drawn, spacing)
    folders = tmp_path / "predictions", tmp_path / "labels"
    assert evaluate_folders(*folders).mean()["dice"] == pytest.approx(2 / 3)
    assert evaluate_folders(*folders, ignore_empty_slices=True).mean()["dice"] == 1.0


def test_a_reference_may_be_stored_in_another_order(tmp_path: Path) -> None:
    save(tmp_path / "predictions" / "a.nii.gz", cube((3, 8, 8)))
    image = nib.load(tmp_path / "predictions" / "a.nii.gz")
    (tmp_path / "labels").mkdir()
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("SAL", (("L", "R"), ("P", "A"), ("I", "S"))))
    nib.save(turned, tmp_path / "labels" / "a.nii.gz")
    report = evaluate_folders(tmp_path / "predictions", tmp_path / "labels", metrics=ALL)
    assert report.cases[0].scores["structure_1"] == {"dice": 1.0, "hd95": 0.0, "surface_dice": 1.0}
