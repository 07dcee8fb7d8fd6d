"""Scores of one label map."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from torch import from_numpy

from ofl_sam2.errors import InputError
from ofl_sam2.metrics import METRICS, EmptyConvention, crop_to_union, score

MakeCube = Callable[..., np.ndarray]
SPACING = (0.5, 1.0, 3.0)
ORGAN = {1: "organ"}
ALL = tuple(METRICS)
MASKS = hnp.arrays(np.uint8, st.shared(hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), key="shape"))


def blobs(seed: int, shape: tuple[int, int, int] = (20, 18, 16)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    labels[3:14, 2:15, 4:12] = rng.integers(0, 3, (11, 13, 8))
    return labels


@pytest.mark.parametrize(("axis", "shift"), [(0, 3), (1, 3), (2, 3), (2, 1)])
def test_shifted_cube_has_the_analytic_scores(axis: int, shift: int, cube: MakeCube) -> None:
    start = [8, 8, 8]
    start[axis] += shift
    scores = score(cube((start[0], start[1], start[2])), cube((8, 8, 8)), SPACING, ORGAN, ("dice", "hd95"))["organ"]
    assert scores["dice"] == pytest.approx((8 - shift) / 8)
    # The far face, over 5 % of the surface, lies exactly the shift away.
    assert scores["hd95"] == pytest.approx(shift * SPACING[axis])


def test_surface_dice_counts_the_area_within_the_tolerance(cube: MakeCube) -> None:
    reference, prediction = cube((4, 4, 4), side=16), cube((6, 4, 4), side=16)
    spacing = (1.0, 1.0, 1.0)
    within = score(prediction, reference, spacing, ORGAN, ("surface_dice",), tolerance=2.0)["organ"]["surface_dice"]
    below = score(prediction, reference, spacing, ORGAN, ("surface_dice",), tolerance=0.5)["organ"]["surface_dice"]
    assert within == 1.0
    # Four faces of each cube agree but for a strip of 2 of 16 mm, two are off by 2 mm. Surface elements lie around the
    # corners of voxels, so half a voxel beside an edge counts with the edge.
    side_face, shifted_face = 14.5 / 16, (16**2 - 15**2) / 16**2
    assert below == pytest.approx((4 * side_face + shifted_face) / 6, abs=0.002)


def test_the_spacing_weighs_surface_dice(cube: MakeCube) -> None:
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


def test_a_mask_at_the_border_of_the_image_scores_like_one_inside(cube: MakeCube) -> None:
    small = cube((0, 0, 0), 8, (8, 8, 9)), cube((0, 0, 1), 8, (8, 8, 9))
    large = tuple(np.pad(labels, 5) for labels in small)
    assert score(*small, SPACING, ORGAN, ALL) == score(large[0], large[1], SPACING, ORGAN, ALL)


def test_crop_keeps_every_voxel_and_one_around(cube: MakeCube) -> None:
    prediction, reference = cube((3, 4, 5), 2) == 1, cube((6, 8, 22), 2) == 1
    cropped = crop_to_union(prediction, reference)
    assert [mask.shape for mask in cropped] == [(7, 8, 20)] * 2
    assert [mask.sum() for mask in cropped] == [8, 8]


@pytest.mark.parametrize(
    ("convention", "both_empty", "false_positive"),
    [(EmptyConvention.STANDARD, math.nan, 0.0), (EmptyConvention.SAMED, 0.0, 1.0)],
)
def test_dice_of_an_empty_reference(
    convention: EmptyConvention, both_empty: float, false_positive: float, cube: MakeCube
) -> None:
    nothing, something = np.zeros((24, 24, 24), np.uint8), cube((8, 8, 8))

    def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
        return score(prediction, reference, SPACING, ORGAN, empty=convention)["organ"]["dice"]

    assert dice(nothing, nothing) == pytest.approx(both_empty, nan_ok=True)
    assert dice(something, nothing) == false_positive
    assert dice(nothing, something) == 0.0


@pytest.mark.parametrize("convention", EmptyConvention)
def test_distances_of_empty_masks(convention: EmptyConvention, cube: MakeCube) -> None:
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


def test_only_the_given_slices_count(cube: MakeCube) -> None:
    reference, prediction = cube((8, 8, 8)), cube((8, 8, 8))
    prediction[:, :, 8] = 0
    prediction[0, 0, 20] = 1
    assert score(prediction, reference, SPACING, ORGAN)["organ"]["dice"] < 1.0
    assert score(prediction, reference, SPACING, ORGAN, slices=(2, [9, 11, 15]))["organ"]["dice"] == 1.0
    assert score(prediction, reference, SPACING, ORGAN, ALL, slices=(2, range(9, 16)))["organ"]["hd95"] == 0.0


def test_dice_of_a_4d_sequence(cube: MakeCube) -> None:
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
