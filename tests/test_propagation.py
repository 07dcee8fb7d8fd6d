"""Order, memories and acceptance on the way through a volume, with scripted confidences."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ofl_sam2 import propagation
from ofl_sam2.backbone.frozen import Memory
from ofl_sam2.learner.few_shot import KERNEL, mask_at_logit_size
from ofl_sam2.learner.steepest_descent import loss
from ofl_sam2.memory.pool import MAIN, SupportKey
from ofl_sam2.memory.recent import RecentTensors
from ofl_sam2.memory.working_set import WorkingSet
from ofl_sam2.propagation import Propagation, SupportEncoder, solve_on_pool, visiting_order
from ofl_sam2.settings import Order, Settings

SLICES = 6
SIMILARITY = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.5, 0.4])
OUTWARD = [2, 3, 4, 5, 1, 0]


@pytest.fixture(scope="module")
def learned(make_segmenter):
    return make_segmenter()


@pytest.fixture(scope="module")
def slices(nano, learned, make_case):
    """Features of each slice of a query volume."""
    stack = learned.stack(make_case("query", seed=7).volume)
    with torch.no_grad():
        features = nano.encode_images(stack.images(range(SLICES)))
    return [features[index : index + 1] for index in range(SLICES)]


def parts(segmenter):
    """What a `SupportEncoder` needs."""
    return segmenter.backbone, segmenter.learner, segmenter.pool, (1, 2)


@pytest.fixture
def start(learned):
    """Build a propagation over the learned pool."""

    def build(values=(1, 2), **switches):
        settings = Settings(gamma=0.5, **switches)
        encoder = SupportEncoder(*parts(learned))
        return Propagation(encoder, values, solve_on_pool(encoder, values, settings), settings)

    with torch.no_grad():
        yield build


@contextmanager
def scripted(trust):
    """Let `trust[visit]`, per structure, be the confidences of the slices visited one after the other."""
    visits = iter(trust)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagation, "confidence", lambda decoded: torch.tensor(next(visits)))
        yield


class Attended:
    """Records with which recent memories each slice was attended, and the memory each slice left behind."""

    def __init__(self, backbone, monkeypatch):
        self.recent, self.left = [], []
        attend, remember = backbone.attend, backbone.remember_prediction

        def watched_attend(features, supports, recent=(), **options):
            self.recent.append(list(recent))
            return attend(features, supports, recent, **options)

        def watched_remember(features, decoded):
            self.left.append(remember(features, decoded))
            return self.left[-1]

        monkeypatch.setattr(backbone, "attend", watched_attend)
        monkeypatch.setattr(backbone, "remember_prediction", watched_remember)

    def visits_seen(self, visit):
        """Which visits left the memories that this visit attended to, the latest first."""
        return [
            next(i for i, left in enumerate(self.left) if torch.equal(left.features, memory.features))
            for memory in self.recent[visit]
        ]


def run(propagated, slices):
    return list(propagated.run(slices.__getitem__, SIMILARITY))


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_outward_runs_visit_every_slice_once_from_the_most_similar_one(similarity):
    runs = visiting_order(torch.tensor(similarity), Order.OUTWARD)
    visited = [index for run in runs for index in run]
    assert sorted(visited) == list(range(len(similarity)))
    assert similarity[visited[0]] == max(similarity)
    assert all(abs(a - b) == 1 for run in runs for a, b in pairwise(run))
    assert not runs[1] or runs[1][0] == visited[0] - 1


def test_first_to_last_is_one_run():
    assert visiting_order(SIMILARITY, Order.FIRST_TO_LAST) == [[0, 1, 2, 3, 4, 5]]


def test_slices_come_in_visiting_order_with_one_row_per_structure(start, slices):
    results = run(start(), slices)
    assert [result.index for result in results] == OUTWARD
    assert {result.logits.shape for result in results} == {(2, 16, 16)}
    assert {result.confidence.shape for result in results} == {result.present.shape for result in results} == {(2,)}
    assert all((result.logits[~result.present] == -1024).all() for result in results)


def test_at_the_turn_around_the_memories_are_those_after_the_start_slice(start, slices, monkeypatch, learned):
    attended = Attended(learned.backbone, monkeypatch)
    with scripted([[1.0]] * SLICES):
        run(start((1,), recent=3), slices)
    assert [attended.visits_seen(visit) for visit in range(SLICES)] == [[], [0], [1, 0], [2, 1, 0], [0], [4, 0]]


def test_the_learner_keeps_what_it_saw_beyond_the_turn_around(start, slices):
    propagated = start((1,))
    with scripted([[1.0]] * SLICES):
        run(propagated, slices)
    assert len(propagated.working_set.queries) == SLICES


def test_a_slice_below_gamma_joins_nothing(start, slices, monkeypatch, learned):
    attended = Attended(learned.backbone, monkeypatch)
    propagated = start((1,))
    with scripted([[0.49], [0.5], [0.49], [0.49], [0.49], [0.49]]):
        run(propagated, slices)
    assert [len(recent) for recent in attended.recent] == [0, 0, 1, 1, 0, 0]
    assert len(propagated.working_set.queries) == 1
    x = learned.learner.embed(slices[OUTWARD[1]].stride16)
    assert torch.equal(propagated.working_set.queries[0][0], x)


def test_accepted_slices_without_the_structure_join_as_negatives(start, slices, monkeypatch, learned):
    decode = learned.backbone.decode

    def absent(*arguments):
        decoded = decode(*arguments)
        return type(decoded)(decoded.logits, decoded.iou, torch.full_like(decoded.presence, -10.0), decoded.pointer)

    monkeypatch.setattr(learned.backbone, "decode", absent)
    attended = Attended(learned.backbone, monkeypatch)
    propagated = start((1,))
    run(propagated, slices)
    assert [len(recent) for recent in attended.recent] == [0, 1, 2, 3, 1, 2]
    nothing = learned.learner.encode_labels(slices[OUTWARD[0]].stride16, torch.zeros(1, 16, 16))
    assert torch.equal(propagated.working_set.queries[0][1], nothing[0])
    assert torch.equal(propagated.working_set.queries[0][2], nothing[1])


def test_structures_accept_slices_on_their_own(start, slices):
    trust = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    together = start((1, 2))
    with scripted(trust):
        both = run(together, slices)
    assert [len(memories) for memories in together.recent] == [2, 2]
    for row, value in enumerate((1, 2)):
        with scripted([[pair[row]] for pair in trust]):
            alone = run(start((value,)), slices)
        for one, other in zip(alone, both, strict=True):
            torch.testing.assert_close(one.logits[0], other.logits[row], rtol=1e-4, atol=1e-4)


def test_recent_memories_of_different_lengths_are_attended_in_groups(start, slices, monkeypatch, learned):
    attended = Attended(learned.backbone, monkeypatch)
    with scripted([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]):
        run(start(), slices)
    assert [len(recent) for recent in attended.recent] == [0, 0, 1, 0, 2, 1, 3, 0, 1, 0, 1]


def test_without_room_for_recent_slices_none_is_remembered(start, slices, monkeypatch, learned):
    attended = Attended(learned.backbone, monkeypatch)
    with scripted([[1.0]] * SLICES):
        run(start((1,), recent=0), slices)
    assert attended.left == []
    assert attended.recent == [[]] * SLICES


@pytest.mark.parametrize("switches", [{"online_branch": False}, {"online_update": False}])
def test_without_updates_the_learner_sees_no_query(start, slices, switches):
    propagated = start((1,), **switches)
    with scripted([[1.0]] * SLICES):
        run(propagated, slices)
    assert propagated.working_set is None or propagated.working_set.queries == []


def test_a_structure_with_few_labelled_slices_repeats_them(make_segmenter, make_case, slices):
    cases = (make_case("a"), make_case("b", values=(1,), labelled_slices=(1, 2, 3)))
    segmenter = make_segmenter(cases, supports=6, absent_supports=0)
    encoder = SupportEncoder(*parts(segmenter))
    propagated = Propagation(encoder, (1, 2), segmenter.view(MAIN).solution, segmenter.settings)
    with torch.no_grad():
        supports = propagated._retrieve(slices[0])
    assert [len(own) for own in supports] == [6, 6]
    assert [len(set(own)) for own in supports] == [6, 3]
    assert supports[1][:3] == supports[1][3:]


@pytest.fixture
def encoded(learned, monkeypatch):
    """How many structures SAM2 was asked to remember, each time that it was."""
    counts, remember = [], learned.backbone.remember_mask

    def counted(features, masks):
        counts.append(len(masks))
        return remember(features, masks)

    monkeypatch.setattr(learned.backbone, "remember_mask", counted)
    return counts


@torch.no_grad()
def test_supports_are_encoded_once_when_needed_and_the_least_recently_used_goes_first(learned, encoded):
    first, second, third = (SupportKey("a", row) for row in range(1, 4))
    one = sum(tensor.nbytes for tensor in vars(SupportEncoder(*parts(learned)).memory(first, 1)).values())
    encoder = SupportEncoder(*parts(learned), RecentTensors(2 * one * len(learned.pool.taught(first))))
    encoded.clear()
    for key, times in ((first, 1), (second, 2), (first, 2), (third, 3), (first, 3), (second, 4)):
        encoder.memory(key, 1)
        assert len(encoded) == times


@torch.no_grad()
def test_structures_of_a_slice_are_encoded_together_and_those_it_lacks_once(learned, encoded):
    encoder, key = SupportEncoder(*parts(learned)), SupportKey("a", 2)
    assert learned.pool.taught(key) == [1, 2]
    one, other = encoder.memory(key, 1), encoder.memory(key, 2)
    assert encoded == [2]
    assert not torch.equal(one.features, other.features)
    lacking = [encoder.memory(key, value) for value in (7, 8)]
    assert encoded == [2, 1]
    assert torch.equal(lacking[0].features, lacking[1].features)


@torch.no_grad()
def test_what_is_remembered_does_not_depend_on_what_is_kept(learned):
    kept, forgetful = SupportEncoder(*parts(learned)), SupportEncoder(*parts(learned), RecentTensors(0))
    asked = [(SupportKey("a", row), value) for row in range(4) for value in (1, 2, 7)]
    for key, value in [*asked, *reversed(asked)]:
        for left, right in zip(kept.sample(key, value), forgetful.sample(key, value), strict=True):
            assert torch.equal(left, right)
        left, right = kept.memory(key, value), forgetful.memory(key, value)
        assert torch.equal(left.features, right.features) and torch.equal(left.pointer, right.pointer)


@torch.no_grad()
def test_a_support_is_what_the_backbone_and_the_learner_make_of_its_mask(learned):
    key = SupportKey("a", 2)
    features, mask = learned.pool.features(key), learned.pool.mask(key, 1)
    assert mask.any()
    encoder = SupportEncoder(*parts(learned))
    expected: Memory = learned.backbone.remember_mask(features, mask[None])
    memory, (x, encoding, weight) = encoder.memory(key, 1), encoder.sample(key, 1)
    assert torch.allclose(memory.features, expected.features, atol=1e-4)
    assert torch.allclose(memory.pointer, expected.pointer, atol=1e-4)
    assert torch.equal(x, learned.learner.embed(features.stride16))
    labels = learned.learner.encode_labels(features.stride16, mask_at_logit_size(mask[None], 4 * x.shape[-1]))
    assert torch.equal(encoding, labels[0]) and torch.equal(weight, labels[1])


def test_solving_on_the_pool_lowers_the_loss_of_every_structure(learned):
    encoder = SupportEncoder(*parts(learned))
    with torch.no_grad():
        tau = solve_on_pool(encoder, (1, 2), Settings(gamma=0.5)).tau
        assert tau.shape == (2, 32, 32, KERNEL, KERNEL)
        for row, value in enumerate((1, 2)):
            supports = [encoder.sample(key, value) for key in learned.pool.spread(value, 32)]
            samples = (torch.stack(column, 1) for column in zip(*supports, strict=True))
            problem = learned.learner.problem(*WorkingSet(*samples).samples())
            before, after = loss(learned.learner.start(1), problem), loss(tau[row : row + 1], problem)
            assert after.item() < 0.5 * before.item()
