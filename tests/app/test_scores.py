from pathlib import Path

from lib.scores import Score, Scores


def test_scores_are_shared_through_the_file(tmp_path: Path) -> None:
    Scores(tmp_path / "scores.json").put("a", Score(0.5, 1))
    assert Scores(tmp_path / "scores.json").read() == {"a": Score(0.5, 1)}


def test_newer_snapshot_wins(tmp_path: Path) -> None:
    scores = Scores(tmp_path / "scores.json")
    scores.put("a", Score(0.5, 2))
    scores.put("a", Score(0.9, 1))
    assert scores.read()["a"] == Score(0.5, 2)
    scores.put("a", Score(0.7, 3))
    assert scores.read()["a"] == Score(0.7, 3)


def test_scores_of_snapshots_that_were_taken_back_are_dropped(tmp_path: Path) -> None:
    scores = Scores(tmp_path / "scores.json")
    for version, image in enumerate("abc"):
        scores.put(image, Score(0.5, version))
    scores.forget_newer(1)
    assert set(scores.read()) == {"a", "b"}


def test_damaged_file_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"a": {"quality"')
    scores = Scores(tmp_path / "scores.json")
    assert scores.read() == {}
    scores.put("b", Score(0.1, 1))
    assert set(scores.read()) == {"b"}
