"""Episodes drawn from labelled volumes, also from awkward ones."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Generator

from ofl_sam2.backbone.frozen import ImageFeatures
from ofl_sam2.memory.pool import PooledCase, View
from ofl_sam2.training import bank as bank_module
from ofl_sam2.training.bank import EpisodeBank
from ofl_sam2.training.synthetic import Dice

SIZE = 64
CLOSE = View(close=True)


def dice(seed=0):
    return Dice(Generator().manual_seed(seed))


def pooled(name="a", present=((), (1,), (1, 2), (1, 2), (2,), ()), slices=None, seed=0):
    """A case with the given structures in its slices, drawn as squares; random features."""
    generator = Generator().manual_seed(seed)
    labels = torch.zeros(len(present), SIZE, SIZE, dtype=torch.uint8)
    for row, values in enumerate(present):
        for value in values:
            labels[row, 20 * value - 10 : 20 * value, 10:40] = value
    shapes = ((16, 16, 16), (32, 8, 8), (128, 4, 4))
    features = ImageFeatures(*(torch.randn(len(present), *shape, generator=generator).half() for shape in shapes))
    return PooledCase(name, tuple(slices or range(len(present))), features, labels)


def draws(bank, count=30):
    with torch.no_grad():
        return [bank.draw(dice(seed), 1) for seed in range(count)]


def owner(features, volumes):
    """(volume, row) that stride-16 features `(1, C, h, w)` belong to."""
    return next(
        (number, row)
        for number, volume in enumerate(volumes)
        for row in range(len(volume.slices))
        if torch.equal(volume.slice(row).stride16, features)
    )


def test_an_episode_lines_up_objects_supports_and_queries(nano):
    bank = EpisodeBank(nano, [pooled("a"), pooled("b", seed=1)], (1, 2), supports=4, queries=3, objects=1)
    episode = bank.draw(dice(), 5)
    assert [len(part) for part in vars(episode).values()] == [4, 4, 4, 3, 3, 5]
    assert episode.sizes == (1,) * 5
    assert {features.shape for features in episode.support_features} == {(5, 128, 4, 4)}
    assert {masks.shape for masks in (*episode.support_masks, *episode.query_masks)} == {(5, SIZE, SIZE)}
    assert {len(features) for features in episode.query_features} == {5}
    assert {memory.features.shape for memory in episode.support_memories} == {(5, 64, 4, 4)}
    assert {features.stride16.dtype for features in episode.query_features} == {torch.float32}


def test_supports_come_from_another_case_and_show_the_structure(nano):
    volumes = [pooled("a"), pooled("b", seed=1)]
    for episode in draws(EpisodeBank(nano, volumes, (1, 2), objects=1)):
        support, _ = owner(episode.support_features[0], volumes)
        query, _ = owner(episode.query_features[0].stride16, volumes)
        assert support != query
        assert episode.support_masks[0].any()


def test_supports_come_from_every_other_case_one_copy_of_each_at_a_time(nano):
    volumes = [pooled(name, ((1,),) * 4, seed=seed) for seed, name in enumerate("aabbc")]
    seen = set()
    for episode in draws(EpisodeBank(nano, volumes, (1,), supports=8)):
        query, _ = owner(episode.query_features[0].stride16, volumes)
        sources = {owner(features, volumes)[0] for features in episode.support_features}
        names = [volumes[source].name for source in sorted(sources)]
        assert len(set(names)) == len(names) == 2
        assert volumes[query].name not in names
        seen |= sources
    assert seen == set(range(5))


def test_a_structure_is_shown_by_the_cases_that_have_it(nano):
    volumes = [pooled("a"), pooled("b", ((1,),) * 4, seed=1), pooled("c", ((2,),) * 4, seed=2)]
    for episode in draws(EpisodeBank(nano, volumes, (1, 2), supports=8, objects=1)):
        query, _ = owner(episode.query_features[0].stride16, volumes)
        value = int(episode.support_masks[0][0].any(1).nonzero()[0]) // 20 + 1
        sources = {owner(features, volumes)[0] for features in episode.support_features}
        assert sources == {number for number, volume in enumerate(volumes) if value in volume.known} - {query}


def test_queries_are_neighbouring_slices_in_either_direction(nano):
    volumes = [pooled("a"), pooled("b", seed=1)]
    steps = set()
    for episode in draws(EpisodeBank(nano, volumes, (1, 2), objects=1)):
        rows = [owner(features.stride16, volumes)[1] for features in episode.query_features]
        steps |= {after - before for before, after in pairwise(rows)}
    assert {-1, 1} <= steps <= {-1, 0, 1}


def test_masks_and_memories_belong_to_their_slices(nano):
    volumes = [pooled("a"), pooled("b", seed=1)]
    episode = draws(EpisodeBank(nano, volumes, (1,), objects=1), 1)[0]
    for features, masks, memory in zip(
        episode.support_features, episode.support_masks, episode.support_memories, strict=True
    ):
        number, row = owner(features, volumes)
        assert torch.equal(masks[0], volumes[number].mask(row, 1))
        expected = nano.remember_mask(volumes[number].slice(row), masks)
        torch.testing.assert_close(memory.features, expected.features)


def test_one_labelled_volume_gives_supports_away_from_the_query(nano):
    volume = pooled("a", present=((1,),) * 12)
    copy = PooledCase("a", volume.slices, volume.features, volume.labels)
    for volumes in ([volume], [volume, copy]):
        for episode in draws(EpisodeBank(nano, volumes, (1,), queries=2)):
            queries = [owner(features.stride16, [volume])[1] for features in episode.query_features]
            supports = [owner(features, [volume])[1] for features in episode.support_features]
            assert all(abs(query - support) > 1 for query in queries for support in supports)


def test_a_small_structure_in_one_volume_is_shown_in_the_supports_all_the_same(nano):
    volume = pooled("a", present=((), (), (1,), (1,), (), ()))
    for episode in draws(EpisodeBank(nano, [volume], (1,))):
        assert episode.support_masks[0].any()


def test_a_close_up_without_its_structure_teaches_nothing(nano):
    volumes = [
        replace(pooled("a", present=((), ())), view=CLOSE, focus=(1,)),
        replace(pooled("b", seed=1), view=CLOSE, focus=(1,)),
        replace(pooled("c", seed=2), view=CLOSE, focus=(1,)),
    ]
    assert [sorted(volume.known) for volume in volumes] == [[], [1], [1]]
    for episode in draws(EpisodeBank(nano, volumes, (1,))):
        assert {owner(features, volumes)[0] for features in episode.support_features} <= {1, 2}


def test_a_structure_that_one_volume_lacks_is_no_target_there(nano):
    volumes = [pooled("a", present=((1,), (1, 2), (1,))), pooled("b", present=((1,), (1,), ()), seed=1)]
    bank = EpisodeBank(nano, volumes, (1, 2))
    seen = set()
    for episode in draws(bank):
        count = len(episode.query_features[0])
        source, _ = owner(episode.support_features[0][:1], volumes)
        assert count == 1
        assert all(episode.support_masks[0].flatten(1).any(1))
        seen.add(source)
    assert seen == {0, 1}


def test_a_volume_without_any_structure_to_learn_is_left_out(nano):
    volumes = [pooled("a", present=((2,), (2,))), pooled("b", seed=1), pooled("empty", present=((), ()), seed=2)]
    sources, queries = set(), set()
    for episode in draws(EpisodeBank(nano, volumes, (1,)), 40):
        sources.add(owner(episode.support_features[0], volumes)[0])
        queries.add(owner(episode.query_features[0].stride16, volumes)[0])
    assert sources == queries == {1}


def test_slices_that_all_hold_the_structure_leave_no_absent_support(nano):
    bank = EpisodeBank(nano, [pooled("a", present=((1,),) * 4), pooled("b", present=((1,),) * 4, seed=1)], (1,))
    for episode in draws(bank):
        assert all(masks.any() for masks in episode.support_masks)


def test_up_to_half_of_the_supports_lack_the_structure(nano):
    bank = EpisodeBank(nano, [pooled("a"), pooled("b", seed=1)], (1,))
    absent = [sum(not masks.any() for masks in episode.support_masks) for episode in draws(bank)]
    assert max(absent) == 2


@pytest.mark.parametrize("slices", [(7,), (0, 9), (3, 4, 8)])
def test_few_labelled_slices_are_repeated(nano, slices):
    volumes = [pooled(name, ((1,),) * len(slices), slices, seed) for seed, name in enumerate("ab")]
    for episode in draws(EpisodeBank(nano, volumes, (1,)), 5):
        assert len(episode.support_features) == 4
        assert len(episode.query_features) == 3


def test_more_structures_than_objects_take_turns(nano):
    present = ((1, 2, 3),) * 4
    bank = EpisodeBank(nano, [pooled("a", present), pooled("b", present, seed=1)], (1, 2, 3), objects=2)
    shown = set()
    for episode in draws(bank):
        assert len(episode.query_masks[0]) == 2
        shown |= {int(mask.any(1).nonzero()[0]) for mask in episode.support_masks[0]}
    assert len(shown) == 3


def test_a_seed_draws_the_same_episode_twice(nano):
    bank = EpisodeBank(nano, [pooled("a"), pooled("b", seed=1)], (1, 2))
    first, again = (bank.draw(dice(8), 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.support_masks, again.support_masks, strict=True))
    assert all(
        torch.equal(a.features, b.features) for a, b in zip(first.support_memories, again.support_memories, strict=True)
    )


def test_memories_are_encoded_once_without_gradient_and_bounded(nano, monkeypatch):
    encoded = []
    remember = nano.remember_mask
    monkeypatch.setattr(nano, "remember_mask", lambda *args: encoded.append(1) or remember(*args))
    bank = EpisodeBank(nano, [pooled("a"), pooled("b", seed=1)], (1, 2))
    episodes = [bank.draw(dice(), 2) for _ in range(2)]
    assert len(encoded) == len(bank._memories) <= 16
    assert not any(memory.features.requires_grad for episode in episodes for memory in episode.support_memories)
    monkeypatch.setattr(bank_module, "MAX_CACHED_MEMORIES", 3)
    small = EpisodeBank(nano, [pooled("a"), pooled("b", seed=1)], (1, 2))
    again = small.draw(dice(), 2)
    assert len(small._memories) == 3
    for one, other in zip(again.support_memories, episodes[0].support_memories, strict=True):
        assert torch.equal(one.features, other.features)
