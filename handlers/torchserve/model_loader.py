"""Loading a model by its folder and a handler string, without a server: TorchServe's loader classes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from wsgi_ts.handlers.serving.context import SendChunk
from wsgi_ts.handlers.serving.service import Service
from wsgi_ts.messages import ModelSpec


class ModelLoader(ABC):
    """What loads models."""

    @abstractmethod
    def load(self, *args: Any, **kwargs: Any) -> Service:
        """Loads a model; the arguments are those of `TsModelLoader.load`."""


class TsModelLoader(ModelLoader):
    """Loads a model from the folder of an extracted archive."""

    def load(
        self,
        model_name: str,
        model_dir: str,
        handler: str,
        gpu_id: int | None,
        batch_size: int,
        envelope: str | None = None,
        limit_max_image_pixels: bool = True,
        metrics_cache: Any = None,
        *,
        metrics_config: str | None = None,
        send_chunk: SendChunk | None = None,
    ) -> Service:
        """Imports the handler and initialises it.

        Args:
            model_name: the model's name.
            model_dir: folder of the extracted archive; its manifest is read where it has one.
            handler: handler string, as in a manifest.
            gpu_id: GPU to use, None for CPU.
            batch_size: the largest batch the handler will be given.
            envelope: name of the request envelope.
            limit_max_image_pixels: whether Pillow's limit for huge images stays in force.
            metrics_cache: takes the handler's metrics once it is initialised; None for the service's own.
            metrics_config: path of the metrics configuration, None for the built-in one.
            send_chunk: called for each chunk of a streamed answer.

        Raises:
            LoadError: memory ran out, or the handler raised a RuntimeError.
            BaseException: anything else the handler raises.
        """
        manifest_path = Path(model_dir) / "MAR-INF" / "MANIFEST.json"
        manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.is_file() else None
        model = (manifest or {}).get("model") or {}
        spec = ModelSpec(
            index=0,
            name=model_name,
            version=str(model.get("modelVersion", "1.0")),
            model_dir=model_dir,
            handler=handler,
            manifest=manifest,
            config_file=model.get("configFile"),
            envelope=envelope,
            batch_size=batch_size,
            limit_max_image_pixels=limit_max_image_pixels,
            metrics_config=metrics_config,
        )
        service = Service.load(spec, gpu_id, send_chunk)
        if metrics_cache is not None:
            service.context.metrics = metrics_cache
        return service


class ModelLoaderFactory:
    """Where the loader comes from."""

    @staticmethod
    def get_model_loader() -> TsModelLoader:
        """Returns the loader."""
        return TsModelLoader()
