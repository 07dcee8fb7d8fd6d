"""Predictions as DICOM SEG, for studies on a DICOMweb server."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from lib.datastores.dicomweb import JournaledDICOMWebDatastore
from lib.datastores.segmentation import Prediction
from pydicom.dataset import Dataset

from ofl_sam2.errors import InputError
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
    request = {**options, "model": model, "image": image, "result_extension": ".nii.gz", "save_label": False}
    result = app().infer(request)
    file, params = Path(result["file"]), result["params"]
    try:
        if not params["label_names"]:
            raise InputError(f"No learned structure was found in {image}, so there is nothing to make a DICOM SEG of.")
        return make(image, file, _names(params), Prediction(model, params["snapshot"])), params
    finally:
        os.unlink(file)


def _names(params: dict[str, Any]) -> dict[int, str]:
    """Value -> name of all learned structures, or of the only one that was asked for, whose value is 1."""
    shown, learned = params["label_names"].items(), params["structures"].items()
    return {value: name for name, value in (learned if shown <= learned else shown)}
