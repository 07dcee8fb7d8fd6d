"""Unrolling an episode: gradients to the learner only, memories and adaptation in order."""

import pytest
import torch
from torch import Generator, nn

from ofl_sam2.backbone.weights import state_hash
from ofl_sam2.training.bank import EpisodeBank
from ofl_sam2.training.episodes import unroll
from ofl_sam2.training.losses import segmentation_loss
from ofl_sam2.training.synthetic import Dice


@pytest.fixture(scope="module")
def episode(nano, make_segmenter, make_case):
    pool = make_segmenter((make_case("a"), make_case("b", seed=1))).pool
    with torch.no_grad():
        return EpisodeBank(nano, list(pool.cases.values()), (1, 2)).draw(Dice(Generator().manual_seed(0)), 2)


def mean_loss(outputs, episode):
    return torch.stack([segmentation_loss(*pair) for pair in zip(outputs, episode.query_masks, strict=True)]).mean()


def test_every_query_is_decoded_for_every_object(nano, make_learner, episode):
    outputs = unroll(nano, make_learner(), episode)
    assert len(outputs) == 3
    assert {output.logits.shape for output in outputs} == {(len(episode.query_masks[0]), 16, 16)}


def test_one_step_reaches_every_parameter_of_the_learner_and_none_of_sam2(nano, make_learner, episode):
    learner = make_learner()
    before = {name: value.detach().clone() for name, value in learner.named_parameters()}
    sam2_before = state_hash(nano.sam2)
    optimizer = torch.optim.SGD(learner.parameters(), lr=10.0)
    mean_loss(unroll(nano, learner, episode), episode).backward()
    assert all(torch.isfinite(value.grad).all() for value in learner.parameters())
    optimizer.step()
    unchanged = [name for name, value in learner.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []
    assert all(value.grad is None for value in nano.parameters())
    assert state_hash(nano.sam2) == sam2_before


def test_gradients_flow_where_the_object_is_judged_absent(nano, make_learner, episode, monkeypatch):
    bias = nano.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias
    monkeypatch.setattr(bias, "data", bias - 100)
    learner = make_learner()
    outputs = unroll(nano, learner, episode)
    assert all((output.presence < 0).all() for output in outputs)
    loss = mean_loss(outputs, episode)
    loss.backward()
    assert torch.isfinite(loss)
    assert learner.up[-1].weight.grad.abs().sum() > 0


def test_an_engine_that_calls_train_changes_nothing(nano, make_learner, episode):
    learner = make_learner()
    with torch.no_grad():
        before = unroll(nano, learner, episode)
        network = nn.ModuleDict({"backbone": nano, "learner": learner}).train()
        after = unroll(nano, learner, episode)
    assert not any(module.training for module in network["backbone"].modules())
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(before, after, strict=True))


def test_without_a_learner_memory_works_alone_as_it_does_with_an_untrained_one(nano, make_learner, episode):
    with torch.no_grad():
        alone, untrained, trained = (
            unroll(nano, learner, episode) for learner in (None, make_learner(fused=False), make_learner())
        )
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(alone, untrained, strict=True))
    assert not torch.equal(alone[0].logits, trained[0].logits)


@pytest.mark.parametrize(("teacher_forcing", "called"), [(0.0, "remember_prediction"), (1.0, "remember_mask")])
def test_predictions_or_true_masks_are_remembered_but_never_the_last_one(
    nano, make_learner, episode, monkeypatch, teacher_forcing, called
):
    remembered, recents = [], []
    for name in ("remember_prediction", "remember_mask"):
        function = getattr(nano, name)
        monkeypatch.setattr(nano, name, lambda *a, f=function, n=name: remembered.append((n, a[1])) or f(*a))
    attend = nano.attend
    monkeypatch.setattr(nano, "attend", lambda f, s, recent: recents.append(len(recent)) or attend(f, s, recent))
    unroll(nano, make_learner(), episode, teacher_forcing)
    assert [name for name, _ in remembered] == [called] * 2
    assert recents == [0, 1, 2]
    if called == "remember_mask":
        assert torch.equal(remembered[0][1], episode.query_masks[0])


def test_later_queries_depend_on_earlier_ones_without_a_gradient_to_them(nano, make_learner, episode):
    learner = make_learner()
    alone = unroll(
        nano,
        learner,
        type(episode)(*(part[1:] if name.startswith("query") else part for name, part in vars(episode).items())),
    )
    outputs = unroll(nano, learner, episode)
    assert not torch.equal(outputs[1].logits, alone[0].logits)
    first = outputs[0].logits
    second = torch.autograd.grad(outputs[1].logits.sum(), first, allow_unused=True)[0]
    assert second is None
