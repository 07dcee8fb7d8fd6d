"""Endless synthetic episodes."""

import itertools

import pytest
import torch
from torch import Generator
from torch.utils.data import DataLoader

from ofl_sam2.training.synthetic import Dice
from ofl_sam2.training.synthetic_episodes import Episodes, SyntheticEpisodes


def test_a_batch_has_the_shapes_asked_for():
    batch = SyntheticEpisodes(32, episodes=3, objects=2, queries=4).batch(Dice(Generator()), 2)
    assert batch.support_images.shape == (3, 2, 32, 32)
    assert batch.support_masks.shape == (3, 2, 2, 32, 32)
    assert batch.query_images.shape == (3, 4, 32, 32)
    assert batch.query_masks.shape == (3, 4, 2, 32, 32)


@pytest.fixture(scope="module")
def batches():
    return list(itertools.islice(SyntheticEpisodes(64, episodes=4, objects=3, seed=3), 8))


def test_images_and_masks_are_in_range(batches):
    for batch in batches:
        for tensor in vars(batch).values():
            assert tensor.dtype == torch.float32
            assert 0 <= tensor.min() <= tensor.max() <= 1


def test_every_object_is_in_at_least_one_support(batches):
    for batch in batches:
        seen = batch.support_masks.amax((1, 3, 4))
        assert (seen > 0.3).all()


def test_most_objects_are_in_the_queries_and_some_are_not(batches):
    found = torch.cat([(batch.query_masks.amax((1, 3, 4)) > 0).flatten() for batch in batches]).float().mean()
    assert 0.5 < found < 1


def test_neighbouring_queries_look_alike(batches):
    near = torch.stack([(batch.query_images[:, 0] - batch.query_images[:, 1]).abs().mean() for batch in batches]).mean()
    far = torch.stack([(batch.query_images[0, 0] - batch.query_images[-1, 0]).abs().mean() for batch in batches]).mean()
    assert near < far


def test_the_number_of_supports_varies_within_its_bounds(batches):
    counts = {batch.support_images.shape[1] for batch in batches}
    assert len(counts) > 1
    assert counts <= {1, 2, 3, 4, 5, 6}


def test_a_seed_gives_the_same_episodes_twice_and_another_seed_others():
    first, again, other = (next(iter(SyntheticEpisodes(32, episodes=1, seed=seed))) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert not torch.equal(first.query_images, other.query_images)


def test_processes_draw_different_episodes_with_equally_many_supports():
    one, other = (list(itertools.islice(SyntheticEpisodes(32, episodes=1, seed=1, process=i), 5)) for i in (0, 1))
    counts = [[batch.support_images.shape[1] for batch in batches] for batches in (one, other)]
    assert counts[0] == counts[1]
    assert len(set(counts[0])) > 1
    assert not any(torch.equal(a.query_images, b.query_images) for a, b in zip(one, other, strict=True))


def test_workers_draw_different_episodes():
    loader = DataLoader(SyntheticEpisodes(32, episodes=1, supports=(1, 1)), batch_size=None, num_workers=2)
    first, second = itertools.islice(loader, 2)
    assert not torch.equal(first.query_images, second.query_images)


def test_episodes_move_to_a_device():
    batch = SyntheticEpisodes(32, episodes=1).batch(Dice(Generator()), 1)
    moved = batch.to("meta")
    assert isinstance(moved, Episodes)
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
