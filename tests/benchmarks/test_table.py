"""The resumable table: finished rows survive, are skipped, and are not lost to another writer."""

import json

import pytest
from support.table import ResumableTable

from ofl_sam2.errors import InputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table.json"


def test_a_row_is_on_disk_at_once(path):
    table = ResumableTable(path)
    table.add("one", {"dice": 0.5})
    assert json.loads(path.read_text()) == {"rows": {"one": {"dice": 0.5}}}
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_the_next_run_knows_finished_rows(path):
    ResumableTable(path).add("one", {"dice": 0.5})
    again = ResumableTable(path)
    assert "one" in again and "two" not in again
    again.add("two", {"dice": 0.7})
    assert list(ResumableTable(path).rows) == ["one", "two"]


def test_rows_of_another_writer_stay(path):
    first, second = ResumableTable(path), ResumableTable(path)
    first.add("one", {"dice": 0.5})
    second.add("two", {"dice": 0.7})
    assert list(ResumableTable(path).rows) == ["one", "two"]


def test_a_row_that_is_not_json_leaves_the_table_whole(path):
    table = ResumableTable(path)
    table.add("one", {"dice": 0.5})
    with pytest.raises(ValueError):
        table.add("two", {"dice": float("nan")})
    assert list(ResumableTable(path).rows) == ["one"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": 3}'])
def test_a_damaged_table_is_refused_and_kept(path, text):
    path.write_text(text)
    with pytest.raises(InputError, match="no table of results"):
        ResumableTable(path)
    assert path.read_text() == text
