"""The ablation table: what it changes, and what it writes."""

from ablations import ABLATIONS, BASE, report

from ofl_sam2.settings import Settings


def test_every_ablation_changes_the_default():
    changed = {name: Settings(**{"side_views": False, **changes}) for name, changes in ABLATIONS.items()}
    base = changed.pop(BASE)
    assert base == Settings(side_views=False)
    assert base not in changed.values()
    assert len(set(changed.values())) == len(changed)


def test_the_table_gives_the_difference_to_the_default(tmp_path):
    rows = {
        BASE: {"weights": "new", "dice": 0.7, "folds": [0.6, 0.8]},
        "no online update": {"weights": "new", "dice": 0.65, "folds": [0.5, 0.8]},
        "no smoothing": {"weights": "old", "dice": 0.6, "folds": [0.5, 0.7]},
    }
    report(rows, tmp_path / "ablations")
    table = (tmp_path / "ablations.md").read_text()
    assert "| no online update | 0.650 | -0.050 | -0.100 - +0.000 |" in table
    assert "no smoothing" not in table
    assert (tmp_path / "ablations.png").stat().st_size > 1000
