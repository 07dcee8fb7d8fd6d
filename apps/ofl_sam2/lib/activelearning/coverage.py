"""How far images lie from each other in the space of frozen features."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.datastore import Datastore
from torch import Tensor
from torch.nn import functional

from lib.cases import image_path
from lib.datastores.archive import ArchiveError
from lib.workspace import Workspace
from ofl_sam2.errors import InputError
from ofl_sam2.files import read_volume
from ofl_sam2.memory.pool import describe
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.volume import SliceStack, choose_axis

logger = logging.getLogger(__name__)

_SLICES = 6
_NEW_A_CALL = 8


class Coverage:
    """Descriptors of whole images, kept in the cache of the app.

    Args:
        workspace: state of the app.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._unreadable: set[str] = set()

    def farthest(self, candidates: Sequence[str], labelled: Sequence[str], datastore: Datastore) -> tuple[str, float]:
        """The candidate farthest from all labelled images; without these the most typical candidate.

        At most eight candidates and eight labelled images are described anew a call, so that a user does not wait long:
        candidates come in, the first of them first, until all are known.

        Returns:
            The image and its cosine distance to the nearest labelled image, or to the mean of the candidates.
        """
        encoder = self._workspace.encoder()
        known = self._described(candidates, datastore, encoder)
        if not known:
            return candidates[0], 0.0
        names, points = list(known), torch.stack(list(known.values()))
        references = self._described(labelled, datastore, encoder)
        if references:
            distance = 1 - (points @ torch.stack(list(references.values())).T).amax(1)
            best = int(distance.argmax())
        else:
            distance = 1 - points @ functional.normalize(points.mean(0), dim=0)
            best = int(distance.argmin())
        return names[best], float(distance[best])

    def known(self, image: str, datastore: Datastore, encoder: VolumeSegmenter) -> Tensor | None:
        """The descriptor of an image, if it has been described before."""
        entry = self._workspace.cache.get(self._key(image, datastore, encoder))
        return None if entry is None else entry["descriptor"]

    def _described(self, images: Sequence[str], datastore: Datastore, encoder: VolumeSegmenter) -> dict[str, Tensor]:
        """Descriptors of the images that have one, and of the first few that do not; unreadable ones are tried once."""
        found, new = {}, 0
        for image in images:
            descriptor = self.known(image, datastore, encoder)
            if descriptor is None and new < _NEW_A_CALL:
                if (key := self._key(image, datastore, encoder)) in self._unreadable:
                    continue
                try:
                    descriptor = self._describe(image, datastore, encoder)
                except (InputError, ArchiveError) as error:
                    logger.warning("%s cannot be described: %s", image, error)
                    if isinstance(error, InputError):
                        self._unreadable.add(key)
                        continue
                new += 1
            if descriptor is not None:
                found[image] = descriptor
        return found

    def _describe(self, image: str, datastore: Datastore, encoder: VolumeSegmenter) -> Tensor:
        volume = read_volume(image_path(datastore, image))
        stack = SliceStack(volume, choose_axis(volume), encoder.backbone.image_size)
        count = min(_SLICES, len(stack))
        indices = [(2 * i + 1) * len(stack) // (2 * count) for i in range(count)]
        features = encoder.encode(stack.images(indices))
        descriptor = functional.normalize(describe(features.stride16).mean(0), dim=0).cpu()
        return self._workspace.cache.put(self._key(image, datastore, encoder), {"descriptor": descriptor})["descriptor"]

    def _key(self, image: str, datastore: Datastore, encoder: VolumeSegmenter) -> str:
        """Cache key of an image as it lies on disk now; a DICOM series never changes under its UID."""
        path, state = Path(image), ""
        if not isinstance(datastore, DICOMWebDatastore):
            path = Path(datastore.get_image_info(image).get("path") or image)
            state = str((path.stat().st_mtime_ns, path.stat().st_size)) if path.exists() else ""
        model = f"{encoder.backbone_hash} {encoder.backbone.image_size}"
        return self._workspace.cache.key("image descriptor", model, str(path), image, state)
