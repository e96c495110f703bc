"""The configuration as the start logs it: TorchServe's labels, one line each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wsgi_ts import TORCHSERVE_VERSION
from wsgi_ts.cgroup import usable_cores
from wsgi_ts.metrics.specification import DEFAULT_FILE
from wsgi_ts.settings.config import Config

_NONE = "N/A"


def configuration_lines(config: Config, gpus: int) -> Iterator[str]:
    """One `label: value` after another; what only a Java server has is told as N/A or by its nearest counterpart."""
    home = config.model_server_home or Path(__file__).resolve().parents[1]
    rows: dict[str, object] = {
        "Torchserve version": TORCHSERVE_VERSION,
        "TS Home": home,
        "Current directory": Path.cwd(),
        "Temp directory": config.temp_dir,
        "Metrics config path": config.metrics_config or DEFAULT_FILE,
        "Number of GPUs": gpus,
        "Number of CPUs": usable_cores(),
        "Max heap size": _NONE,
        "Python executable": config.python,
        "Config file": config.config_file or _NONE,
        "Inference address": config.inference_address,
        "Management address": config.management_address,
        "Metrics address": config.metrics_address,
        "Model Store": config.model_store or _NONE,
        "Initial Models": config.initial_models or _NONE,
        "Log dir": config.log_dir,
        "Metrics dir": config.metrics_dir,
        "Netty threads": f"{config.web_workers} (web workers)",
        "Netty client threads": config.netty_client_threads,
        "Default workers per model": config.default_workers_per_model,
        "Blacklist Regex": config.blacklist_env_vars or _NONE,
        "Maximum Response Size": config.max_response_size,
        "Maximum Request Size": config.max_request_size,
        "Limit Maximum Image Pixels": _boolean(config.limit_max_image_pixels),
        "Prefer direct buffer": _boolean(config.prefer_direct_buffer),
        "Allowed Urls": f"[{'|'.join(config.allowed_urls)}]",
        "Custom python dependency for model allowed": _boolean(config.install_py_dep_per_model),
        "Enable metrics API": _boolean(config.enable_metrics_api),
        "Metrics mode": config.metrics_mode.upper(),
        "Disable system metrics": _boolean(config.disable_system_metrics),
        "Workflow Store": config.workflow_store or _NONE,
        "CPP log config": config.cpp_log_config or _NONE,
        "Model config": config.models or _NONE,
        "System metrics command": config.system_metrics_cmd or "default",
        "Model API enabled": _boolean(config.enable_model_api),
    }
    return (f"{label}: {value}" for label, value in rows.items())


def _boolean(value: bool) -> str:
    return "true" if value else "false"
