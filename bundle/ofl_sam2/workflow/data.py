"""Lists of cases for the configs, and the labelled case as a transform."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.transforms import Transform

from ofl_sam2.dataset import Case, find_cases, labelled_cases, load_case
from ofl_sam2.files import case_name
from ofl_sam2.workflow.run import config_key


def image_list(
    images: str, cases: Sequence[str] | str | None = None, unless_in: str | None = None
) -> list[dict[str, str]]:
    """The images of a folder, as `[{"image": path}, ...]`.

    Args:
        images: folder.
        cases: names to choose, as a list or separated by commas; default all.
        unless_in: folder of label maps; images that have one there are left out.

    Raises:
        InputError: as in `find_cases`, with the config key in front.
    """
    with config_key("image_dir"):
        found = find_cases(Path(images), cases=case_names(cases))
    done = {case_name(path) for path in Path(unless_in).glob("*")} if unless_in else set()
    return [{"image": str(case.image)} for case in found if case.name not in done]


def labelled_list(
    images: str,
    labels: str,
    cases: Sequence[str] | str | None = None,
    unless: Sequence[str] | str = (),
) -> list[dict[str, str]]:
    """The labelled images of two folders, as `[{"image": path, "label": path}, ...]`; none where `cases` is empty.

    Args:
        images, labels: folders; images and labels pair by name.
        cases: names to choose, as a list or separated by commas; default all.
        unless: names of cases to leave out.

    Raises:
        InputError: as in `labelled_cases`, with the config keys in front.
    """
    if cases is not None and not cases:
        return []
    with config_key("image_dir and label_dir"):
        found = labelled_cases(Path(images), Path(labels), case_names(cases))
    left_out = case_names(unless) or []
    return [{"image": str(c.image), "label": str(c.label)} for c in found if c.name not in left_out]


class LoadCase(Transform):
    """Read image and label and check that they belong together: `{"image": path, "label": path}` -> `LabelledCase`.

    Args:
        ignore_empty_slices: slices without any label are unlabelled, not empty.
    """

    def __init__(self, ignore_empty_slices: bool = False) -> None:
        self.ignore_empty_slices = ignore_empty_slices

    def __call__(self, data: dict[str, str]) -> Any:
        image, label = Path(data["image"]), Path(data["label"])
        return load_case(Case(case_name(image), image, label), ignore_empty_slices=self.ignore_empty_slices)


def case_names(cases: Sequence[Any] | str | None) -> list[str] | None:
    """Names of cases as a list, be they given as one or as text with commas; None stays None."""
    if cases is None:
        return None
    return [str(name).strip() for name in (cases.split(",") if isinstance(cases, str) else cases)]
