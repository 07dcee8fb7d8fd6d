"""From probabilities to what is drawn."""

from itertools import permutations
from operator import itemgetter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ofl_sam2.canvas import Canvas
from ofl_sam2.drawing import Drawing, scored
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.progress import Watch
from ofl_sam2.volume import Volume, canonical_view
from ofl_sam2.window import Window


@pytest.fixture
def make_drawing(make_segmenter):
    def build(volume, **switches):
        segmenter = make_segmenter(**switches)
        return Drawing(segmenter, segmenter.viewpoint, volume, Watch(None, None))

    return build


def dot(grid, at):
    probabilities = torch.zeros(1, *grid)
    probabilities[(0, *at)] = 1
    return probabilities


def width(row, spacing):
    """Standard deviation in mm of a profile."""
    places = np.arange(len(row)) * spacing
    mean = (places * row).sum() / row.sum()
    return float(np.sqrt((row * (places - mean) ** 2).sum() / row.sum()))


def test_smoothing_is_as_wide_in_mm_along_all_axes(make_drawing):
    volume = Volume(np.zeros((21, 21, 21), np.float32), np.diag([0.5, 0.5, 1.0, 1.0]), "a")
    smooth = make_drawing(volume, smoothing=2.0)._smoothed(dot((21, 21, 21), (10, 10, 10)))[0].numpy()
    assert smooth.sum() == pytest.approx(1, abs=0.01)
    assert width(smooth.sum((1, 2)), 0.5) == pytest.approx(1, rel=0.05)
    assert width(smooth.sum((0, 1)), 1.0) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("times", [(), (2,)])
def test_smoothing_rounds_alike_in_every_stored_order(make_drawing, order, times):
    def smoothed(affine, stored):
        return make_drawing(Volume(stored, affine, "a"))._smoothed(torch.from_numpy(stored[None]))[0].numpy()

    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    voxels = np.random.default_rng(0).random((14, 13, 12, *times), np.float32)
    turned = affine[:, [*order, 3]] * (-1, 1, -1, 1)
    stored = np.ascontiguousarray(voxels.transpose(*order, *range(3, voxels.ndim))[::-1, :, ::-1])
    assert np.array_equal(canonical_view(smoothed(turned, stored), turned), smoothed(affine, voxels))


def test_thick_slices_and_times_are_not_mixed(make_drawing):
    thick = Volume(np.zeros((9, 9, 5), np.float32), np.diag([1.0, 1.0, 8.0, 1.0]), "a")
    sequence = Volume(np.zeros((9, 9, 5, 4), np.float32), np.diag([1.0, 1.0, 8.0, 1.0]), "a")
    frames = Volume(np.zeros((9, 9, 5), np.float32), np.eye(4), "a", frames=True)
    for volume, at in ((thick, (4, 4, 2)), (sequence, (4, 4, 2, 1)), (frames, (4, 4, 2))):
        smooth = make_drawing(volume)._smoothed(dot(volume.grid, at))[0].numpy()
        others = np.delete(smooth, at[2], axis=2) if volume is not sequence else np.delete(smooth, at[3], axis=3)
        assert others.max() < 1e-6
        assert np.count_nonzero(smooth > 1e-3) > 4


def test_what_is_likelier_than_the_threshold_is_drawn(make_drawing):
    volume = Volume(np.zeros((9, 9, 5), np.float32), np.eye(4), "a")
    probabilities = (
        torch.rand(2, 9, 9, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 0])[:, None, None, None]
    )
    for threshold in (0.1, 0.4, 0.9):
        drawing = make_drawing(volume, threshold=threshold)
        canvas = Canvas(volume.grid, (1, 2), overlap=False, repaint=False)
        drawing._paint(canvas, itemgetter(()), (1, 2), probabilities, probabilities, (1.0, 1.0, 1.0))
        assert np.array_equal(canvas.labels == 1, probabilities[0].numpy() > threshold)
        assert not (canvas.labels == 2).any()


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("framed", [(2,), (1, 2)])
def test_what_a_close_up_takes_off_hides_nothing(make_drawing, monkeypatch, averaged, framed):
    """The overview draws the second structure over all of the first, the close-up only in a corner of it."""
    volume = Volume(np.zeros((9, 9, 5), np.float32), np.eye(4), "a")
    drawing, first, corner = make_drawing(volume), np.s_[2:7, 2:7, 1:4], np.s_[2:3, 2:3, 1:2]
    monkeypatch.setattr(drawing.segmenter, "view", lambda view: SimpleNamespace(values=(1, 2)))
    seen = [(Window((0, 0, 0), volume.grid), (value,)) for value in framed]
    monkeypatch.setattr("ofl_sam2.drawing.windows", lambda volume, masks: seen)

    def look(canvas, window, values, overview):
        if overview and averaged:
            drawing.overview = torch.zeros(2, *volume.grid)
        scores = torch.full((len(values), *volume.grid), -5.0)
        for row, value in zip(scores, values, strict=True):
            row[first if value == 1 or overview else corner] = value
        canvas.paint(itemgetter(()), scores, values)

    monkeypatch.setattr(drawing, "_look", look)
    canvas, _ = drawing.run()
    expected = np.zeros(volume.grid, np.uint8)
    expected[first], expected[corner] = 1, 2
    assert np.array_equal(canvas.labels, expected)


