"""Seconds and memory of nano on one hippocampus-sized task: learn, first and second segmentation; medians of five."""

import statistics
import time

from support import HIPPOCAMPUS, data_folder, labelled, nano, splits, write

from ofl_sam2.console import peak_memory_gb

REPEATS = 5


def main() -> None:
    folder, split = data_folder("msd_hippocampus"), splits()
    support = [labelled(folder, name) for name in split["dev_shots"][:2]]
    volume = labelled(folder, split["dev_val"][0]).volume
    learn, first, second = [], [], []
    for _ in range(REPEATS):
        segmenter = nano()
        started = time.perf_counter()
        segmenter.learn(support, HIPPOCAMPUS)
        learn.append(time.perf_counter() - started)
        slices = len(segmenter.stack(volume))
        first.append(segmenter.segment(volume).seconds / slices)
        second.append(segmenter.segment(volume).seconds / slices)
    write(
        "speed",
        {
            "learn_two_volumes_seconds": round(statistics.median(learn), 2),
            "segment_seconds_per_slice": round(statistics.median(first), 4),
            "segment_again_seconds_per_slice": round(statistics.median(second), 4),
            "again_over_first": round(statistics.median(b / a for a, b in zip(first, second, strict=True)), 3),
            "structures": len(HIPPOCAMPUS),
            "peak_memory_gb": round(peak_memory_gb(), 2),
        },
    )


if __name__ == "__main__":
    main()
