"""The training set in memory: frozen features of labelled volumes and augmented copies; episodes drawn from them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ofl_sam2.backbone.frozen import ImageFeatures, Memory, SAM2Backbone
from ofl_sam2.memory.pool import PooledCase
from ofl_sam2.training.episodes import Episode
from ofl_sam2.training.processes import rank, world_size
from ofl_sam2.training.synthetic import Dice

MAX_CACHED_MEMORIES = 2048

_Slice = tuple[PooledCase, int]


class EpisodeBank:
    """Draws episodes: neighbouring query slices of one volume, supports from the other cases where there are any.

    Args:
        backbone: frozen.
        volumes: labelled volumes and augmented copies of them, which share the name of their case.
        structures: label values to learn.
        supports, queries: S and Q of an episode.
        objects: most structures in one episode.
    """

    def __init__(
        self,
        backbone: SAM2Backbone,
        volumes: Sequence[PooledCase],
        structures: Sequence[int],
        supports: int = 4,
        queries: int = 3,
        objects: int = 4,
    ) -> None:
        self.backbone, self.structures = backbone, tuple(structures)
        self.supports, self.queries, self.objects = supports, queries, objects
        self._memories: dict[tuple[int, int, int], Memory] = {}
        self.volumes: list[PooledCase] = []
        self.replace(volumes)

    def replace(self, volumes: Sequence[PooledCase]) -> None:
        """Draw from other volumes from now on; the memories of those that stay are kept."""
        self.volumes = [volume for volume in volumes if volume.known & set(self.structures)]
        staying = set(map(id, self.volumes))
        self._memories = {key: memory for key, memory in self._memories.items() if key[0] in staying}

    def draw(self, dice: Dice, episodes: int) -> Episode:
        """Draw a batch of episodes, joined into one; several processes share the batch out among them."""
        drawn = [self._episode(dice) for _ in range(episodes)]
        return _join(drawn[rank() :: world_size()])

    def _episode(self, dice: Dice) -> Episode:
        query = self.volumes[dice.integer(0, len(self.volumes) - 1)]
        sources = self._sources(dice, query)
        rows = self._query_rows(dice, query)
        values = self._values(dice, query, rows, sources)
        ranked = _by_similarity(query, rows[0], sources)
        supports = [self._supports(dice, query, rows, ranked, value) for value in values]
        columns = list(zip(*supports, strict=True))
        features = [query.slice(row).to(self._device).expand(len(values)) for row in rows]
        return Episode(
            [Memory.cat(list(map(self._memory, column, values))) for column in columns],
            [torch.cat([volume.slice(row).to(self._device).stride16 for volume, row in column]) for column in columns],
            [self._masks(column, values) for column in columns],
            features,
            [self._masks([(query, row)] * len(values), values) for row in rows],
        )

    @property
    def _device(self) -> torch.device:
        return self.backbone.sam2.device

    def _sources(self, dice: Dice, query: PooledCase) -> list[PooledCase]:
        """Volumes in the view that share a structure: one of every other case, else a copy of this one, else itself."""
        shared = query.known & set(self.structures)
        usable = [volume for volume in self.volumes if volume.view == query.view and volume.known & shared]
        other_cases = [volume for volume in usable if volume.name != query.name]
        copies = [volume for volume in usable if volume is not query]
        by_key: dict[str, list[PooledCase]] = {}
        for volume in other_cases or copies or usable:
            by_key.setdefault(volume.key, []).append(volume)
        return [group[dice.integer(0, len(group) - 1)] for group in by_key.values()]

    def _query_rows(self, dice: Dice, query: PooledCase) -> list[int]:
        """Neighbouring slices in either direction, half of them around a structure, half of them anywhere."""
        filled = [row for row, values in enumerate(query.present) if values & set(self.structures)]
        last = len(query.slices) - 1
        around = filled and dice.chance(0.5)
        centre = filled[dice.integer(0, len(filled) - 1)] if around else dice.integer(0, last)
        first = centre - dice.integer(0, self.queries - 1)
        rows = [min(max(first + i, 0), last) for i in range(self.queries)]
        return rows if dice.chance(0.5) else rows[::-1]

    def _values(self, dice: Dice, query: PooledCase, rows: list[int], sources: Sequence[PooledCase]) -> list[int]:
        """Structures of the episode: those in the query slices first, all of them known to the query and a source."""
        near = frozenset().union(*(query.present[row] for row in rows))
        known = frozenset().union(*(source.known for source in sources))
        shared = known & query.known & set(self.structures)
        shuffled = sorted(sorted(shared), key=lambda value: (value not in near, dice.uniform(0, 1)))
        return shuffled[: self.objects]

    def _supports(
        self, dice: Dice, query: PooledCase, rows: list[int], ranked: Sequence[_Slice], value: int
    ) -> list[_Slice]:
        """Random ones of the most similar slices, half of them without the structure where there are such.

        Of the query's own case, slices next to the query serve only where the structure is in no other slice.
        """
        teaching = [(volume, row) for volume, row in ranked if value in volume.known]
        apart = [
            (volume, row)
            for volume, row in teaching
            if volume.key != query.key or all(abs(row - other) > 1 for other in rows)
        ]
        with_it, anywhere = ([s for s in group if value in s[0].present[s[1]]] for group in (apart, teaching))
        without = [(volume, row) for volume, row in apart if value not in volume.present[row]]
        absent = _sample(dice, without[: self.supports], self.supports // 2)
        wanted = self.supports - len(absent)
        chosen = _sample(dice, (with_it or anywhere)[: 2 * wanted], wanted)
        return (chosen * self.supports)[:wanted] + absent

    def _masks(self, slices: Sequence[_Slice], values: Sequence[int]) -> Tensor:
        """Masks `(B, size, size)` of pairs of a slice and a structure."""
        pairs = zip(slices, values, strict=True)
        return torch.stack([volume.mask(row, value) for (volume, row), value in pairs]).to(self._device)

    @torch.no_grad()
    def _memory(self, support: _Slice, value: int) -> Memory:
        """SAM2's memory of a support slice, encoded once; bounded, the oldest goes first."""
        volume, row = support
        key = (id(volume), row, value)
        if key not in self._memories:
            if len(self._memories) >= MAX_CACHED_MEMORIES:
                del self._memories[next(iter(self._memories))]
            mask = self._masks([support], [value])
            self._memories[key] = self.backbone.remember_mask(volume.slice(row).to(self._device), mask)
        return self._memories[key]


