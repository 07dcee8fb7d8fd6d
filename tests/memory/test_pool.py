import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ofl_sam2.backbone.frozen import ImageFeatures
from ofl_sam2.memory.pool import PooledCase, SupportKey, SupportPool, describe, label_map

SIZE = 8
LIVER, SPLEEN, ABSENT = 1, 2, 9
QUERY = 0.0  # degrees


def features(degrees: Sequence[float]) -> ImageFeatures:
    """One slice per angle; the cosine similarity of two slices is that of their angles."""
    angles = torch.tensor([math.radians(angle) for angle in degrees])
    stride16 = torch.stack([angles.cos(), angles.sin()], 1)[:, :, None, None].expand(-1, -1, 4, 4)
    count = len(degrees)
    return ImageFeatures(torch.zeros(count, 1, 16, 16).half(), torch.zeros(count, 1, 8, 8).half(), stride16.half())


def case(name: str, degrees: Sequence[float], values: Sequence[Sequence[int]]) -> PooledCase:
    """Slices at `degrees`, each with some structures: one row of pixels per value."""
    labels = torch.zeros(len(degrees), SIZE, SIZE, dtype=torch.int16)
    for row, present in enumerate(values):
        for line, value in enumerate(present):
            labels[row, line] = value
    return PooledCase(name, tuple(range(len(degrees))), features(degrees), labels)


def pool_of(*cases: PooledCase) -> SupportPool:
    pool = SupportPool()
    for each in cases:
        pool.add(each)
    return pool


def descriptor(degrees: float = QUERY) -> Tensor:
    return describe(features([degrees]).stride16)[0]


@pytest.fixture
def pool() -> SupportPool:
    return pool_of(
        case("a", [10, 50, 80, 5], [[LIVER], [LIVER, SPLEEN], [LIVER], []]),
        case("b", [30, 20, 60], [[LIVER], [], [SPLEEN]]),
    )


class TestDescribe:
    def test_descriptors_have_unit_norm(self) -> None:
        descriptors = describe(100 * torch.randn(3, 5, 20, 20).half())
        assert descriptors.dtype == torch.float32
        assert descriptors.shape == (3, 5 * 8 * 8)
        assert torch.allclose(descriptors.norm(dim=1), torch.ones(3), atol=1e-5)

    def test_scale_does_not_count_and_place_does(self) -> None:
        maps = torch.rand(1, 4, 16, 16)
        assert torch.allclose(describe(maps), describe(3 * maps), atol=1e-6)
        assert (describe(maps) * describe(maps.flip(-1))).sum() < 0.999

    def test_empty_features_are_finite(self) -> None:
        assert describe(torch.zeros(1, 2, 4, 4)).isfinite().all()


class TestPooledCase:
    def test_a_slice_is_float32_and_its_masks_are_binary(self) -> None:
        one = case("a", [10, 50], [[LIVER], [LIVER, SPLEEN]])
        assert len(one) == 2
        assert one.slice(1).stride16.dtype == torch.float32
        assert torch.equal(one.slice(1).stride16, one.features.stride16[1:].float())
        mask = one.mask(1, SPLEEN)
        assert mask.dtype == torch.float32
        assert mask.sum() == SIZE
        assert (mask[1] == 1).all()

    def test_present_values_are_per_slice_and_without_background(self) -> None:
        assert case("a", [0, 1, 2], [[SPLEEN, 300], [], [LIVER]]).present == [{SPLEEN, 300}, set(), {LIVER}]


class TestSupportPool:
    def test_cases_are_added_and_replaced_in_an_order_of_their_own(self, pool: SupportPool) -> None:
        assert len(pool) == 7
        assert pool.values() == (LIVER, SPLEEN)
        pool.add(case("b", [0], [[300]]))
        assert len(pool) == 5
        assert pool.values() == (LIVER, SPLEEN, 300)
        pool.add(case("B", [0], [[300]]))
        assert list(pool.cases) == ["B", "a", "b"]

    def test_a_key_names_the_slice(self, pool: SupportPool) -> None:
        key = SupportKey("b", 2)
        assert torch.equal(pool.features(key).stride16, pool.cases["b"].slice(2).stride16)
        assert torch.equal(pool.mask(key, SPLEEN), pool.cases["b"].mask(2, SPLEEN))

    def test_similarity_is_to_the_nearest_slice_with_a_structure(self, pool: SupportPool) -> None:
        queries = torch.stack([descriptor(5), descriptor(60), descriptor(90)])
        expected = [math.cos(math.radians(angle)) for angle in (5, 0, 10)]
        assert torch.allclose(pool.similarity(queries), torch.tensor(expected), atol=1e-3)


