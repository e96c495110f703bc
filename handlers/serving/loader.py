"""From a handler string to something callable: a file, `module:function`, or the name of a bundled handler.

The model's folder must be on `sys.path` already (see `wsgi_ts.handlers.serving.service.Service.load`).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

#: Bundled handlers by the name a manifest may give instead of a file.
BUNDLED = {
    "base_handler": "wsgi_ts.handlers.bundled.base:BaseHandler",
    "vision_handler": "wsgi_ts.handlers.bundled.vision:VisionHandler",
    "image_classifier": "wsgi_ts.handlers.bundled.image:ImageClassifier",
    "image_segmenter": "wsgi_ts.handlers.bundled.image:ImageSegmenter",
    "object_detector": "wsgi_ts.handlers.bundled.image:ObjectDetector",
    "text_handler": "wsgi_ts.handlers.bundled.text:TextHandler",
    "text_classifier": "wsgi_ts.handlers.bundled.text:TextClassifier",
    "densenet_handler": "wsgi_ts.handlers.bundled.densenet:handle",
    "dali_handler": "wsgi_ts.handlers.bundled.dali:DALIHandler",
    "dali_image_classifier": "wsgi_ts.handlers.bundled.dali:DALIImageClassifier",
    "vllm_handler": "wsgi_ts.handlers.bundled.vllm:VLLMHandler",
    "trt_llm_handler": "wsgi_ts.handlers.bundled.trt_llm:TRTLLMHandler",
}

#: TorchServe's package of the bundled handlers: a manifest may give the whole name of the module, too.
BUNDLED_MODULES = "ts.torch_handler."

#: Request envelopes by the name that `service_envelope` gives.
ENVELOPES = {
    "body": "BodyEnvelope",
    "json": "JSONEnvelope",
    "kserve": "KServeEnvelope",
    "kservev2": "KServev2Envelope",
}


class Entry(NamedTuple):
    """A loaded handler.

    Attributes:
        handle: called with (data, context) for each batch.
        initialize: called with the context once, before the first batch.
        instance: the handler object; None where the handler is a function.
    """

    handle: Callable[[Any, Any], Any]
    initialize: Callable[[Any], Any]
    instance: Any = None


def load_entry(handler: str, model_dir: str, envelope: str | None = None) -> Entry:
    """Resolves a handler string, imports its module and makes its instance.

    Args:
        handler: `file.py`, `file.py:function`, `module`, `module:function` or a bundled handler's name, with
            `ts.torch_handler.` before it or without; the file may be in a folder of the model, whose modules it then
            finds first. What stands for the function may be a class.
        model_dir: the model's folder; its modules come before equally named ones imported earlier.
        envelope: name of the request envelope to wrap the handler in.

    Raises:
        ImportError: there is no such module, or it fails to import something itself.
        ValueError: the module has no entry point, or the envelope is unknown.
    """
    module_part, _, function = handler.partition(":")
    path, name = os.path.split(module_part.removesuffix(".py"))
    folder = os.path.join(model_dir, path) if path else model_dir
    bundled = None if _is_in(folder, name) else BUNDLED.get(name.removeprefix(BUNDLED_MODULES))
    if bundled is None:
        if folder not in sys.path:
            sys.path.insert(0, folder)
        module = import_from(name, folder)
        found = getattr(module, function or "handle", None)
        entry = _entry(_handler_class(module) if found is None else found)
    else:
        bundled_module, _, symbol = bundled.partition(":")
        entry = _entry(getattr(importlib.import_module(bundled_module), symbol))
    if not envelope:
        return entry
    return entry._replace(handle=_envelope_class(envelope)(entry.handle).handle)


def import_from(name: str, model_dir: str) -> ModuleType:
    """Imports a module, preferring the model folder's one over another of that name that is already imported.

    Raises:
        ImportError: there is no such module, or it fails to import something itself.
    """
    if not name:
        raise ImportError("The model has no handler: the manifest's model.handler is empty.")
    top = name.partition(".")[0]
    known = sys.modules.get(top)
    if known is not None and _is_in(model_dir, top) and not _is_from(known, model_dir):
        for other in [key for key in sys.modules if key == top or key.startswith(top + ".")]:
            del sys.modules[other]
    importlib.invalidate_caches()
    return importlib.import_module(name)


def list_classes_from_module(module: ModuleType, parent_class: type | None = None) -> list[type]:
    """Returns the classes that a module defines itself, by name: all, or those derived from `parent_class`."""
    return [
        found
        for _, found in inspect.getmembers(module, inspect.isclass)
        if found.__module__ == module.__name__ and (parent_class is None or issubclass(found, parent_class))
    ]


def _entry(found: Any) -> Entry:
    return _class_entry(found) if inspect.isclass(found) else _function_entry(found)


def _function_entry(function: Any) -> Entry:
    return Entry(function, lambda context: function(None, context))


def _handler_class(module: ModuleType) -> type:
    """The module's only class; of several the only one with a method `handle` from which none of them derives.

    Raises:
        ValueError: there is none, or more than one.
    """
    classes = list_classes_from_module(module)
    if len(classes) == 1:
        return classes[0]
    able = [each for each in dict.fromkeys(classes) if callable(getattr(each, "handle", None))]
    meant = [each for each in able if not any(issubclass(other, each) for other in able if other is not each)]
    if len(meant) != 1:
        raise ValueError(
            f"Expected only one class in custom service code or a function entry point {classes} "
            f"in {getattr(module, '__file__', module.__name__)}"
        )
    return meant[0]


def _class_entry(handler_class: type) -> Entry:
    instance: Any = handler_class()
    if getattr(instance, "handle", None) is None:
        raise ValueError(f"Expect handle method in class {handler_class}")

    def handle(data: Any, context: Any) -> Any:
        # Looked up each time: initialize may replace it, for example by a MicroBatching.
        return instance.handle(data, context)

    return Entry(handle, getattr(instance, "initialize", lambda context: None), instance)


def _envelope_class(envelope: str) -> Any:
    if envelope not in ENVELOPES:
        raise ValueError(f'Unknown service_envelope "{envelope}": use one of {", ".join(sorted(ENVELOPES))}.')
    return getattr(importlib.import_module("wsgi_ts.handlers.serving.envelopes"), ENVELOPES[envelope])


def _is_in(model_dir: str, name: str) -> bool:
    stem = os.path.join(model_dir, *name.split("."))
    return os.path.isfile(stem + ".py") or os.path.isfile(os.path.join(stem, "__init__.py"))


def _is_from(module: ModuleType, model_dir: str) -> bool:
    path: str | None = getattr(module, "__file__", None)
    if path is None:
        return False
    folder = os.path.realpath(model_dir)
    return os.path.realpath(path).startswith(folder + os.sep)