def test_the_quality_counts_the_probabilities_of_the_unet_by_its_weight_where_it_knows(make_drawing):
    volume = Volume(np.zeros((9, 9, 5), np.float32), np.eye(4), "a")
    drawing = make_drawing(volume)
    found = torch.full((2, 9, 9, 5), 0.6)
    second = torch.stack([torch.ones(9, 9, 5), torch.full((9, 9, 5), torch.nan)])
    canvas = Canvas(volume.grid, (1, 2), overlap=True, repaint=False)
    drawing._paint(canvas, itemgetter(()), (1, 2), found, found, (1.0, 1.0, 1.0), second, 0.25)
    assert drawing.quality.of(drawing.confidence).tolist() == pytest.approx([0.7**0.5, 0.6**0.5])


@pytest.mark.parametrize(("thickness", "weight"), [(1.0, 2 / 5), (4.0, 2 / 3)])
def test_the_unet_counts_as_two_of_the_views(make_segmenter, make_case, monkeypatch, thickness, weight):
    case = make_case(affine=np.diag([1.0, 1.0, thickness, 1.0]))
    segmenter, weights = make_segmenter((case,)), []
    segmenter.unet = VoxelUNet(Plan((1.0, 1.0, thickness), (24, 20, 6)), (1, 2)).eval()
    monkeypatch.setattr("ofl_sam2.drawing.scored", lambda *given: (weights.append(given[-1]), scored(*given))[1])
    segmenter.segment(case.volume)
    assert weights == [pytest.approx(weight)]


def test_widths_are_the_same_in_mm_along_space_and_none_along_time(make_drawing):
    thick = Volume(np.zeros((9, 8, 5, 3), np.float32), np.diag([2.0, 1.0, 4.0, 1.0]), "a")
    assert make_drawing(thick)._widths(1.0) == [0.5, 1.0, 0.25, 0.0]


def test_scores_are_positive_from_the_threshold_on_and_where_the_unet_is_surer():
    assert (scored(torch.tensor([0.29, 0.31]), 0.3) > 0).tolist() == [False, True]
    learner, unet = torch.tensor([0.3, 0.3, 0.05, 0.9]), torch.tensor([0.4, 0.6, 0.99, 0.01])
    assert (scored(learner, 0.3, unet, 0.5) > 0).tolist() == [False, True, True, False]


def test_of_structures_the_unet_does_not_know_the_learner_decides():
    probabilities = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    second = torch.stack([torch.full((50,), torch.nan), torch.ones(50)])
    both = scored(probabilities, 0.35, second, 0.4)
    alone = scored(probabilities, 0.35)
    assert torch.equal(both[0], alone[0])
    assert (both[1] > alone[1]).all()


@pytest.mark.parametrize(
    ("room", "network_grid", "asks"), [(809, (9, 9, 5), False), (810, (9, 9, 5), True), (810, (9, 9, 6), False)]
)
def test_volumes_that_are_not_averaged_go_without_the_unet(make_drawing, monkeypatch, room, network_grid, asks):
    volume = Volume(np.random.default_rng(0).normal(0, 1, (9, 9, 5)), np.eye(4), "a")
    drawing = make_drawing(volume)

    class Asked:
        def shape_of(self, _):
            return network_grid

        def probabilities(self, *_):
            return torch.zeros(2, 9, 9, 5)

    drawing.segmenter.unet = Asked()
    monkeypatch.setattr("ofl_sam2.drawing.MAX_AVERAGED", room)
    with torch.no_grad():
        drawing.run()
    assert (drawing.by_unet is not None) == asks
