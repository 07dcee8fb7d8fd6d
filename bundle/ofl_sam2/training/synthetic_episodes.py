"""Endless few-shot episodes from synthetic anatomy: supports of one patient, neighbouring query slices of another."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset, get_worker_info

from ofl_sam2.training.synthetic import Dice, Palette, deform, random_anatomy, random_palette, render

MIN_PIXELS = 12
MAX_QUERIES = 6


@dataclass(frozen=True)
class Episodes:
    """A batch of E episodes with O objects each.

    `support_images (E, S, size, size)`, `support_masks (E, S, O, size, size)`, `query_images (E, Q, size, size)`,
    `query_masks (E, Q, O, size, size)`, all in [0, 1].
    """

    support_images: Tensor
    support_masks: Tensor
    query_images: Tensor
    query_masks: Tensor

    def to(self, device: torch.device | str) -> "Episodes":
        """Move all tensors to a device."""
        return Episodes(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


class SyntheticEpisodes(IterableDataset):
    """Endless batches of episodes; one pair of patients serves a whole batch.

    Args:
        size: side of the square input in pixels.
        episodes, objects, queries: E, O and Q of a batch.
        supports: smallest and largest number S of support slices, drawn per batch.
        seed: of the first worker; further workers count on.
        process: number of this one among processes that train together; their batches differ, but not in S, so that
            none waits for the others.
        device: where the volumes are made.
    """

    def __init__(
        self,
        size: int,
        episodes: int = 4,
        objects: int = 3,
        queries: int = 3,
        supports: tuple[int, int] = (1, 6),
        seed: int = 0,
        process: int = 0,
        device: str = "cpu",
    ) -> None:
        if queries > MAX_QUERIES:
            raise ValueError(
                f"{queries} query slices do not fit into the thinnest volumes; take at most {MAX_QUERIES}."
            )
        self.size, self.episodes, self.objects, self.queries = size, episodes, objects, queries
        self.supports, self.seed, self.process, self.device = supports, seed, process, device

    def __iter__(self) -> Iterator[Episodes]:
        """Yield batches for ever."""
        worker = get_worker_info()
        seed = self.seed * 1000 + (worker.id if worker else 0)
        counts = Dice(Generator().manual_seed(seed))
        dice = Dice(Generator(self.device).manual_seed(seed + 10**9 * self.process))
        while True:
            yield self.batch(dice, counts.integer(*self.supports))

    def batch(self, dice: Dice, count: int) -> Episodes:
        """Draw one batch with `count` supports; several anatomies share it."""
        parts: list[tuple[Tensor, ...]] = []
        while len(parts) < self.episodes:
            parts += self._pair(dice, count)[: self.episodes - len(parts)]
        return Episodes(*(torch.stack(column) for column in zip(*parts, strict=True)))

    def _pair(self, dice: Dice, supports: int) -> list[tuple[Tensor, ...]]:
        depth, side = dice.integer(12, 18), (48, 64, 96, 128)[dice.integer(0, 3)]
        anatomy = random_anatomy(dice, depth, side)
        palette = random_palette(dice, anatomy)
        strength = dice.uniform(0.3, 1.0)
        patients = []
        for _ in range(2):
            regions = deform(dice, anatomy.regions, strength)
            patients.append((render(dice, regions, palette if dice.chance(0.9) else _repaint(dice, palette)), regions))
        drawn = [self._episode(dice, patients, supports) for _ in range(2)]
        return [episode for episode in drawn if episode is not None]

    def _episode(self, dice: Dice, patients: list, supports: int) -> tuple[Tensor, ...] | None:
        (image_a, regions_a), (image_b, regions_b) = patients if dice.chance(0.75) else [patients[1], patients[1]]
        depth = len(regions_b)
        step = 1 if dice.chance(0.5) else -1
        first = dice.integer(self.queries - 1, depth - self.queries)
        queries = [first + step * i for i in range(self.queries)]
        near = [round(first + 2.5 * float(dice.normal(1))) for _ in range(supports)]
        chosen = [z if 0 <= z < depth and dice.chance(0.65) else dice.integer(0, depth - 1) for z in near]
        box = (..., *_field_of_view(dice, regions_b.shape[-1]))
        seen_a, seen_b = regions_a[chosen][box], regions_b[queries][box]
        targets = _targets(dice, seen_a, seen_b, self.objects)
        if targets is None:
            return None
        return (
            *self._resize(image_a[chosen][box], seen_a, targets),
            *self._resize(image_b[queries][box], seen_b, targets),
        )

    def _resize(self, images: Tensor, regions: Tensor, targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        masks = torch.stack([torch.isin(regions, target) for target in targets], 1).float()
        size = (self.size, self.size)
        images = functional.interpolate(images[:, None], size=size, mode="bilinear", antialias=True)[:, 0]
        masks = functional.interpolate(masks, size=size, mode="bilinear", antialias=True)
        return images.clamp(0, 1), torch.where(masks > 0.02, masks, 0.0).clamp_max(1)


def _repaint(dice: Dice, palette: Palette) -> Palette:
    """The same anatomy from another scanner: intensities bent by a random monotone curve."""
    mean = palette.mean.clamp(0, 1) ** dice.log_uniform(0.6, 1.6)
    return Palette(**{**palette.__dict__, "mean": mean, "inverted": palette.inverted ^ dice.chance(0.1)})


def _targets(dice: Dice, supports: Tensor, queries: Tensor, count: int) -> list[Tensor] | None:
    """Draw `count` targets seen in the supports, a quarter of them in no query if there are such; None without any."""
    pixels = supports.shape[-1] ** 2

    def seen(regions: Tensor) -> set[int]:
        counts = torch.stack([torch.bincount(region.flatten(), minlength=64) for region in regions]).amax(0)
        keep = (counts >= MIN_PIXELS) & (counts <= 0.45 * pixels)
        return set(keep.nonzero().flatten().tolist()) - {0}

    def draw(candidates: list[int]) -> int:
        """One candidate, the smaller ones more often."""
        pair = [candidates[dice.integer(0, len(candidates) - 1)] for _ in range(2)]
        return min(pair, key=lambda value: int((queries == value).sum())) if dice.chance(0.6) else pair[0]

    in_supports = seen(supports)
    both, gone = sorted(seen(queries) & in_supports), sorted(in_supports - set(queries.unique().tolist()))
    if not both:
        return None
    chosen = []
    for _ in range(count):
        source = gone if gone and dice.chance(0.25) else both
        target = [draw(source)] + ([draw(source)] if dice.chance(0.1) else [])
        chosen.append(torch.tensor(target, device=supports.device))
    return chosen


def _field_of_view(dice: Dice, side: int) -> tuple[slice, slice]:
    """A random square crop, the same for both patients."""
    width = side if dice.chance(0.5) else round(side * dice.log_uniform(0.3, 1.0))
    top, left = dice.integer(0, side - width), dice.integer(0, side - width)
    return slice(top, top + width), slice(left, left + width)
