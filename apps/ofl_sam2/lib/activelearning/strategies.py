"""Which image to label next. Each order is the same for the same seed, labels and images already handed out."""

import hashlib
from abc import abstractmethod
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from lib.activelearning.coverage import Coverage
from lib.workspace import Workspace
from ofl_sam2.errors import InputError
from ofl_sam2.frames import natural_key


def strategies(workspace: Workspace) -> dict[str, Strategy]:
    """All strategies by name, the default first."""
    diverse = DiverseFirst(workspace)
    return {
        "most_uncertain": MostUncertain(workspace, diverse),
        "diverse_first": diverse,
        "random": Random(),
        "sequential": Sequential(),
    }


class _Unlabelled(Strategy):
    """Chooses among the images without a final label; what a strategy handed out before comes last."""

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose.

        Args:
            request: `strategy` and, if wanted, `seed` and images that are `passed_over`.
            datastore: the studies.

        Returns:
            `id` of the image and why it was chosen; None when every image is labelled or passed over.

        Raises:
            InputError: a seed that is no integer.
        """
        images = sorted({*datastore.get_unlabeled_images()} - {*request.get("passed_over", ())}, key=natural_key)
        if not images:
            return None
        served = {image: _served(datastore, image) for image in images}
        oldest = min(served.values())
        return self.choose([image for image in images if served[image] == oldest], datastore, _seed(request))

    @abstractmethod
    def choose(self, images: list[str], datastore: Datastore, seed: int) -> dict[str, Any]:
        """Choose one of `images`, which are in natural order and at least one."""


class Sequential(_Unlabelled):
    """By name."""

    def __init__(self) -> None:
        super().__init__("The next image by name")

    def choose(self, images: list[str], datastore: Datastore, seed: int) -> dict[str, Any]:
        return {"id": images[0]}


class Random(_Unlabelled):
    """In an order that only the seed decides; new images do not change the order of the others."""

    def __init__(self) -> None:
        super().__init__("Random, the same order for the same seed")

    def choose(self, images: list[str], datastore: Datastore, seed: int) -> dict[str, Any]:
        return {"id": shuffled(images, seed)[0]}


class DiverseFirst(_Unlabelled):
    """The image least like those labelled, in the space of frozen features; works before any label.

    Args:
        workspace: state of the app.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__("The image least like the labelled ones; needs no label")
        self._coverage = Coverage(workspace)

    def choose(self, images: list[str], datastore: Datastore, seed: int) -> dict[str, Any]:
        candidates = shuffled(images, seed)
        image, distance = self._coverage.farthest(candidates, sorted(datastore.get_labeled_images()), datastore)
        return {"id": image, "distance": round(distance, 4)}


class MostUncertain(_Unlabelled):
    """The image with the lowest quality estimate; as `diverse_first` while there is none.

    Args:
        workspace: state of the app.
        otherwise: chooses while no image has an estimate.
    """

    def __init__(self, workspace: Workspace, otherwise: DiverseFirst) -> None:
        super().__init__("The image whose segmentation is estimated worst")
        self._workspace, self._otherwise = workspace, otherwise

    def choose(self, images: list[str], datastore: Datastore, seed: int) -> dict[str, Any]:
        scores = self._workspace.scores.read()
        scored = [image for image in images if image in scores]
        if not scored:
            return self._otherwise.choose(images, datastore, seed)
        image = min(scored, key=lambda name: scores[name].quality)
        return {"id": image, "quality": round(scores[image].quality, 4)}


def shuffled(images: list[str], seed: int) -> list[str]:
    """The images in the order of a seed."""
    return sorted(images, key=lambda image: hashlib.sha256(f"{seed}\0{image}".encode()).digest())


def _served(datastore: Datastore, image: str) -> int:
    """When any strategy handed the image out last, in seconds since the epoch; 0 if never."""
    served = datastore.get_image_info(image).get("strategy", {}).values()
    return max((int(entry.get("ts", 0)) for entry in served), default=0)


def _seed(request: dict[str, Any]) -> int:
    try:
        return int(request.get("seed") or 0)
    except (TypeError, ValueError) as error:
        raise InputError(f"seed is {request['seed']!r}; it must be an integer.") from error
