"""Learning and segmenting whole volumes with a random-weight nano."""

import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ofl_sam2.canvas import merge
from ofl_sam2.errors import Cancelled, InputError
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.memory.pool import MAIN, View
from ofl_sam2.progress import CancelToken
from ofl_sam2.segmenter import VolumeSegmenter, with_settings
from ofl_sam2.volume import Volume, canonical_view
from ofl_sam2.window import Window

ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
SPACING = np.array([1.0, 1.0, 4.0])


@pytest.fixture(scope="module")
def segmenter(make_segmenter):
    """Has learned one case; tests of this module do not change it."""
    return make_segmenter()


@pytest.fixture(scope="module")
def query(make_case):
    return make_case(name="query", seed=7).volume


@pytest.fixture(scope="module")
def magnifying(make_segmenter, make_small_case):
    """A segmenter that has learned a small structure in voxels of equal sides, and a volume to segment."""
    return make_segmenter((make_small_case("a"),)), make_small_case("b", 1).volume


@pytest.fixture
def count_encoded(nano, monkeypatch):
    """Counts encoded images."""
    counts = []
    encode = nano.encode_images
    monkeypatch.setattr(nano, "encode_images", lambda images: counts.append(len(images)) or encode(images))
    return counts


def same(one, other):
    return (
        np.array_equal(one.labels, other.labels)
        and np.array_equal(one.confidence, other.confidence)
        and one.quality == other.quality
    )


def reoriented(volume, order, signs):
    """The same scan stored in another axis order and direction."""
    orientation = np.stack([np.argsort(order), signs], 1)
    image = nib.Nifti1Image(volume.voxels, volume.affine).as_reoriented(orientation)
    return Volume(np.asarray(image.dataobj), image.affine, volume.name)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(ORIENTATIONS))
def test_the_stored_orientation_changes_neither_result_nor_grid(segmenter, query, orientation):
    expected = segmenter.segment(query)
    stored = reoriented(query, *orientation)
    result = segmenter.segment(stored)
    assert result.labels.shape == stored.grid
    np.testing.assert_array_equal(canonical_view(result.labels, stored.affine), expected.labels)
    np.testing.assert_array_equal(result.confidence, expected.confidence)


@settings(max_examples=4, deadline=None)
@given(st.sampled_from(ORIENTATIONS))
def test_side_views_and_close_ups_fit_every_stored_orientation(magnifying, orientation):
    segmenter, query = magnifying
    expected = segmenter.segment(query)
    stored = reoriented(query, *orientation)
    result = segmenter.segment(stored)
    assert expected.labels.any()
    np.testing.assert_array_equal(canonical_view(result.labels, stored.affine), expected.labels)


def test_a_close_up_replaces_what_the_overview_found(magnifying, monkeypatch):
    segmenter, query = magnifying
    window = Window((20, 20, 25), (50, 52, 57))
    monkeypatch.setattr("ofl_sam2.drawing.windows", lambda *_: [(window, (1,))])
    result = segmenter.segment(query)
    assert result.labels.any()
    result.labels[window.slices] = 0
    assert not result.labels.any()


def test_what_no_close_up_frames_is_seen_from_all_sides(magnifying, monkeypatch):
    segmenter, query = magnifying
    monkeypatch.setattr("ofl_sam2.drawing.windows", lambda *_: [])
    result, whole = segmenter.segment(query), with_settings(segmenter, close_ups=False).segment(query)
    one_view = with_settings(segmenter, close_ups=False, side_views=False).segment(query)
    assert (result.labels != whole.labels).mean() < 1e-3 < (result.labels != one_view.labels).mean()
    assert result.quality["structure_1"] == pytest.approx(whole.quality["structure_1"], abs=1e-3)


def test_a_structure_without_side_views_leaves_those_of_the_others(magnifying, make_segmenter, make_case):
    alone, query = magnifying
    thick = make_case("thick", seed=3, grid=(40, 36, 8), values=(1,))
    labels = np.where(thick.labels > 0, 2, 0).astype(np.uint8)
    both = make_segmenter((), learner=alone.learner)
    both.pools, both.viewpoint = dict(alone.pools), alone.viewpoint
    both.learn([replace(thick, labels=labels, values=(2,))], {1: "one", 2: "two"})
    both = with_settings(both, close_ups=False)
    assert both.view(View(0)).values == (1,) and both.view(MAIN).values == (1, 2)
    seen = []
    result = both.segment(query, lambda done, total: seen.append(total))
    assert max(seen) == sum(query.grid)
    assert set(np.unique(result.labels)) <= {0, 1, 2} and (result.labels == 1).any()


