"""Cancellation between threads."""

import threading

import pytest

from ofl_sam2.errors import Cancelled
from ofl_sam2.progress import CancelToken


def test_a_fresh_token_lets_work_go_on():
    token = CancelToken()
    token.check()
    assert not token.cancelled


def test_a_token_cancelled_in_another_thread_stops_the_work():
    token = CancelToken()
    thread = threading.Thread(target=token.cancel)
    thread.start()
    thread.join()
    assert token.cancelled
    with pytest.raises(Cancelled, match="finished before is kept"):
        token.check()


def test_cancelling_twice_is_cancelling():
    token = CancelToken()
    token.cancel()
    token.cancel()
    assert token.cancelled
