"""Cine MR of the heart, nano: learn on one patient, segment the other; and one cine sequence from a single frame."""

import argparse
import json
from dataclasses import replace

from support import RESULTS, data_folder, labelled, nano, rounded, score_case, write
from support.tasks import only_slices

from ofl_sam2.dataset import Case, load_case
from ofl_sam2.overlay import Overlay, case_overlay
from ofl_sam2.training.settings import TrainingSettings
from ofl_sam2.training.trainer import train

STRUCTURES = {1: "LV cavity", 2: "myocardium"}


def main(minutes: float) -> None:
    folder = data_folder("sunnybrook_cine")
    listed = json.loads((folder / "cases.json").read_text())
    content: dict = {"training_minutes": minutes, "dice": {}}
    for source, target in (("SC-HF-I-1", "SC-HF-I-2"), ("SC-HF-I-2", "SC-HF-I-1")):
        support = only_slices(labelled(folder, f"{source}_ED"), listed[source]["ed_slices"])
        query = labelled(folder, f"{target}_ED")
        segmenter = nano()
        segmenter.learn([support], STRUCTURES)
        for stage in ("learn", f"train {minutes:g} min"):
            if stage != "learn":
                train(segmenter, [support], TrainingSettings(minutes=minutes))
            result = segmenter.segment(query.volume)
            scores = score_case(query, result, slices=(2, listed[target]["ed_slices"])).scores
            content["dice"][f"{source} -> {target}, {stage}"] = rounded({k: v["dice"] for k, v in scores.items()})
            print(source, target, stage, content["dice"][f"{source} -> {target}, {stage}"], flush=True)
        overlay = Overlay(
            query.volume, result.labels, STRUCTURES, query.labels, axis=segmenter.stack(query.volume).axis
        )
        case_overlay(RESULTS / f"sunnybrook_{target}.png", overlay, f"{target}, learned from {source} only")
    content["cine"] = {name: cine(folder, name) for name in ("SC-HF-I-1_slice05", "SC-HF-I-2_slice05")}
    write("sunnybrook", content)


def cine(folder, name: str) -> dict:
    """Learn from the ED frame, segment all frames, score the ES frame."""
    frames = json.loads((folder / "sequences" / "manifest.json").read_text())[name]
    sequence = folder / "sequences" / name
    case = load_case(Case(name, sequence / "frames", sequence / "masks"))
    segmenter = nano()
    segmenter.learn([replace(case, labelled_slices=(frames["ed"],))], {1: "LV cavity"})
    result = segmenter.segment(case.volume)
    dice = score_case(case, result, slices=(2, [frames["es"]])).scores["LV cavity"]["dice"]
    picture = Overlay(case.volume, result.labels, {1: "LV cavity"})
    case_overlay(RESULTS / f"cine_{name}.png", picture, f"{name}: all frames from the label of frame {frames['ed']}")
    print(name, dice, flush=True)
    return {"learned_frame": frames["ed"], "scored_frame": frames["es"], "dice": round(dice, 4)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    main(**vars(parser.parse_args()))
