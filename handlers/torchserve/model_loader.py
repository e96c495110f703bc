"""Loading a model by its folder and a handler string, without a server: TorchServe's loader classes."""

from __future__ import annotations

import json
import os
import sys
import uuid
from abc import ABC, abstractmethod
from typing import Any

from wsgi_ts.handlers.serving.failures import load_error
from wsgi_ts.handlers.serving.loader import load_entry
from wsgi_ts.handlers.torchserve.service import Service
from wsgi_ts.ts_path import shim_path


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
        handler: str | None = None,
        gpu_id: int | None = None,
        batch_size: int | None = None,
        envelope: str | None = None,
        limit_max_image_pixels: bool = True,
        metrics_cache: Any = None,
    ) -> Service:
        """Imports the handler and initialises it.

        Puts the model's folder and the `ts` compatibility package at the head of `sys.path`.

        Args:
            model_name: the model's name.
            model_dir: folder of the extracted archive; its manifest is read where it has one.
            handler: handler string, as in a manifest.
            gpu_id: GPU to use, None for CPU.
            batch_size: the largest batch the handler will be given.
            envelope: name of the request envelope.
            limit_max_image_pixels: whether Pillow's limit for huge images stays in force.
            metrics_cache: takes the handler's metrics.

        Raises:
            LoadError: memory ran out, or the handler raised a RuntimeError.
            BaseException: anything else the handler raises.
        """
        if metrics_cache is not None:
            metrics_cache.set_request_ids(str(uuid.uuid4()))
        manifest = None
        path = os.path.join(model_dir, "MAR-INF", "MANIFEST.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                manifest = json.load(file)
        sys.path[:0] = [folder for folder in (model_dir, shim_path()) if folder not in sys.path]
        service = Service(
            model_name, model_dir, manifest, None, gpu_id, batch_size, limit_max_image_pixels, metrics_cache
        )
        try:
            entry = load_entry(handler or "", model_dir, envelope)
            service.initialize(entry.initialize)
        except BaseException as error:
            service.close()
            known = load_error(error)
            if known is None:
                raise
            raise known from error
        # After its `initialize`, which may have put another function in place of `handle`.
        service._entry_point = entry.handle if envelope or entry.instance is None else entry.instance.handle
        return service


class ModelLoaderFactory:
    """Where the loader comes from."""

    @staticmethod
    def get_model_loader() -> TsModelLoader:
        """Returns the loader."""
        return TsModelLoader()
