"""Saved models: identical after loading, whole after any crash, refused in words when damaged."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ofl_sam2 import store
from ofl_sam2.backbone import load
from ofl_sam2.errors import InputError, ModelError, OFLError, WeightsError
from ofl_sam2.learner.plan import Plan
from ofl_sam2.learner.unet import VoxelUNet
from ofl_sam2.memory.pool import MAIN
from ofl_sam2.model_index import FORMAT, INDEX, is_model, read_index
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.store import load_model, save_model


@pytest.fixture(scope="module", autouse=True)
def installed(nano, tmp_path_factory):
    """The random nano in the place of the package's own."""
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    save_file(nano.sam2.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "NANO_WEIGHTS", path)
        yield path


@pytest.fixture(scope="module")
def learned(make_segmenter, make_case) -> VolumeSegmenter:
    return make_segmenter((make_case("a", values=(1,)), make_case("b", seed=1)))


@pytest.fixture(scope="module")
def extended(learned, make_case) -> VolumeSegmenter:
    """The same after one more case and some training, with a U-Net of one of the structures."""
    segmenter = VolumeSegmenter(learned.backbone, copy.deepcopy(learned.learner), learned.settings)
    segmenter.pools, segmenter.viewpoint = learned.pools, learned.viewpoint
    with torch.no_grad():
        segmenter.learner.lam.mul_(2)
    segmenter.learn([make_case("c", seed=2)], {1: "bright", 2: "dim"})
    segmenter.unet = VoxelUNet(Plan((1.0, 1.0, 4.0), (24, 20, 6)), (2,)).eval()
    return segmenter


@pytest.fixture(scope="module")
def query(make_case):
    return make_case("query", seed=7).volume


@pytest.fixture(scope="module")
def pristine(learned, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "model"
    save_model(learned, folder, {"trained_on": ["a"]})
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A saved model to change."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def assert_same(one: VolumeSegmenter, other: VolumeSegmenter, volume) -> None:
    first, second = one.segment(volume), other.segment(volume)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.confidence, second.confidence)
    assert (first.structures, first.quality) == (second.structures, second.quality)


def test_a_loaded_model_segments_bit_for_bit_like_the_saved_one(folder, learned, query):
    loaded = load_model(folder)
    assert torch.equal(loaded.view(MAIN).solution.tau, learned.view(MAIN).solution.tau)
    assert loaded.settings == learned.settings
    assert loaded.viewpoint == learned.viewpoint
    assert {name: case.slices for name, case in loaded.pool.cases.items()} == {
        "a": tuple(range(6)),
        "b": tuple(range(6)),
    }
    assert_same(loaded, learned, query)


def test_a_model_goes_on_learning_after_loading(folder, extended, make_case, query):
    loaded = load_model(folder)
    with torch.no_grad():
        loaded.learner.lam.mul_(2)
    loaded.unet = extended.unet
    loaded.learn([make_case("c", seed=2)], {1: "bright", 2: "dim"})
    save_model(loaded, folder)
    assert_same(load_model(folder), extended, query)


def test_a_unet_is_saved_and_goes_when_the_model_has_none(folder, learned, extended, query):
    save_model(extended, folder)
    file = read_index(folder).unet.file
    loaded = load_model(folder)
    assert loaded.unet.values == (2,)
    assert_same(loaded, extended, query)
    save_model(learned, folder)
    assert not (folder / file).exists()
    assert load_model(folder).unet is None


def test_a_model_of_format_2_is_read_without_its_refinement(folder, learned, query):
    def older(index):
        index.update(format=2, refinement={"file": "refinement-0123456789abcdef.safetensors", "sha256": "0" * 64})
        del index["unet"], index["settings"]["unet_views"]
        index["settings"]["refinement"] = True

    rewrite(folder, older)
    assert_same(load_model(folder), learned, query)


def test_a_model_with_a_fixed_weight_of_the_unet_is_read(folder, learned, query):
    rewrite(folder, lambda index: index["settings"].update(unet=0.4))
    assert load_model(folder).settings == learned.settings
    assert_same(load_model(folder), learned, query)


def test_settings_can_differ_from_the_saved_ones(folder):
    assert load_model(folder, gamma=0.9).settings.gamma == 0.9
    with pytest.raises(InputError, match="Unknown settings: gama"):
        load_model(folder, gama=0.9)


def test_the_index_says_what_was_saved(folder):
    index = read_index(folder)
    assert (index.backbone, index.image_size, index.axis) == ("nano", 64, 2)
    assert index.structures == {1: "structure_1", 2: "structure_2"}
    assert [case.case for case in index.pool] == ["a", "b"]
    assert index.notes == {"trained_on": ["a"]}
    assert is_model(folder)
    assert not is_model(folder.parent)


def test_cases_that_did_not_change_are_not_written_again(folder, extended, learned):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    save_model(extended, folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    unchanged = {stored.file for stored in read_index(folder).pool if stored.case != "c"}
    assert len(unchanged) == 2
    assert {name: before[name] for name in unchanged} == {name: after[name] for name in unchanged}
    save_model(extended, folder)
    again = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in again if again[name] != after.get(name)} == {INDEX}


