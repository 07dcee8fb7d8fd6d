"""Folders of 2D frames (PNG, JPEG) and of their masks (PNG)."""

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ofl_sam2.atomic import atomic_path
from ofl_sam2.errors import InputError
from ofl_sam2.volume import Volume

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
_COLOUR_MODES = ("RGB", "RGBA", "P", "CMYK", "YCbCr")
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts "frame2" before "frame10".

    Example:
        >>> sorted(["f10", "f2"], key=natural_key)
        ['f2', 'f10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.casefold())], name


def frame_files(folder: Path) -> list[Path]:
    """Return the PNG and JPEG files of `folder` in natural order, hidden ones left out."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in FRAME_SUFFIXES and not p.name.startswith(".")]
    return sorted(files, key=lambda path: natural_key(path.name))


def frame_names(volume: Volume) -> tuple[str, ...]:
    """File stems of the frames: those they were read from, else running numbers."""
    return volume.frame_names or tuple(f"{index:05d}" for index in range(volume.grid[2]))


def read_frames(folder: Path) -> Volume:
    """Read all frames of `folder`: grey `(X, Y, T)` or colour `(X, Y, T, 3)`.

    Raises:
        InputError: an unreadable frame, two frames of one name, frames of several sizes or colour modes.
    """
    files = frame_files(folder)
    names = _stems(files)
    first = _read_image(files[0])
    stack = np.empty((len(files), *first.shape), first.dtype)
    for index, file in enumerate(files):
        pixels = _read_image(file)
        if pixels.shape != first.shape or pixels.dtype != first.dtype:
            raise InputError(
                f"{file} is {_describe(pixels)}, but {files[0].name} is {_describe(first)}. "
                "Convert all frames of a sequence to one size and one mode."
            )
        stack[index] = pixels
    colour = stack.ndim == 4
    voxels = stack.transpose(2, 1, 0, 3) if colour else stack.transpose(2, 1, 0)
    return Volume(voxels, np.eye(4), folder.name, frames=True, colour=colour, path=folder, frame_names=names)


def read_masks(folder: Path, frames: Volume | None) -> Volume:
    """Read the PNG masks of `folder`, `(X, Y, T)`; grey values or palette indices are the labels.

    Args:
        folder: masks named like their frames.
        frames: the sequence they belong to, frames without a mask file get zeros; None takes the masks as they are.

    Raises:
        InputError: no masks, unreadable or colour masks, masks without a frame or of another size.
    """
    files = [path for path in frame_files(folder) if path.suffix.lower() == ".png"]
    if not files:
        raise InputError(f"{folder} holds no PNG masks. Save masks as PNG: JPEG changes label values.")
    masks = dict(zip(_stems(files), map(_read_mask, files), strict=True))
    names = tuple(masks) if frames is None else frame_names(frames)
    strangers = sorted(set(masks) - set(names), key=natural_key)
    if frames is not None and strangers:
        raise InputError(
            f"{folder} holds masks without a frame in {frames.path or frames.name}: {', '.join(strangers)}. "
            "Name each mask like its frame."
        )
    shape = next(iter(masks.values())).shape if frames is None else (frames.grid[1], frames.grid[0])
    stack = np.zeros((len(names), *shape), np.result_type(*masks.values()))
    for name, mask in masks.items():
        if mask.shape != shape:
            raise InputError(
                f"{folder / name}.png is {_describe(mask)}, expected {shape[1]} x {shape[0]} pixels. "
                "Use masks of the size of their frames."
            )
        stack[names.index(name)] = mask
    labelled = None if frames is None else tuple(i for i, name in enumerate(names) if name in masks)
    return Volume(
        stack.transpose(2, 1, 0),
        np.eye(4),
        folder.name,
        frames=True,
        path=folder,
        frame_names=names,
        labelled=labelled,
    )


def write_masks(folder: Path, labels: NDArray[np.unsignedinteger[Any]], names: Sequence[str]) -> None:
    """Write `labels` `(X, Y, T)` as one PNG a frame; the folder appears whole or not at all.

    Raises:
        InputError: labels above 65535, or a folder that holds anything but PNG files.
        OFLError: the folder cannot be written.
    """
    if labels.max(initial=0) > np.iinfo(np.uint16).max:
        raise InputError(f"Cannot write {folder}: PNG masks hold labels up to 65535. Renumber the structures.")
    if folder.exists() and (not folder.is_dir() or any(path.suffix.lower() != ".png" for path in folder.iterdir())):
        raise InputError(f"Cannot write {folder}: it exists and holds other files than masks. Choose another folder.")
    token = secrets.token_hex(6)
    temporary, old = (folder.parent / f".{token}.{state}.{folder.name}" for state in ("partial", "old"))
    try:
        for index, name in enumerate(names):
            with atomic_path(temporary / f"{name}.png") as file:
                Image.fromarray(np.ascontiguousarray(labels[:, :, index].T)).save(file)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _stems(files: Sequence[Path]) -> tuple[str, ...]:
    stems = tuple(path.stem for path in files)
    twice = sorted({stem for stem in stems if stems.count(stem) > 1}, key=natural_key)
    if twice:
        raise InputError(f"{files[0].parent} holds several frames of one name: {', '.join(twice)}. Keep one of each.")
    return stems


def _read_image(path: Path) -> NDArray[Any]:
    """Pixels `(H, W)` or `(H, W, 3)`; transparency is dropped."""
    image = _open(path)
    if image.mode in _COLOUR_MODES:
        return np.asarray(image.convert("RGB"))
    return np.asarray(image.convert("L") if image.mode == "LA" else image)


def _read_mask(path: Path) -> NDArray[Any]:
    image = _open(path)
    if image.mode not in _MASK_MODES:
        raise InputError(
            f"{path} is a colour image (mode {image.mode}), not a mask. "
            "Save masks as grey or palette PNG whose pixel values are the labels."
        )
    return np.asarray(image)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"Cannot read {path}: {error}. The image looks damaged; export it again.") from error


def _describe(pixels: NDArray[Any]) -> str:
    kind = "colour" if pixels.ndim == 3 else f"grey ({pixels.dtype})"
    return f"{pixels.shape[1]} x {pixels.shape[0]} pixels, {kind}"
