"""Memory against length: 512 x 512 x n volumes with a disk cache; resident memory beyond image and label."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from support import RESULTS, nano, write

from ofl_sam2.dataset import LabelledCase
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.overlay import curve
from ofl_sam2.volume import Volume

LENGTHS = (20, 75, 150, 300)


def measure(length: int) -> None:
    """Print the largest resident memory beyond the arrays, in MB, sampled after each slice."""
    rng = np.random.default_rng(0)
    small = phantom(rng, 64, 12)
    segmenter = nano()
    segmenter.learn([LabelledCase(small, (small.voxels > 600).astype(np.uint8), (1,))], {1: "object"})
    volume = phantom(rng, 512, length)
    process, most = psutil.Process(), 0
    with tempfile.TemporaryDirectory() as folder:
        segmenter.cache = FeatureCache(Path(folder), max_bytes=4 << 30, memory_bytes=4 << 20)
        arrays = volume.voxels.nbytes + volume.voxels.size

        def sample(done: int, total: int) -> None:
            nonlocal most
            most = max(most, process.memory_info().rss - arrays)

        segmenter.segment(volume, progress=sample)
    print(most / 1e6)


def phantom(rng: np.random.Generator, side: int, length: int) -> Volume:
    """A bright cylinder in noise, int16."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    plane = np.where(x**2 + y**2 < 0.05, 1000, 200)
    voxels = np.empty((side, side, length), np.int16)
    for index in range(length):
        voxels[:, :, index] = plane + rng.normal(0, 40, plane.shape)
    return Volume(voxels, np.diag([1.0, 1.0, 1.0, 1.0]), f"phantom_{side}_{length}")


def main() -> None:
    memory = {}
    for length in LENGTHS:
        output = subprocess.run([sys.executable, __file__, str(length)], capture_output=True, text=True, check=True)
        memory[length] = round(float(output.stdout.split()[-1]), 1)
        print(length, "slices:", memory[length], "MB beyond image and label", flush=True)
    curve(
        RESULTS / "long_volume.png",
        {"nano": (list(memory), list(memory.values()))},
        "slices of 512 x 512",
        "MB beyond image and label",
        "Memory while segmenting",
    )
    write("long_volume", {"mb_beyond_image_and_label": memory})


if __name__ == "__main__":
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
