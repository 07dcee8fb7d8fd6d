import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from lib.activelearning.strategies import shuffled, strategies
from lib.scores import Score
from lib.workspace import Workspace

from ofl_sam2.errors import InputError

Make = Callable[..., Any]
NAMES = ("most_uncertain", "diverse_first", "random", "sequential")


def order(workspace: Workspace, name: str, data: Any, **request: Any) -> list[str]:
    """The images a strategy hands out until all of them are labelled."""
    chosen = []
    while sample := strategies(workspace)[name]({"strategy": name, **request}, data):
        chosen.append(sample["id"])
        data.labels[sample["id"]] = Path()
    return chosen


@pytest.mark.parametrize("name", NAMES)
def test_every_image_comes_once_without_any_label(fresh_workspace: Workspace, make_studies: Make, name: str) -> None:
    data = make_studies()
    assert sorted(order(fresh_workspace, name, data)) == sorted(data.list_images())
    assert strategies(fresh_workspace)[name]({"strategy": name}, data) is None


@pytest.mark.parametrize("name", NAMES)
def test_order_is_the_same_for_the_same_seed(fresh_workspace: Workspace, make_studies: Make, name: str) -> None:
    first = order(fresh_workspace, name, make_studies(), seed=5)
    assert order(fresh_workspace, name, make_studies(), seed="5") == first


@pytest.mark.parametrize("name", NAMES)
def test_image_handed_out_before_comes_last(fresh_workspace: Workspace, make_studies: Make, name: str) -> None:
    data, seen = make_studies(), []
    for moment in range(4):
        image = strategies(fresh_workspace)[name]({"strategy": name}, data)["id"]
        data.image_info[image] = {"strategy": {name: {"ts": int(time.time()) + moment}}}
        seen.append(image)
    assert sorted(seen) == sorted(data.list_images())
    assert strategies(fresh_workspace)[name]({"strategy": name}, data)["id"] == seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_image_handed_out_by_another_strategy_comes_last(
    fresh_workspace: Workspace, make_studies: Make, name: str
) -> None:
    data = make_studies()
    for image in data.list_images()[:-1]:
        data.image_info[image] = {"strategy": {"other": {"ts": int(time.time())}}}
    assert strategies(fresh_workspace)[name]({"strategy": name}, data)["id"] == data.list_images()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_passed_over_are_not_chosen(fresh_workspace: Workspace, make_studies: Make, name: str) -> None:
    data, request = make_studies(), {"strategy": name, "passed_over": [f"synthetic_00{n}" for n in (0, 1, 3)]}
    assert strategies(fresh_workspace)[name](request, data)["id"] == "synthetic_002"
    assert strategies(fresh_workspace)[name]({**request, "passed_over": data.list_images()}, data) is None


def test_sequential_follows_natural_order(fresh_workspace: Workspace, make_studies: Make) -> None:
    data = make_studies()
    for image in ("case10", "case9"):
        (data.folder / f"{image}.nii.gz").touch()
    assert order(fresh_workspace, "sequential", data)[:2] == ["case9", "case10"]


def test_random_seeds_differ_and_new_images_change_no_order() -> None:
    images = [f"case{number}" for number in range(20)]
    assert shuffled(images, 0) != shuffled(images, 1)
    assert [image for image in shuffled([*images, "new"], 0) if image != "new"] == shuffled(images, 0)


@pytest.mark.parametrize("name", ["random", "diverse_first"])
def test_seed_that_is_no_integer_is_refused(fresh_workspace: Workspace, make_studies: Make, name: str) -> None:
    with pytest.raises(InputError, match="seed is 'x'"):
        strategies(fresh_workspace)[name]({"strategy": name, "seed": "x"}, make_studies())


def test_most_uncertain_takes_the_lowest_estimate(workspace: Workspace, make_studies: Make) -> None:
    for image, quality in {"synthetic_000": 0.1, "synthetic_001": 0.9, "synthetic_003": 0.4}.items():
        workspace.scores.put(image, Score(quality, 1))
    data = make_studies(labelled=["synthetic_000"])
    sample = strategies(workspace)["most_uncertain"]({"strategy": "most_uncertain"}, data)
    assert sample == {"id": "synthetic_003", "quality": 0.4}


def test_most_uncertain_is_diverse_first_without_estimates(workspace: Workspace, make_studies: Make) -> None:
    tasks, data = strategies(workspace), make_studies(labelled=["synthetic_000"])
    assert tasks["most_uncertain"]({}, data) == tasks["diverse_first"]({}, data)


def test_diverse_first_begins_typical_and_goes_on_far_away(fresh_workspace: Workspace, make_studies: Make) -> None:
    data = make_studies()
    noise = np.random.default_rng(0).normal(0, 200, (32, 32, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(noise, np.diag([3.0, 3.0, 6.0, 1.0])), data.folder / "other.nii.gz")
    chosen = order(fresh_workspace, "diverse_first", data)
    assert chosen.index("other") == 1


def test_diverse_first_describes_a_few_new_images_a_call(fresh_workspace: Workspace, make_studies: Make) -> None:
    data = make_studies()
    source = data.folder / "synthetic_000.nii.gz"
    for number in range(10):
        (data.folder / f"copy{number}.nii.gz").write_bytes(source.read_bytes())
    strategy = strategies(fresh_workspace)["diverse_first"]
    coverage = strategy._coverage
    strategy({}, data)
    encoder = fresh_workspace.encoder()
    assert sum(coverage.known(image, data, encoder) is not None for image in data.list_images()) == 8
    strategy({}, data)
    assert all(coverage.known(image, data, encoder) is not None for image in data.list_images())


def test_unreadable_image_is_not_in_the_way(fresh_workspace: Workspace, make_studies: Make) -> None:
    data = make_studies()
    (data.folder / "broken.nii.gz").write_bytes(b"no image")
    data.vanished.add("synthetic_000")
    chosen = order(fresh_workspace, "diverse_first", data)
    assert set(chosen[-2:]) == {"broken", "synthetic_000"} and len(chosen) == 5


def test_many_unreadable_images_are_not_in_the_way(
    fresh_workspace: Workspace, make_studies: Make, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_studies()
    readable = set(data.list_images())
    for number in range(30):
        (data.folder / f"broken{number}.nii.gz").write_bytes(b"no image")
    strategy = strategies(fresh_workspace)["diverse_first"]
    assert {strategy({}, data)["id"] for _ in range(2)} <= readable
    assert sum("cannot be described" in message for message in caplog.messages) == 30
