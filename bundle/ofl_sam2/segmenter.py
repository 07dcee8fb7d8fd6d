"""Learn from labelled volumes, segment new ones: the method on one page."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ofl_sam2.backbone.frozen import ImageFeatures, SAM2Backbone
from ofl_sam2.backbone.weights import state_hash
from ofl_sam2.dataset import LabelledCase, default_structures
from ofl_sam2.drawing import Drawing
from ofl_sam2.errors import InputError
from ofl_sam2.intensity import window_for
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.looks import Look, Viewpoint
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.memory.pool import CLOSE, MAIN, PooledCase, SupportPool, View, label_map
from ofl_sam2.memory.recent import RecentTensors
from ofl_sam2.progress import CancelToken, Progress, Watch
from ofl_sam2.propagation import MOST_SUPPORT_BYTES, LearnedView
from ofl_sam2.settings import Settings
from ofl_sam2.volume import SliceStack, Volume

_ENCODE_BATCH = 8
_SOLVING = ("pool_slices", "learn_steps", "preconditioned", "exact_ridge")


@dataclass(frozen=True)
class Segmentation:
    """The result for one volume.

    Attributes:
        labels: in the volume's own grid; with overlapping structures `(K, ...)`, one binary map each.
        structures: label value -> name.
        confidence: `(S, K)` in [0, 1] per slice and structure.
        quality: structure -> estimated quality in [0, 1].
        volume_ml: structure -> volume in millilitres (summed over time for 4D).
        seconds: wall time.
    """

    labels: NDArray[Any] = field(repr=False)
    structures: dict[int, str]
    confidence: NDArray[np.float32] = field(repr=False)
    quality: dict[str, float]
    volume_ml: dict[str, float]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """What fits into a JSON report."""
        return {"quality": self.quality, "volume_ml": self.volume_ml, "seconds": round(self.seconds, 3)}


class VolumeSegmenter:
    """Learns structures from labelled volumes and segments new volumes without prompts.

    Args:
        backbone: frozen SAM2.
        learner: few-shot learner that fits the backbone.
        settings: the switches of the method.
        cache: frozen features by content; default an in-memory cache.

    Attributes:
        pools: labelled slices, one pool a view.
        structures: label value -> name of what was learned.
        viewpoint: how volumes are sliced; None before anything was learned.
        unet: the 3D U-Net that `train` fitted; None before it did.
    """

    def __init__(
        self,
        backbone: SAM2Backbone,
        learner: FewShotLearner,
        settings: Settings | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        self.backbone, self.learner = backbone, learner.eval()
        self.settings = settings or Settings()
        self.cache = cache or FeatureCache(None, max_bytes=256 << 20)
        self.backbone_hash = state_hash(backbone.sam2)
        self.pools: dict[View, SupportPool] = {}
        self.structures: dict[int, str] = {}
        self.viewpoint: Viewpoint | None = None
        self.unet: VoxelUNet | None = None
        self._views: dict[View, LearnedView] = {}

    @property
    def pool(self) -> SupportPool:
        """The labelled slices of the main view, which every case has."""
        return self.pools.get(MAIN, SupportPool())

    @property
    def axis(self) -> int | None:
        """Canonical axis of the main slices; None before anything was learned."""
        return self.viewpoint.axis if self.viewpoint else None

    @torch.no_grad()
    def learn(
        self,
        cases: Iterable[LabelledCase],
        structures: dict[int, str] | None = None,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Put labelled slices into the pools and solve the mapping networks. Seconds.

        Args:
            cases: labelled volumes; a case learned before under the same name is replaced.
            structures: label value -> name of what to learn, beside what was learned before; default every value that
                occurs.
            progress: called after each encoded batch of slices with how many are done and how many are known of.
            cancel: to stop; then nothing is changed.

        Raises:
            InputError: no case, a structure that no label holds, or one that was learned under another name.
            Cancelled: stopped by `cancel`.
        """
        pools, viewpoint, settings = dict(self.pools), self.viewpoint, self.settings
        watch = Watch(progress, cancel)
        for case in cases:
            if viewpoint is None:
                settings = replace(settings, ct_window=settings.ct_window or window_for(case.volume, case.labels))
                viewpoint = Viewpoint.of(case.volume, self.backbone.image_size, settings)
            pools = {view: pool.without({case.volume.name}) for view, pool in pools.items()}
            for look in viewpoint.looks(case):
                pools.setdefault(look.view, SupportPool()).add(self._pooled(case, look, watch))
        names = self._checked_names(pools.get(MAIN, SupportPool()), structures)
        self.pools, self.viewpoint, self.structures, self.settings = pools, viewpoint, names, settings
        self.solve()

    def rename(self, names: dict[int, str]) -> None:
        """Give what was learned other names, label value -> name; what is not named keeps its own."""
        self.structures = {value: names.get(value, name) for value, name in self.structures.items()}

    def forget(self, names: Iterable[str]) -> None:
        """Take labelled cases out of the pools and solve anew; structures that no label holds any more go with them.

        Raises:
            InputError: no such case; then nothing is changed.
        """
        gone = set(names)
        if unknown := sorted(gone - set(self.pool.cases)):
            raise InputError(
                f"There is no label of {', '.join(unknown)} to forget. Known: {', '.join(self.pool.cases)}."
            )
        pools = {view: pool.without(gone) for view, pool in self.pools.items()}
        self.structures = {value: name for value, name in self.structures.items() if value in pools[MAIN].values()}
        self.pools, self.viewpoint = (pools, self.viewpoint) if self.structures else ({}, None)
        self.solve()

    @torch.no_grad()
    def solve(self) -> None:
        """Solve the mapping networks on the pools; after `learn`, and whenever the learner's parameters change."""
        values = {view: self._teachable(pool) for view, pool in self.pools.items()}
        kept = RecentTensors(MOST_SUPPORT_BYTES)
        self._views = {
            view: LearnedView(pool, values[view], self.backbone, self.learner, self.settings, kept)
            for view, pool in self.pools.items()
            if values[view]
        }

    def view(self, view: View) -> LearnedView | None:
        """What was learned from one view; None where that is nothing."""
        return self._views.get(view)

    def _teachable(self, pool: SupportPool) -> tuple[int, ...]:
        """Structures a view is used for: at least half of the cases that hold them are in its pool."""

        def holders(cases: SupportPool, value: int) -> int:
            return len({case.name for case in cases.cases.values() if value in case.known})

        return tuple(v for v in self.structures if 2 * holders(pool, v) >= max(1, holders(self.pool, v)))

    @torch.no_grad()
    def segment(
        self, volume: Volume, progress: Progress | None = None, cancel: CancelToken | None = None
    ) -> Segmentation:
        """Segment a volume or sequence. The label grid is the image grid.

        Args:
            volume: to segment.
            progress: called after each segmented slice with how many are done and how many are known of.
            cancel: to stop.

        Raises:
            InputError: nothing has been learned yet.
            Cancelled: stopped by `cancel`.
        """
        if self.viewpoint is None:
            raise InputError("Nothing has been learned yet. Save or give at least one label first.")
        started = time.perf_counter()
        drawing = Drawing(self, self.viewpoint, volume, Watch(progress, cancel))
        canvas, quality = drawing.run()
        voxels = [int(canvas.mask(value).sum()) for value in self.structures]
        return Segmentation(
            canvas.labels,
            dict(self.structures),
            drawing.confidence.numpy(),
            dict(zip(self.structures.values(), quality, strict=True)),
            {
                name: count * drawing.main.voxel_volume_ml
                for name, count in zip(self.structures.values(), voxels, strict=True)
            },
            time.perf_counter() - started,
        )

    def stack(self, volume: Volume) -> SliceStack:
        """The main slices of a volume as the model sees them.

        A model that learned thick slices cuts every thick-slice volume along its own through-plane direction.
        """
        viewpoint = self.viewpoint or Viewpoint.of(volume, self.backbone.image_size, self.settings)
        return viewpoint.stack(volume)

    def encode(self, images: Tensor) -> ImageFeatures:
        """Frozen features of inputs `(N, 3, size, size)`, rounded to float16, each slice encoded once."""
        parts = []
        for image in images:  # one by one: features depend on the batch size in the last bits
            key = self.cache.key(self.backbone_hash, self.device.type, image.numpy())
            entry = self.cache.get(key)
            if entry is None:
                fresh = self.backbone.encode_images(image[None].to(self.device))
                entry = self.cache.put(key, vars(fresh.to("cpu")))
            parts.append(ImageFeatures(**entry))
        return ImageFeatures.cat(parts).to(self.device)

    def batches(self, stack: SliceStack, indices: Iterable[int]) -> Iterator[ImageFeatures]:
        """Frozen features of slices, a few at a time."""
        chosen = list(indices)
        for start in range(0, len(chosen), _ENCODE_BATCH):
            yield self.encode(stack.images(chosen[start : start + _ENCODE_BATCH]))

    @property
    def active_close_ups(self) -> LearnedView | None:
        """What was learned from main close-ups, unless the settings say to go without."""
        return self.view(CLOSE) if self.settings.close_ups else None

    @property
    def active_unet(self) -> VoxelUNet | None:
        """The U-Net, unless the settings say to go without."""
        return self.unet if self.settings.unet_views else None

    @property
    def device(self) -> torch.device:
        """Where the models run."""
        return self.learner.lam.device

    def _checked_names(self, pool: SupportPool, structures: dict[int, str] | None) -> dict[int, str]:
        """Names of the structures to learn, ascending by value."""
        if not pool.cases:
            raise InputError("There is nothing to learn from. Give at least one labelled volume.")
        found = pool.values()
        if structures is None:
            names = {value: self.structures.get(value, name) for value, name in default_structures(found).items()}
        else:
            before = {value: name for value, name in self.structures.items() if value in found}
            names = {**before, **structures}
            own = {value: name for value, name in before.items() if name not in default_structures([value]).values()}
            changed = [f"{value} is {name}, not {names[value]}" for value, name in own.items() if names[value] != name]
            if changed:
                raise InputError(
                    f"The value {'; '.join(changed)} in this model. Give the structures the names that they have, or "
                    "start anew with --fresh."
                )
        absent = [f"{value}={name}" for value, name in names.items() if value not in found]
        if absent or not names:
            wanted, held = ", ".join(absent) or "a structure", ", ".join(map(str, found)) or "none"
            raise InputError(f"No label holds {wanted}; the labels hold {held}. Correct the labels or the structures.")
        if len(set(names.values())) < len(names):
            raise InputError(f"Two structures have the same name: {', '.join(names.values())}. Give each its own.")
        return dict(sorted(names.items()))

    def _pooled(self, case: LabelledCase, look: Look, watch: Watch) -> PooledCase:
        if not look.slices or not case.values:
            raise InputError(f"{case.volume.name} has no labelled slice. Label at least one.")
        parts: list[ImageFeatures] = []
        watch.expect(len(look.slices))
        for batch in self.batches(look.stack, look.slices):
            parts.append(batch.to("cpu", torch.float16))
            watch.advance(len(batch))
        maps = [label_map(look.stack.masks(look.labels, index, case.values), case.values) for index in look.slices]
        return PooledCase(
            case.volume.name, look.slices, ImageFeatures.cat(parts), torch.stack(maps), look.view, look.focus
        )


def with_settings(segmenter: VolumeSegmenter, **changes: Any) -> VolumeSegmenter:
    """The same learned state under other settings (ablations); nothing is copied."""
    settings = replace(segmenter.settings, **changes)
    other = VolumeSegmenter(segmenter.backbone, segmenter.learner, settings, segmenter.cache)
    other.pools, other.structures = segmenter.pools, segmenter.structures
    other.unet = segmenter.unet
    other.viewpoint = segmenter.viewpoint and replace(segmenter.viewpoint, settings=settings)
    if any(getattr(settings, name) != getattr(segmenter.settings, name) for name in _SOLVING):
        other.solve()
    else:
        other._views = segmenter._views
    return other
