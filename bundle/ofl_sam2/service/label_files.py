"""Labels as files, or as folders of masks: which are taken, their hash, and copies that are whole or not there."""

import os
import re
import secrets
import shutil
from hashlib import sha256
from pathlib import Path

import nrrd

from ofl_sam2.atomic import atomic_path
from ofl_sam2.backbone.weights import sha256_of
from ofl_sam2.errors import InputError
from ofl_sam2.files import data_files, image_suffix

LABEL_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


def check_label_file(path: Path) -> None:
    """Refuse a file that cannot be one label on its own; its voxels are not looked at.

    Raises:
        InputError: it is absent, of another format, points to data elsewhere, or holds overlapping segments.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist. Check the path.")
    if path.is_dir():
        return
    suffix = image_suffix(path).lower()
    if suffix not in LABEL_SUFFIXES:
        raise InputError(f"{path} is no label file. Use {', '.join(LABEL_SUFFIXES)} or a folder of PNG masks.")
    if suffix in (".nrrd", ".mha") and data_files(path):
        raise InputError(f"{path} keeps its voxels in another file. Save the label as one file.")
    if suffix == ".nrrd":
        _check_nrrd(path)


def content_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, or of the names and contents of the files in a folder, as hex."""
    if path.is_file():
        return sha256_of(path)
    lines = (f"{sha256_of(file)}  {file.name}\n" for file in _masks(path))
    return sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def copy_label(source: Path, target: Path) -> None:
    """Copy a file, or the files in a folder, atomically over `target`.

    Raises:
        OFLError: `target` cannot be written; it is as before.
    """
    if source.is_file():
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        return
    token = secrets.token_hex(6)
    temporary, old = (target.parent / f".{token}.{state}.{target.name}" for state in ("partial", "old"))
    try:
        for file in _masks(source):
            copy_label(file, temporary / file.name)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _masks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _check_nrrd(path: Path) -> None:
    try:
        header = nrrd.read_header(str(path))
    except Exception as error:  # a damaged header can raise anything that the parser raises
        raise InputError(
            f"Cannot read {path}: {str(error) or 'its header is damaged'}. Is it complete? Export it again."
        ) from error
    layers = {value for name, value in header.items() if re.fullmatch(r"Segment\d+_Layer", name)}
    if len(layers) > 1 or {"list", "vector"} & set(header.get("kinds") or ()):
        raise InputError(
            f"{path} holds overlapping segments. Switch 'Allow overlap' off in the Segment Editor, "
            "so that each voxel belongs to one structure, and save again."
        )
