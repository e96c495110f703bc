"""Looks up all that handlers lean on in the libraries that are installed here; prints what is wrong, name by name.

A process of its own: some of the libraries take seconds to import and change what they find.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
from typing import Any

from wsgi_ts.handlers.toolkit import library_names
from wsgi_ts.handlers.toolkit.library_names import CACHE_NAMES, ROW_INPUTS, LibraryName


def fault_of(name: LibraryName) -> str | None:
    """What is wrong with a name, "" for nothing, None where the library is not installed."""
    try:
        if importlib.util.find_spec(name.modules[0]) is None:
            return None
    except ModuleNotFoundError:
        return None
    found = name.load("This test")
    missing = [member for member in name.members if not hasattr(found, member) and member not in _made_by(found)]
    parameters = inspect.signature(found).parameters if name.parameters else {}
    # A function that takes any named argument is checked no further.
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    missing += [f"parameter {each}" for each in name.parameters if each not in parameters and not takes_all]
    if name is library_names.COMPATIBLE_OPERATORS and library_names.DEEPSPEED_SHARED_MEMORY not in found:
        missing.append(library_names.DEEPSPEED_SHARED_MEMORY)
    return f"{name} has no {', '.join(missing)}" if missing else ""


def _made_by(found: Any) -> list[str]:
    return list(vars(found())) if inspect.isclass(found) and found.__name__ == "DynamicCache" else []


def fault_of_models() -> str | None:
    """Whether models of transformers take their inputs and their cache under one of the names that are known."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    for model in (LlamaForCausalLM, GPT2LMHeadModel):
        parameters = inspect.signature(model.forward).parameters
        if not set(ROW_INPUTS) <= set(parameters):
            return f"{model.__name__}.forward takes {', '.join(parameters)}: which has a row for each of the batch?"
        if len(set(CACHE_NAMES) & set(parameters)) != 1:
            return f"{model.__name__}.forward takes {', '.join(parameters)}: which is the cache?"
    return ""


def main() -> None:
    """Prints the faults as one JSON object."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    stdout = os.dup(1)
    os.dup2(2, 1)  # what the libraries print
    faults = {str(name): fault_of(name) for name in library_names.LIBRARY_NAMES if name.library in sys.argv[1:]}
    if "transformers" in sys.argv[1:]:
        faults["models"] = fault_of_models()
    os.write(stdout, json.dumps(faults).encode())


if __name__ == "__main__":
    main()
