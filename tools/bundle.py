"""Write dist/ofl_sam2_v<version>.zip, which unpacks to `ofl_sam2/`, and its sha256; the same files give the same bytes.

The example model the bundle ships is made anew where it no longer fits the shipped weights, or with `--example`.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ofl_sam2 import __version__
from ofl_sam2.atomic import atomic_path, atomic_write_text
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.dataset import LabelledCase, find_cases, load_case
from ofl_sam2.learner.few_shot import FewShotLearner
from ofl_sam2.learner.load import learner_bytes, shipped_learner
from ofl_sam2.model_index import is_model, read_index
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.store import save_model
from ofl_sam2.training.cohort import STRUCTURES, write_cohort

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"
EXAMPLES, EXAMPLE_MODEL, STATE = BUNDLE / "examples", BUNDLE / "models" / "example", BUNDLE / "models" / "model.pt"
SHIPPED = ("LICENSE", "large_files.yml", "configs/*", "docs/*", "examples/*/*", "models/model.pt", "models/example/*")
CODE = ("ofl_sam2/**/*.py", "ofl_sam2/weights/*")
SEED, LABELLED_SLICES = 3, 6
OLDEST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def pack(bundle: Path, target: Path) -> str:
    """Write what the bundle needs at run time to an uncompressed archive; return its sha256."""
    files = sorted({path for pattern in (*SHIPPED, *CODE) for path in bundle.glob(pattern) if path.is_file()})
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(f"ofl_sam2/{path.relative_to(bundle).as_posix()}", OLDEST_ZIP_DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    atomic_write_text(target.with_name(f"{target.name}.sha256"), f"{digest}  {target.name}\n")
    return digest


def check_versions(bundle: Path, changelog: Path) -> None:
    """Stop where metadata, its changelog, the package and CHANGELOG.md do not name one version."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog.read_text(), re.MULTILINE)
    found = {
        "metadata.json": metadata["version"],
        "its changelog": next(iter(metadata["changelog"])),
        "CHANGELOG.md": newest.group(1) if newest else None,
    }
    if set(found.values()) != {__version__}:
        raise SystemExit(f"The package has version {__version__}, but {found}. Name one version everywhere.")


def example_is_current() -> bool:
    """Whether the example model was learned with the shipped weights, and `model.pt` is its state."""
    backbone = load_backbone("nano")
    learner = shipped_learner("nano", backbone.width)
    if not (is_model(EXAMPLE_MODEL) and STATE.is_file()):
        return False
    index, state = read_index(EXAMPLE_MODEL), torch.load(STATE, weights_only=True)
    same_learner = index.learner.sha256 == hashlib.sha256(learner_bytes(learner)).hexdigest()
    same_backbone = index.backbone_hash == VolumeSegmenter(backbone, learner).backbone_hash
    return same_learner and same_backbone and same_state(state, network_state(learner))


def network_state(learner: FewShotLearner) -> dict[str, Tensor]:
    """The state of the network MONAI sees: learner and fusion."""
    return {f"learner.{name}": value for name, value in learner.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states hold the same tensors under the same names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_example() -> None:
    """Draw two synthetic patients, learn some slices of the first, and write what is learned as the shipped model."""
    names = write_cohort(EXAMPLES, 2, SEED)
    first = next(case for case in find_cases(EXAMPLES / "images", EXAMPLES / "labels") if case.name == names[0])
    backbone = load_backbone("nano")
    segmenter = VolumeSegmenter(backbone, shipped_learner("nano", backbone.width))
    segmenter.learn([thinned(load_case(first))], STRUCTURES)
    save_model(segmenter, EXAMPLE_MODEL, {"example": "synthetic anatomy, no image of a person or an animal"})
    with atomic_path(STATE) as temporary:
        torch.save(network_state(segmenter.learner), temporary)


def thinned(case: LabelledCase) -> LabelledCase:
    """The case with only some evenly spread slices labelled, to keep the model small."""
    depth = case.labels.shape[2]
    slices = tuple(depth * i // LABELLED_SLICES + depth // (2 * LABELLED_SLICES) for i in range(LABELLED_SLICES))
    return dataclasses.replace(case, labelled_slices=slices)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", action="store_true", help="make the example model anew in any case")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the archive")
    arguments = parser.parse_args()
    check_versions(BUNDLE, ROOT / "CHANGELOG.md")
    if arguments.example or not example_is_current():
        make_example()
    target = arguments.output / f"ofl_sam2_v{__version__}.zip"
    digest = pack(BUNDLE, target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, sha256 {digest}")


if __name__ == "__main__":
    main()
