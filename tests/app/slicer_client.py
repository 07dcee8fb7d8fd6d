"""What the Slicer module does, call for call, on MONAI Label's own REST client (which is also the module's)."""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import requests
import SimpleITK as sitk
from monailabel.client import MONAILabelClient
from monailabel.utils.others.generic import file_checksum
from numpy.typing import NDArray

from ofl_sam2.files import read_labels, read_volume, write_labels


@dataclass
class Scene:
    """What the user sees: an image, and segments over it.

    Attributes:
        sample: the answer to "Next Sample".
        volume: the image as ITK reads it, which is what Slicer does.
        segments: name -> mask `(X, Y, Z)`, in the order of the panel.
    """

    sample: dict[str, Any]
    volume: sitk.Image
    segments: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, ...]:
        return self.volume.GetSize()

    def add_empty(self, names: list[str]) -> None:
        for name in names:
            self.segments.setdefault(name, np.zeros(self.grid, bool))

    def export(self) -> sitk.Image:
        """A label map in the grid of the image; the n-th segment, empty or not, has the value n."""
        labels = np.zeros(self.grid, np.uint8)
        for value, mask in enumerate(self.segments.values(), start=1):
            labels[mask] = value
        exported = sitk.GetImageFromArray(labels.transpose())
        exported.CopyInformation(self.volume)
        return exported

    def take_in(self, path: str, names: list[str]) -> None:
        """Replace segments by a label map: its value n is the n-th name, whether there is such a voxel or not.

        So does ImportLabelmapToSegmentationNode of Slicer's vtkSlicerSegmentationsModuleLogic.
        """
        result = sitk.ReadImage(path)
        assert result.GetSize() == self.grid
        for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(result, geometry)(), getattr(self.volume, geometry)(), atol=1e-4)
        labels = sitk.GetArrayFromImage(result).transpose()
        assert labels.max() <= len(names), f"{labels.max()} segments for the names {names}: some would be unnamed"
        for number, name in enumerate(names, start=1):
            self.segments[name] = labels == number


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
        self.info = info
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

    def open(self, sample: dict[str, Any], shared_disk: bool = False) -> Scene:
        """Load a sample: from `path` on a shared disk, else by download; with empty segments and an original label."""
        path = Path(sample["path"])
        if not shared_disk:
            path = self.folder / sample["name"]
            address = f"{self.rest.get_server_url()}/datastore/image?image={quote_plus(sample['id'])}"
            path.write_bytes(requests.get(address, timeout=60).content)
            assert file_checksum(path) == sample["checksum"]
        scene = Scene(sample, sitk.ReadImage(str(path)))
        known = self.rest.datastore()["objects"][sample["id"]]["labels"].get("original")
        if known:
            file = self.rest.download_label(sample["id"], "original")
            scene.take_in(file, list(known["info"]["params"]["label_names"]))
        scene.add_empty(self.info["labels"])
        return scene

    def submit_scene(self, scene: Scene) -> dict[str, Any]:
        """Submit Label: every segment, empty ones too, in the module's default format .nii.gz; then GET /info/."""
        with NamedTemporaryFile(suffix=".nii.gz", dir=self.folder) as file:
            sitk.WriteImage(scene.export(), file.name)
            info = [{"name": name, "idx": number} for number, name in enumerate(scene.segments, start=1)]
            answer = self.rest.save_label(scene.sample["id"], file.name, params={"label_info": info})
        self.connect()
        return answer

    def run(self, scene: Scene, session_id: str | None = None, **options: Any) -> dict[str, Any]:
        """Run: POST /infer/{model}, the result becomes the scene's segments; the result's parameters."""
        params = {**self.options, **options, "result_extension": ".nrrd", "result_dtype": "uint8"}
        path, answer = self.rest.infer(self.model, scene.sample["id"], params, session_id=session_id)
        names = answer.get("label_names") or self.info["models"][self.model]["labels"]
        scene.take_in(path, [name for name in sorted(names, key=names.get) if name != "background"])
        Path(path).unlink()
        return answer

    def train(self, **options: Any) -> dict[str, Any]:
        """POST /train/{model}."""
        return self.rest.train_start(self.trainer, {**self.train_options, **options})

    @staticmethod
    def _chosen(config: dict[str, Any]) -> dict[str, Any]:
        """The first entry of each list, as the combo boxes show it; other values as they are."""
        return {key: value[0] if isinstance(value, list) else value for key, value in config.items()}
