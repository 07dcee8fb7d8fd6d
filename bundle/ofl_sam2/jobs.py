"""What the commands do, as functions: open a model, learn, train, segment."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from ofl_sam2.backbone.load import load_backbone
from ofl_sam2.console import err, progress
from ofl_sam2.dataset import Case, LabelledCase, LazyCases, find_cases, labelled_cases, load_case, parse_structures
from ofl_sam2.errors import InputError, ModelError
from ofl_sam2.files import case_name, image_suffix, is_image, is_sequence, read_volume, write_labels
from ofl_sam2.intensity import parse_window
from ofl_sam2.learner.load import shipped_learner
from ofl_sam2.memory.cache import FeatureCache
from ofl_sam2.model_index import is_model, read_index
from ofl_sam2.progress import CancelToken, Progress
from ofl_sam2.segmenter import VolumeSegmenter
from ofl_sam2.settings import Settings
from ofl_sam2.store import load_model, save_model
from ofl_sam2.training.settings import TrainingResult, TrainingSettings
from ofl_sam2.training.trainer import train

CACHE_BYTES = 4 << 30
CHECKPOINT = "training.pt"
DEFAULT_BACKBONE = "nano"


def default_cache(folder: Path | None = None) -> FeatureCache:
    """Frozen features on disk: in `folder`, else OFL_SAM2_CACHE, else the user's cache folder; at most 4 GiB."""
    chosen = folder or os.environ.get("OFL_SAM2_CACHE") or user_cache_path("ofl_sam2") / "features"
    return FeatureCache(Path(chosen), max_bytes=CACHE_BYTES, memory_bytes=128 << 20)


def open_segmenter(
    model: Path,
    backbone: str | None = None,
    image_size: int | None = None,
    device: str = "cpu",
    cache_dir: Path | None = None,
    fresh: bool = False,
    ct_window: str | None = None,
) -> VolumeSegmenter:
    """The saved model of a folder, or a new one.

    Args:
        model: folder of the model.
        backbone: default that of the saved model, nano for a new one.
        image_size: input side in pixels; default that of the saved model, by backbone for a new one.
        device: "cpu" or "cuda".
        cache_dir: see `default_cache`.
        fresh: start anew even if the folder holds a model.
        ct_window: lowest and highest HU, such as "-1000,400"; default that of the saved model, by the first labels for
            a new one.

    Raises:
        ModelError: the folder holds a damaged model, or one of another backbone, input size or window.
        InputError: unknown backbone, impossible size, window or device.
        WeightsError: the backbone's weights are not here.
    """
    check_device(device)
    window = parse_window(ct_window) if ct_window else None
    cache = default_cache(cache_dir)
    if is_model(model) and not fresh:
        saved = read_index(model)
        wanted = backbone or saved.backbone, image_size or saved.image_size
        if wanted != (saved.backbone, saved.image_size):
            raise ModelError(
                f"{model} was learned with {saved.backbone} at {saved.image_size} pixels, not with {wanted[0]} at "
                f"{wanted[1]}. Choose another --model folder, or give --fresh to replace it."
            )
        if window and window != saved.settings.ct_window:
            raise ModelError(
                f"{model} was learned with the CT window {saved.settings.ct_window}, not with {window}. "
                "Choose another --model folder, or give --fresh to replace it."
            )
        return load_model(model, device, cache)
    name = backbone or DEFAULT_BACKBONE
    frozen = load_backbone(name, image_size, device)
    settings = Settings(ct_window=window)
    return VolumeSegmenter(frozen, shipped_learner(name, frozen.width).to(device), settings, cache)


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        InputError: neither "cpu" nor a CUDA device of this machine.
    """
    try:
        torch.zeros(1, device=device if device.startswith(("cpu", "cuda")) else "unknown")
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"The device '{device}' cannot be used here. Choose cpu, or cuda on a machine with it."
        ) from error


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
    """Put labelled volumes into the pool, solve, and save the model.

    Returns:
        What was learned, for a JSON report.
    """
    chosen = labelled_cases(images, labels, cases)
    notes = read_index(model).notes if is_model(model) and len(segmenter.pool) else {}
    names = parse_structures(structures) if structures else None
    with progress("learn", unit="case") as done:
        loaded = _counted(_load(chosen, ignore_empty_slices), len(chosen), done)
        segmenter.learn(loaded, names, cancel=cancel)
    save_model(segmenter, model, notes)
    return {
        "model": str(model),
        "backbone": segmenter.backbone.config.name,
        "cases": [case.name for case in chosen],
        "pool": list(segmenter.pool.cases),
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
) -> TrainingResult:
    """Fit learner and fusion on cases that were learned, and save the model.

    Raises:
        Cancelled: stopped by `cancel`; what was fitted until then is saved.
    """
    loaded, chosen = LazyCases(), labelled_cases(images, labels, cases)
    for case, labelled in zip(chosen, _load(chosen, ignore_empty_slices), strict=True):
        loaded.add(labelled, partial(read_volume, case.image))
    with progress("encode augmented copies") as encoded, progress("train", unit="%") as trained:
        result = train(
            segmenter,
            loaded,
            settings,
            model / CHECKPOINT,
            lambda report: trained(round(100 * report.share), 100),
            encoded,
            cancel,
            fitted=read_index(model).notes.get("trained_on", ()),
        )
    seconds = result.reports[-1].seconds if result.reports else 0.0
    finished = {} if cancel.cancelled else {"trained_on": list(cases)}
    save_model(segmenter, model, {"trained_seconds": round(seconds, 1), **finished})
    cancel.check()
    return result


def segment_images(
    model: Path,
    images: Sequence[Path],
    output: Path,
    resume: bool,
    device: str = "cpu",
    cache_dir: Path | None = None,
    cancel: CancelToken | None = None,
    report: Callable[[dict[str, dict[str, Any]], dict[str, str]], None] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Segment images and write a label map each; a bad image does not keep the others from being done.

    Args:
        model: folder of the model.
        images: image files, DICOM series, frame folders, or folders of such images.
        output: folder for the label maps.
        resume: skip images whose label map is there already.
        device: "cpu" or "cuda".
        cache_dir: see `default_cache`.
        cancel: to stop.
        report: called with what is returned, as far as it is known: before the first image, and after each.

    Returns:
        Case name -> path, quality, volumes and seconds of what was segmented now; case name -> why not.

    Raises:
        InputError: two images of one name.
        ModelError, WeightsError: as in `load_model`.
        OFLError: the output cannot be written.
        Cancelled: stopped by `cancel`; finished label maps stay.
    """
    check_device(device)
    targets = _targets(images, output)
    segmenter = load_model(model, device, default_cache(cache_dir))
    results: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    tell = report or (lambda *_: None)
    tell(results, failures)
    for name, (image, target) in targets.items():
        if resume and target.exists():
            err.print(f"{name}: {target} is there already, skipped.")
            continue
        try:
            volume = read_volume(image)
            with progress(name) as done:
                result = segmenter.segment(volume, done, cancel)
            write_labels(target, result.labels, volume)
        except InputError as error:
            failures[name] = str(error)
        else:
            results[name] = {"labels": str(target), **result.summary()}
            quality = ", ".join(f"{structure} {value:.2f}" for structure, value in result.quality.items())
            err.print(f"{name}: {result.seconds:.1f} s, estimated quality {quality}")
        tell(results, failures)
    return results, failures


