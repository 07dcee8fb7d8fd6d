"""Asking again for what did not change."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from lib.results import RecentResults, result_key

from ofl_sam2.segmenter import Segmentation
from ofl_sam2.service.snapshots import Snapshot


def segmentation(size):
    return Segmentation(np.zeros(size, np.uint8), {1: "a"}, np.zeros((1, 1), np.float32), {"a": 1.0}, {"a": 0.0}, 0.1)


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


def test_the_least_recently_used_result_goes_first():
    kept = RecentResults(250)
    one = segmentation(100)
    kept.put("one", one)
    kept.put("two", segmentation(100))
    assert kept.get("one") is one
    kept.put("three", segmentation(100))
    assert kept.get("two") is None
    assert kept.get("one") is one


def test_what_is_too_large_is_not_kept():
    kept = RecentResults(250)
    kept.put("large", segmentation(300))
    assert kept.get("large") is None
