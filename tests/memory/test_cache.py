import errno
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from torch import Tensor

from ofl_sam2.errors import InputError
from ofl_sam2.memory.cache import FeatureCache

MEGABYTE = 1 << 20


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.safetensors"))


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def feature(seed: int, count: int = 4) -> dict[str, Tensor]:
    return {"feature": torch.full((count,), float(seed))}


def same(first: dict[str, Tensor], second: dict[str, Tensor] | None) -> bool:
    return (
        second is not None
        and first.keys() == second.keys()
        and all(torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first)
    )


any_array = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), elements=st.floats(width=32)
)
any_tensors = st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), any_array, max_size=3)


@settings(max_examples=60, deadline=None)
@given(values=any_tensors, memory=st.booleans())
def test_the_second_run_sees_the_numbers_of_the_first_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, np.ndarray], memory: bool
) -> None:
    folder = None if memory else tmp_path_factory.mktemp("cache")
    cache = FeatureCache(folder, MEGABYTE)
    key = cache.key(*values, *values.values())
    first = cache.put(key, {name: torch.from_numpy(value) for name, value in values.items()})
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == {n: v.shape for n, v in values.items()}
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    assert same(first, cache.get(key))
    if folder is not None:
        assert same(first, FeatureCache(folder, MEGABYTE).get(key))


def test_values_are_rounded_to_float16_and_saturate() -> None:
    given_values = torch.tensor([0.1, -1 / 3, 1e5, -1e5, 1e-9])
    stored = FeatureCache(None, MEGABYTE).put("0" * 64, {"feature": given_values})["feature"]
    assert torch.equal(stored[:2], given_values[:2].half().float())
    assert stored[2:].tolist() == [65504.0, -65504.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_point_layout_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6, dtype=dtype).reshape(2, 3).T.expand(4, 3, 2)
    cache = FeatureCache(tmp_path, MEGABYTE, memory_bytes=0)
    stored = cache.put("0" * 64, {"feature": tensor, "same": tensor})
    assert torch.equal(stored["feature"], tensor.float())
    assert same(stored, cache.get("0" * 64))


@pytest.mark.parametrize("on_disk", [False, True])
def test_callers_may_change_what_they_gave_and_got(tmp_path: Path, on_disk: bool) -> None:
    cache = FeatureCache(tmp_path if on_disk else None, MEGABYTE)
    given_values = torch.ones(3, dtype=torch.float16)
    cache.put("0" * 64, {"feature": given_values})["feature"].zero_()
    given_values.zero_()
    for _ in range(2):
        kept = cache.get("0" * 64)
        assert kept is not None
        assert kept["feature"].tolist() == [1, 1, 1]
        kept["feature"].zero_()


def test_integers_are_refused() -> None:
    with pytest.raises(InputError, match=r"'labels' is torch\.int64"):
        FeatureCache(None, MEGABYTE).put("0" * 64, {"labels": torch.arange(3)})


@pytest.mark.parametrize("key", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_keys_that_could_leave_the_folder_are_refused(tmp_path: Path, key: str) -> None:
    cache = FeatureCache(tmp_path, MEGABYTE)
    with pytest.raises(InputError, match="is not a cache key"):
        cache.put(key, feature(0))
    with pytest.raises(InputError, match="is not a cache key"):
        cache.get(key)
    assert not list(tmp_path.iterdir())


def test_negative_bounds_are_refused() -> None:
    with pytest.raises(InputError, match="from 0 up"):
        FeatureCache(None, -1)


def test_different_content_has_different_keys() -> None:
    zeros = np.zeros((2, 3), np.float32)
    parts: list[tuple[bytes | str | np.ndarray, ...]] = [
        (),
        ("",),
        (b"",),
        ("ab",),
        ("a", "b"),
        (b"ab",),
        (zeros,),
        (zeros.T,),
        (zeros.ravel(),),
        (zeros.astype(np.int32),),
        (zeros.astype(">f4"),),
        (zeros.tobytes(),),
        (zeros, ""),
        (np.zeros((0, 3)),),
        (np.zeros((3, 0)),),
        (np.zeros(()),),
    ]
    assert len({FeatureCache.key(*part) for part in parts}) == len(parts)


@given(any_array)
def test_the_key_depends_on_the_numbers_not_on_the_memory_layout(array: np.ndarray) -> None:
    strided = np.repeat(array[..., None], 2, axis=-1)[..., 0]
    assert FeatureCache.key(array) == FeatureCache.key(strided) == FeatureCache.key(np.array(array, order="F"))


def test_object_arrays_and_other_types_make_no_key() -> None:
    for part in (np.array([None]), 3, None):
        with pytest.raises(InputError, match="A cache key is made of"):
            FeatureCache.key(part)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3000)), max_size=40), st.integers(0, 12_000))
