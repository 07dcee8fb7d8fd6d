"""The network MONAI sees: a learned segmenter as a module whose state is learner and fusion, without SAM2."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from ofl_sam2.backbone.weights import ENVIRONMENT, load_strict
from ofl_sam2.dataset import labelled_cases, load_case, parse_structures
from ofl_sam2.errors import InputError
from ofl_sam2.files import case_name
from ofl_sam2.jobs import check_device, open_segmenter
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.model_index import is_model, read_index
from ofl_sam2.segmenter import VolumeSegmenter, with_settings
from ofl_sam2.volume import Volume
from ofl_sam2.workflow.data import case_names
from ofl_sam2.workflow.run import config_key

BUNDLE = Path(__file__).parents[2]
_log = logging.getLogger(__name__)


class FewShotNetwork(nn.Module):
    """A segmenter with its pool of labelled slices; `forward` maps image volumes to label maps.

    The state holds learner and fusion only. Loading one is strict whatever the caller asks for, and looks at the
    model folder again, because a training publishes both.

    Args:
        open_model: opens the segmenter.
    """

    learner: FewShotLearner
    _adapted: VolumeSegmenter | None

    def __init__(self, open_model: Callable[[], VolumeSegmenter]) -> None:
        super().__init__()
        self._open = open_model
        self._hold(open_model())

    def use(self, segmenter: VolumeSegmenter) -> None:
        """Work with this segmenter from now on."""
        self._open = lambda: segmenter
        self._hold(segmenter)

    def forward(self, image: Tensor) -> Tensor:
        """Segment a batch.

        Args:
            image: `(B, 1, X, Y, Z)` or, a sequence, `(B, 1, X, Y, Z, T)`. A MetaTensor brings its affine (RAS+, mm) and
                file name; without it voxels are cubes of 1 mm.

        Returns:
            Label values `(B, 1, X, Y, Z)` uint8 (uint16 for values above 255) in the grid of the image.

        Raises:
            InputError: more than one channel, or a model that has not learned yet.
        """
        return self.segment(image)

    @torch.no_grad()
    def segment(self, image: Tensor, **changes: Any) -> Tensor:
        """As `forward`, under other settings than those of the model.

        Args:
            image: see `forward`.
            changes: fields of `Settings`.
        """
        segmenter = self._solved_for(changes)
        maps = torch.stack([_labels(segmenter, image, item)[None] for item in range(len(image))])
        return MetaTensor(maps).copy_meta_from(image) if isinstance(image, MetaTensor) else maps

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load learner and fusion into the model as it is published now.

        Raises:
            WeightsError: names or shapes differ, also with `strict=False`.
        """
        self._hold(self._open())
        load_strict(nn.ModuleDict({"learner": self.learner}), state_dict, source="the few-shot network")
        return super().load_state_dict(state_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FewShotNetwork":
        return FewShotNetwork(self._open)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FewShotNetwork":
        super()._apply(fn, recurse)
        self.segmenter.backbone._apply(fn)
        return self

    def _hold(self, segmenter: VolumeSegmenter) -> None:
        self.segmenter, self.learner = segmenter, segmenter.learner
        self._solved_on, self._adapted = self._learner_version(), None
        self._changes: dict[str, Any] = {}

    def _learner_version(self) -> list[tuple[int, int]]:
        """Changes with every change of the learner and of its device."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self.learner.parameters()]

    def _solved_for(self, changes: dict[str, Any]) -> VolumeSegmenter:
        """The segmenter under changed settings, solved anew where the learner changed."""
        if self._learner_version() != self._solved_on:
            self.segmenter.solve()
            self._solved_on, self._adapted = self._learner_version(), None
        if self._adapted is None or self._changes != changes:
            self._adapted, self._changes = with_settings(self.segmenter, **changes), changes
        return self._adapted


def few_shot_network(
    model_dir: str | None = None,
    support_images: str | None = None,
    support_labels: str | None = None,
    support_cases: Sequence[str] | str | None = None,
    structures: str | None = None,
    backbone: str | None = None,
    image_size: int | None = None,
    device: str = "cpu",
) -> FewShotNetwork:
    """The network of a learned model, of a folder of labelled volumes, or of both.

    Args:
        model_dir: folder of a learned model. Default: without supports the model trained in this bundle, or the example
            it ships; with supports a new one.
        support_images, support_labels: folders of labelled volumes to learn from first.
        support_cases: names of the ones to learn from; default all that have a label.
        structures: what to learn of them, such as "1=anterior,2=posterior"; default every value.
        backbone, image_size: of a new model, see `open_segmenter`.
        device: where to learn and to segment.

    Raises:
        InputError, ModelError, WeightsError: with the name of the config key in front.
    """
    opened = partial(open_model, backbone=backbone, image_size=image_size, device=device)
    folder = None if model_dir is None else Path(model_dir)
    if folder is not None:
        with config_key("model_dir"):
            read_index(folder)
    if support_images is None and support_labels is None:
        with config_key("support_cases and structures"):
            if support_cases is not None or structures is not None:
                raise InputError("There is nothing to learn them from. Give support_images and support_labels as well.")
        return FewShotNetwork(lambda: opened(folder or bundled_model()))
    with config_key("support_images and support_labels"):
        if support_images is None or support_labels is None:
            raise InputError("Only one of the two is given. Give both folders, or neither.")
        found = labelled_cases(Path(support_images), Path(support_labels), case_names(support_cases))
    with config_key("structures"):
        names = parse_structures(structures) if structures else None
    segmenter = opened(folder)
    with config_key("support_images, support_labels and structures"):
        segmenter.learn((load_case(case) for case in found), names)
    return FewShotNetwork(lambda: segmenter)


def bundled_model() -> Path:
    """The model trained in this bundle, else the example it ships."""
    trained = BUNDLE / "models" / "model"
    return trained if is_model(trained) else BUNDLE / "models" / "example"


def open_model(folder: Path | None, backbone: str | None, image_size: int | None, device: str) -> VolumeSegmenter:
    """The model of a folder; a new one where the folder holds none, or without a folder.

    Raises:
        InputError, ModelError, WeightsError: with the name of the config key in front.
    """
    use_bundled_weights()
    with config_key("device"):
        check_device(device)
    with config_key("backbone, image_size" if folder is None else "model_dir, backbone, image_size"):
        return open_segmenter(folder or Path(), backbone, image_size, device, fresh=folder is None)


def use_bundled_weights() -> None:
    """Look for SAM2.1 weights where `monai.bundle download_large_files` puts them, unless told otherwise."""
    if any((BUNDLE / "weights").glob("*.pt")):
        os.environ.setdefault(ENVIRONMENT, str(BUNDLE / "weights"))


def _labels(segmenter: VolumeSegmenter, batch: Tensor, item: int) -> Tensor:
    volume = _volume(batch, item)
    result = segmenter.segment(volume)
    quality = ", ".join(f"{structure} {value:.2f}" for structure, value in result.quality.items())
    _log.info("%s: %.1f s, estimated quality %s", volume.name, result.seconds, quality)
    return torch.from_numpy(result.labels).to(batch.device)


def _volume(batch: Tensor, item: int) -> Volume:
    if batch.shape[1] != 1 or batch.ndim not in (5, 6):
        raise InputError(
            f"Images of shape {tuple(batch.shape)} cannot be segmented. Give volumes of one channel: (B, 1, X, Y, Z)."
        )
    affine, name = np.eye(4), f"image {item}"
    if isinstance(batch, MetaTensor):
        affines, names = batch.affine, batch.meta.get("filename_or_obj", name)
        affine = (affines[item] if affines.ndim == 3 else affines).cpu().numpy().astype(np.float64)
        name = case_name(names[item] if isinstance(names, list) else names)
    return Volume(batch[item, 0].cpu().numpy(), affine, name)