class TestRetrieve:
    def test_slices_with_and_without_the_structure_alternate_by_falling_similarity(self, pool: SupportPool) -> None:
        found = pool.retrieve(descriptor(), LIVER, count=6, absent=2)
        assert found == [SupportKey(*key) for key in (("a", 0), ("a", 3), ("b", 0), ("b", 1), ("a", 1), ("a", 2))]

    def test_absent_slices_take_their_places_from_the_least_similar(self, pool: SupportPool) -> None:
        assert pool.retrieve(descriptor(), LIVER, count=3, absent=1) == [
            SupportKey("a", 0),
            SupportKey("a", 3),
            SupportKey("b", 0),
        ]

    def test_without_absent_slices_all_are_present(self, pool: SupportPool) -> None:
        found = pool.retrieve(descriptor(), SPLEEN, count=3, absent=0)
        assert found == [SupportKey("a", 1), SupportKey("b", 2)]

    @pytest.mark.parametrize("count", [1, 2])
    def test_one_slice_with_the_structure_always_stays(self, count: int, pool: SupportPool) -> None:
        found = pool.retrieve(descriptor(), LIVER, count=count, absent=5)
        assert len(found) == count
        assert found[0] == SupportKey("a", 0)

    def test_more_than_there_are_gives_what_there_is(self, pool: SupportPool) -> None:
        assert len(pool.retrieve(descriptor(), SPLEEN, count=50, absent=50)) == len(pool)

    @pytest.mark.parametrize("value", [LIVER, ABSENT])
    @pytest.mark.parametrize("absent", [0, 1, 2])
    def test_a_pool_of_one_slice_gives_that_slice(self, value: int, absent: int) -> None:
        single = pool_of(case("only", [70], [[LIVER]]))
        assert single.retrieve(descriptor(), value, count=4, absent=absent) == [SupportKey("only", 0)]

    @pytest.mark.parametrize("absent", [0, 1, 2])
    def test_a_structure_absent_everywhere_still_gives_supports(self, absent: int, pool: SupportPool) -> None:
        found = pool.retrieve(descriptor(), ABSENT, count=4, absent=absent)
        assert found == [SupportKey("a", 3), SupportKey("a", 0)][: max(1, absent)]


class TestSpread:
    def test_three_of_four_hold_the_structure(self) -> None:
        pool = pool_of(case("a", range(40), [[LIVER]] * 20 + [[]] * 20))
        chosen = pool.spread(LIVER, 8)
        with_it = [key.row for key in chosen if key.row < 20]
        assert len(set(chosen)) == 8
        assert len(with_it) == 6
        assert max(b - a for a, b in pairwise(with_it)) <= 4

    @pytest.mark.parametrize("count", [4, 5, 8, 12, 33])
    def test_every_case_is_covered_however_small(self, count: int) -> None:
        sizes = {"large": 100, "one": 1, "middle": 30, "huge": 200}
        pool = pool_of(*(case(name, [0.0] * size, [[LIVER]] * size) for name, size in sizes.items()))
        chosen = pool.spread(LIVER, count)
        assert len(set(chosen)) == len(chosen) == count
        assert {key.case for key in chosen} == set(sizes)

    def test_what_small_cases_cannot_give_larger_ones_do(self) -> None:
        pool = pool_of(case("large", [0.0] * 50, [[LIVER]] * 50), case("small", [0.0] * 2, [[LIVER]] * 2))
        chosen = pool.spread(LIVER, 10)
        assert [key.case for key in chosen] == ["small"] * 2 + ["large"] * 8

    def test_fewer_slices_than_asked_are_all_taken(self, pool: SupportPool) -> None:
        chosen = pool.spread(LIVER, 50)
        assert len(set(chosen)) == len(chosen) == len(pool)

    def test_one_slice_of_a_case_is_taken_from_the_middle(self) -> None:
        pool = pool_of(case("a", [0.0] * 9, [[LIVER]] * 9))
        assert pool.spread(LIVER, 1) == [SupportKey("a", 4)]

    def test_a_pool_of_one_slice_gives_that_slice(self) -> None:
        assert pool_of(case("only", [0], [[LIVER]])).spread(LIVER, 32) == [SupportKey("only", 0)]

    def test_a_structure_absent_everywhere_gives_only_slices_without_it(self, pool: SupportPool) -> None:
        assert 0 < len(pool.spread(ABSENT, 8)) <= 2


class TestLabelMap:
    def test_the_likeliest_wins_and_structures_exclude_each_other(self) -> None:
        masks = torch.tensor([[[0.9, 0.5, 0.2, 0.0]], [[0.1, 0.3, 0.3, 0.0]]])
        assert label_map(masks, (LIVER, SPLEEN)).tolist() == [[LIVER, LIVER, 0, 0]]

    def test_a_thin_structure_between_others_survives_below_one_half(self) -> None:
        masks = torch.tensor([0.3, 0.45, 0.2]).view(3, 1, 1)
        assert label_map(masks, (4, 5, 6)).item() == 5

    def test_what_is_thinner_than_a_pixel_keeps_the_one_it_fills_most_of(self) -> None:
        masks = torch.zeros(3, 4, 4)
        masks[0, 1], masks[0, 1, 2], masks[1, 3, 3] = 0.2, 0.3, 0.1
        found = label_map(masks, (4, 5, 6))
        assert found[1, 2] == 4 and found[3, 3] == 5 and found.count_nonzero() == 2

    def test_values_are_looked_up_in_the_smallest_type_that_holds_them(self) -> None:
        masks = torch.eye(2)[:, None]
        small, large = label_map(masks, (7, 255)), label_map(masks, (7, 1000))
        assert (small.dtype, small.tolist()) == (torch.uint8, [[7, 255]])
        assert (large.dtype, large.tolist()) == (torch.int32, [[7, 1000]])

    def test_masks_of_one_input_survive_the_way_into_the_pool(self) -> None:
        labels = torch.randint(0, 3, (SIZE, SIZE))
        masks = torch.stack([labels == value for value in (LIVER, SPLEEN)]).float()
        stored = label_map(masks, (LIVER, SPLEEN))
        assert torch.equal(stored.long(), labels)
