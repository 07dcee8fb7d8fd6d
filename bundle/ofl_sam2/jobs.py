"""What the commands do, as functions: open a model, learn, train, segment, pretrain."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from safetensors.torch import save_file
from tqdm import tqdm

from ofl_sam2.atomic import atomic_path
from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.console import err, progress
from ofl_sam2.dataset import Case, LabelledCase, find_cases, load_case, parse_structures
from ofl_sam2.errors import Cancelled, InputError, ModelError, OFLError
from ofl_sam2.files import case_name, image_suffix, read_volume, write_labels
from ofl_sam2.frames import frame_files
from ofl_sam2.learner.load import learner_bytes, shipped_learner
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.progress import CancelToken, Progress
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.store import is_model, load_model, read_index, save_model
from ofl_sam2.training.trainer import EpochReport, TrainingSettings, train

CACHE_BYTES = 4 << 30
CHECKPOINT = "training.pt"


def default_cache(folder: Path | None = None) -> FeatureCache:
    """Frozen features on disk: in `folder`, else OFL_SAM2_CACHE, else the user's cache folder; at most 4 GiB."""
    chosen = folder or os.environ.get("OFL_SAM2_CACHE") or user_cache_path("ofl_sam2") / "features"
    return FeatureCache(Path(chosen), max_bytes=CACHE_BYTES, memory_bytes=128 << 20)


def open_segmenter(
    model: Path,
    backbone: str,
    image_size: int | None = None,
    device: str = "cpu",
    cache_dir: Path | None = None,
    fresh: bool = False,
) -> VolumeSegmenter:
    """The saved model of a folder, or a new one.

    Raises:
        ModelError: the folder holds a model of another backbone.
    """
    cache = default_cache(cache_dir)
    if is_model(model) and not fresh:
        saved = read_index(model).get("backbone", {})
        wanted = {"name": backbone, "image_size": image_size or saved.get("image_size")}
        if any(saved.get(key) != value for key, value in wanted.items()):
            raise ModelError(
                f"{model} was learned with {saved.get('name')} at {saved.get('image_size')} pixels, not with {backbone} at "
                f"{wanted['image_size']}. Choose another --model folder, or give --fresh to replace it."
            )
        return load_model(model, device, cache)
    frozen = load_backbone(backbone, image_size, device)
    return VolumeSegmenter(frozen, shipped_learner(backbone, frozen.width).to(device), cache=cache)


def learn_cases(
    segmenter: VolumeSegmenter,
    images: Path,
    labels: Path,
    model: Path,
    cases: Sequence[str] | None,
    structures: str | None,
    ignore_empty_slices: bool,
    cancel: CancelToken,
) -> dict[str, Any]:
    """Put labelled volumes into the pool, solve, and save the model."""
    chosen = _labelled(images, labels, cases)
    names = parse_structures(structures) if structures else None
    with progress("learn", unit="case") as done:
        segmenter.learn(_counted(_load(chosen, segmenter, ignore_empty_slices), len(chosen), done), names, cancel=cancel)
    save_model(segmenter, model, _notes(model))
    return {
        "model": str(model),
        "backbone": segmenter.backbone.config.name,
        "cases": [case.name for case in chosen],
        "slices": len(segmenter.pool),
        "structures": segmenter.structures,
        "fitted": segmenter.learner.fitted,
    }


def train_cases(
    segmenter: VolumeSegmenter,
    images: Path,
    labels: Path,
    model: Path,
    cases: Sequence[str],
    settings: TrainingSettings,
    ignore_empty_slices: bool,
    cancel: CancelToken,
) -> list[EpochReport]:
    """Fit learner and fusion on cases that were learned, and save the model."""
    loaded = list(_load(_labelled(images, labels, cases), segmenter, ignore_empty_slices))
    with progress("encode augmented copies") as encoded, progress("train", unit="%") as trained:
        reports = train(
            segmenter,
            loaded,
            settings,
            model / CHECKPOINT,
            lambda report: trained(round(100 * report.share), 100),
            encoded,
            cancel,
        )
    seconds = reports[-1].seconds if reports else 0.0
    save_model(segmenter, model, {"trained_seconds": round(seconds, 1), "trained_on": list(cases)})
    return reports


