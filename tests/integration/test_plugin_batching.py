"""Batching plugins in a real server: the example pads less, and a bad one is switched off while requests go on."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
from support.archives import archive
from support.eventually import eventually

from wsgi_ts.plugins.testing import PluginServer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "plugins"
BAD = """
import time

class Sleeps:
    def key(self, head):
        time.sleep(1)

class Raises:
    def admit(self, batch_cost, batch_n, cost):
        raise ValueError("no batch today")
"""


def is_served(server: PluginServer, model: str) -> bool:
    return server.post(f"/predictions/{model}").status == 200


def test_the_example_pads_less_than_first_come_first_served(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("measure", EXAMPLES / "measure_length_buckets.py")
    assert spec is not None and spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure", measure)
    spec.loader.exec_module(measure)
    found = measure.measure(count=800, clients=32)
    assert found["buckets"][1] < found["fifo"][1] / 1.5, found


def test_a_bad_policy_is_switched_off_and_all_are_answered(tmp_path: Path) -> None:
    (tmp_path / "bad_policies.py").write_text(dedent(BAD))
    lines = "batchSize: 4\nmaxBatchDelay: 20\nminWorkers: 1\nmaxWorkers: 1\nbatching: {}\n"
    names = {"sleeps": "bad_policies:Sleeps", "raises": "bad_policies:Raises", "missing": "bad_policies:Nothing"}
    models = tuple(archive(tmp_path, name, config_yaml=lines.format(named)) for name, named in names.items())
    server = PluginServer(tmp_path / "server", tmp_path / "bad_policies.py", models=models)
    server.start()
    try:
        for model in names:
            eventually(partial(is_served, server, model), within=30, what=f"model {model}")
        with ThreadPoolExecutor(8) as clients:
            asked = [(model, number) for number in range(10) for model in names]
            answers = list(
                clients.map(lambda each: server.post(f"/predictions/{each[0]}", b"%d" % each[1]).body, asked)
            )
        assert answers == [b"%d" % number for _, number in asked]

        def states() -> dict[str, tuple[str, str, int]]:
            rows = server.get("/plugins", api="management").json()["plugins"]
            return {row["name"]: (row["process"], row["state"], row["errors"]) for row in rows}

        def are_off() -> bool:
            # A policy is asked whether it admits one only where two wait: on a busy machine they may not yet have.
            with ThreadPoolExecutor(8) as clients:
                assert set(clients.map(lambda _: server.post("/predictions/raises").status, range(8))) == {200}
            return states() == dict.fromkeys(names.values(), ("batcher 0", "off", 1))

        eventually(are_off, within=10, what="states of the policies")
        assert server.output.count("ValueError: no batch today; the model's batches are formed by the built-in") == 1
        assert "module bad_policies has no Nothing" in server.output
        lines = server.get("/metrics", api="metrics").text.splitlines()
        assert sorted(line for line in lines if line.startswith("ts_plugin_errors_total{")) == [
            f'ts_plugin_errors_total{{plugin="{name}",}} 1.0' for name in sorted(names.values())
        ]
    finally:
        assert server.stop() == 0
