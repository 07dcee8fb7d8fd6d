"""Labels of the studies as cases that the library learns from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from ofl_sam2.dataset import Case, LabelledCase, load_case
from ofl_sam2.errors import InputError
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
    return LabelledCase(replace(case.volume, name=image_id), labels, values, case.labelled_slices)


def read_case(datastore: Datastore, registry: StructureRegistry, image_id: str) -> LabelledCase:
    """The final label of an image, read from the studies.

    Raises:
        InputError: there is none, or as in `labelled_case`.
    """
    label_id = datastore.get_label_by_image_id(image_id, FINAL)
    label = datastore.get_label_uri(label_id, FINAL) if label_id else ""
    if not label:
        raise InputError(f"The studies hold no final label of {image_id}. Save one first.")
    info = datastore.get_label_info(label_id, FINAL).get("label_info")
    return labelled_case(image_id, image_path(datastore, image_id), Path(label), info, registry)


def image_path(datastore: Datastore, image_id: str) -> Path:
    """Where an image lies on this machine.

    Raises:
        InputError: the studies do not hold it any more.
    """
    uri = datastore.get_image_uri(image_id)
    if not uri or not Path(uri).exists():
        raise InputError(f"The studies hold no image '{image_id}' (any more). Refresh the list of images.")
    return Path(uri)


class LazyCases(Sequence[LabelledCase]):
    """Cases that are read each time they are asked for, so that memory does not grow with their number."""

    def __init__(self, names: Sequence[str], read: Callable[[str], LabelledCase]) -> None:
        self._names, self._read = list(names), read

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LazyCases(self._names[index], self._read)
        return self._read(self._names[index])

    def __iter__(self) -> Iterator[LabelledCase]:
        return map(self._read, self._names)
