"""Progress, interruption and JSON of the command line."""

import io
import json
import os
import signal
import sys

import numpy as np
import pytest
from rich.table import Table

from ofl_sam2 import console
from ofl_sam2.console import cancel_on_interrupt, err, out, peak_memory_gb, progress, write_json
from ofl_sam2.errors import OFLError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with progress("patient_7") as done:
        for slice_ in range(1, 31):
            now[0] += 1
            done(slice_, 30)
    assert capsys.readouterr().err.splitlines() == [f"patient_7: {n}/30 slice" for n in (10, 20, 30)]


def test_quick_work_needs_no_lines(capsys):
    with progress("patient_7") as done:
        done(1, 1)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("learn", unit="case") as done:
        done(1, 4)
        console.time.sleep(0.15)  # tqdm draws at most ten times a second
        done(4, 4)
    shown = terminal.getvalue()
    assert "learn" in shown
    assert "4/4" in shown
    assert "case/s" in shown


def test_the_first_interrupt_cancels_and_the_second_interrupts(capsys):
    with cancel_on_interrupt() as token:
        assert not token.cancelled
        os.kill(os.getpid(), signal.SIGINT)
        assert token.cancelled
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().err.count("Stopping after the current step") == 1


def test_a_termination_signal_cancels_too():
    with cancel_on_interrupt() as token:
        os.kill(os.getpid(), signal.SIGTERM)
        assert token.cancelled


def test_the_former_signal_handlers_come_back_even_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), cancel_on_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before[0]
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("stream", [out, err])
def test_names_and_long_paths_are_shown_as_they_are(stream, capsys):
    text = "[red]scan[1][/red] :smile: " + "a very long path " * 20
    stream.print(text)
    assert "".join(capsys.readouterr()) == text + "\n"


def test_a_result_is_written_as_json_where_wanted(tmp_path):
    write_json(None, {"a": 1})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "sub" / "result.json", {"a": 1, "name": "é"})
    assert json.loads((tmp_path / "sub" / "result.json").read_text()) == {"a": 1, "name": "é"}


def test_json_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OFLError, match="a file stands where a folder is needed"):
        write_json(tmp_path / "file" / "result.json", {})


def test_peak_memory_counts_what_was_allocated():
    before = peak_memory_gb()
    block = np.ones(int(before * 1e9 / 8) + 25_000_000)
    assert block.sum() > 0
    assert peak_memory_gb() >= before + 0.15


def test_a_wide_table_is_printed_whole(capsys):
    table = Table(*[f"structure {number}" for number in range(40)])
    table.add_row(*[f"0.{number:03d}" for number in range(40)])
    console.print_whole(table)
    shown = capsys.readouterr().out
    assert all(f"0.{number:03d}" in shown and f"structure {number}" in shown for number in range(40))
