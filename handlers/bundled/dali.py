"""Image handlers whose preprocessing is an NVIDIA DALI pipeline, written to a file by `Pipeline.serialize`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from wsgi_ts.handlers.bundled.image import ImageClassifier
from wsgi_ts.handlers.bundled.vision import VisionHandler
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.toolkit.library_names import DALI_PIPELINE


def get_dali_pipeline(ctx: Context) -> Any:
    """Loads the pipeline that the section `dali` of the model's YAML describes.

    Its keys are `batch_size`, `num_threads`, `device_id`, `seed` and `pipeline_file`; without the last, the
    archive's only `*.dali` file is taken.

    Raises:
        ImportError: DALI is not installed.
        ValueError: the YAML has no such section.
        FileNotFoundError: there is no such file, or more than one to choose from.
    """
    pipeline = DALI_PIPELINE.load(f"The model {ctx.model_name}")
    options = (ctx.model_yaml_config or {}).get("dali")
    if not isinstance(options, dict):
        raise ValueError(f"{ctx.model_name} has no section dali in its model-config.yaml")
    return pipeline.deserialize(
        filename=_pipeline_file(ctx, options.get("pipeline_file")),
        batch_size=options.get("batch_size", ctx.system_properties["batch_size"]),
        num_threads=options.get("num_threads", 1),
        device_id=options.get("device_id", ctx.system_properties["gpu_id"]),
        seed=options.get("seed", -1),
        prefetch_queue_depth=1,
    )


def _pipeline_file(ctx: Context, named: str | None) -> str:
    model_dir = ctx.system_properties["model_dir"]
    found = [named] if named else sorted(name for name in os.listdir(model_dir) if name.endswith(".dali"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"The archive has {len(found)} *.dali files: add one, or name it with dali.pipeline_file in its YAML."
        )
    path = os.path.join(model_dir, found[0])
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Missing dali pipeline file: the archive has no {found[0]}.")
    return path


class DALIHandler(VisionHandler):
    """Base of the handlers with a DALI pipeline. The pipeline's external source is named `source`."""

    pipeline: Any = None

    def initialize(self, context: Context) -> None:
        """Loads the model and the pipeline; raises what `BaseHandler.initialize` and `get_dali_pipeline` raise."""
        super().initialize(context)
        self.pipeline = get_dali_pipeline(context)

    def image_processing(self, image: Any) -> torch.Tensor:
        """Refuses with NotImplementedError: the pipeline decodes and scales whole batches."""
        raise NotImplementedError("the DALI pipeline processes whole batches")

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """Sends the images of a batch through the pipeline.

        Args:
            data: list of B rows with an image file in `data` or `body`, as bytes or base64 text.

        Returns:
            Tensor (B, …) on the model's device, of the type and shape that the pipeline makes.

        Raises:
            PredictionException: 400, a row has no such image.
        """
        files = [self._content(row) for row in data]
        if not all(isinstance(file, (bytes, bytearray)) for file in files):
            raise PredictionException(
                "Send the image as the body or in the form field data, as a file or base64 text; one in each instance "
                "or input.",
                400,
            )
        images = [np.frombuffer(file, dtype=np.uint8) for file in files]
        output = self.pipeline.run(source=images)[0]
        if hasattr(output, "as_cpu"):
            output = output.as_cpu()
        return torch.stack([torch.as_tensor(np.array(output.at(row))) for row in range(len(images))]).to(self.device)


class DALIImageClassifier(DALIHandler, ImageClassifier):
    """Answers each image with its most likely classes and their probabilities."""
