"""The launcher of one large language model: what it writes, and a server that it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import engines, http
from support.eventually import eventually
from support.processes import MARKER, server_processes
from support.server import REPOSITORY, free_ports

from wsgi_ts.cli import commands as cli
from wsgi_ts.llm_launcher import main, model_config, parser, write_model
from wsgi_ts.models.model_yaml import check_parallel, parse_model_yaml


def config_of(*flags: str, gpus: int = 0) -> dict[str, Any]:
    return model_config(parser().parse_args(flags), gpus)


def test_the_flags_become_the_models_yaml() -> None:
    config = config_of(
        "--model_id", "org/name", "--vllm_engine.max_model_len", "512", "--startup_timeout", "60", gpus=4
    )
    assert config["handler"]["model_path"] == "org/name"
    engine = config["handler"]["vllm_engine_config"]
    assert (engine["max_model_len"], engine["max_num_seqs"], engine["tensor_parallel_size"]) == (512, 256, 4)
    assert engine["download_dir"] is None
    read = parse_model_yaml(config)
    assert not read.warnings
    check_parallel(read)
    assert (read.parallel_type, read.parallel_level, read.startup_timeout_s) == ("custom", 4, 60)
    assert (read.min_workers, read.max_workers, read.batch_size, read.response_timeout_s) == (1, 1, 1, 1200)
    assert read.async_communication


def test_without_gpus_the_model_spans_none() -> None:
    config = config_of()
    assert "parallelType" not in config
    assert config["handler"]["vllm_engine_config"]["tensor_parallel_size"] == 1
    assert config["handler"]["model_path"] == "meta-llama/Meta-Llama-3.1-8B-Instruct"


def test_trt_llm_has_settings_of_its_own() -> None:
    handler = config_of("--engine", "trt_llm", "--model_id", "org/name", "--trt_llm_engine.max_batch_size", "8")[
        "handler"
    ]
    assert handler["engine_dir"] == "org/name"
    assert handler["kv_cache_config"] == {"free_gpu_memory_fraction": 0.1}
    assert handler["trt_llm_engine_config"]["max_batch_size"] == 8


def test_a_folder_is_meant_from_where_the_launcher_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    handler = config_of("--model_id", "weights")["handler"]
    assert handler["model_path"] == str(tmp_path / "weights")
    assert handler["vllm_engine_config"]["served_model_name"] == ["weights"]


def test_the_models_folder_names_the_bundled_handler(tmp_path: Path) -> None:
    options = parser().parse_args(["--model_name", "llm", "--engine", "trt_llm"])
    model = write_model(options, {"minWorkers": 1}, tmp_path)
    manifest = json.loads((model / "MAR-INF" / "MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "trt_llm_handler"
    assert yaml.safe_load((model / manifest["model"]["configFile"]).read_text()) == {"minWorkers": 1}


def test_a_name_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model_store", str(tmp_path / "store"), "--model_name", "a b"]) == 1
    assert "cannot be prepared: Model name contains special characters" in capsys.readouterr().err


def test_it_is_a_command_of_wsgi_ts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["llm", "--model_name", "a/b", "--model_store", str(tmp_path)]
    assert cli.wsgi_ts(flags) == 1
    monkeypatch.setattr(sys, "argv", ["wsgi-ts", *flags])
    assert cli.wsgi_ts() == 1
    assert capsys.readouterr().err.count("The model cannot be prepared") == 2
    with pytest.raises(SystemExit):
        cli.wsgi_ts(["llm", "--help"])
    assert capsys.readouterr().out.startswith("usage: wsgi-ts llm ")


@pytest.mark.slow
def test_a_model_is_served_until_the_launcher_is_stopped(tmp_path: Path) -> None:
    inference, management, metrics, *grpc = free_ports(5)
    config = tmp_path / "config.properties"
    addresses = {"inference": inference, "management": management, "metrics": metrics}
    lines = [f"{api}_address=http://127.0.0.1:{port}\n" for api, port in addresses.items()]
    lines += [f"grpc_{api}_port={port}\n" for api, port in zip(("inference", "management"), grpc, strict=True)]
    config.write_text("".join(lines))
    (tmp_path / "tmp").mkdir()
    marker = uuid.uuid4().hex
    # vllm is not installed here: a stand-in with its names is found instead.
    folders = os.pathsep.join([os.fspath(REPOSITORY), os.path.dirname(engines.__file__)])
    environment = os.environ | {
        **{MARKER: marker, "SPT_NOENV": "1", "PYTHONPATH": folders},
        **{"TMPDIR": os.fspath(tmp_path / "tmp"), "TS_CONFIG_FILE": os.fspath(config)},
    }
    command = [sys.executable, "-m", "wsgi_ts.llm_launcher", "--model_id", "letters", "--disable_token_auth"]
    with (tmp_path / "output.log").open("wb") as output:
        launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        request = json.dumps({"model": "letters", "prompt": "a", "max_tokens": 2})

        def answer() -> http.Reply | None:
            try:
                reply = http.request(inference, "POST", "/predictions/model/1.0/v1/completions", body=request)
            except OSError:
                return None
            return reply if reply.status == 200 else None

        reply = eventually(answer, within=60, what=(tmp_path / "output.log").read_text())
        assert reply is not None
        assert reply.json()["choices"][0]["text"] == "bc"
        assert list((tmp_path / "tmp").glob("wsgi-ts-llm-*"))
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(120) == 0
    finally:
        for process in server_processes(marker):
            process.kill()
        launcher.kill()
        launcher.wait()
    assert not list((tmp_path / "tmp").glob("wsgi-ts-llm-*"))
