"""Environment variables of model workers, and the CPU threads that their libraries may use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import wsgi_ts
from wsgi_ts.messages import ModelSpec
from wsgi_ts.process import INSTANCE_VARIABLE, PARENT_PID_VARIABLE
from wsgi_ts.settings.config import Config

#: What a process of ours cannot do without, whatever `blacklist_env_vars` says. PYTHONPATH may be where we are.
_ALWAYS_KEPT = frozenset({"PYTHONPATH", "SPT_NOENV", INSTANCE_VARIABLE, PARENT_PID_VARIABLE})
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
#: Libraries that keep a number of threads of their own, by a part of their file's name, and what sets it.
_THREAD_SETTERS = {
    "openblas": (
        "scipy_openblas_set_num_threads64_",
        "scipy_openblas_set_num_threads",
        "openblas_set_num_threads64_",
        "openblas_set_num_threads",
    ),
    "mkl_rt": ("MKL_Set_Num_Threads",),
}


def worker_environment(environ: Mapping[str, str], config: Config) -> dict[str, str]:
    """The variables that all model workers get.

    `blacklist_env_vars` takes some of the server's own away, other keys add some.
    """
    hidden = re.compile(config.blacklist_env_vars)
    kept = {name: value for name, value in environ.items() if name in _ALWAYS_KEPT or not hidden.fullmatch(name)}
    kept["TS_DECODE_INPUT_REQUEST"] = str(config.decode_input_request).lower()
    kept["TS_REQUEST_SEQUENCE_ID"] = config.ts_header_key_sequence_id
    kept["TS_REQUEST_SEQUENCE_START"] = config.ts_header_key_sequence_start
    kept["TS_REQUEST_SEQUENCE_END"] = config.ts_header_key_sequence_end
    kept["TS_IPEX_ENABLE"] = str(config.ipex_enable).lower()
    kept["TS_IPEX_GPU_ENABLE"] = str(config.ipex_gpu_enable).lower()
    return kept


def export_python_path(spec: ModelSpec) -> None:
    """Lets Python programs that a handler starts import what the handler can import.

    Only now, in the running worker: an interpreter that is started with it would take modules of its own library from
    the model's folder.
    """
    folder = os.path.dirname(spec.handler.partition(":")[0])
    home = str(Path(wsgi_ts.__file__).parent.parent)
    installed = os.path.basename(home) in ("site-packages", "dist-packages")
    parts = [os.path.join(spec.model_dir, folder) if folder else "", os.environ.get("PYTHONPATH", "")]
    parts += [os.path.realpath(spec.model_dir), "" if installed else home]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, parts))


def hide_own_arguments(spec: ModelSpec) -> None:
    """Leaves only the handler's file in `sys.argv`: a handler, or a library that it uses, may look for flags there."""
    sys.argv = [os.path.join(spec.model_dir, spec.handler.partition(":")[0])]


def export_threads(threads: int) -> None:
    """Has libraries that are loaded from now on use so many threads; 0, or OMP_NUM_THREADS set: as they like."""
    if threads > 0 and "OMP_NUM_THREADS" not in os.environ:
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))


def limit_threads(threads: int) -> None:
    """Caps the threads of OpenMP, MKL, OpenBLAS and torch, loaded already or later.

    Workers x cores threads on the same cores slow each other down. 0: as they like. `OMP_NUM_THREADS` of whoever runs
    the server counts instead.
    """
    if threads <= 0 or os.environ.get("OMP_NUM_THREADS", str(threads)) != str(threads):
        return
    export_threads(threads)
    # The template has loaded these before anybody knew the number: they have to be told.
    for path, setters in _loaded_libraries().items():
        library = ctypes.CDLL(path)
        for name in setters:
            setter = getattr(library, name, None)
            if setter is not None:
                setter(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _loaded_libraries() -> dict[str, tuple[str, ...]]:
    """The files of those libraries that this process has loaded, with the names of their setters."""
    found = {}
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            for part, setters in _THREAD_SETTERS.items():
                if part in os.path.basename(path) and ".so" in path:
                    found[f"/{path}"] = setters
    return found
