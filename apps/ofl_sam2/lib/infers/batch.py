"""Batch inference: many images, one after the other, where one bad image does not keep the rest from being done."""

import logging
from collections.abc import Callable
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import MONAILabelException
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.utils.others.generic import remove_file

from lib.cases import result_tag
from ofl_sam2.errors import Cancelled, OFLError

logger = logging.getLogger(__name__)


class BatchInfer(BatchInferTask):
    """Saves each result as a label of the tag `original`, or the one the request names."""

    def __call__(
        self, request: dict[str, Any], datastore: Datastore, infer: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        """Segment the images of the request.

        Returns:
            Image id -> label, tag and parameters, or an entry `error` that says why there is none.

        Raises:
            InputError: the request would make results labels to learn from.
        """
        tag = result_tag(request)
        images = sorted(self.get_images(request, datastore))
        images = images[: request.get("max_batch_size") or None]
        results: dict[str, Any] = {}
        for number, image in enumerate(images, start=1):
            single = {**request, "image": image, "save_label": True, "label_tag": tag, "batch": True}
            try:
                result = infer(single, datastore)
                remove_file(result.pop("file", None))
                results[image] = result
                logger.info("%d of %d: %s segmented", number, len(images), image)
            except Cancelled:
                raise
            except (OFLError, MONAILabelException, OSError) as error:
                results[image] = {"error": str(error)}
                logger.warning("%d of %d: %s failed: %s", number, len(images), image, error)
        return results
