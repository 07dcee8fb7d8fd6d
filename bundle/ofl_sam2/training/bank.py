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


class EpisodeBank:
    """Draws episodes: supports from one volume, neighbouring query slices from another case where there is one.

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
        sources = self._sources(query)
        source = sources[dice.integer(0, len(sources) - 1)]
        rows = self._query_rows(dice, query)
        values = self._values(dice, query, rows, source)
        supports = [self._support_rows(dice, query, rows, source, value) for value in values]
        volume, device = self.volumes[source], self._device
        stacked = [[own[i] for own in supports] for i in range(self.supports)]
        memories = [
            [self._memory(source, row, value) for row, value in zip(column, values, strict=True)] for column in stacked
        ]
        features = [query.slice(row).to(device).expand(len(values)) for row in rows]
        return Episode(
            [Memory.cat(column) for column in memories],
            [torch.cat([volume.slice(row).to(device).stride16 for row in column]) for column in stacked],
            [self._masks(volume, column, values) for column in stacked],
            features,
            [self._masks(query, [row] * len(values), values) for row in rows],
        )

    @property
    def _device(self) -> torch.device:
        return self.backbone.sam2.device

    def _sources(self, query: PooledCase) -> list[int]:
        """Volumes in the same view that share a structure: of other cases, else other copies of this case, else it."""
        shared = query.known & set(self.structures)
        usable = [i for i, volume in enumerate(self.volumes) if volume.view == query.view and volume.known & shared]
        other_cases = [i for i in usable if self.volumes[i].name != query.name]
        return other_cases or [i for i in usable if self.volumes[i] is not query] or usable

    def _query_rows(self, dice: Dice, query: PooledCase) -> list[int]:
        """Neighbouring slices in either direction, half of them around a structure, half of them anywhere."""
        filled = [row for row, values in enumerate(query.present) if values & set(self.structures)]
        last = len(query.slices) - 1
        around = filled and dice.chance(0.5)
        centre = filled[dice.integer(0, len(filled) - 1)] if around else dice.integer(0, last)
        first = centre - dice.integer(0, self.queries - 1)
        rows = [min(max(first + i, 0), last) for i in range(self.queries)]
        return rows if dice.chance(0.5) else rows[::-1]

    def _values(self, dice: Dice, query: PooledCase, rows: list[int], source: int) -> list[int]:
        """Structures of the episode: those in the query slices first, all of them known to query and source."""
        near = frozenset().union(*(query.present[row] for row in rows))
        shared = self.volumes[source].known & query.known & set(self.structures)
        shuffled = sorted(sorted(shared), key=lambda value: (value not in near, dice.uniform(0, 1)))
        return shuffled[: self.objects]

    def _support_rows(self, dice: Dice, query: PooledCase, rows: list[int], source: int, value: int) -> list[int]:
        """Random ones of the most similar slices, half of them without the structure where there are such.

        Of the query's own case, slices next to the query serve only where the structure is in no other slice.
        """
        volume = self.volumes[source]
        similarity = (volume.descriptors @ query.descriptors[rows[0]]).tolist()
        ranked = sorted(range(len(volume.slices)), key=lambda row: -similarity[row])
        same = volume.key == query.key
        apart = [row for row in ranked if not same or all(abs(row - other) > 1 for other in rows)]
        with_it, anywhere = ([row for row in group if value in volume.present[row]] for group in (apart, ranked))
        without = [row for row in apart if value not in volume.present[row]]
        absent = _sample(dice, without[: self.supports], self.supports // 2)
        wanted = self.supports - len(absent)
        chosen = _sample(dice, (with_it or anywhere)[: 2 * wanted], wanted)
        return (chosen * self.supports)[:wanted] + absent

    def _masks(self, volume: PooledCase, rows: Sequence[int], values: Sequence[int]) -> Tensor:
        """Masks `(B, size, size)` of pairs of a row and a structure."""
        return torch.stack([volume.mask(row, value) for row, value in zip(rows, values, strict=True)]).to(self._device)

    @torch.no_grad()
    def _memory(self, source: int, row: int, value: int) -> Memory:
        """SAM2's memory of a support slice, encoded once; bounded, the oldest goes first."""
        volume = self.volumes[source]
        key = (id(volume), row, value)
        if key not in self._memories:
            if len(self._memories) >= MAX_CACHED_MEMORIES:
                del self._memories[next(iter(self._memories))]
            mask = self._masks(volume, [row], [value])
            self._memories[key] = self.backbone.remember_mask(volume.slice(row).to(self._device), mask)
        return self._memories[key]


def _sample(dice: Dice, rows: list[int], count: int) -> list[int]:
    """Draw up to `count` rows, in their order."""
    order = sorted(range(len(rows)), key=lambda _: dice.uniform(0, 1))[:count]
    return [rows[i] for i in sorted(order)]


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