def test_the_folder_stays_within_its_bound(
    tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, int]], bound: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = FeatureCache(folder, bound, memory_bytes=0)
    unbounded = tmp_path_factory.mktemp("unbounded")
    for seed, count in puts:
        key = cache.key(str(seed), str(count))
        stored = cache.put(key, feature(seed, count))
        FeatureCache(unbounded, MEGABYTE).put(key, feature(seed, count))
        assert size_on_disk(folder) <= bound
        fits = (unbounded / key[:2] / f"{key}.safetensors").stat().st_size <= bound
        assert (folder / key[:2] / f"{key}.safetensors").exists() == fits
        assert same(stored, cache.get(key)) or not fits


def test_the_least_recently_used_entry_goes_first(tmp_path: Path) -> None:
    keys = [FeatureCache.key(str(seed)) for seed in range(4)]
    cache = FeatureCache(tmp_path, 3 * 2300, memory_bytes=0)
    for age, key in enumerate(keys[:3]):
        cache.put(key, feature(age, 1000))
        path = tmp_path / key[:2] / f"{key}.safetensors"
        os.utime(path, (1000 + age, 1000 + age))
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], feature(3, 1000))
    assert [cache.get(key) is not None for key in keys] == [True, False, False, True]


def test_a_use_from_memory_counts_for_the_disk_too(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, MEGABYTE)
    cache.put("0" * 64, feature(0))
    os.utime(entries(tmp_path)[0], (1000, 1000))
    cache.get("0" * 64)
    assert entries(tmp_path)[0].stat().st_mtime > time.time() - 60


def test_a_smaller_bound_is_applied_when_the_folder_is_opened(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, MEGABYTE)
    for seed in range(5):
        cache.put(cache.key(str(seed)), feature(seed, 1000))
    FeatureCache(tmp_path, 5000)
    assert len(entries(tmp_path)) == 2
    FeatureCache(tmp_path, 100)
    assert entries(tmp_path) == []


def test_what_other_processes_wrote_is_counted_before_the_own_bytes_reach_the_bound(tmp_path: Path) -> None:
    mine, other = (FeatureCache(tmp_path, 40_000, memory_bytes=0) for _ in range(2))
    for seed in range(18):
        other.put(other.key(f"other {seed}"), feature(seed, 1000))
    for seed in range(4):
        mine.put(mine.key(f"mine {seed}"), feature(seed, 1000))
    assert size_on_disk(tmp_path) <= 40_000
    assert all(mine.get(mine.key(f"mine {seed}")) is not None for seed in range(4))


def test_the_memory_front_is_bounded_and_keeps_the_latest(tmp_path: Path) -> None:
    cache = FeatureCache(None, max_bytes=100)
    keys = [cache.key(str(seed)) for seed in range(4)]
    for seed, key in enumerate(keys[:3]):
        cache.put(key, feature(seed, 16))
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], feature(3, 16))
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    cache.put("f" * 64, feature(9, 51))
    assert cache.get("f" * 64) is None
    assert cache.get(keys[3]) is not None


def test_with_room_in_memory_the_file_is_not_needed_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, MEGABYTE, memory_bytes=1000)
    stored = cache.put("0" * 64, feature(1))
    entries(tmp_path)[0].unlink()
    assert same(stored, cache.get("0" * 64))
    assert FeatureCache(tmp_path, MEGABYTE).get("0" * 64) is None


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    foreign = [tmp_path / "ab" / "patient.safetensors", tmp_path / "scan.nii", tmp_path / "ab" / ".x.tmp"]
    for path in foreign:
        path.write_bytes(bytes(5000))
        os.utime(path, (1000, 1000))
    FeatureCache(tmp_path, 0).put("a" * 64, feature(0))
    assert all(path.stat().st_size == 5000 for path in foreign)


def test_leftovers_of_a_crashed_writer_are_removed_once_stale(tmp_path: Path) -> None:
    (tmp_path / "aa").mkdir()
    stale, fresh = (tmp_path / "aa" / f".{'a' * 64}.{digit * 12}.tmp" for digit in "01")
    stale.write_bytes(bytes(10))
    fresh.write_bytes(bytes(10))
    os.utime(stale, (1000, 1000))
    FeatureCache(tmp_path, MEGABYTE)
    assert list((tmp_path / "aa").iterdir()) == [fresh]


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255), truncate=st.booleans())
def test_a_damaged_entry_is_a_miss_and_is_deleted(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int, truncate: bool
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = FeatureCache(folder, MEGABYTE, memory_bytes=0)
    stored = cache.put("0" * 64, {"feature": torch.arange(50.0), "other": torch.ones(2, 3)})
    path = entries(folder)[0]
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position] ^= flip
    path.write_bytes(content[:position] if truncate else content)
    found = cache.get("0" * 64)
    assert found is None or same(stored, found)  # a flipped byte may fall on a blank of the header
    if found is None:
        assert not path.exists()
    assert same(stored, cache.put("0" * 64, stored))
    assert same(stored, cache.get("0" * 64))


