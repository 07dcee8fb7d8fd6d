"""Label efficiency: Dice after so many labelled volumes and so many seconds, ours and networks trained from scratch.

A row is a data set, K labelled volumes, a draw of them, a method and its wall-time budget. Finished rows are in
results/label_efficiency.json at once and are skipped on the next run, so the table (a night or two on two cores) may
be stopped and continued. Run it on an otherwise idle machine; rows say what else was running.

    python benchmarks/label_efficiency.py --datasets hippocampus --k 2 --methods learn train DynUNet --budgets 0 60 300
    python benchmarks/label_efficiency.py --report          # table and pictures of the rows that exist
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import RESULTS, rounded
from support.curves import draw_curves, markdown
from support.outcomes import METHODS, UNTRAINED, fit
from support.peers import PEERS
from support.table import ResumableTable
from support.tasks import DATA_SETS, DataSet, Task
from support.usage import Usage

from ofl_sam2.atomic import atomic_write_text

BUDGETS = (10, 30, 60, 120, 300, 600)
LONG_BUDGET, LONG_TASK = 3000, ("hippocampus", 2, 0)


@dataclass(frozen=True)
class Planned:
    """A row to measure."""

    task: Task
    method: str
    budget: float

    @property
    def key(self) -> str:
        """Identifies the row."""
        return f"{self.task.dataset} K={self.task.shots} draw={self.task.draw} {self.method} {self.budget:g}s"


def planned(data_set: DataSet) -> Iterator[Planned]:
    """All rows of a data set, the short ones of a task first."""
    for task in data_set.tasks:
        if not task.seed:
            yield from (Planned(task, method, 0) for method in UNTRAINED)
        for budget in BUDGETS:
            yield from (Planned(task, method, budget) for method in METHODS if method not in UNTRAINED)
        if (task.dataset, task.shots, task.draw) == LONG_TASK:
            yield from (Planned(task, method, LONG_BUDGET) for method in PEERS)


def wanted(row: Planned, chosen: argparse.Namespace) -> bool:
    """Whether the command line asks for a row."""
    given = (
        (chosen.methods, row.method),
        (chosen.k, row.task.shots),
        (chosen.draws, row.task.draw),
        (chosen.budgets, row.budget),
    )
    return chosen.only in row.key and all(choice is None or value in choice for choice, value in given)


def measure(row: Planned, data_set: DataSet, most_queries: int | None) -> dict[str, Any]:
    """Learn the supports, segment the queries, score; nothing is kept from other rows."""
    supports = [data_set.case(name) for name in row.task.supports]
    queries = [data_set.case(name) for name in row.task.queries[:most_queries]]
    usage = Usage()
    fitted = fit(row.method, row.budget, supports, data_set.structures, row.task.seed)
    started = time.perf_counter()
    predictions = [fitted.segment(case.volume) for case in queries]
    segment_seconds = (time.perf_counter() - started) / len(queries)
    conditions = usage.conditions()
    report = data_set.report(queries, predictions)
    per_structure = {name: rounded(values) for name, values in report.mean_per_structure().items()}
    return {
        "dataset": row.task.dataset,
        "k": row.task.shots,
        "draw": row.task.draw,
        "seed": row.task.seed,
        "method": row.method,
        "budget": row.budget,
        **rounded(report.mean()),
        "seconds": round(fitted.seconds, 2),
        "cpu_seconds": round(fitted.cpu_seconds, 2),
        "steps": fitted.steps,
        "segment_seconds": round(segment_seconds, 2),
        **fitted.details,
        "structures": per_structure,
        "supports": list(row.task.supports),
        "queries": [case.volume.name for case in queries],
        "conditions": conditions,
    }


def run(chosen: argparse.Namespace, table: ResumableTable) -> None:
    """Measure the rows that are asked for and missing, until the time is up."""
    started = time.perf_counter()
    for name in chosen.datasets or DATA_SETS:
        data_set = DATA_SETS[name]()
        missing = [row for row in planned(data_set) if wanted(row, chosen) and row.key not in table]
        print(f"{name}: {len(missing)} rows to measure", flush=True)
        for row in missing:
            if time.perf_counter() - started + row.budget > 60 * chosen.limit_minutes:
                print(f"{chosen.limit_minutes:g} minutes are up; run again to go on.")
                return
            table.add(row.key, measure(row, data_set, chosen.queries))
            result = table.rows[row.key]
            note = result["conditions"].get("note", "")
            print(
                f"{row.key}: Dice {result['dice']}, {result['seconds']} s, {result['steps']} steps {note}", flush=True
            )


def report(table: ResumableTable, stem: Path) -> None:
    """Write the table as Markdown and one picture a data set."""
    rows = list(table.rows.values())
    atomic_write_text(stem.with_suffix(".md"), markdown(rows))
    print(f"-> {stem.with_suffix('.md').name}")
    for name in dict.fromkeys(row["dataset"] for row in rows):
        picture = draw_curves(Path(f"{stem}_{name}.png"), name, [row for row in rows if row["dataset"] == name])
        print(f"-> {picture.name}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="text that a row's key contains, such as 'K=2 draw=0'")
    parser.add_argument("--datasets", nargs="+", choices=DATA_SETS)
    parser.add_argument("--k", nargs="+", type=int, help="numbers of labelled volumes")
    parser.add_argument("--draws", nargs="+", type=int)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=float, help="seconds; 0 for methods without training")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"), help="start no row that ends later")
    parser.add_argument(
        "--queries", type=int, help="score on the first N only, in a file of its own: to try things out"
    )
    parser.add_argument("--report", action="store_true", help="only write table and pictures of the rows that exist")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    stem = RESULTS / (f"label_efficiency_{chosen.queries}_queries" if chosen.queries else "label_efficiency")
    table = ResumableTable(stem.with_suffix(".json"))
    if not chosen.report:
        run(chosen, table)
    if table.rows:
        report(table, stem)


if __name__ == "__main__":
    main()