def test_what_the_new_model_does_not_name_is_removed_and_nothing_else(folder, extended):
    old_learner = read_index(folder).learner.file
    strangers = ["notes.txt", "pool-summary.safetensors", "my-weights.safetensors", "training.pt"]
    for name in strangers:
        (folder / name).write_text("mine")
    left_by_a_crash = folder / f".0123456789ab.partial.{old_learner}"
    left_by_a_crash.write_bytes(b"half")
    save_model(extended, folder)
    index = read_index(folder)
    named = {INDEX, index.learner.file, index.unet.file, *(stored.file for stored in index.pool)}
    assert set(content(folder)) == named | set(strangers)
    assert old_learner not in named


def test_a_damaged_pool_file_is_written_again_on_save(folder, learned, query):
    path = folder / read_index(folder).pool[0].file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    save_model(learned, folder)
    assert_same(load_model(folder), learned, query)


def test_files_of_the_same_content_are_linked_from_another_model(folder, extended, tmp_path, query):
    save_model(extended, tmp_path / "next", reuse=folder)
    shared = set(content(folder)) & set(content(tmp_path / "next")) - {INDEX}
    assert len(shared) == 2
    assert all((folder / name).samefile(tmp_path / "next" / name) for name in shared)
    assert_same(load_model(tmp_path / "next"), extended, query)


def test_nothing_learned_is_nothing_to_save(make_segmenter, tmp_path):
    with pytest.raises(InputError, match="nothing to save"):
        save_model(make_segmenter(()), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_write_that_fails_leaves_the_old_model_and_no_rubbish(folder, extended, learned, query, monkeypatch, failing):
    """Four files change: the learner, the U-Net, one case, the index."""
    calls, replace = [], os.replace

    def fail(*paths):
        calls.append(paths)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OFLError, match="the disk is full"):
            save_model(extended, folder)
    assert len(calls) == failing
    assert_same(load_model(folder), learned, query)
    assert not list(folder.glob(".*"))
    save_model(extended, folder)
    assert len(content(folder)) == 6
    assert_same(load_model(folder), extended, query)


def test_a_crash_at_any_point_leaves_the_old_or_the_new_model(pristine, tmp_path, extended):
    """A child process dies at the n-th time it opens, renames or deletes a file, for every n."""
    old = read_index(pristine)
    seen = []
    for point in range(1, 100):
        folder = Path(shutil.copytree(pristine, tmp_path / str(point)))
        child = os.fork()
        if child == 0:
            _die_at(point)
            save_model(extended, folder)
            os._exit(0)
        crashed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        index = read_index(folder)
        for stored in (index.learner, *filter(None, [index.unet]), *index.pool):
            assert load_file(folder / stored.file)
        seen.append("old" if index == old else "new")
        if crashed in (0, 7) and point % 5 == 0:
            assert load_model(folder).structures == index.structures
        if crashed == 0:
            break
        assert crashed == 7
    assert len(seen) > 8
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == "old"
    assert seen[-2:] == ["new", "new"]


def _die_at(point: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        count += event in {"open", "os.rename", "os.remove", "os.mkdir"}
        if count == point:
            os._exit(7)

    sys.addaudithook(hook)


def test_a_folder_without_a_model_says_what_to_run(tmp_path):
    with pytest.raises(ModelError, match=r"holds no model: model.json is missing. Run 'ofl-sam2 learn"):
        load_model(tmp_path / "absent")


def test_a_newer_format_is_refused(folder):
    rewrite(folder, lambda index: index.update(format=FORMAT + 1, version="9.9", pool="of another shape"))
    with pytest.raises(ModelError, match=r"version 9.9, which is newer than this one .* Upgrade"):
        load_model(folder)


def test_other_backbone_weights_are_refused(folder, nano, monkeypatch, tmp_path):
    state = {name: tensor.clone() for name, tensor in nano.sam2.state_dict().items()}
    next(iter(state.values())).view(-1)[0] += 1
    save_file(state, tmp_path / "other.safetensors")
    monkeypatch.setattr(load, "NANO_WEIGHTS", tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="learned with other weights of nano"):
        load_model(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"model"',
        b"{}",
        b"\xff\xfe",
        b'{"format": Infinity}',
        b'{"format": "1"}',
        b'{"format": null}',
        b'{"format": true}',
        b'{"format": 1}',
        b'{"format": 1, "backbone": []}',
        b"[" * 100_000,
    ],
)
def test_an_index_that_is_none_is_a_model_error(folder, text):
    (folder / INDEX).write_bytes(text)
    with pytest.raises(ModelError, match=r"model.json is damaged .*Restore the folder"):
        load_model(folder)


def test_an_index_cut_anywhere_is_a_model_error(folder):
    whole = (folder / INDEX).read_bytes()
    for end in range(0, len(whole) - 1, 37):
        (folder / INDEX).write_bytes(whole[:end])
        with pytest.raises(ModelError, match="damaged"):
            read_index(folder)