def check_all_segmented(failures: dict[str, str]) -> None:
    """Report images that could not be segmented.

    Raises:
        InputError: there are some.
    """
    if failures:
        reasons = " ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise InputError(f"{len(failures)} of the images could not be segmented. {reasons}")


def _load(cases: Iterable[Case], ignore_empty_slices: bool) -> Iterator[LabelledCase]:
    for case in cases:
        yield load_case(case, ignore_empty_slices=ignore_empty_slices)


def _counted(cases: Iterator[LabelledCase], total: int, done: Progress) -> Iterator[LabelledCase]:
    for number, case in enumerate(cases):
        yield case
        done(number + 1, total)


def _images_of(path: Path) -> list[Path]:
    """The image itself, or those in a folder that is none."""
    if path.is_dir() and any(path.iterdir()) and not is_image(path):
        return [case.image for case in find_cases(path)]
    return [path]


def _targets(images: Sequence[Path], output: Path) -> dict[str, tuple[Path, Path]]:
    """Case name -> image and the file its label map goes to."""
    targets: dict[str, tuple[Path, Path]] = {}
    for image in (one for path in images for one in _images_of(path)):
        absolute = Path(os.path.abspath(image))  # gives "." and ".." a name, and keeps that of a link
        name = case_name(absolute)
        if name in targets:
            raise InputError(f"{image} and {targets[name][0]} have the same name. Segment them into different folders.")
        kept = image_suffix(absolute).lower()
        suffix = "" if is_sequence(absolute) else kept if kept in (".nrrd", ".mha") else ".nii.gz"
        targets[name] = (absolute, output / f"{name}{suffix}")
    return targets
