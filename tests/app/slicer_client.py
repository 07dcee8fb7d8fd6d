"""What the Slicer module does, call for call, on MONAI Label's own REST client (which is also the module's)."""

from pathlib import Path
from typing import Any

import numpy as np
from monailabel.client import MONAILabelClient
from numpy.typing import NDArray

from ofl_sam2.files import read_labels, read_volume, write_labels


class SlicerClient:
    """One user of the Slicer module.

    Args:
        url: of the server.
        folder: where the user's images lie and results are put.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.rest = MONAILabelClient(url, tmpdir=str(folder), client_id="user-ann")
        self.model = self.trainer = ""

    def connect(self) -> dict[str, Any]:
        """GET /info/, and choose the models of the panel as the module does: by type, the first trainer."""
        info = self.rest.info()
        assert "config" not in info, "the module would ask to upgrade the server"
        self.model = next(name for name, m in info["models"].items() if m["type"] in ("segmentation", "detection"))
        self.trainer = next(iter(info["trainers"]))
        self.options = self._chosen(info["models"][self.model]["config"])
        self.train_options = self._chosen(info["trainers"][self.trainer]["config"])
        return info

    def next_sample(self, strategy: str) -> dict[str, Any]:
        """POST /activelearning/{strategy}; {} when every image has a label."""
        return self.rest.next_sample(strategy, {})

    def segment(self, image: str, session_id: str | None = None) -> tuple[NDArray[Any], dict[str, Any]]:
        """POST /infer/{model} with the options of the panel, in .nrrd and uint8.

        Returns:
            The label map in the order of the image file, and the result's parameters.
        """
        params = {**self.options, "result_extension": ".nrrd", "result_dtype": "uint8"}
        path, answer = self.rest.infer(self.model, image, params, session_id=session_id)
        assert path.endswith(".nrrd")
        return read_labels(path).voxels, answer

    def submit(self, image: Path, labels: NDArray[Any], names: dict[int, str]) -> dict[str, Any]:
        """PUT /datastore/label of a label map in the grid of an image, as .nrrd, with its names in `label_info`."""
        path = self.folder / f"segmentation_{image.name.partition('.')[0]}.nrrd"
        write_labels(path, labels.astype(np.uint8), read_volume(image))
        info = [{"name": name, "idx": value, "color": [128, 174, 128]} for value, name in names.items()]
        return self.rest.save_label(image.name.partition(".")[0], str(path), params={"label_info": info})

    def train(self, **options: Any) -> dict[str, Any]:
        """POST /train/{model}."""
        return self.rest.train_start(self.trainer, {**self.train_options, **options})

    @staticmethod
    def _chosen(config: dict[str, Any]) -> dict[str, Any]:
        """The first entry of each list, as the combo boxes show it; other values as they are."""
        return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}
