"""Predictions as DICOM SEG, for studies on a DICOMweb server."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from lib.datastores.dicomweb import JournaledDICOMWebDatastore
from lib.datastores.segmentation import Prediction
from lib.infers.options import BY_POSITION, read_options
from pydicom.dataset import Dataset

from ofl_sam2.errors import InputError
from ofl_sam2.settings import Settings
from server.lookup import app


def dicomweb_studies() -> JournaledDICOMWebDatastore:
    """The studies.

    Raises:
        HTTPException: 400; they are in a folder.
    """
    studies = app().datastore()
    if not isinstance(studies, JournaledDICOMWebDatastore):
        raise HTTPException(400, "DICOM SEG needs studies on a DICOMweb server. Ask for output=image instead.")
    return studies


def predict(
    image: str,
    model: str,
    options: dict[str, Any],
    make: Callable[[str, Path, dict[int, str], Prediction], Dataset],
) -> tuple[Dataset, dict[str, Any]]:
    """Segment an image of the studies, and hand the label map to `make`.

    Args:
        image, model, options: as in a request for a segmentation.
        make: called with image, label map, names of its values, and where it comes from.

    Returns:
        What `make` made, and what is known about the result.

    Raises:
        InputError: as `make`, the image cannot be segmented, or nothing was found in it.
    """
    own = {"result_extension": ".nii.gz", "save_label": False, BY_POSITION: False}
    request = {**options, **own, "model": model, "image": image}
    result = app().infer(request)
    file, params = Path(result["file"]), result["params"]
    try:
        if not params["label_names"]:
            raise InputError(f"No learned structure was found in {image}, so there is nothing to make a DICOM SEG of.")
        return make(image, file, _names(params, options), Prediction(model, params["snapshot"])), params
    finally:
        os.unlink(file)


def _names(params: dict[str, Any], options: dict[str, Any]) -> dict[int, str]:
    """Value -> name of all learned structures, or of the only one that was asked for."""
    asked_for = read_options(options, Settings(), app().options.device).structure
    names = params["structures"] if asked_for is None else params["label_names"]
    return {value: name for name, value in names.items()}
