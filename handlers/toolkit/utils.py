"""Helpers that TorchServe offers to handlers: label mappings, class look-up, how long a call takes."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar, cast

import yaml

log = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Tag soup and other leftovers in scraped text.
CLEANUP_REGEX = re.compile("<.*?>|&([a-z0-9]+|#[0-9]{1,6}|#x[0-9a-f]{1,6});")


class PT2Backend(str, Enum):
    """The torch.compile backends that a model may name."""

    EAGER = "eager"
    AOT_EAGER = "aot_eager"
    INDUCTOR = "inductor"
    NVFUSER = "nvfuser"
    AOT_NVFUSER = "aot_nvfuser"
    AOT_CUDAGRAPHS = "aot_cudagraphs"
    OFI = "ofi"
    FX2TRT = "fx2trt"
    ONNXRT = "onnxrt"
    IPEX = "ipex"
    TORCHXLA_TRACE_ONCE = "torchxla_trace_once"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    HPU_BACKEND = "hpu_backend"


def check_valid_pt2_backend(backend: str) -> bool:
    """Returns whether torch.compile may be called with this backend; warns where not."""
    if backend in {member.value for member in PT2Backend}:
        return True
    log.warning("%s is not a supported backend", backend)
    return False


def load_label_mapping(mapping_file_path: str) -> dict[str, str] | None:
    """Reads `index_to_name.json`: class index -> label.

    Args:
        mapping_file_path: a JSON object of labels, or of lists whose last element is the label, or
            `{"object_type_names": [label, …]}`.

    Returns:
        The mapping, None where the file is missing.

    Raises:
        ValueError: the file has another form.
    """
    if not os.path.isfile(mapping_file_path):
        log.warning("%s is missing. Inference output will not include class name.", mapping_file_path)
        return None
    with open(mapping_file_path, encoding="utf-8") as file:
        mapping = json.load(file)
    if not isinstance(mapping, dict):
        raise ValueError('index->name JSON mapping should be in "class": "label" format.')
    names = mapping.get("object_type_names")
    if isinstance(names, list):
        return {str(index): name for index, name in enumerate(names)}
    labels = {}
    for index, value in mapping.items():
        label = value[-1] if isinstance(value, list) and value else value
        if not isinstance(label, str):
            raise ValueError("labels in index->name mapping must be either str or List[str]")
        labels[index] = label
    return labels


def map_class_to_label(
    probs: list[list[float]], mapping: dict[str, str] | None = None, lbl_classes: list[list[int]] | None = None
) -> list[dict[str, float]]:
    """Turns rows of probabilities into one dict label -> probability per row.

    Args:
        probs: the probabilities, one list per row.
        mapping: class index -> label; without it the index itself is the label.
        lbl_classes: the class index of each probability; 0, 1, 2, … without it.

    Raises:
        TypeError: `probs` is not a list, or `mapping` not a dict.
    """
    if not isinstance(probs, list):
        raise TypeError("Convert classes to list before doing mapping")
    if mapping is not None and not isinstance(mapping, dict):
        raise TypeError("Mapping must be a dict")
    rows = []
    for position, row in enumerate(probs):
        classes = range(len(row)) if lbl_classes is None else lbl_classes[position]
        labels = [str(index) if mapping is None else mapping[str(index)] for index in classes]
        rows.append(dict(zip(labels, row, strict=False)))
    return rows


def path_in_archive(model_dir: str, name: str) -> str:
    """Returns the path of a file or folder of the archive; any other name (of a model hub, a whole path) as it is."""
    path = os.path.join(model_dir, name)
    return path if os.path.exists(path) else name


def get_yaml_config(yaml_file_path: str) -> dict[str, Any]:
    """Returns the content of a YAML file."""
    with open(yaml_file_path, encoding="utf-8") as file:
        config: dict[str, Any] = yaml.safe_load(file)
    return config


def import_class(class_name: str, module_prefix: str | None = None) -> Any:
    """Imports a class by its dotted name, or by its name alone where `module_prefix` names the module.

    Raises:
        ImportError: no module is named, or it has no such class.
    """
    module_name, _, name = class_name.rpartition(".")
    full_name = ".".join(part for part in (module_prefix, module_name) if part)
    if not full_name:
        raise ImportError(f'"{class_name}" names no module: write it as "module.{class_name}".')
    module = importlib.import_module(full_name)
    if not hasattr(module, name):
        raise ImportError(f'The module "{full_name}" has no class "{name}".')
    return getattr(module, name)


def deprecated(
    version: str, replacement: str = "", klass: type[Warning] = PendingDeprecationWarning
) -> Callable[[_Function], _Function]:
    """Marks a function that goes in a version: a call warns, and says what to use instead if there is something."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def warn(*args: Any, **kwargs: Any) -> Any:
            text = f"{function.__name__} is deprecated in {version} and moved to {replacement}"
            warnings.warn(text, klass, stacklevel=2)
            return function(*args, **kwargs)

        return cast(_Function, warn)

    return decorate


def timeit(func: _Function) -> _Function:
    """Prints after each call how long it took, in seconds, and how much CPU time this process had meanwhile."""

    @functools.wraps(func)
    def time_and_log(*args: Any, **kwargs: Any) -> Any:
        began, cpu_began = time.perf_counter(), time.process_time()
        result = func(*args, **kwargs)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        print(f"func: {func.__name__!r} took a total of {took:2.4f} sec to run and {cpu:2.4f} sec of CPU time")
        return result

    return cast(_Function, time_and_log)