def test_without_close_ups_and_side_views_a_volume_is_looked_at_once(magnifying):
    segmenter, query = magnifying
    plain = with_settings(segmenter, side_views=False, close_ups=False)
    seen = []
    plain.segment(query, lambda done, total: seen.append(total))
    assert set(seen) == {query.grid[2]}


@pytest.mark.parametrize(
    ("grid", "spacing", "frames", "slices"),
    [
        ((24, 20, 1), (1, 1, 4), False, 1),
        ((24, 1, 20), (1, 4, 1), False, 1),
        ((5, 24, 20), (6, 1, 1), False, 5),
        ((9, 7, 4), (1, 1, 1), False, 4),
        ((33, 6, 3), (0.4, 2.5, 5), False, 3),
        ((12, 10, 3, 2), (1, 1, 4), False, 6),
        ((18, 14, 4), (1, 1, 1), True, 4),
    ],
)
def test_the_label_grid_is_the_image_grid(segmenter, make_case, grid, spacing, frames, slices):
    volume = make_case(grid=grid, affine=np.diag([*map(float, spacing), 1.0]), frames=frames).volume
    result = segmenter.segment(volume)
    assert result.labels.shape == volume.grid
    assert result.labels.dtype == np.uint8
    assert set(np.unique(result.labels)) <= {0, 1, 2}
    assert result.confidence.shape == (slices, 2)
    assert 0 <= result.confidence.min() <= result.confidence.max() <= 1


def test_one_labelled_slice_is_enough_to_learn_from(make_segmenter, make_case, query):
    segmenter = make_segmenter((make_case(grid=(24, 20, 1)),))
    assert segmenter.segment(query).labels.shape == query.grid


def test_volumes_and_quality_are_those_of_the_labels(segmenter, query):
    result = segmenter.segment(query)
    assert result.labels.any()
    for value, name in result.structures.items():
        assert result.volume_ml[name] == pytest.approx((result.labels == value).sum() * 4 / 1000)
        assert 0 <= result.quality[name] <= 1
    assert set(result.summary()) == {"quality", "volume_ml", "seconds"}


def test_before_any_training_the_system_equals_the_offline_branch_bit_for_bit(make_segmenter, make_learner, query):
    online = make_segmenter(learner=make_learner(fused=False))
    offline = with_settings(online, online_branch=False)
    assert same(online.segment(query), offline.segment(query))
    assert not same(make_segmenter().segment(query), offline.segment(query))


def test_two_runs_are_identical_and_the_second_encodes_nothing(make_segmenter, query, count_encoded):
    segmenter = make_segmenter()
    cold = segmenter.segment(query)
    assert sum(count_encoded) == 6 + query.grid[2]
    count_encoded.clear()
    warm = segmenter.segment(query)
    assert count_encoded == []
    assert same(cold, warm)
    assert same(cold, make_segmenter().segment(query))


def test_a_cache_on_disk_changes_nothing_between_first_and_second_run(
    nano, make_learner, make_case, query, tmp_path, count_encoded
):
    results = []
    for _ in range(2):
        segmenter = VolumeSegmenter(nano, make_learner(), cache=FeatureCache(tmp_path, 1 << 30))
        segmenter.learn([make_case()])
        results.append(segmenter.segment(query))
    assert sum(count_encoded) == 6 + query.grid[2]
    assert same(*results)


def test_learning_a_case_again_replaces_it(make_segmenter, make_case):
    segmenter = make_segmenter((make_case("a"), make_case("b", seed=1)))
    before = segmenter.view(MAIN).solution.tau
    again = make_case("a", seed=9, labelled_slices=(1, 2))
    segmenter.learn([again])
    assert list(segmenter.pool.cases) == ["a", "b"]
    assert segmenter.pool.cases["a"].slices == (1, 2)
    assert not torch.equal(segmenter.view(MAIN).solution.tau, before)
    fresh = make_segmenter((again, make_case("b", seed=1)))
    assert torch.equal(segmenter.view(MAIN).solution.tau, fresh.view(MAIN).solution.tau)


def test_new_cases_may_bring_new_structures(make_segmenter, make_case):
    segmenter = make_segmenter((make_case("a", values=(2,)),))
    assert segmenter.structures == {2: "structure_2"}
    segmenter.learn([make_case("b", values=(1,))], structures={2: "dim", 1: "bright"})
    assert list(segmenter.structures.items()) == [(1, "bright"), (2, "dim")]
    assert len(segmenter.view(MAIN).solution.tau) == 2
    segmenter.learn([make_case("c")])
    assert segmenter.structures == {1: "bright", 2: "dim"}


