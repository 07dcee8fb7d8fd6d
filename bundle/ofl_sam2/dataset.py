"""Cases: images paired with their labels by name."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray

from ofl_sam2.errors import InputError
from ofl_sam2.files import case_name, is_image, read_labels, read_volume
from ofl_sam2.frames import natural_key
from ofl_sam2.volume import Volume

MAX_VALUE = 65535
_MAX_STRUCTURES = 255
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """An image and, where there is one, its label."""

    name: str
    image: Path
    label: Path | None = None


@dataclass(frozen=True, eq=False)
class LabelledCase:
    """A case in memory.

    Attributes:
        volume: the image.
        labels: unsigned integers in the volume's grid.
        values: label values that occur, without 0.
        labelled_slices: main slices (numbered like `SliceStack`) that count as labelled; None means all.
        ignore_empty_slices: of these, slices without any structure do not count.

    Raises:
        InputError: a label value above `MAX_VALUE`.
    """

    volume: Volume
    labels: NDArray[np.unsignedinteger[Any]] = field(repr=False)
    values: tuple[int, ...]
    labelled_slices: tuple[int, ...] | None = None
    ignore_empty_slices: bool = False

    def __post_init__(self) -> None:
        if max(self.values, default=0) > MAX_VALUE:
            raise InputError(
                f"The label of {self.volume.name} holds the value {max(self.values)}. Use values from 1 to {MAX_VALUE}."
            )


class LazyCases(Sequence[LabelledCase]):
    """Cases of which the first ones stay in memory, and the images of the others are read each time they are asked for.

    Labels stay as they were when their case was added, whatever people save meanwhile.

    Args:
        most_bytes: bound on the images and labels that stay.
    """

    def __init__(self, most_bytes: int = _KEPT_BYTES) -> None:
        self._room = most_bytes
        self._cases: list[Callable[[], LabelledCase]] = []

    def add(self, case: LabelledCase, read: Callable[[], Volume]) -> None:
        """Add a case, and how to read its image again."""
        size = case.volume.voxels.nbytes + case.labels.nbytes
        if size <= self._room:
            self._room -= size
            self._cases.append(lambda: case)
        else:
            self._cases.append(_packed(case, read))

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, index: Any) -> Any:
        return self._cases[index]()


def _packed(case: LabelledCase, read: Callable[[], Volume]) -> Callable[[], LabelledCase]:
    """What makes a case anew, from its packed label and its image."""
    name, dtype, shape = case.volume.name, case.labels.dtype, case.labels.shape
    values, slices, ignore = case.values, case.labelled_slices, case.ignore_empty_slices
    packed = zlib.compress(np.ascontiguousarray(case.labels).data, level=1)

    def unpacked() -> LabelledCase:
        labels = np.frombuffer(zlib.decompress(packed), dtype).reshape(shape)
        return LabelledCase(replace(read(), name=name), labels, values, slices, ignore)

    return unpacked


def find_cases(images: Path, labels: Path | None = None, cases: Sequence[str] | None = None) -> list[Case]:
    """Pair the images of a folder with the labels of another by case name, in natural order.

    Args:
        images: folder of image files and of subfolders with a DICOM series or frames.
        labels: folder of label files and of subfolders with PNG masks; images may lack a label.
        cases: names to choose; then each must have a label if `labels` is given.

    Raises:
        InputError: an empty or absent folder, two files of one case, unknown cases, missing pairs; all are named.
    """
    image_paths = _by_name(images)
    label_paths = _by_name(labels) if labels is not None else {}
    orphans = _missing(label_paths, image_paths)
    if orphans:
        raise InputError(
            f"{labels} holds labels without an image in {images}: {orphans}. Give a label the name of its image."
        )
    names = list(image_paths) if cases is None else sorted(set(cases), key=natural_key)
    unknown = _missing(names, image_paths)
    if unknown:
        raise InputError(f"{images} holds no case named {unknown}. It holds: {', '.join(image_paths)}.")
    unlabelled = _missing(names, label_paths)
    if labels is not None and cases is not None and unlabelled:
        raise InputError(f"{labels} holds no label for {unlabelled}. Add the labels or leave these cases out.")
    return [Case(name, image_paths[name], label_paths.get(name)) for name in names]


def labelled_cases(images: Path, labels: Path, cases: Sequence[str] | None = None) -> list[Case]:
    """Those of `find_cases` that have a label.

    Raises:
        InputError: as in `find_cases`, or no label at all.
    """
    found = [case for case in find_cases(images, labels, cases) if case.label is not None]
    if not found:
        raise InputError(f"{labels} holds no label of an image in {images}. A label has the name of its image.")
    return found


def load_case(case: Case, *, ignore_empty_slices: bool = False) -> LabelledCase:
    """Read a case and check that image and label belong together.

    A label of the same grid stored in another axis order (as converters write it) is brought into the image's order.

    Args:
        case: image and label.
        ignore_empty_slices: leave slices without any structure out of the labelled ones.

    Raises:
        InputError: no label, unreadable files, different grids, an empty label, or too many label values.
    """
    if case.label is None:
        raise InputError(f"{case.image} has no label to learn from. Add one named '{case.name}'.")
    volume = read_volume(case.image)
    label_volume = read_labels(case.label, volume)
    labels = in_grid_of(label_volume, volume)
    values = tuple(int(value) for value in np.unique(labels) if value)
    if not values:
        raise InputError(f"{case.label} is empty: it holds no structure. Draw one, or leave the case out.")
    if len(values) > _MAX_STRUCTURES:
        raise InputError(f"{case.label} holds {len(values)} different values. Is it an image instead of a label?")
    return LabelledCase(volume, labels, values, label_volume.labelled, ignore_empty_slices)


def parse_structures(text: str) -> dict[int, str]:
    """Parse names of label values.

    Raises:
        InputError: an entry that is not VALUE=NAME, the background value 0, or a value or name given twice.

    Example:
        >>> parse_structures("1=anterior, 2=posterior")
        {1: 'anterior', 2: 'posterior'}
    """
    structures: dict[int, str] = {}
    for entry in text.split(","):
        value, equals, name = (part.strip() for part in entry.partition("="))
        if not (equals and name and value.isdecimal() and int(value) > 0):
            raise InputError(
                f"Cannot read the structure '{entry.strip()}' in '{text}'. "
                "Write VALUE=NAME with a value from 1, for example 1=anterior,2=posterior."
            )
        if int(value) in structures or name.casefold() in map(str.casefold, structures.values()):
            raise InputError(f"'{entry.strip()}' in '{text}' repeats a value or a name. Give each structure its own.")
        structures[int(value)] = name
    return dict(sorted(structures.items()))


def default_structures(values: Iterable[int]) -> dict[int, str]:
    """Name label values that have no name.

    Example:
        >>> default_structures([1, 2])
        {1: 'structure_1', 2: 'structure_2'}
    """
    return {int(value): f"structure_{int(value)}" for value in values}


def _by_name(folder: Path) -> dict[str, Path]:
    """Images or labels of `folder` by case name, in natural order."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give the folder that holds one file or subfolder for each case.")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in folder.iterdir():
        if is_image(path):
            found[case_name(path)].append(path)
    if not found:
        raise InputError(
            f"{folder} holds no images. Put each case into it as a file (NIfTI, NRRD, MetaImage) "
            "or as a subfolder (DICOM series, PNG or JPEG frames)."
        )
    twice = [path.name for paths in found.values() if len(paths) > 1 for path in sorted(paths)]
    if twice:
        raise InputError(f"{folder} holds several files of one case: {', '.join(twice)}. Keep one of each.")
    return {name: found[name][0] for name in sorted(found, key=natural_key)}


