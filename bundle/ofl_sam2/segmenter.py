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
from ofl_sam2.errors import InputError
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.memory.pool import PooledCase, SupportPool, describe, label_map
from ofl_sam2.progress import CancelToken, Progress
from ofl_sam2.propagation import PoolSolution, Propagation, SegmentedSlice, SupportEncoder, solve_on_pool
from ofl_sam2.quality import volume_quality
from ofl_sam2.settings import Settings
from ofl_sam2.volume import SliceStack, Volume, choose_axis, is_anisotropic

_ENCODE_BATCH = 8
_LOGIT_LIMIT = 30.0


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
        self.pool = SupportPool()
        self.structures: dict[int, str] = {}
        self.axis: int | None = None
        self.through_plane = False
        self.solution: PoolSolution | None = None
        self._supports = SupportEncoder(backbone, learner, self.pool)

    @torch.no_grad()
    def learn(
        self,
        cases: Iterable[LabelledCase],
        structures: dict[int, str] | None = None,
        progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Put labelled slices into the pool and solve the mapping networks. Seconds.

        Args:
            cases: labelled volumes; a case learned before under the same name is replaced.
            structures: label value -> name of what to learn; default every value that occurs.
            progress: called after each encoded slice of a case.
            cancel: to stop; then nothing is changed.

        Raises:
            InputError: no case, or a structure that no label holds.
            Cancelled: stopped by `cancel`.
        """
        before = self.axis, self.through_plane
        pool = SupportPool()
        pool.cases.update(self.pool.cases)
        try:
            for case in cases:
                self._choose_slicing(case.volume)
                pool.add(self._pooled(case, progress, cancel))
            names = self._checked_names(pool, structures)
        except BaseException:
            self.axis, self.through_plane = before
            raise
        self.pool, self.structures = pool, names
        self.solve()

    @torch.no_grad()
    def solve(self) -> None:
        """Solve the mapping networks on the pool; after `learn`, and whenever the learner's parameters change."""
        self._supports = SupportEncoder(self.backbone, self.learner, self.pool)
        self.solution = solve_on_pool(self._supports, tuple(self.structures), self.settings)

    @torch.no_grad()
    def segment(
        self, volume: Volume, progress: Progress | None = None, cancel: CancelToken | None = None
    ) -> Segmentation:
        """Segment a volume or sequence. The label grid is the image grid.

        Args:
            volume: to segment.
            progress: called after each segmented slice.
            cancel: to stop.

        Raises:
            InputError: nothing has been learned yet.
            Cancelled: stopped by `cancel`.
        """
        if self.axis is None or self.solution is None:
            raise InputError("Nothing has been learned yet. Save or give at least one label first.")
        started = time.perf_counter()
        stack = self.stack(volume)
        values = tuple(self.structures)
        features = _StackFeatures(self, stack)
        similarity = torch.cat(
            [
                self.pool.similarity(describe(batch.stride16).cpu())
                for batch in features.batches(range(len(stack)), cancel)
            ]
        )
        overlap = self.settings.overlap
        dtype = np.uint8 if overlap else np.min_scalar_type(max(values))
        labels = np.zeros((len(values), *volume.grid) if overlap else volume.grid, dtype)
        confidence = torch.zeros(len(stack), len(values))
        present = torch.zeros(len(stack), len(values), dtype=torch.bool)
        propagation = Propagation(self._supports, values, self.solution, self.settings)
        for done, result in enumerate(propagation.run(features.one, similarity), start=1):
            found = self._write(labels, stack, result, values)
            confidence[result.index], present[result.index] = result.confidence.cpu(), found
            if progress:
                progress(done, len(stack))
            if cancel:
                cancel.check()
        quality = volume_quality(confidence, present).tolist()
        voxels = [int(labels[k].sum()) if overlap else int((labels == v).sum()) for k, v in enumerate(values)]
        return Segmentation(
            labels,
            dict(self.structures),
            confidence.numpy(),
            dict(zip(self.structures.values(), quality, strict=True)),
            {name: n * stack.voxel_volume_ml for name, n in zip(self.structures.values(), voxels, strict=True)},
            time.perf_counter() - started,
        )

    def stack(self, volume: Volume) -> SliceStack:
        """The slices of a volume as the model sees them.

        A model that learned thick slices cuts every thick-slice volume along its own through-plane direction.
        """
        thick = volume.frames or (self.through_plane and is_anisotropic(volume))
        axis = choose_axis(volume) if thick or self.axis is None else self.axis
        return SliceStack(volume, axis, self.backbone.image_size)

    def encode(self, images: Tensor) -> ImageFeatures:
        """Frozen features of inputs `(N, 3, size, size)`, rounded to float16, each slice encoded once."""
        parts = []
        for image in images:  # one by one: features depend on the batch size in the last bits
            key = self.cache.key(self.backbone_hash, image.numpy())
            entry = self.cache.get(key)
            if entry is None:
                fresh = self.backbone.encode_images(image[None].to(self.device))
                entry = self.cache.put(key, vars(fresh.to("cpu")))
            parts.append(ImageFeatures(**entry))
        return ImageFeatures.cat(parts).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the models run."""
        return self.learner.lam.device

    def _choose_slicing(self, volume: Volume) -> None:
        """Fix the slicing at the first labelled case: its through-plane direction, or an axis where it has none."""
        if self.axis is None:
            self.axis, self.through_plane = choose_axis(volume), is_anisotropic(volume)

    def _checked_names(self, pool: SupportPool, structures: dict[int, str] | None) -> dict[int, str]:
        """Names of the structures to learn, ascending by value."""
        if not pool.cases:
            raise InputError("There is nothing to learn from. Give at least one labelled volume.")
        found = pool.values()
        if structures is None:
            names = {value: self.structures.get(value, name) for value, name in default_structures(found).items()}
        else:
            names = structures
        absent = [f"{value}={name}" for value, name in names.items() if value not in found]
        if absent or not names:
            wanted, held = ", ".join(absent) or "a structure", ", ".join(map(str, found)) or "none"
            raise InputError(f"No label holds {wanted}; the labels hold {held}. Correct the labels or the structures.")
        if len(set(names.values())) < len(names):
            raise InputError(f"Two structures have the same name: {', '.join(names.values())}. Give each its own.")
        return dict(sorted(names.items()))

    def _pooled(self, case: LabelledCase, progress: Progress | None, cancel: CancelToken | None) -> PooledCase:
        stack = self.stack(case.volume)
        slices = tuple(range(len(stack))) if case.labelled_slices is None else case.labelled_slices
        if not slices or not case.values:
            raise InputError(f"{case.volume.name} has no labelled slice. Label at least one.")
        parts, done = [], 0
        for batch in _StackFeatures(self, stack).batches(slices, cancel):
            parts.append(batch.to("cpu", torch.float16))
            done += len(batch)
            if progress:
                progress(done, len(slices))
        maps = [label_map(stack.masks(case.labels, index, case.values), case.values) for index in slices]
        return PooledCase(case.volume.name, slices, ImageFeatures.cat(parts), torch.stack(maps))

    def _write(
        self, labels: NDArray[Any], stack: SliceStack, result: SegmentedSlice, values: tuple[int, ...]
    ) -> Tensor:
        """Write one slice into the label array; return which structures were found in it."""
        logits = stack.restore(result.logits.clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT).cpu(), outside=-_LOGIT_LIMIT)
        if self.settings.overlap:
            masks = logits > 0
            for row in range(len(values)):
                stack.slice_of(labels[row], result.index)[...] = masks[row].numpy()
            return masks.flatten(1).any(1)
        merged = merge(logits)
        stack.slice_of(labels, result.index)[...] = np.array([0, *values])[merged.numpy()]
        return torch.bincount(merged.flatten(), minlength=len(values) + 1)[1:] > 0


class _StackFeatures:
    """Frozen features of the slices of one volume, through the segmenter's cache."""

    def __init__(self, segmenter: VolumeSegmenter, stack: SliceStack) -> None:
        self.segmenter, self.stack = segmenter, stack

    def one(self, index: int) -> ImageFeatures:
        return self.segmenter.encode(self.stack.images([index]))

    def batches(self, indices: Iterable[int], cancel: CancelToken | None) -> Iterator[ImageFeatures]:
        chosen = list(indices)
        for start in range(0, len(chosen), _ENCODE_BATCH):
            if cancel:
                cancel.check()
            yield self.segmenter.encode(self.stack.images(chosen[start : start + _ENCODE_BATCH]))


def merge(logits: Tensor) -> Tensor:
    """Winner per pixel, 0 the background: softmax over logits with p_0 = prod(1 - p_i).

    Args:
        logits: `(K, H, W)`.

    Returns:
        `(H, W)` int64 in 0..K.

    Example:
        >>> merge(torch.tensor([[[2.0]], [[-1.0]]])).item()
        1
    """
    log_background = torch.nn.functional.logsigmoid(-logits).sum(0, keepdim=True)
    background = log_background - torch.log1p(-log_background.exp().clamp_max(1 - 1e-7))
    return torch.cat([background, logits]).argmax(0)


def with_settings(segmenter: VolumeSegmenter, **changes: Any) -> VolumeSegmenter:
    """The same learned state under other settings (ablations); nothing is copied."""
    other = VolumeSegmenter(
        segmenter.backbone, segmenter.learner, replace(segmenter.settings, **changes), segmenter.cache
    )
    other.pool, other.structures = segmenter.pool, segmenter.structures
    other.axis, other.through_plane = segmenter.axis, segmenter.through_plane
    other.solve()
    return other
