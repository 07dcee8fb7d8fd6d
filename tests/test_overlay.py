from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofl_sam2.errors import InputError
from ofl_sam2.evaluation import CaseScore, Report
from ofl_sam2.overlay import PALETTE, Overlay, case_overlay, curve, representative, summary_figure
from ofl_sam2.volume import Volume

STRUCTURES = {1: "anterior", 2: "posterior"}


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)])


def where(path: Path, colour: str) -> np.ndarray:
    """Pixels (row, column) of nearly this colour, `(n, 2)`."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.argwhere(np.abs(pixels - rgb(colour)).max(axis=-1) <= 12)


def overlay(shape: tuple[int, ...] = (40, 50, 12), affine: np.ndarray | None = None, **options: object) -> Overlay:
    voxels = np.random.default_rng(0).integers(0, 500, shape).astype(np.int16)
    prediction = np.zeros(shape, np.uint8)
    prediction[10:20, 10:40, 2:10] = 1
    prediction[22:32, 10:40, 2:10] = 2
    affine = np.eye(4) if affine is None else affine
    return Overlay(Volume(voxels, affine, "case"), prediction, STRUCTURES, **options)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_outlines_have_the_colours_of_the_structures(tmp_path: Path, axis: int) -> None:
    path = case_overlay(tmp_path / "case.png", overlay(axis=axis))
    assert Image.open(path).format == "PNG"
    width, height = Image.open(path).size
    assert 1000 <= width <= 2000 and 300 <= height <= 2000
    assert len(where(path, PALETTE[0])) > 200 and len(where(path, PALETTE[1])) > 200
    assert len(where(path, PALETTE[2])) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["case.png"]


def test_the_patients_right_is_on_the_left(tmp_path: Path) -> None:
    # Structure 2 has the larger R coordinate, whichever way the array runs.
    for flip in (1.0, -1.0):
        case = overlay(affine=np.diag([flip, 1.0, 1.0, 1.0]))
        path = case_overlay(tmp_path / "case.png", case, slices=1)
        panel = np.asarray(Image.open(path)).shape[0] * 0.85
        columns = [np.median([column for row, column in where(path, PALETTE[k]) if row < panel]) for k in (0, 1)]
        assert (columns[1] < columns[0]) == (flip > 0)


def test_pixels_keep_their_aspect_in_mm(tmp_path: Path) -> None:
    def stretch(row_spacing: float) -> float:
        case = overlay(affine=np.diag([1.0, row_spacing, 1.0, 1.0]))
        found = where(case_overlay(tmp_path / "case.png", case, slices=1), PALETTE[0])
        rows, columns = found[found[:, 0] < found[:, 0].max() - 60].T
        return float(np.ptp(rows) / np.ptp(columns))

    assert stretch(1.0) == pytest.approx(3.0, rel=0.1)
    assert stretch(0.5) == pytest.approx(1.5, rel=0.1)


def test_the_reference_adds_white_dashes(tmp_path: Path) -> None:
    case = overlay()
    without = case_overlay(tmp_path / "without.png", case)
    reference = np.roll(case.prediction, 3, axis=1)
    with_reference = case_overlay(tmp_path / "with.png", Overlay(case.volume, case.prediction, STRUCTURES, reference))
    assert len(where(with_reference, "#ffffff")) > len(where(without, "#ffffff")) + 500


def test_slices_are_few_and_hold_a_structure(tmp_path: Path) -> None:
    heights = [Image.open(case_overlay(tmp_path / f"{n}.png", overlay(), slices=n)).size[1] for n in (4, 8, 30)]
    assert heights[0] < heights[1] == heights[2]
    single = overlay()
    single.prediction[..., :5] = single.prediction[..., 6:] = 0
    path = case_overlay(tmp_path / "single.png", single)
    assert Image.open(path).size[0] < 600 and len(where(path, PALETTE[0])) > 200


def test_nothing_to_outline_shows_the_image(tmp_path: Path) -> None:
    case = overlay()
    case.prediction[...] = 0
    width, height = Image.open(case_overlay(tmp_path / "case.png", case)).size
    assert width > 1000 and height > 600


def test_sequences_are_drawn(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (30, 20, 5, 3)).astype(np.uint8)
    mask = np.zeros((30, 20, 5), np.uint8)
    mask[5:20, 5:15] = 1
    colour = Volume(frames, np.eye(4), "video", frames=True, colour=True)
    assert len(where(case_overlay(tmp_path / "video.png", Overlay(colour, mask, {1: "tool"})), PALETTE[0])) > 200
    cine = Volume(np.repeat(frames, 2, axis=2)[..., 0][..., None].repeat(3, -1), np.eye(4), "cine")
    labels = np.zeros(cine.grid, np.uint8)
    labels[5:20, 5:15, 3, 1] = 1
    assert len(where(case_overlay(tmp_path / "cine.png", Overlay(cine, labels, {1: "wall"})), PALETTE[0])) > 200


def test_labels_of_another_grid_are_refused(tmp_path: Path) -> None:
    case = overlay()
    with pytest.raises(InputError, match="does not fit"):
        case_overlay(tmp_path / "case.png", Overlay(case.volume, case.prediction[:-1], STRUCTURES))
    assert list(tmp_path.iterdir()) == []


def report(*dices: float) -> Report:
    return Report(tuple(CaseScore(f"c{n}", {"anterior": {"dice": d, "hd95": 1 - d}}) for n, d in enumerate(dices)))


def test_representative_cases() -> None:
    assert representative(report(0.5, 0.9, 0.7, 0.8, 0.6)) == {"best": "c1", "median": "c2", "worst": "c0"}
    assert representative(report(0.5, 0.9, 0.7), "hd95") == {"best": "c1", "median": "c2", "worst": "c0"}
    assert representative(report(0.5, 0.9)) == {"best": "c1", "worst": "c0"}
    assert representative(report(0.5)) == {"best": "c0"}
    assert representative(report(float("nan"))) == {}


@pytest.mark.parametrize("dices", [(0.9, 0.5, 0.7, 0.8), (0.9,), (float("nan"),)])
def test_summary_loads_only_the_cases_it_shows(tmp_path: Path, dices: tuple[float, ...]) -> None:
    loaded = []

    def overlay_of(case: str) -> Overlay:
        loaded.append(case)
        return overlay()

    path = summary_figure(tmp_path / "summary.png", report(*dices), overlay_of)
    assert loaded == list(representative(report(*dices)).values())
    assert Image.open(path).size[0] == 1725
    assert (len(where(path, PALETTE[1])) > 200) == bool(loaded)


def test_curve_draws_every_series(tmp_path: Path) -> None:
    series = {"memory": ([1, 2, 4], [0.6, 0.7, 0.8]), "learner": ([1, 2, 4], [0.7, 0.8, 0.9])}
    path = curve(tmp_path / "deep" / "curve.png", series, "labelled volumes", "Dice", "Dice by volumes")
    assert len(where(path, PALETTE[0])) > 200 and len(where(path, PALETTE[1])) > 200
    assert Image.open(path).size == (900, 570)


def test_real_volume(tmp_path: Path, data_dir: Path) -> None:
    from ofl_sam2.files import read_labels, read_volume

    folder = data_dir / "msd_hippocampus"
    name = sorted(path.name for path in (folder / "labels").glob("*.nii.gz"))[0]
    labels = read_labels(folder / "labels" / name).voxels
    case = Overlay(read_volume(folder / "images" / name), np.roll(labels, 1, axis=0), STRUCTURES, labels, axis=1)
    path = case_overlay(tmp_path / "case.png", case)
    assert len(where(path, PALETTE[0])) > 500 and len(where(path, PALETTE[1])) > 500
