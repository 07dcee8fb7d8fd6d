"""Labels of the studies as cases that the library learns from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from ofl_sam2.dataset import Case, LabelledCase, load_case
from ofl_sam2.errors import InputError
from ofl_sam2.service.journal import label_version
from ofl_sam2.service.label_files import content_sha256
from ofl_sam2.service.structures import StructureRegistry

FINAL = DefaultLabelTag.FINAL.value


def labelled_case(
    image_id: str, image: Path, label: Path, label_info: Sequence[dict[str, Any]] | None, registry: StructureRegistry
) -> LabelledCase:
    """An image and a label of it, its values those of the registry; new structures enter the registry.

    Args:
        image_id: becomes the name of the case.
        image: file or folder of the image.
        label: file or folder of the label.
        label_info: names of the label's values as clients send them, `[{"name": ..., "idx": ...}, ...]`.
        registry: structures of the app.

    Raises:
        InputError: unreadable, another grid, not integer, empty, or names that do not fit the values.
    """
    case = load_case(Case(image_id, image, label))
    labels = registry.remap(case.labels, label_info)
    values = tuple(int(value) for value in np.unique(labels) if value)
    if not values:
        raise InputError(f"The label of {image_id} holds background only. Draw a structure, or do not save it.")
    return replace(case, volume=replace(case.volume, name=image_id), labels=labels, values=values)


def read_case(datastore: Datastore, registry: StructureRegistry, image_id: str) -> LabelledCase:
    """The final label of an image, read from the studies.

    Raises:
        InputError: there is none, or as in `labelled_case`.
    """
    return _read_final(datastore, registry, image_id)[0]


def read_unchanged_case(datastore: Datastore, registry: StructureRegistry, image_id: str) -> tuple[LabelledCase, str]:
    """As `read_case`, with the version of the label, see `label_version`.

    Raises:
        InputError: also where the label is no more what the studies list.
    """
    case, label, info = _read_final(datastore, registry, image_id)
    sha256 = content_sha256(label)
    if info.get("sha256", sha256) != sha256:
        raise InputError(f"The label of {image_id} is being saved again. Train once more to learn from it.")
    return case, label_version(sha256, info.get("label_info"))


def _read_final(
    datastore: Datastore, registry: StructureRegistry, image_id: str
) -> tuple[LabelledCase, Path, dict[str, Any]]:
    """A case, where its label lies, and what the studies list about the label."""
    label_id = datastore.get_label_by_image_id(image_id, FINAL)
    label = datastore.get_label_uri(label_id, FINAL) if label_id else ""
    if not label or not Path(label).exists():
        raise InputError(f"The studies hold no final label of {image_id}. Save one first.")
    info = datastore.get_label_info(label_id, FINAL)
    image = image_path(datastore, image_id)
    return labelled_case(image_id, image, Path(label), info.get("label_info"), registry), Path(label), info


def image_path(datastore: Datastore, image_id: str) -> Path:
    """Where an image lies on this machine.

    Raises:
        InputError: the studies do not hold it any more.
    """
    uri = datastore.get_image_uri(image_id)
    if not uri or not Path(uri).exists():
        raise InputError(f"The studies hold no image '{image_id}' (any more). Refresh the list of images.")
    return Path(uri)


def result_tag(request: dict[str, Any]) -> str:
    """The tag that a result is saved under.

    Raises:
        InputError: it would become a label to learn from, in the place of one that a person drew.
    """
    tag = request.get("label_tag") or DefaultLabelTag.ORIGINAL.value
    if tag == FINAL:
        raise InputError("Results cannot be saved as 'final': final labels are learned from. Use 'original'.")
    return str(tag)