@pytest.mark.parametrize(
    ("values", "metadata"),
    [
        (torch.ones(3).half(), {}),
        (torch.ones(3).half(), {"key": "1" * 64, "crc32": "00000000"}),
        (torch.ones(3), {"key": "0" * 64}),
    ],
)
def test_an_entry_of_another_key_or_kind_is_a_miss(tmp_path: Path, values: Tensor, metadata: dict[str, str]) -> None:
    path = tmp_path / "00" / f"{'0' * 64}.safetensors"
    path.parent.mkdir()
    save_file({"feature": values}, path, metadata)
    assert FeatureCache(tmp_path, MEGABYTE).get("0" * 64) is None
    assert not path.exists()


def test_an_entry_copied_under_another_key_is_a_miss(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, MEGABYTE, memory_bytes=0)
    cache.put("0" * 64, feature(0))
    other = tmp_path / "00" / f"{'0' * 63}1.safetensors"
    other.write_bytes(entries(tmp_path)[0].read_bytes())
    assert cache.get("0" * 63 + "1") is None
    assert not other.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_unwritable_folder_is_only_read_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    cache = FeatureCache(tmp_path, MEGABYTE, memory_bytes=0)
    kept = cache.put("0" * 64, feature(7))
    attempts = []

    def refuse(path: Path, content: bytes) -> None:
        attempts.append(path)
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            key = cache.key(str(seed))
            assert same(feature(seed), cache.put(key, feature(seed)))
            assert cache.get(key) is None
    assert len(attempts) == len(caplog.records) == 1
    assert f"not cached in {tmp_path} for now" in caplog.text
    assert same(kept, cache.get("0" * 64))
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_writable_from", time.monotonic())
    cache.put("1" * 64, feature(1))
    assert same(feature(1), cache.get("1" * 64))


def test_a_file_in_the_place_of_the_folder_disables_writing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    cache = FeatureCache(tmp_path / "cache", MEGABYTE)
    stored = cache.put("0" * 64, feature(1))
    assert same(stored, cache.get("0" * 64))
    assert len(caplog.records) == 1


def test_a_folder_emptied_by_someone_else_is_filled_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path, MEGABYTE, memory_bytes=0)
    cache.put("0" * 64, feature(1))
    entries(tmp_path)[0].unlink()
    (tmp_path / "00").rmdir()
    assert cache.get("0" * 64) is None
    stored = cache.put("0" * 64, feature(2))
    assert same(stored, cache.get("0" * 64))
    assert not caplog.records


def work(folder: Path, seed: int, seconds: float, report: "multiprocessing.Queue[tuple[int, int, str]]") -> None:
    """Read and write at random until the time is up; report the hits and what went wrong."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(seed)
    hits = turns = 0
    problem = ""
    try:
        cache = FeatureCache(folder, 60_000, memory_bytes=0)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            turns += 1
            content = int(generator.integers(40))
            key = cache.key(str(content))
            found = cache.get(key)
            hits += found is not None
            if not same(feature(content, 1000), found or cache.put(key, feature(content, 1000))):
                problem = f"wrong values for {content}"
    except Exception as error:
        problem = repr(error)
    report.put((turns, hits, problem))


def test_processes_share_a_folder_and_evict_from_it_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    report: multiprocessing.Queue[tuple[int, int, str]] = context.Queue()
    workers = [context.Process(target=work, args=(tmp_path, seed, 2.0, report)) for seed in range(4)]
    for worker in workers:
        worker.start()
    results = [report.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert [problem for _, _, problem in results] == [""] * 4
    assert all(hits > 0 for _, hits, _ in results)
    assert sum(turns - hits for turns, hits, _ in results) > 4 * 40  # more than without any eviction
    assert size_on_disk(tmp_path) <= 60_000 + 4 * (60_000 // 16 + 2_300)
    FeatureCache(tmp_path, 60_000)
    assert size_on_disk(tmp_path) <= 60_000
    assert not list(tmp_path.rglob("*.tmp"))


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 20_000, memory_bytes=5_000)
    wrong: list[int] = []

    def use(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for content in generator.integers(20, size=60).tolist():
            key = cache.key(str(content))
            if not same(feature(content, 1000), cache.get(key) or cache.put(key, feature(content, 1000))):
                wrong.append(content)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert size_on_disk(tmp_path) <= 20_000
