"""What the benchmarks share: data, machine, scoring, results as JSON."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ofl_sam2 import __version__
from ofl_sam2.atomic import atomic_write_text
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.dataset import Case, LabelledCase, load_case
from ofl_sam2.evaluation import CaseScore, Report
from ofl_sam2.learner.load import shipped_learner
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.metrics import score
from ofl_sam2.segmenter import Segmentation, VolumeSegmenter

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HIPPOCAMPUS = {1: "anterior", 2: "posterior"}


def data_folder(name: str) -> Path:
    """Folder of a real data set; ends the script with a message where it is absent."""
    folder = Path(os.environ.get("OFL_SAM2_DATA", ROOT.parent / "shared" / "data")) / name
    if not folder.is_dir():
        print(f"{folder} is absent: set OFL_SAM2_DATA to run this benchmark.")
        sys.exit(0)
    return folder


def splits() -> dict[str, list[str]]:
    return json.loads((data_folder("msd_hippocampus") / "splits.json").read_text())


def labelled(folder: Path, name: str, **options: Any) -> LabelledCase:
    return load_case(Case(name, folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"), **options)


def nano(cache_bytes: int = 2 << 30) -> VolumeSegmenter:
    """A segmenter on nano with its shipped learner and features cached in memory."""
    backbone = load_backbone("nano")
    cache = FeatureCache(None, max_bytes=cache_bytes, memory_bytes=cache_bytes)
    return VolumeSegmenter(backbone, shipped_learner("nano", backbone.width), cache=cache)


def score_case(case: LabelledCase, result: Segmentation, slices: tuple[int, list[int]] | None = None) -> CaseScore:
    names = result.structures
    return CaseScore(case.volume.name, score(result.labels, case.labels, case.volume.spacing, names, slices=slices))


def evaluate(segmenter: VolumeSegmenter, cases: list[LabelledCase]) -> tuple[Report, list[Segmentation]]:
    results = [segmenter.segment(case.volume) for case in cases]
    return Report(tuple(score_case(*pair) for pair in zip(cases, results, strict=True))), results


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "version": __version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def write(name: str, content: dict[str, Any]) -> None:
    """Write results/NAME.json with the machine and the commit."""
    path = RESULTS / f"{name}.json"
    atomic_write_text(path, json.dumps({"machine": machine(), **content}, indent=1, default=float) + "\n")
    print(f"-> {path.relative_to(ROOT)}")


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(float(value), 4) if np.isfinite(value) else None for key, value in values.items()}