@pytest.mark.parametrize(
    "keys",
    [
        ("backbone",),
        ("backbone", "name"),
        ("backbone", "hash"),
        ("backbone", "image_size"),
        ("slicing",),
        ("slicing", "axis"),
        ("slicing", "through_plane"),
        ("structures",),
        ("structures", "1"),
        ("settings", "supports"),
        ("learner",),
        ("learner", "file"),
        ("learner", "sha256"),
        ("unet",),
        ("pool",),
        ("pool", 0),
        ("pool", 0, "case"),
        ("pool", 0, "slices"),
        ("pool", 0, "sha256"),
        ("settings",),
        ("notes",),
    ],
)
def test_an_entry_of_another_kind_is_a_model_error(folder, keys):
    whole = (folder / INDEX).read_text()
    right = json.loads(whole)
    for key in keys:
        right = right[key]
    for wrong in (None, "x", -1, 1.5, True, [], [{}], {"file": "x"}):
        if type(wrong) is type(right) and not isinstance(wrong, list):
            continue
        index = entry = json.loads(whole)
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = wrong
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(ModelError, match="damaged"):
            read_index(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["backbone"].update(name="mega"), "damaged: Unknown backbone 'mega'"),
        (lambda index: index["backbone"].update(image_size=65), "damaged: .*65"),
        (lambda index: index["backbone"].update(image_size=96), "does not hold 6 labelled slices of 96 x 96"),
        (lambda index: index["backbone"].update(hash="00"), "other weights"),
        (lambda index: index["slicing"].update(axis=3), "damaged .*axis 3"),
        (lambda index: index["settings"].update(order="backwards"), "damaged .*order"),
        (lambda index: index["settings"].update(magic=1), "damaged .*magic"),
        (lambda index: index["structures"].update({"x": "organ"}), "damaged"),
        (lambda index: index["structures"].update({"65536": "organ"}), "damaged"),
        (lambda index: index["structures"].update({"9": "organ"}), r"no stored label holds \[9\]"),
        (lambda index: index["pool"][0].update(slices=[0]), "does not hold 1 labelled slices"),
        (lambda index: index["learner"].update(sha256="0" * 64), "content is not what was saved"),
        (lambda index: index["learner"].update(index["pool"][0]), "no few-shot learner"),
        (
            lambda index: index["pool"][0].update(file=index["learner"]["file"], sha256=index["learner"]["sha256"]),
            "hold",
        ),
    ],
)
def test_entries_that_make_no_sense_are_refused(folder, change, words):
    def only_file(index):
        change(index)
        index["learner"] = {key: index["learner"][key] for key in ("file", "sha256")}

    rewrite(folder, only_file)
    with pytest.raises((ModelError, WeightsError), match=words):
        load_model(folder)


def test_any_value_that_is_learned_can_be_stored(make_segmenter, make_case, tmp_path):
    case = make_case()
    large = replace(case, labels=np.array([0, 300, 65535], np.uint16)[case.labels], values=(300, 65535))
    segmenter = make_segmenter((large,))
    save_model(segmenter, tmp_path / "model")
    stored = load_model(tmp_path / "model")
    assert list(stored.structures) == [300, 65535]
    query = make_case("b", seed=1).volume
    assert np.array_equal(stored.segment(query).labels, segmenter.segment(query).labels)


@pytest.mark.parametrize("which", ["learner", "unet", "pool"])
def test_a_missing_file_is_named(folder, extended, which):
    save_model(extended, folder)
    path = next(folder.glob(f"{which}-*"))
    path.unlink()
    with pytest.raises(ModelError, match=f"{path.name} is missing. Restore the folder"):
        load_model(folder)


@pytest.mark.parametrize("which", ["learner", "unet", "pool"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer"])
def test_a_damaged_file_is_refused_before_it_is_read(folder, extended, which, damage):
    save_model(extended, folder)
    path = next(folder.glob(f"{which}-*"))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-100], "empty": b"", "longer": data + b"\0"}[damage])
    with pytest.raises(ModelError, match=f"{path.name} is damaged"):
        load_model(folder)


def test_cases_that_were_read_are_neither_written_nor_read_nor_hashed_again(folder, tmp_path, monkeypatch, query):
    loaded, hashed = load_model(folder), []
    own = store.sha256_of
    monkeypatch.setattr(store, "sha256_of", lambda path: (hashed.append(path.name), own(path))[1])
    monkeypatch.setattr(store, "save", None)
    save_model(loaded, tmp_path / "next", reuse=folder)
    again = load_model(tmp_path / "next", like=loaded)
    assert not any(name.startswith("pool") for name in hashed)
    assert {id(c) for c in again.pool.cases.values()} == {id(c) for c in loaded.pool.cases.values()}
    assert again.backbone is loaded.backbone
    assert_same(again, loaded, query)


def test_a_case_that_was_changed_is_written_as_it_is(folder, tmp_path, query):
    loaded = load_model(folder)
    (first, *_), pool = loaded.pool.cases.values(), loaded.pool
    pool.add(replace(first, labels=torch.zeros_like(first.labels) + 1))
    save_model(loaded, tmp_path / "next", reuse=folder)
    assert (load_model(tmp_path / "next").pool.cases[first.key].labels == 1).all()
