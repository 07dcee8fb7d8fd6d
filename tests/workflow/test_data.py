"""Lists of cases as the configs make them."""

from pathlib import Path

import pytest

from ofl_sam2.errors import InputError
from ofl_sam2.workflow.data import LoadCase, image_list, labelled_list


def names(items) -> list[str]:
    return [Path(item["image"]).name.removesuffix(".nii.gz") for item in items]


def test_every_image_of_a_folder(study):
    assert names(image_list(str(study / "images"))) == ["a", "b", "c.1"]
    assert names(image_list(str(study / "images"), "b, a")) == ["a", "b"]


def test_images_that_are_segmented_are_left_out(study, tmp_path):
    (tmp_path / "c.1.nii.gz").touch()
    (tmp_path / ".0f.partial.a.nii.gz").touch()
    assert names(image_list(str(study / "images"), unless_in=str(tmp_path))) == ["a", "b"]
    assert names(image_list(str(study / "images"), unless_in=str(tmp_path / "absent"))) == ["a", "b", "c.1"]


def test_labelled_images(study):
    folders = str(study / "images"), str(study / "labels")
    assert names(labelled_list(*folders)) == ["a", "b"]
    assert labelled_list(*folders, ["b"]) == [
        {"image": str(study / "images" / "b.nii.gz"), "label": str(study / "labels" / "b.nii.gz")}
    ]
    assert labelled_list(*folders, []) == []


def test_mistakes_name_the_config_key(study):
    with pytest.raises(InputError, match=r"^image_dir: .*no case named x"):
        image_list(str(study / "images"), ["x"])
    with pytest.raises(InputError, match=r"^image_dir and label_dir: .*no label for c.1"):
        labelled_list(str(study / "images"), str(study / "labels"), ["c.1"])


def test_a_case_is_checked_when_it_is_loaded(study):
    (item,) = labelled_list(str(study / "images"), str(study / "labels"), ["a"])
    assert LoadCase()(item).values == (1, 2)
    assert LoadCase(ignore_empty_slices=True)(item).ignore_empty_slices


def test_cases_that_are_left_out(study):
    images, labels = str(study / "images"), str(study / "labels")
    names = [Path(case["image"]).name for case in labelled_list(images, labels)]
    rest = [Path(case["image"]).name for case in labelled_list(images, labels, unless=[names[0].split(".")[0]])]
    assert rest == names[1:] and names[1:]