def test_a_chosen_structure_is_learned_alone(make_segmenter, make_case, query):
    segmenter = make_segmenter(())
    segmenter.learn([make_case()], structures={2: "dim"})
    result = segmenter.segment(query)
    assert set(np.unique(result.labels)) <= {0, 2}
    assert list(result.quality) == ["dim"]


def test_structures_that_were_learned_stay_and_keep_their_names(make_segmenter, make_case):
    segmenter = make_segmenter(())
    segmenter.learn([make_case("a", values=(1,))], structures={1: "liver"})
    segmenter.learn([make_case("b", values=(2,))], structures={2: "spleen"})
    assert segmenter.structures == {1: "liver", 2: "spleen"}
    with pytest.raises(InputError, match="1 is liver, not heart in this model"):
        segmenter.learn([make_case("c")], structures={1: "heart"})
    assert segmenter.structures == {1: "liver", 2: "spleen"} and set(segmenter.pool.cases) == {"a", "b"}
    segmenter.learn([make_case("a", values=(2,))], structures={2: "spleen"})
    assert segmenter.structures == {2: "spleen"}


def test_the_first_ct_fixes_a_window_that_holds_its_structures(make_segmenter, make_case):
    case = make_case(values=(1,))
    hounsfield = np.where(case.labels == 1, -800, 40) + np.arange(case.labels.size).reshape(case.labels.shape) % 7
    hounsfield.flat[:2] = -1000, 1500
    ct = replace(case, volume=replace(case.volume, voxels=hounsfield.astype(np.int16)))
    segmenter = make_segmenter((ct,))
    low, high = segmenter.settings.ct_window
    assert -801 < low < -799 and high == 240
    assert segmenter.viewpoint.settings == segmenter.settings
    inside = segmenter.stack(ct.volume).intensity
    assert (inside.low, inside.high) == (low, high)
    soft = make_segmenter((replace(ct, labels=1 - case.labels),))
    assert soft.settings.ct_window == (-160, 240)
    assert make_segmenter((ct,), ct_window=(-500, 500)).settings.ct_window == (-500, 500)
    assert make_segmenter((case,)).settings.ct_window is None
    segmenter.learn([make_case("mr", seed=1)])
    assert segmenter.settings.ct_window == (low, high)


def test_a_forgotten_case_is_as_if_it_had_never_been_learned(make_segmenter, make_case, query):
    segmenter = make_segmenter((make_case("a", values=(1,)), make_case("b", seed=1)))
    segmenter.forget(["b"])
    assert segmenter.structures == {1: "structure_1"}
    assert same(segmenter.segment(query), make_segmenter((make_case("a", values=(1,)),)).segment(query))
    with pytest.raises(InputError, match=r"There is no label of b to forget\. Known: a\."):
        segmenter.forget(["a", "b"])
    segmenter.forget(["a"])
    with pytest.raises(InputError, match="Nothing has been learned yet"):
        segmenter.segment(query)
    segmenter.learn([make_case("c")])
    assert list(segmenter.pool.cases) == ["c"]


def test_what_cannot_be_learned_is_refused_and_changes_nothing(make_segmenter, make_case, query):
    segmenter = make_segmenter(())
    with pytest.raises(InputError, match="Nothing has been learned yet"):
        segmenter.segment(query)
    with pytest.raises(InputError, match="nothing to learn from"):
        segmenter.learn([])
    with pytest.raises(InputError, match="No label holds 3=liver; the labels hold 1, 2"):
        segmenter.learn([make_case()], structures={1: "spleen", 3: "liver"})
    assert (segmenter.axis, segmenter.viewpoint, len(segmenter.pool)) == (None, None, 0)


def test_a_cancelled_learning_leaves_the_old_state(make_segmenter, make_case, query):
    segmenter, token = make_segmenter(), CancelToken()
    before = segmenter.segment(query)
    with pytest.raises(Cancelled):
        segmenter.learn(
            [make_case("b", seed=5), make_case("c", seed=6)], progress=lambda *_: token.cancel(), cancel=token
        )
    assert list(segmenter.pool.cases) == ["a"]
    assert same(segmenter.segment(query), before)


def test_a_cancelled_segmentation_stops_at_the_next_slice(segmenter, query):
    token, seen = CancelToken(), []

    def progress(done, total):
        seen.append(done)
        if done == 2:
            token.cancel()

    with pytest.raises(Cancelled):
        segmenter.segment(query, progress, token)
    assert seen == [1, 2]


def test_progress_reaches_its_total(make_segmenter, make_case, query):
    segmenter, learned, segmented = make_segmenter(()), [], []
    segmenter.learn([make_case(grid=(24, 20, 11))], progress=lambda *step: learned.append(step))
    segmenter.segment(query, lambda *step: segmented.append(step))
    assert learned[-1] == (11, 11)
    assert segmented == [(i, 6) for i in range(1, 7)]