def segment_images(
    model: Path,
    images: Sequence[Path],
    output: Path,
    resume: bool,
    device: str = "cpu",
    cache_dir: Path | None = None,
    cancel: CancelToken | None = None,
) -> dict[str, dict[str, Any]]:
    """Segment images and write a label map each; a bad image does not keep the others from being done.

    Returns:
        Case name -> path, quality, volumes and seconds.

    Raises:
        InputError: two images of one name, or images that could not be segmented; all the others are finished then.
    """
    targets = _targets(images, output)
    segmenter = load_model(model, device, default_cache(cache_dir))
    results: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    for name, (image, target) in targets.items():
        if resume and target.exists():
            err.print(f"{name}: {target} is there already, skipped.")
            continue
        try:
            volume = read_volume(image)
            with progress(name) as done:
                result = segmenter.segment(volume, done, cancel)
            write_labels(target, result.labels, volume)
        except Cancelled:
            raise
        except OFLError as error:
            failures.append(f"{name}: {error}")
            continue
        results[name] = {"labels": str(target), **result.summary()}
        quality = ", ".join(f"{structure} {value:.2f}" for structure, value in result.quality.items())
        err.print(f"{name}: {result.seconds:.1f} s, estimated quality {quality}", soft_wrap=True)
    if failures:
        raise InputError(f"{len(failures)} of {len(targets)} images were not segmented. " + " ".join(failures))
    return results


def pretrain_nano(
    output: Path, minutes: float, device: str, resume: Path | None, seed: int, cancel: CancelToken
) -> int:
    """Pretrain nano and write its weights, the learner's beside them, and a checkpoint; return the number of steps."""
    from ofl_sam2.training.pretraining import PretrainingState, pretrain

    state = PretrainingState.load(resume) if resume else PretrainingState.fresh(seed)
    checkpoint = output.with_suffix(".checkpoint.pt")
    with tqdm(desc="pretrain", unit="step") as bar:
        for report in pretrain(state, checkpoint, minutes, device, seed, cancel=cancel):
            bar.set_postfix(stage=report.stage, loss=f"{report.loss:.3f}")
            bar.update()
    weights = state.average["backbone"].sam2.state_dict()
    with atomic_path(output) as temporary:
        save_file({name: tensor.half().cpu().contiguous() for name, tensor in weights.items()}, temporary)
    with atomic_path(output.with_name(f"{output.stem}_learner.safetensors")) as temporary:
        temporary.write_bytes(learner_bytes(state.average["learner"]))
    return state.step


def _labelled(images: Path, labels: Path, names: Sequence[str] | None) -> list[Case]:
    """Cases that have a label."""
    cases = [case for case in find_cases(images, labels, names) if case.label is not None]
    if not cases:
        raise InputError(f"{labels} holds no label of an image in {images}. A label has the name of its image.")
    return cases


def _load(cases: Iterable[Case], segmenter: VolumeSegmenter, ignore_empty_slices: bool) -> Iterator[LabelledCase]:
    for case in cases:
        yield load_case(case, ignore_empty_slices=ignore_empty_slices, axis=segmenter.axis)


def _counted(cases: Iterator[LabelledCase], total: int, done: Progress) -> Iterator[LabelledCase]:
    for number, case in enumerate(cases):
        yield case
        done(number + 1, total)


def _notes(model: Path) -> dict[str, Any]:
    """Notes of the model that is there, which `learn` keeps."""
    return read_index(model)["notes"] if is_model(model) else {}


def _targets(images: Sequence[Path], output: Path) -> dict[str, tuple[Path, Path]]:
    """Case name -> image and the file its label map goes to."""
    targets: dict[str, tuple[Path, Path]] = {}
    for image in images:
        name = case_name(image)
        if name in targets:
            raise InputError(f"{image} and {targets[name][0]} have the same name. Segment them into different folders.")
        is_frames = image.is_dir() and bool(frame_files(image))
        suffix = "" if is_frames else image_suffix(image) if image_suffix(image) in (".nrrd", ".mha") else ".nii.gz"
        targets[name] = (image, output / f"{name}{suffix}")
    return targets
