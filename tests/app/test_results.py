"""Asking again for what did not change."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from lib.results import RecentResults, result_key

from ofl_sam2.segmenter import Segmentation
from ofl_sam2.service.snapshots import Snapshot


def segmentation(size):
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    return Segmentation(noise, {1: "a"}, np.zeros((1, 1), np.float32), {"a": 1.0}, {"a": 0.0}, 0.1)


def test_a_result_depends_on_snapshot_image_place_and_settings(make_case):
    snapshot, volume = Snapshot(1, Path("1"), {}, ""), make_case().volume
    moved = replace(volume, affine=volume.affine * 2)
    keys = {
        result_key(*arguments)
        for arguments in (
            (snapshot, volume, {}),
            (replace(snapshot, version=2), volume, {}),
            (snapshot, make_case(seed=1).volume, {}),
            (snapshot, moved, {}),
            (snapshot, volume, {"gamma": 0.5}),
        )
    }
    assert len(keys) == 5
    assert result_key(snapshot, make_case().volume, {}) in keys


def same(one, other):
    np.testing.assert_array_equal(one.labels, other.labels)
    return one.labels.dtype == other.labels.dtype and one.quality == other.quality


def test_the_least_recently_used_result_goes_first():
    kept = RecentResults(1500)
    one = segmentation(500)
    kept.put("one", one)
    kept.put("two", segmentation(500))
    assert same(kept.get("one"), one)
    kept.put("three", segmentation(500))
    assert kept.get("two") is None
    assert same(kept.get("one"), one)


def test_what_is_too_large_is_not_kept_and_drives_out_nothing():
    kept = RecentResults(1500)
    kept.put("small", segmentation(500))
    kept.put("large", segmentation(5000))
    assert kept.get("large") is None and kept.get("small") is not None


def test_a_result_counts_as_it_is_packed():
    kept, one = RecentResults(1 << 20), segmentation(100)
    large = replace(one, labels=np.zeros((512, 512, 300), np.uint8))
    kept.put("large", large)
    assert same(kept.get("large"), large)
