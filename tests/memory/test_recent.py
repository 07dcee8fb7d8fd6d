"""What was used last stays, within bounds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ofl_sam2.memory.recent import RecentTensors

ROOM = 8


def floats(count):
    return {"x": torch.zeros(count)}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, ROOM + 1) | st.none())))
def test_the_last_entries_that_fit_are_there(uses):
    recent, expected = RecentTensors(4 * ROOM), {}
    for key, count in uses:
        if count is None:
            found = recent.get(key)
            assert (None if found is None else len(found["x"])) == expected.get(key)
            if key in expected:
                expected[key] = expected.pop(key)
            continue
        recent.put(key, floats(count))
        if count <= ROOM:
            expected.pop(key, None)
            expected[key] = count
            while sum(expected.values()) > ROOM:
                del expected[next(iter(expected))]
    assert {key for key in range(6) if recent.get(key)} == set(expected)


def test_an_entry_is_the_one_that_was_put():
    recent, tensors = RecentTensors(4 * ROOM), floats(3)
    recent.put(("any", "key"), tensors)
    assert recent.get(("any", "key")) is tensors
    recent.put(("any", "key"), floats(ROOM + 1))
    assert recent.get(("any", "key")) is tensors
