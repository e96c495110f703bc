"""Requests that a model runs before it is asked: `handler: warm_up: [sample.jpg]` in its model-config.yaml.

The first batches of a model are slow: kernels are compiled, memory is allocated, caches are cold. Files of the archive
that are run as requests while the model loads take that from the first clients.
"""

from __future__ import annotations

import logging
import mimetypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.inputs import BadInput, Request, build_row
from wsgi_ts.handlers.serving.results import Answer
from wsgi_ts.messages import ModelSpec

log = logging.getLogger(__name__)


def warm_up_files(config: Mapping[str, Any], model_dir: str) -> list[Path]:
    """Returns the files that a model-config.yaml names; a warning tells of those that are not in the model's folder."""
    section = config.get("handler")
    names = section.get("warm_up") if isinstance(section, dict) else None
    if names is None:
        return []
    folder = Path(model_dir).resolve()
    found = []
    for name in names if isinstance(names, list) else [names]:
        path = (folder / str(name)).resolve()
        if path.is_file() and path.is_relative_to(folder):
            found.append(path)
        else:
            log.warning("handler.warm_up: there is no file %s in the archive", name)
    return found


def warm_up(context: Context, predict: Callable[[list[Request]], list[Answer]], spec: ModelSpec) -> None:
    """Runs the warm-up files as requests, one after the other; one that fails is told of and changes nothing.

    The content type is that of the file's suffix, so that a handler gets what a client's request would give it.
    """
    send_chunk, context.cl_socket = context.cl_socket, lambda *_: None
    try:
        for path in warm_up_files(context.model_yaml_config, spec.model_dir):
            content_type = mimetypes.guess_type(path.name)[0]
            try:
                row = build_row(content_type, memoryview(path.read_bytes()), decode=spec.decode_input_request)
            except BadInput as error:
                log.warning("handler.warm_up: %s cannot be read as %s: %s", path.name, content_type, error)
                continue
            (answer,) = predict([Request("warm-up", row, {})])
            if answer.error:
                log.warning("The warm-up with %s failed: %s", path.name, bytes(answer.body).decode("utf-8", "replace"))
            else:
                log.info("Warmed up with %s", path.name)
    finally:
        context.cl_socket = send_chunk
