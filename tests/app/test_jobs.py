import os
import threading
from pathlib import Path

import pytest
from lib.jobs import Jobs

from ofl_sam2.errors import Cancelled


def test_job_is_listed_until_it_is_finished(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "lock")
    job = jobs.start("infer", "case")
    job.progress(3, 8)
    (shown,) = jobs.list()
    assert (shown.kind, shown.image, shown.done, shown.total) == ("infer", "case", 3, 8)
    assert shown.to_dict()["id"] == job.id
    jobs.finish(job.id)
    assert jobs.list() == []


def test_job_is_gone_when_its_work_fails(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "lock")
    with pytest.raises(ValueError), jobs.running("infer", "case"):
        raise ValueError
    assert jobs.list() == []


def test_cancel_reaches_the_work(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "lock")
    with jobs.running("infer", "case") as job:
        assert jobs.cancel(job.id)
        with pytest.raises(Cancelled):
            job.cancel.check()
    assert not jobs.cancel(job.id)


def test_other_process_sees_a_waiting_user(tmp_path: Path) -> None:
    server, background = Jobs(tmp_path / "lock"), Jobs(tmp_path / "lock")
    assert not background.user_waits()
    first, second = server.start("infer", "a"), server.start("infer", "b")
    assert background.user_waits() and server.user_waits()
    server.finish(first.id)
    assert background.user_waits()
    server.finish(second.id)
    assert not background.user_waits() and not server.user_waits()


@pytest.mark.parametrize("kind", ["scoring", "batch"])
def test_background_work_is_no_waiting_user(tmp_path: Path, kind: str) -> None:
    jobs = Jobs(tmp_path / "lock")
    with jobs.running(kind, "case"):
        assert not Jobs(tmp_path / "lock").user_waits()


def test_job_finishes_in_another_thread(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "lock")
    job = jobs.start("infer", "case")
    worker = threading.Thread(target=jobs.finish, args=(job.id,))
    worker.start()
    worker.join()
    assert not Jobs(tmp_path / "lock").user_waits()


def test_background_work_of_a_server_that_is_gone_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(tmp_path / "lock")
    batch, infer = jobs.start("batch", "a"), jobs.start("infer", "b")
    assert not batch.cancel.cancelled
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert batch.cancel.cancelled and not infer.cancel.cancelled
