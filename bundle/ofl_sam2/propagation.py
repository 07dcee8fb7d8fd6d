"""Through one volume, slice by slice: retrieve supports, attend, learn, fuse, decode, remember.

Shapes: K structures of one slice share its image features and go through SAM2 as a batch of K objects.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ofl_sam2.backbone.frozen import Decoded, ImageFeatures, Memory, SAM2Backbone
from ofl_sam2.learner.few_shot import FewShotLearner, mask_at_logit_size
from ofl_sam2.memory.pool import SupportKey, SupportPool, describe
from ofl_sam2.memory.recent import RecentTensors
from ofl_sam2.memory.working_set import WorkingSet
from ofl_sam2.quality import confidence
from ofl_sam2.settings import Order, Settings

MOST_SUPPORT_BYTES = 1 << 30


@dataclass(frozen=True)
class SegmentedSlice:
    """One slice: `logits (K, 4h, 4w)` with absent structures overwritten, `confidence (K,)`, `present (K,)` bool."""

    index: int
    logits: Tensor
    confidence: Tensor
    present: Tensor


class SupportEncoder:
    """Turns labelled slices into SAM2's memories and the learner's samples of one structure.

    A slice is the same for all structures that it lacks.

    Args:
        backbone, learner: what encodes them.
        pool: the labelled slices.
        values: structures that will be asked for.
        kept: what was encoded last; encoders may share it.
    """

    def __init__(
        self,
        backbone: SAM2Backbone,
        learner: FewShotLearner,
        pool: SupportPool,
        values: Collection[int],
        kept: RecentTensors | None = None,
    ) -> None:
        self.backbone, self.learner, self.pool, self.values = backbone, learner, pool, values
        self._kept = kept or RecentTensors(MOST_SUPPORT_BYTES)
        self._own = object()

    def memory(self, key: SupportKey, value: int) -> Memory:
        """What SAM2 remembers of a labelled slice; all structures in it are encoded at once."""
        if found := self._kept.get((self._own, "memory", key, self._drawn(key, value))):
            return Memory(**found)
        taught = [each for each in self.pool.taught(key) if each in self.values]
        values = taught if value in taught else [value]
        masks = torch.stack([self._mask(key, each) for each in values])
        encoded = self.backbone.remember_mask(self._features(key).expand(len(values)), masks)
        memories = {each: encoded[[row]] for row, each in enumerate(values)}
        for each, memory in memories.items():
            self._kept.put((self._own, "memory", key, self._drawn(key, each)), vars(memory))
        return memories[value]

    def sample(self, key: SupportKey, value: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the learner sees of it: `x (1, C_x, h, w)`, `encoding` and `weight (1, D, h, w)`."""

        def embed() -> dict[str, Tensor]:
            return {"x": self.learner.embed(self._features(key).stride16)}

        def encode() -> dict[str, Tensor]:
            features = self._features(key)
            mask = mask_at_logit_size(self._mask(key, value)[None], features.stride4.shape[-1])
            encoding, weight = self.learner.encode_labels(features.stride16, mask)
            return {"encoding": encoding, "weight": weight}

        label = self._once((self._own, "label", key, self._drawn(key, value)), encode)
        return self._once((self._own, "image", key), embed)["x"], label["encoding"], label["weight"]

    def _once(self, entry: Hashable, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if (found := self._kept.get(entry)) is None:
            found = encode()
            self._kept.put(entry, found)
        return found

    def _drawn(self, key: SupportKey, value: int) -> int | None:
        return value if value in self.pool.present(key) else None

    def _mask(self, key: SupportKey, value: int) -> Tensor:
        return self.pool.mask(key, value).to(self._device)

    def _features(self, key: SupportKey) -> ImageFeatures:
        return self.pool.features(key).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.learner.lam.device


def _samples(
    encoder: SupportEncoder, values: Sequence[int], keys: Sequence[Sequence[SupportKey]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Learner samples of S supports for each of K structures: `(K, S, ...)`."""
    samples = [[encoder.sample(key, value) for key in own] for own, value in zip(keys, values, strict=True)]
    x, encoding, weight = (torch.stack([torch.cat([one[i] for one in own]) for own in samples]) for i in range(3))
    return x, encoding, weight


class PoolSolution(NamedTuple):
    """What the pool alone says: mapping networks `tau (K, D, C_x, k, k)` and the metric of the descent `(K, n, n)`."""

    tau: Tensor
    metric: Tensor | None


def solve_on_pool(encoder: SupportEncoder, values: Sequence[int], settings: Settings) -> PoolSolution:
    """Solve the mapping networks of K structures on a spread-out part of the pool."""
    learner = encoder.learner
    solved, metrics = [], []
    for value in values:
        x, encoding, weight = _samples(encoder, [value], [encoder.pool.spread(value, settings.pool_slices)])
        problem = learner.problem(*WorkingSet(x, encoding, weight).samples())
        metric = learner.metric(x) if settings.preconditioned else None
        solved.append(learner.solve(learner.start(1), problem, settings.learn_steps, metric, settings.exact_ridge))
        metrics.append(metric)
    joined = torch.cat([m for m in metrics if m is not None]) if settings.preconditioned else None
    return PoolSolution(torch.cat(solved), joined)


class LearnedView:
    """What is learned from the labelled slices of one view.

    Attributes:
        pool: the labelled slices.
        values: structures that can be segmented in this view.
        supports: encodes slices of the pool.
        solution: the mapping networks of `values`.
    """

    def __init__(
        self,
        pool: SupportPool,
        values: tuple[int, ...],
        backbone: SAM2Backbone,
        learner: FewShotLearner,
        settings: Settings,
        kept: RecentTensors | None = None,
    ) -> None:
        self.pool, self.values = pool, values
        self.supports = SupportEncoder(backbone, learner, pool, values, kept)
        self.solution = solve_on_pool(self.supports, values, settings)

    def of(self, values: tuple[int, ...]) -> PoolSolution:
        """The mapping networks of some of the structures."""
        rows = [self.values.index(value) for value in values]
        return PoolSolution(
            self.solution.tau[rows], None if self.solution.metric is None else self.solution.metric[rows]
        )


def visiting_order(similarity: Tensor, order: Order) -> list[list[int]]:
    """Runs of slice indices: from the slice most similar to the supports outwards, or first to last.

    Example:
        >>> visiting_order(torch.tensor([0.1, 0.9, 0.3]), Order.OUTWARD)
        [[1, 2], [0]]
    """
    count = len(similarity)
    if order is Order.FIRST_TO_LAST:
        return [list(range(count))]
    start = int(similarity.argmax())
    return [list(range(start, count)), list(range(start - 1, -1, -1))]


class Propagation:
    """Segments the slices of one volume; the learner adapts to it on the way.

    Args:
        encoder: backbone, learner and pool.
        values: label values of the K structures.
        start: mapping networks solved on the pool, see `solve_on_pool`.
        settings: the switches.
    """

    def __init__(self, encoder: SupportEncoder, values: Sequence[int], start: PoolSolution, settings: Settings) -> None:
        self.encoder, self.values, self.settings = encoder, values, settings
        self.backbone, self.learner = encoder.backbone, encoder.learner
        self.tau, self.metric = start
        self.working_set: WorkingSet | None = None
        self.recent: list[list[Memory]] = [[] for _ in values]

    def run(self, features_of: Callable[[int], ImageFeatures], similarity: Tensor) -> Iterator[SegmentedSlice]:
        """Segment all slices.

        Args:
            features_of: frozen features of one slice, N = 1.
            similarity: of each slice to the supports, `(S,)`.
        """
        runs = visiting_order(similarity, self.settings.order)
        for index in runs[0]:
            yield self.segment(index, features_of(index))
            if index == runs[0][0]:
                after_first = [list(memories) for memories in self.recent]
        for run in runs[1:]:
            self.recent = [list(memories) for memories in after_first]
            for index in run:
                yield self.segment(index, features_of(index))

    def segment(self, index: int, features: ImageFeatures) -> SegmentedSlice:
        """Segment one slice and learn from it where the result is trusted."""
        supports = self._retrieve(features)
        shared = features.expand(len(self.values))
        embedding = self._attend(shared, supports)
        if self.settings.online_branch:
            x = self.learner.embed(features.stride16)
            self._adapt(supports)
            target = self.learner.target_feature(x.expand(len(self.values), -1, -1, -1), self.tau)
            embedding = self.learner.fuse(target, embedding, self.settings.adaptive_fusion)
        decoded = self.backbone.decode(embedding, shared)
        trust = confidence(decoded)
        self._remember(shared, decoded, trust >= self.settings.gamma)
        return SegmentedSlice(index, decoded.masks(), trust, decoded.presence > 0)

    def _retrieve(self, features: ImageFeatures) -> list[list[SupportKey]]:
        """Supports per structure, all lists of one length: short ones repeat their supports."""
        descriptor = describe(features.stride16)[0].cpu()
        keys = [
            self.encoder.pool.retrieve(descriptor, value, self.settings.supports, self.settings.absent_supports)
            for value in self.values
        ]
        longest = max(map(len, keys))
        return [[own[i % len(own)] for i in range(longest)] for own in keys]

    def _attend(self, features: ImageFeatures, supports: list[list[SupportKey]]) -> Tensor:
        """Memory attention; structures with the same number of recent memories go together."""
        embedding = torch.empty_like(features.stride16)
        for length in sorted({len(memories) for memories in self.recent}):
            rows = [row for row, memories in enumerate(self.recent) if len(memories) == length]
            conditioning = [
                Memory.cat([self.encoder.memory(supports[row][i], self.values[row]) for row in rows])
                for i in range(min(len(supports[0]), self.settings.memory_supports))
            ]
            recent = [Memory.cat([self.recent[row][i] for row in rows]) for i in range(length)]
            embedding[rows] = self.backbone.attend(features[rows], conditioning, recent)
        return embedding

    def _adapt(self, supports: list[list[SupportKey]]) -> None:
        """Solve the mapping networks on the retrieved supports and the accepted slices."""
        samples = _samples(self.encoder, self.values, supports)
        if self.working_set is None:
            self.working_set = WorkingSet(
                *samples,
                rate=self.settings.query_rate,
                support_floor=self.settings.support_floor,
                capacity=self.settings.query_capacity,
            )
            steps = self.settings.first_steps
        else:
            self.working_set.replace_supports(*samples)
            steps = self.settings.update_steps
        problem = self.learner.problem(*self.working_set.samples())
        self.tau = self.learner.solve(self.tau, problem, steps, self.metric, self.settings.exact_ridge)

    def _remember(self, features: ImageFeatures, decoded: Decoded, accepted: Tensor) -> None:
        """Let accepted slices join SAM2's memory and the learner's working set."""
        rows = accepted.nonzero().flatten().tolist()
        if rows and self.settings.recent:
            memory = self.backbone.remember_prediction(features[rows], decoded[rows])
            for position, row in enumerate(rows):
                self.recent[row] = [memory[position : position + 1], *self.recent[row]][: self.settings.recent]
        if rows and self.settings.online_update and self.working_set is not None:
            x = self.learner.embed(features.stride16[:1]).expand(len(self.values), -1, -1, -1)
            encoding, weight = self.learner.encode_labels(features.stride16, decoded.masks().sigmoid())
            self.working_set.add(x, encoding, weight, accepted)
