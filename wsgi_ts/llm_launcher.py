"""Serves one large language model without an archive: `wsgi-ts llm`, or `python -m wsgi_ts.llm_launcher`.

TorchServe's `ts.llm_launcher`, with its flags: writes a model folder that names a bundled handler, and runs a server
for it until that is stopped.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from wsgi_ts.archiver import ArchiverError, ModelArchiveRequest, create_model_archive
from wsgi_ts.gpu.devices import gpu_count
from wsgi_ts.process import python_command

PROGRAM = "python -m wsgi_ts.llm_launcher"
ENGINES = ("vllm", "trt_llm")
#: How long one answer may take before a worker that is asked to leave is killed, in seconds.
_RESPONSE_TIMEOUT_S = 1200
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the server in the foreground; returns the exit status.

    `arguments` is the command line without the program's name; default: that of this process.
    """
    options = parser(program).parse_args(arguments)
    store = Path(options.model_store)
    try:
        store.mkdir(parents=True, exist_ok=True)
        # Outside the store, so that no model of the same name is touched, and gone with the server.
        with tempfile.TemporaryDirectory(prefix="wsgi-ts-llm-") as folder:
            model = write_model(options, model_config(options, gpu_count(None)), Path(folder))
            command = ["--start", "--foreground", "--ncs", "--model-store", str(store)]
            if options.disable_token_auth:
                command.append("--disable-token-auth")
            return _serve([*command, "--models", f"{options.model_name}={model}"])
    except (ArchiverError, OSError) as error:
        print(f"The model cannot be prepared: {error}", file=sys.stderr)
        return 1


def _serve(arguments: Sequence[str]) -> int:
    """Runs `torchserve` until the server has ended, passing on what signals say; returns its exit status.

    A process of its own, since `torchserve` becomes the server's guard and would not come back here.
    """
    # No signal of the terminal reaches it twice.
    command = python_command("wsgi_ts.cli", *arguments)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    for number in _FORWARDED:
        # One that is ignored (nohup, a shell's background job) stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda sent, _: process.send_signal(sent))
    signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    status = process.wait()
    return status if status >= 0 else 128 - status


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Returns the flags; those of an engine have its name before a dot."""
    flags = argparse.ArgumentParser(prog=program, description="Serves one large language model.")
    add = flags.add_argument
    add("--model_name", default="model", help="name in the server's URLs (default: %(default)s)")
    add("--model_store", default="model_store", metavar="DIR", help="folder of further models (default: %(default)s)")
    add(
        "--model_id",
        default="meta-llama/Meta-Llama-3.1-8B-Instruct",
        help="name on the Hugging Face hub, or a folder (default: %(default)s)",
    )
    add("--disable_token_auth", action="store_true", help="answer requests without a token")
    add("--startup_timeout", type=int, default=1200, metavar="SECONDS", help="for loading (default: %(default)s)")
    add("--engine", choices=ENGINES, default="vllm", help="default: %(default)s")
    add("--dtype", default="bfloat16", help="of the weights, for trt_llm (default: %(default)s)")
    add("--vllm_engine.max_num_seqs", type=int, default=256, metavar="N", help="requests in the engine at a time")
    add("--vllm_engine.max_model_len", type=int, metavar="TOKENS", help="longest context; default: the model's")
    add("--vllm_engine.download_dir", metavar="DIR", help="where the weights are kept")
    add("--trt_llm_engine.max_batch_size", type=int, default=4, metavar="N", help="default: %(default)s")
    add(
        "--trt_llm_engine.kv_cache_free_gpu_memory_fraction",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="of the free GPU memory, for the cache of keys and values (default: %(default)s)",
    )
    return flags


def model_config(options: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """Returns the model's YAML; the model spans all GPUs of this machine."""
    given = vars(options)
    config: dict[str, Any] = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 1,
        "maxBatchDelay": 100,
        "responseTimeout": _RESPONSE_TIMEOUT_S,
        "startupTimeout": options.startup_timeout,
        "deviceType": "gpu",
        "asyncCommunication": True,
    }
    if gpus:
        config |= {"parallelType": "custom", "parallelLevel": gpus}
    # A folder is meant from here; the worker's current directory is the model's.
    model = str(Path(options.model_id).absolute()) if Path(options.model_id).is_dir() else options.model_id
    if options.engine == "vllm":
        download_dir = given["vllm_engine.download_dir"]
        config["handler"] = {
            "model_path": model,
            "vllm_engine_config": {
                "served_model_name": [options.model_id],
                "max_num_seqs": given["vllm_engine.max_num_seqs"],
                "max_model_len": given["vllm_engine.max_model_len"],
                "download_dir": str(Path(download_dir).absolute()) if download_dir else None,
                "tensor_parallel_size": max(1, gpus),
            },
        }
    else:
        config["handler"] = {
            "engine_dir": model,
            "kv_cache_config": {"free_gpu_memory_fraction": given["trt_llm_engine.kv_cache_free_gpu_memory_fraction"]},
            "trt_llm_engine_config": {
                "dtype": options.dtype,
                "max_batch_size": given["trt_llm_engine.max_batch_size"],
                "tensor_parallel_size": max(1, gpus),
            },
        }
    return config


def write_model(options: argparse.Namespace, config: dict[str, Any], folder: Path) -> Path:
    """Writes the model's folder; returns its path.

    Raises:
        ArchiverError: the model's name is none.
        OSError: the folder cannot be written.
    """
    file = folder / "model-config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return create_model_archive(
        ModelArchiveRequest(
            model_name=options.model_name,
            version="1.0",
            handler=f"{options.engine}_handler",
            config_file=str(file),
            export_path=str(folder),
            archive_format="no-archive",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
