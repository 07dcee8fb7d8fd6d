"""The label-efficiency table: draws, planned rows, choosing among them, continuing, reporting."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import label_efficiency
import pytest
from support import curves
from support.curves import markdown
from support.table import ResumableTable
from support.tasks import DataSet, Task, draws

MACHINE = {"cpu": "A processor", "cores": 2, "threads": 1, "commit": "abc"}
NAMES = [f"case_{number:02}" for number in range(16)]


def everything(**choice):
    free = {"only": "", "k": None, "draws": None, "methods": None, "budgets": None, "datasets": None}
    return Namespace(**{**free, "limit_minutes": float("inf"), "queries": None, **choice})


def result(row, *_):
    task = row.task
    named = {"dataset": task.dataset, "k": task.shots, "draw": task.draw, "seed": task.seed, "supports": task.supports}
    scores = {"dice": 0.5 + 0.1 * row.task.draw, "hd95": None, "surface_dice": 0.6}
    times = {"seconds": 3.0 + row.budget, "cpu_seconds": 4.0, "steps": 7, "segment_seconds": 1.0}
    return {**named, "method": row.method, "budget": row.budget, **scores, **times, "conditions": MACHINE}


@pytest.fixture
def data_set(monkeypatch):
    """One data set of two draws of K = 2."""
    tasks = tuple(Task("toy", draw, chosen, ("query",)) for draw, chosen in enumerate(draws(NAMES, 2, count=2)))
    chosen = DataSet(Path("toy"), {1: "organ"}, tasks)
    monkeypatch.setattr(label_efficiency, "DATA_SETS", {"toy": lambda: chosen})
    return chosen


def test_draws_are_the_same_every_time_and_differ_from_each_other():
    assert draws(NAMES, 2) == draws(NAMES, 2)
    assert len({name for draw in draws(NAMES, 4) for name in draw}) == 12
    assert all(len(set(draw)) == 8 for draw in draws(NAMES, 8))
    assert [sorted(draw) for draw in draws(NAMES, 16)] == [NAMES]


def test_small_draws_are_part_of_larger_ones():
    for small, large in zip(draws(NAMES, 2), draws(NAMES, 8), strict=True):
        assert large[:2] == small


def test_every_row_has_its_own_key(data_set):
    rows = list(label_efficiency.planned(data_set))
    assert len(rows) == 2 * (3 + 3 * 6)
    assert len({row.key for row in rows}) == len(rows)


def test_what_is_not_trained_has_one_seed_and_others_are_named(data_set):
    task, other = data_set.tasks
    again = replace(data_set, tasks=(task, replace(other, supports=task.supports, seed=1)))
    rows = list(label_efficiency.planned(again))
    assert {row.method for row in rows if row.task.seed} == {"train", "DynUNet", "SegResNet"}
    text = markdown([result(row) for row in rows])
    assert f"draw 0: {', '.join(task.supports)}\n" in text
    assert f"draw 1: {', '.join(task.supports)} (seed 1)\n" in text


def test_the_command_line_chooses_rows(data_set):
    def keys(**choice):
        return [r.key for r in label_efficiency.planned(data_set) if label_efficiency.wanted(r, everything(**choice))]

    assert keys(methods=["learn"]) == ["toy K=2 draw=0 learn 0s", "toy K=2 draw=1 learn 0s"]
    assert keys(methods=["DynUNet"], budgets=[30.0], draws=[1]) == ["toy K=2 draw=1 DynUNet 30s"]
    assert keys(only="draw=1 train 60s") == ["toy K=2 draw=1 train 60s"]
    assert keys(k=[4]) == []


def test_a_second_run_measures_only_what_is_missing(data_set, monkeypatch, tmp_path):
    measured = []

    def stopped_after_three(row, *others):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(row.key)
        return result(row)

    monkeypatch.setattr(label_efficiency, "measure", stopped_after_three)
    with pytest.raises(KeyboardInterrupt):
        label_efficiency.run(everything(budgets=[0, 10]), ResumableTable(tmp_path / "table.json"))
    first = list(measured)
    monkeypatch.setattr(label_efficiency, "measure", lambda row, *_: measured.append(row.key) or result(row))
    table = ResumableTable(tmp_path / "table.json")
    assert list(table.rows) == first
    label_efficiency.run(everything(budgets=[0, 10]), table)
    assert len(measured) == len(set(measured)) == len(table.rows) == 12


def test_no_row_starts_that_would_end_too_late(data_set, monkeypatch, tmp_path):
    monkeypatch.setattr(label_efficiency, "measure", result)
    table = ResumableTable(tmp_path / "table.json")
    label_efficiency.run(everything(methods=["train"], draws=[0], limit_minutes=0.6), table)
    assert [row["budget"] for row in table.rows.values()] == [10, 30]


def test_report_averages_the_draws_and_lists_them(data_set, tmp_path):
    table = ResumableTable(tmp_path / "table.json")
    for row in label_efficiency.planned(data_set):
        table.add(row.key, result(row))
    text = markdown(list(table.rows.values()))
    assert "| toy | 2 | learn | - | 2 | 0.550 (0.500 - 0.600) | - | 0.600 | 3.0 | 4.0 | 1.0 | 7 |" in text
    assert "- A processor, 2 cores, 1 threads, commit abc" in text
    assert f"- toy, K = 2, draw 1: {', '.join(data_set.tasks[1].supports)}" in text
    label_efficiency.report(table, tmp_path / "report")
    assert (tmp_path / "report.md").read_text() == text
    assert (tmp_path / "report_toy.png").read_bytes().startswith(b"\x89PNG")


def test_panels_end_below_the_untrained_methods_and_say_what_is_lower(data_set, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves.Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or Path(path).touch())
    low = {"dice": 0.2}
    rows = [
        {**result(row), **(low if row.method == "DynUNet" and row.budget == 10 else {})}
        for row in label_efficiency.planned(data_set)
    ]
    curves.draw_curves(tmp_path / "curves.png", "toy", rows)
    (panel,) = drawn[0].axes
    assert panel.get_title(loc="left") == "K = 2, first draw"
    assert panel.get_ylim()[0] == pytest.approx(0.34)
    assert [text.get_text() for text in panel.texts] == ["0.20"]
    ends = [line.get_ydata() for line in panel.get_lines() if len(line.get_ydata()) == 6]
    assert ends and all(dice == 0.5 for line in ends for dice in line[1:])
