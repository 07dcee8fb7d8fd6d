"""What training draws from: every view of the labelled slices, and augmented copies of them."""

import pytest
import torch

from ofl_sam2.progress import Watch
from ofl_sam2.training.copies import with_copies
from ofl_sam2.training.held_out import HeldOut

NOTHING = HeldOut({})


@pytest.fixture(scope="module")
def cases(make_case):
    return make_case("a"), make_case("b", seed=1, values=(1,), labelled_slices=(1, 2, 3))


@pytest.fixture(scope="module")
def segmenter(make_segmenter, cases):
    return make_segmenter(cases)


def test_copies_are_encoded_beside_the_originals_and_reported(segmenter, cases):
    steps = []
    volumes = with_copies(segmenter, cases, NOTHING, 2, 100, 0, Watch(lambda *step: steps.append(step), None))
    assert [(volume.name, volume.slices) for volume in volumes[:2]] == [("a", tuple(range(6))), ("b", (1, 2, 3))]
    assert sorted(volume.name for volume in volumes[2:]) == ["a", "a", "b", "b"]
    assert steps[-1] == (18, 18)
    assert {volume.features.stride16.dtype for volume in volumes} == {torch.float16}
    one, other = (volume for volume in volumes[2:] if volume.name == "a")
    assert one.slices == other.slices == volumes[0].slices
    assert not torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(("max_slices", "slices"), [(1000, 8 * 9), (29, 20), (8, 1)])
def test_the_copies_keep_to_the_bound_in_slices(segmenter, cases, max_slices, slices):
    volumes = with_copies(segmenter, cases, NOTHING, 8, max_slices, 0, Watch(None, None))
    copied = sum(map(len, volumes[2:]))
    assert copied <= slices if max_slices > 8 else len(volumes) == 3


def test_held_out_slices_are_neither_given_nor_copied(segmenter, cases):
    apart = HeldOut({(case.view, case.key): (0, 1) for case in segmenter.pool.cases.values()})
    volumes = with_copies(segmenter, cases, apart, 1, 100, 0, Watch(None, None))
    assert {volume.name: volume.slices for volume in volumes} == {"a": (2, 3, 4, 5), "b": (3,)}


def test_every_view_of_a_case_is_trained_on(make_segmenter, make_case):
    cases = (make_case("a", grid=(40, 40, 40), affine=torch.eye(4).double().numpy()),)
    segmenter = make_segmenter(cases)
    volumes = with_copies(segmenter, cases, NOTHING, 1, 1000, 0, Watch(None, None))
    assert len(segmenter.pools) > 1
    assert {volume.view for volume in volumes[: len(volumes) // 2]} == set(segmenter.pools)
    assert len(volumes) == 2 * sum(len(pool.cases) for pool in segmenter.pools.values())