def test_overlapping_structures_get_one_map_each(segmenter, query):
    apart, overlapping = segmenter.segment(query), with_settings(segmenter, overlap=True).segment(query)
    assert overlapping.labels.shape == (2, *query.grid)
    assert set(np.unique(overlapping.labels)) == {0, 1}
    np.testing.assert_array_equal(overlapping.confidence, apart.confidence)
    assert overlapping.labels.any(0)[apart.labels > 0].mean() > 0.5
    assert overlapping.volume_ml["structure_1"] == pytest.approx(overlapping.labels[0].sum() * 4 / 1000)


def test_slices_are_cut_along_the_thick_direction_of_the_volume_at_hand(segmenter, make_case):
    sagittal = make_case(grid=(5, 24, 20), affine=np.diag([4.0, 1.0, 1.0, 1.0])).volume
    assert segmenter.segment(sagittal).confidence.shape == (5, 2)


def test_other_settings_share_what_was_learned(segmenter):
    other = with_settings(segmenter, gamma=0.9, exact_ridge=True)
    assert (other.settings.gamma, segmenter.settings.gamma) == (0.9, 0.5)
    assert other.pool is segmenter.pool
    assert (other.structures, other.axis) == (segmenter.structures, segmenter.axis)
    assert not torch.equal(other.view(MAIN).solution.tau, segmenter.view(MAIN).solution.tau)


def test_a_unet_changes_what_is_drawn_unless_it_is_switched_off(make_segmenter, query):
    segmenter = make_segmenter()
    plain = segmenter.segment(query)
    segmenter.unet = VoxelUNet(Plan((1.0, 1.0, 4.0), (24, 20, 6)), (1,)).eval()
    torch.nn.init.constant_(segmenter.unet.net.output_block.conv.conv.bias, 0.0)
    with torch.no_grad():
        segmenter.unet.net.output_block.conv.conv.bias[1] = 40.0
    drawn, off = segmenter.segment(query), with_settings(segmenter, unet_views=0.0).segment(query)
    assert (drawn.labels == 1).sum() > (plain.labels == 1).sum()
    np.testing.assert_array_equal(off.labels, plain.labels)
    np.testing.assert_array_equal(drawn.confidence, plain.confidence)


@pytest.mark.parametrize(
    "switches",
    [
        {"online_branch": False},
        {"adaptive_fusion": False},
        {"online_update": False},
        {"preconditioned": False},
        {"exact_ridge": True},
        {"order": "first_to_last"},
        {"gamma": 0.0},
        {"gamma": 1.0},
        {"supports": 3, "absent_supports": 1, "memory_supports": 3},
        {"absent_supports": 0},
        {"memory_supports": 1},
        {"recent": 0},
        {"query_capacity": 1},
        {"query_rate": 0.5},
        {"support_floor": 0.9, "query_rate": 0.5},
        {"learn_steps": 1},
        {"first_steps": 1},
        {"update_steps": 0},
        {"pool_slices": 2},
    ],
    ids=lambda switches: "-".join(f"{name}={value}" for name, value in switches.items()),
)
def test_every_switch_runs_and_makes_a_difference(segmenter, query, switches):
    plain, result = segmenter.segment(query), with_settings(segmenter, **switches).segment(query)
    assert result.labels.shape == query.grid
    assert np.isfinite(result.confidence).all()
    assert not np.array_equal(result.confidence, plain.confidence)


def test_both_label_generators_run(make_segmenter, make_learner, query):
    results = [
        make_segmenter(learner=make_learner(label_generator=kind)).segment(query)
        for kind in ("mask", "masked_features")
    ]
    assert not np.array_equal(results[0].confidence, results[1].confidence)


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 6), st.just(3), st.just(4)), elements=st.floats(-30, 30, width=32)),
)
def test_merging_is_a_softmax_over_logits_with_the_product_of_absences_as_background(logits):
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    absence = 1 / (1 + np.exp(logits.astype(np.float64)))
    background = absence.prod(0, keepdims=True)
    presence = -np.expm1(np.log(absence).sum(0, keepdims=True))
    scores = np.concatenate([np.log(background) - np.log(presence), np.log(probability) - np.log(absence)])
    softmax = np.exp(scores - scores.max(0)) / np.exp(scores - scores.max(0)).sum(0)
    winner = merge(torch.from_numpy(logits)).numpy()
    chosen = np.take_along_axis(softmax, winner[None], 0)[0]
    np.testing.assert_allclose(chosen, softmax.max(0), rtol=1e-4)
