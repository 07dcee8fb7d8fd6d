"""What training draws from: every view of the labelled slices, and augmented copies of them."""

import pytest
import torch

from ofl_sam2.errors import Cancelled
from ofl_sam2.looks import Viewpoint
from ofl_sam2.progress import CancelToken, Watch
from ofl_sam2.training.copies import FreshCopies
from ofl_sam2.training.held_out import HeldOut

NOTHING = HeldOut({})


@pytest.fixture(scope="module")
def cases(make_case):
    return make_case("a"), make_case("b", seed=1, values=(1,), labelled_slices=(1, 2, 3))


@pytest.fixture(scope="module")
def segmenter(make_segmenter, cases):
    return make_segmenter(cases)


def fresh(segmenter, cases, most=2, max_slices=100, held_out=NOTHING, seed=0):
    return FreshCopies(segmenter, cases, [case.volume.name for case in cases], held_out, most, max_slices, seed)


def started(*args, steps=0, **kwargs):
    copies = fresh(*args, **kwargs)
    copies.start(steps, Watch(None, None))
    return copies


def same(one, other):
    return torch.equal(one.labels, other.labels) and torch.equal(one.features.stride16, other.features.stride16)


def test_copies_are_encoded_beside_the_originals_and_reported(segmenter, cases):
    told = []
    copies = fresh(segmenter, cases)
    copies.start(0, Watch(lambda *step: told.append(step), None))
    volumes = copies.volumes
    assert [(volume.name, volume.slices) for volume in volumes[:2]] == [("a", tuple(range(6))), ("b", (1, 2, 3))]
    assert sorted(volume.name for volume in volumes[2:]) == ["a", "a", "b", "b"]
    assert told[-1] == (18, 18)
    assert {volume.features.stride16.dtype for volume in volumes} == {torch.float16}
    one, other = (volume for volume in volumes[2:] if volume.name == "a")
    assert one.slices == other.slices == volumes[0].slices
    assert not torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(("max_slices", "slices"), [(1000, 8 * 9), (29, 20), (8, 6)])
def test_the_copies_keep_to_the_bound_in_slices(segmenter, cases, max_slices, slices):
    copies = started(segmenter, cases, 8, max_slices)
    for _ in range(4):
        assert 0 < sum(map(len, copies.volumes[2:])) <= slices
        copies.step()


def test_each_step_goes_on_with_a_copy_that_takes_the_place_of_the_oldest(segmenter, cases, monkeypatch):
    monkeypatch.setattr("ofl_sam2.training.copies.BATCH", 2)
    copies = started(segmenter, cases, 1)
    before = copies.volumes
    steps = 0
    while copies.volumes == before:
        copies.step()
        steps += 1
    assert steps == -(-len(before[2]) // 2)
    assert copies.volumes[:-1] == [*before[:2], *before[3:]]
    assert copies.volumes[-1].name == before[2].name
    assert not same(copies.volumes[-1], before[2])


@pytest.mark.parametrize("steps", range(9))
def test_after_an_interruption_the_same_copies_go_on(segmenter, cases, monkeypatch, steps):
    monkeypatch.setattr("ofl_sam2.training.copies.BATCH", 2)
    straight, resumed = started(segmenter, cases, 1), started(segmenter, cases, 1, steps=steps)
    for _ in range(steps):
        straight.step()
    for _ in range(4):
        assert len(straight.volumes) == len(resumed.volumes)
        assert all(map(same, straight.volumes, resumed.volumes))
        straight.step()
        resumed.step()


def test_another_seed_gives_other_copies(segmenter, cases):
    one, other = (started(segmenter, cases, seed=seed).volumes[2:] for seed in (0, 1))
    assert not any(same(a, b) for a in one for b in other)


def test_held_out_slices_are_neither_given_nor_copied(segmenter, cases):
    apart = HeldOut({(case.view, case.key): (0, 1) for case in segmenter.pool.cases.values()})
    volumes = started(segmenter, cases, 1, held_out=apart).volumes
    assert {volume.name: volume.slices for volume in volumes} == {"a": (2, 3, 4, 5), "b": (3,)}


def test_every_view_of_a_case_is_trained_on(make_segmenter, make_case):
    cases = (make_case("a", grid=(40, 40, 40), affine=torch.eye(4).double().numpy()),)
    segmenter = make_segmenter(cases)
    volumes = started(segmenter, cases, 1, 1000).volumes
    assert len(segmenter.pools) > 1
    assert {volume.view for volume in volumes[: len(volumes) // 2]} == set(segmenter.pools)
    assert len(volumes) == 2 * sum(len(pool.cases) for pool in segmenter.pools.values())


def test_a_case_is_read_once_for_the_copies_of_all_its_views(make_segmenter, make_case, monkeypatch):
    cases = [make_case(name, grid=(40, 40, 40), affine=torch.eye(4).double().numpy()) for name in "abc"]
    segmenter, looked_at = make_segmenter(cases), []
    looks = Viewpoint.looks
    monkeypatch.setattr(Viewpoint, "looks", lambda *args: looked_at.append(args[1].volume.name) or looks(*args))
    started(segmenter, cases, 2, 1000)
    assert sorted(looked_at[:3]) == ["a", "b", "c"]
    assert looked_at == looked_at[:3] * 2


def test_encoding_can_be_cancelled(segmenter, cases):
    token = CancelToken()
    with pytest.raises(Cancelled):
        fresh(segmenter, cases).start(0, Watch(lambda *_: token.cancel(), token))