def _by_similarity(query: PooledCase, row: int, sources: Sequence[PooledCase]) -> list[_Slice]:
    """All slices of the sources, by falling similarity to a slice of the query."""
    slices = [(source, own) for source in sources for own in range(len(source))]
    similarity = torch.cat([source.descriptors @ query.descriptors[row] for source in sources])
    return [slices[i] for i in similarity.argsort(descending=True, stable=True).tolist()]


def _sample(dice: Dice, slices: Sequence[_Slice], count: int) -> list[_Slice]:
    """Draw up to `count` slices, in their order."""
    order = sorted(range(len(slices)), key=lambda _: dice.uniform(0, 1))[:count]
    return [slices[i] for i in sorted(order)]


def _join(episodes: Sequence[Episode]) -> Episode:
    def columns(name: str) -> Iterator[tuple[Any, ...]]:
        return zip(*(getattr(episode, name) for episode in episodes), strict=True)

    return Episode(
        [Memory.cat(c) for c in columns("support_memories")],
        [torch.cat(c) for c in columns("support_features")],
        [torch.cat(c) for c in columns("support_masks")],
        [ImageFeatures.cat(c) for c in columns("query_features")],
        [torch.cat(c) for c in columns("query_masks")],
        tuple(len(episode.query_masks[0]) for episode in episodes),
    )
