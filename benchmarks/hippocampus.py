"""Hippocampus MR, nano: learn from the first dev_shots, score on dev_val. Memory only, learn, ablations, train."""

import argparse
import time

from scipy.stats import spearmanr
from support import HIPPOCAMPUS, RESULTS, data_folder, evaluate, labelled, nano, rounded, splits, write

from ofl_sam2.overlay import Overlay, summary_figure
from ofl_sam2.segmenter import with_settings
from ofl_sam2.training.settings import TrainingSettings
from ofl_sam2.training.trainer import train

ABLATIONS = {
    "memory only": {"online_branch": False},
    "learn": {},
    "learn, one view": {"side_views": False},
}


def main(shots: int, minutes: float) -> None:
    folder, split = data_folder("msd_hippocampus"), splits()
    support = [labelled(folder, name) for name in split["dev_shots"][:shots]]
    cases = [labelled(folder, name) for name in split["dev_val"]]
    segmenter = nano()
    started = time.perf_counter()
    segmenter.learn(support, HIPPOCAMPUS)
    learn_seconds = time.perf_counter() - started
    rows = {}
    for name, changes in ABLATIONS.items():
        rows[name] = row(*evaluate(with_settings(segmenter, **changes), cases))
        print(name, rows[name]["mean"], flush=True)
    trained = train(segmenter, support, TrainingSettings(minutes=minutes))
    report, results = evaluate(segmenter, cases)
    rows[f"train {minutes:g} min"] = row(report, results)
    print(f"train {minutes:g} min", report.mean(), flush=True)
    overlays = {
        case.volume.name: Overlay(case.volume, result.labels, HIPPOCAMPUS, case.labels)
        for case, result in zip(cases, results, strict=True)
    }
    summary_figure(RESULTS / f"hippocampus_{shots}.png", report, overlays.__getitem__)
    write(
        f"hippocampus_{shots}",
        {
            "learned_from": split["dev_shots"][:shots],
            "scored_on": f"{len(cases)} dev_val cases",
            "learn_seconds": round(learn_seconds, 2),
            "epochs": len(trained.reports),
            "losses": [round(entry.loss, 4) for entry in trained.reports],
            "held_out_dice": [trained.dice_before, trained.dice_after],
            "trained_parameters_kept": trained.improved,
            "dice": rows,
        },
    )


def row(report, results) -> dict:
    per_structure = {name: values["dice"] for name, values in report.mean_per_structure().items()}
    slices = sum(len(result.confidence) for result in results)
    seconds = sum(result.seconds for result in results)
    quality = [sum(result.quality.values()) for result in results]
    dice = [sum(values["dice"] for values in scores.scores.values()) for scores in report.cases]
    return {
        **rounded(per_structure),
        "mean": round(report.mean()["dice"], 4),
        "rank_correlation_of_quality_and_dice": round(float(spearmanr(quality, dice).statistic), 3),
        "seconds_per_slice": round(seconds / slices, 4),
        "seconds_per_volume": round(seconds / len(results), 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5.0)
    main(**vars(parser.parse_args()))
