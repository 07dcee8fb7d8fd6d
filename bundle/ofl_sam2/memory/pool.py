"""The pool of labelled slices and how a query slice retrieves its supports from it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ofl_sam2.backbone.frozen import ImageFeatures

DESCRIPTOR_SIDE = 8

T = TypeVar("T")


def describe(stride16: Tensor) -> Tensor:
    """Unit descriptors `(N, d)` of stride-16 features `(N, C, h, w)`, for retrieval by cosine similarity."""
    return functional.normalize(functional.adaptive_avg_pool2d(stride16.float(), DESCRIPTOR_SIDE).flatten(1), dim=1)


@dataclass(frozen=True)
class View:
    """A way of looking at volumes: slices along `axis` (canonical; None is the main one), perhaps of a close-up."""

    axis: int | None = None
    close: bool = False


MAIN, CLOSE = View(), View(close=True)


def pool_key(name: str, focus: tuple[int, ...]) -> str:
    """Identifies a case, or a close-up of it, in the pool of a view."""
    return f"{name} {focus}" if focus else name


@dataclass(frozen=True)
class PooledCase:
    """The labelled slices of one case in one view, or an augmented copy of them.

    Attributes:
        name: of the case.
        slices: their indices in the view, S of them.
        features: frozen features, float16, of S slices.
        labels: `(S, size, size)` uint8 or int32, label values at input resolution.
        view: how the case was looked at.
        focus: label values that a close-up is made for.
        sha256: of the file that it was read from; None of a new or changed case.
    """

    name: str
    slices: tuple[int, ...]
    features: ImageFeatures
    labels: Tensor
    view: View = MAIN
    focus: tuple[int, ...] = ()
    sha256: str | None = field(default=None, init=False)

    @property
    def key(self) -> str:
        """Identifies it in the pool of its view, where a case may have several close-ups."""
        return pool_key(self.name, self.focus)

    @cached_property
    def known(self) -> frozenset[int]:
        """Label values it can teach."""
        present = frozenset().union(*self.present)
        return present & frozenset(self.focus) if self.focus else present

    @cached_property
    def descriptors(self) -> Tensor:
        """`(S, d)`, see `describe`."""
        return describe(self.features.stride16)

    @cached_property
    def present(self) -> list[frozenset[int]]:
        """Label values in each slice."""
        return [frozenset(torch.unique(labels).tolist()) - {0} for labels in self.labels]

    def __len__(self) -> int:
        return len(self.slices)

    def slice(self, row: int) -> ImageFeatures:
        """Features of one slice, float32, N = 1."""
        return self.features[row : row + 1].to(dtype=torch.float32)

    def mask(self, row: int, value: int) -> Tensor:
        """Mask `(size, size)` in {0, 1} of one structure in one slice."""
        return (self.labels[row] == value).float()


@dataclass(frozen=True)
class SupportKey:
    """One labelled slice: the key of its case and the row among its labelled slices."""

    case: str
    row: int


class SupportPool:
    """Every labelled slice; nothing leaves but by the user's wish."""

    def __init__(self) -> None:
        self.cases: dict[str, PooledCase] = {}

    def __len__(self) -> int:
        return sum(map(len, self.cases.values()))

    def add(self, case: PooledCase) -> None:
        """Add a case, or replace the one of that key; the order in which cases come does not matter."""
        self.cases = dict(sorted({**self.cases, case.key: case}.items()))

    def without(self, names: Collection[str]) -> "SupportPool":
        """A pool of the other cases."""
        pool = SupportPool()
        pool.cases = {key: case for key, case in self.cases.items() if case.name not in names}
        return pool

    def teachers(self, value: int) -> list[PooledCase]:
        """Cases whose label holds a structure; elsewhere it may just not have been drawn. All where none does."""
        return [case for case in self.cases.values() if value in case.known] or list(self.cases.values())

    def values(self) -> tuple[int, ...]:
        """All label values, ascending."""
        return tuple(sorted(set().union(*(value for case in self.cases.values() for value in case.present))))

    def features(self, key: SupportKey) -> ImageFeatures:
        """See `PooledCase.slice`."""
        return self.cases[key.case].slice(key.row)

    def mask(self, key: SupportKey, value: int) -> Tensor:
        """See `PooledCase.mask`."""
        return self.cases[key.case].mask(key.row, value)

    def present(self, key: SupportKey) -> frozenset[int]:
        """Label values in a slice."""
        return self.cases[key.case].present[key.row]

    def taught(self, key: SupportKey) -> list[int]:
        """Those of them that its case can teach, ascending."""
        return sorted(self.present(key) & self.cases[key.case].known)

    def retrieve(self, descriptor: Tensor, value: int, count: int, absent: int) -> list[SupportKey]:
        """The labelled slices most similar to a query, with and without the structure in turn, the nearest first.

        So the first few of them, which SAM2's memory may be limited to, show both.

        Args:
            descriptor: `(d,)` of the query, see `describe`.
            value: structure.
            count: how many slices at most, at least one.
            absent: how many of them without the structure, if there are such; one with it always stays.

        Returns:
            At least one key; without the structure only where no slice has it.
        """
        ranked = self._ranked(descriptor, value)
        with_it = [key for key in ranked if value in self.present(key)]
        without = [key for key in ranked if value not in self.present(key)]
        absent = min(absent, count - 1) if with_it else max(absent, 1)
        without = without[: min(absent, count)]
        pairs = zip_longest(with_it[: count - len(without)], without)
        return [key for pair in pairs for key in pair if key is not None]

    def spread(self, value: int, count: int) -> list[SupportKey]:
        """Up to `count` slices, as many of each case as it has to give, three of four with the structure."""
        cases = [[SupportKey(case.key, row) for row in range(len(case))] for case in self.teachers(value)]
        with_it = [[key for key in keys if value in self.present(key)] for keys in cases]
        without = [[key for key in keys if value not in self.present(key)] for keys in cases]
        absent = min(count // 4, sum(map(len, without)))
        return _spread(with_it, count - absent) + _spread(without, absent)

    def similarity(self, descriptors: Tensor) -> Tensor:
        """Highest cosine similarity `(N,)` of descriptors `(N, d)` to any labelled slice with a structure."""
        rows = [
            case.descriptors[[i for i, values in enumerate(case.present) if values]] for case in self.cases.values()
        ]
        return (descriptors @ torch.cat(rows).T).amax(1)

    def _ranked(self, descriptor: Tensor, value: int) -> list[SupportKey]:
        scored = [
            (-score, case.key, row)
            for case in self.teachers(value)
            for row, score in enumerate((case.descriptors @ descriptor).tolist())
        ]
        return [SupportKey(key, row) for _, key, row in sorted(scored)]


def label_map(masks: Tensor, values: Sequence[int]) -> Tensor:
    """One label map `(size, size)` from soft masks `(K, size, size)`: the likeliest of background and structures.

    A structure thinner than a pixel, which loses to the background everywhere, keeps the pixel it fills most of.
    """
    tops, places = masks.flatten(1).max(1)
    drawn = [row for row, top in enumerate(tops.tolist()) if top > 0]
    winner = torch.cat([1 - masks[drawn].sum(0, keepdim=True), masks[drawn]]).argmax(0)
    for number, place in enumerate(places[drawn].tolist(), start=1):
        if winner.view(-1)[place] == 0 and not (winner == number).any():
            winner.view(-1)[place] = number
    dtype = torch.uint8 if max(values) < 256 else torch.int32
    return torch.tensor([0, *(values[row] for row in drawn)], dtype=dtype)[winner]


def _spread(cases: Sequence[list[SupportKey]], count: int) -> list[SupportKey]:
    """Share `count` equally between the cases; what small ones cannot give, larger ones do."""
    chosen: list[SupportKey] = []
    for waiting, keys in zip(range(len(cases), 0, -1), sorted(cases, key=len), strict=True):
        chosen += evenly(keys, (count - len(chosen)) // waiting)
    return chosen


def evenly(items: Sequence[T], count: int) -> Sequence[T]:
    """Up to `count` of the items, evenly spread."""
    if len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