def _missing(names: Iterable[str], among: Iterable[str]) -> str:
    return ", ".join(sorted(set(names) - set(among), key=natural_key))


def in_grid_of(labels: Volume, volume: Volume) -> NDArray[np.unsignedinteger[Any]]:
    """The label voxels in the axis order of `volume`, copied only where the orders differ.

    Raises:
        InputError: the grids differ.
    """
    if labels.voxels.shape == volume.grid and (volume.frames or same_place(labels.affine, volume.affine)):
        return labels.voxels
    view = labels.in_order(labels.voxels)
    arranged = np.zeros(volume.grid, labels.voxels.dtype)
    target = volume.in_order(arranged)
    if volume.frames or view.shape != target.shape:
        sequence = len(volume.grid) == 4 and len(labels.grid) == 3
        advice = (
            "Four dimensions are read as a sequence in time: label each time, or save channels as single images."
            if sequence
            else "Resample the label to the image's grid with nearest-neighbour interpolation."
        )
        shapes = f"{_oriented_shape(labels)}, but {volume.path} has {_oriented_shape(volume)}"
        raise InputError(f"{labels.path} has shape {shapes}. {advice}")
    if not same_place(_canonical_affine(labels), _canonical_affine(volume)):
        raise InputError(
            f"{labels.path} and {volume.path} have the same shape but lie in different places in space. "
            f"Correct the label's header, or resample it to the image's grid. Label affine {_text(labels.affine)}, "
            f"image affine {_text(volume.affine)}."
        )
    target[...] = view
    return arranged


def _oriented_shape(volume: Volume) -> str:
    codes = "" if volume.frames else f" (axes {''.join(nib.orientations.aff2axcodes(volume.affine))})"
    return f"{volume.voxels.shape}{codes}"


def _canonical_affine(volume: Volume) -> NDArray[np.float64]:
    orientation = nib.orientations.io_orientation(volume.affine)
    return np.asarray(volume.affine @ nib.orientations.inv_ornt_aff(orientation, volume.grid[:3]))


def same_place(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether affines agree to 1e-3 mm plus 1 % of the voxel size."""
    tolerance = 1e-3 + 0.01 * float(voxel_sizes(other).min())
    return bool(np.allclose(one, other, rtol=0, atol=tolerance))


def _text(affine: NDArray[np.float64]) -> str:
    return str(np.round(affine[:3], 3).tolist())
