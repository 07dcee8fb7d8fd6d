"""One episode: supports with masks, then query slices in order, each segmented with what came before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ofl_sam2.backbone.frozen import Decoded, ImageFeatures, Memory, SAM2Backbone
from ofl_sam2.learner.few_shot import FewShotLearner, mask_at_logit_size
from ofl_sam2.memory.working_set import WorkingSet

FIRST_STEPS, UPDATE_STEPS = 3, 2


@dataclass(frozen=True)
class Episode:
    """B objects with S supports and Q queries; masks are `(B, size, size)`.

    Attributes:
        support_memories: SAM2's memory of each support slice.
        support_features: stride-16 features `(B, C, h, w)` of each support slice.
        support_masks: of each support slice.
        query_features: of each query slice, in order.
        query_masks: of each query slice.
        sizes: how many of the objects belong to each of the episodes that were joined into this one.
    """

    support_memories: Sequence[Memory]
    support_features: Sequence[Tensor]
    support_masks: Sequence[Tensor]
    query_features: Sequence[ImageFeatures]
    query_masks: Sequence[Tensor]
    sizes: tuple[int, ...] = ()


def unroll(
    backbone: SAM2Backbone, learner: FewShotLearner | None, episode: Episode, teacher_forcing: float = 0.0
) -> list[Decoded]:
    """Segment the queries of an episode one after the other.

    Args:
        backbone: gradients reach its weights unless it is frozen.
        learner: the few-shot learner, or None for SAM2's memory alone.
        episode: B objects.
        teacher_forcing: probability that the true mask, not the prediction, enters the memories.

    Returns:
        One `Decoded` of B objects per query.
    """
    online = None if learner is None else _OnlineBranch(learner, episode)
    recent: list[Memory] = []
    outputs: list[Decoded] = []
    for features, masks in zip(episode.query_features, episode.query_masks, strict=True):
        embedding = backbone.attend(features, episode.support_memories, recent)
        if online is not None:
            embedding = online.fuse(features, embedding)
        decoded = backbone.decode(embedding, features)
        outputs.append(decoded)
        if len(outputs) == len(episode.query_features):
            break
        given = decoded.detach()
        if torch.rand(()) < teacher_forcing:
            recent.insert(0, backbone.remember_mask(features, masks))
            soft = mask_at_logit_size(masks, given.logits.shape[-1])
        else:
            recent.insert(0, backbone.remember_prediction(features, given))
            soft = given.masks().sigmoid()
        if online is not None:
            online.learn(features.stride16, soft)
    return outputs


class _OnlineBranch:
    """The few-shot learner within one episode."""

    def __init__(self, learner: FewShotLearner, episode: Episode) -> None:
        self.learner = learner
        side = episode.query_features[0].stride4.shape[-1]
        samples = [
            self._sample(features, mask_at_logit_size(masks, side))
            for features, masks in zip(episode.support_features, episode.support_masks, strict=True)
        ]
        x, encoding, weight = (torch.stack(column, 1) for column in zip(*samples, strict=True))
        self.set = WorkingSet(x, encoding, weight)
        self.tau, self.metric = learner.start(len(x)), learner.metric(x)
        self._solve(FIRST_STEPS)

    def fuse(self, features: ImageFeatures, attended: Tensor) -> Tensor:
        target = self.learner.target_feature(self.learner.embed(features.stride16), self.tau)
        return self.learner.fuse(target, attended)

    def learn(self, features: Tensor, masks: Tensor) -> None:
        self.set.add(*self._sample(features, masks))
        self._solve(UPDATE_STEPS)

    def _sample(self, features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.learner.embed(features), *self.learner.encode_labels(features, masks)

    def _solve(self, steps: int) -> None:
        self.tau = self.learner.solve(self.tau, self.learner.problem(*self.set.samples()), steps, self.metric)
