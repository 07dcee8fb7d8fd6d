"""kill -9 at any moment while labels are saved, replaced and deleted: every acknowledged label is there afterwards."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ofl_sam2.files import read_labels
from ofl_sam2.service.journal import LabelJournal
from ofl_sam2.service.label_files import content_sha256

APP_DIR = Path(__file__).resolve().parents[2] / "apps" / "ofl_sam2"
IMAGES = ("a", "b", "c")

# Imports once, then forks a writer for each seed that it reads.
WRITERS = """
import os, random, sys
from pathlib import Path
app, bundle, root = sys.argv[1:]
sys.path[:0] = [app, bundle]
import nibabel as nib
import numpy as np
from lib.datastores.local import JournaledLocalDatastore
from ofl_sam2.service.journal import LabelJournal
from ofl_sam2.service.label_files import content_sha256

def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())  # in one piece, or not at all

def write(root, seed):
    dice = random.Random(seed)
    store = JournaledLocalDatastore(root / "studies", LabelJournal(root / "journal"))
    store.reconcile()
    store.watch()
    say("ready", str(os.getpid()))
    while True:
        image = dice.choice("abc")
        upload = root / f"upload{dice.choice(['.nii.gz', '.nii'])}"
        voxels = np.random.default_rng(dice.getrandbits(32)).integers(0, 3, (24, 24, 8), np.uint8)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), upload)
        delete = image in store.get_labeled_images() and dice.random() < 0.2
        content = "deleted" if delete else content_sha256(upload)
        say("begin", image, content)
        if delete:
            store.remove_label(image, "final")
        else:
            store.save_label(image, str(upload), "final", {"label_info": [{"name": "x", "idx": 1}]})
        say("done", image, content)

for seed in sys.stdin:
    writer = os.fork()
    if writer == 0:
        write(Path(root), int(seed))
    os.waitpid(writer, 0)
    say("dead")
"""


@contextmanager
def writers(root: Path) -> Iterator[Callable[[int, float], list[list[str]]]]:
    """Start writers and kill them: `kill(seed, seconds)` returns what one said, killed `seconds` after it was ready."""
    command = [sys.executable, "-c", WRITERS, str(APP_DIR), str(APP_DIR.parents[1] / "bundle"), str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        said = map(str.split, process.stdout)

        def kill(seed: int, seconds: float) -> list[list[str]]:
            print(seed, file=process.stdin, flush=True)
            word, pid = next(said)
            assert word == "ready"
            time.sleep(seconds)
            os.kill(int(pid), signal.SIGKILL)
            return list(takewhile(lambda words: words != ["dead"], said))

        try:
            yield kill
        finally:
            process.stdin.close()


def allowed(said: list[list[str]], before: dict[str, str]) -> dict[str, set[str]]:
    """For each image the contents it may have: the last one acknowledged, or the one that was under way."""
    states = {image: {before.get(image, "deleted")} for image in IMAGES}
    for word, image, content in said:
        states[image] = states[image] | {content} if word == "begin" else {content}
    return states


def state(root: Path) -> dict[str, str]:
    """Start as a server does; the content of each label, the same in studies, list and journal, and of no other."""
    sys.path.insert(0, str(APP_DIR))
    try:
        from lib.datastores.local import JournaledLocalDatastore
    finally:
        sys.path.remove(str(APP_DIR))
    journal = LabelJournal(root / "journal")
    store = JournaledLocalDatastore(root / "studies", journal)
    store.reconcile()
    assert json.loads((root / "studies" / "datastore_v2.json").read_text()) == store.json()
    assert store.list_images() == list(IMAGES) and journal.pending() == []
    contents = {}
    for image in store.get_labeled_images():
        path = Path(store.get_label_uri(image, "final"))
        contents[image] = content_sha256(path)
        assert read_labels(path).grid == (24, 24, 8)
        assert store.get_label_info(image, "final")["label_info"] == [{"name": "x", "idx": 1}]
    assert {image: event.sha256 for (image, _), event in journal.latest().items()} == contents
    journal.prune()
    kept = {path.name for path in (root / "journal" / "blobs").iterdir()}
    assert kept == {journal.blob(event).name for event in journal.latest().values()}
    return contents


def run(root: Path, rounds: int, seed: int) -> int:
    """Kill `rounds` writers one after the other; how many saves and deletions were acknowledged."""
    (root / "studies").mkdir(parents=True)
    for image in IMAGES:
        nib.save(nib.Nifti1Image(np.zeros((24, 24, 8), np.uint8), np.eye(4)), root / "studies" / f"{image}.nii.gz")
    dice, acknowledged, contents = random.Random(seed), 0, {}
    with writers(root) as kill:
        for number in range(rounds):
            said = kill(number, dice.uniform(0, 1))
            expected, contents = allowed(said, contents), state(root)
            lost = [image for image in IMAGES if contents.get(image, "deleted") not in expected[image]]
            assert not lost, f"round {number}: the labels of {lost} were lost"
            assert state(root) == contents
            acknowledged += sum(word == "done" for word, *_ in said)
    return acknowledged


def test_five_kills_lose_no_label(tmp_path):
    assert run(tmp_path, rounds=5, seed=0) > 0


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_twenty_kills_lose_no_label(tmp_path):
    assert run(tmp_path, rounds=20, seed=1) > 20
