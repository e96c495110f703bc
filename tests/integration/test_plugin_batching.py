"""Batching plugins in a real server: the example pads less, and a bad one is switched off while requests go on."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually

from wsgi_ts.batcher.batching_plugins import BatchingPlugins
from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.messages import ModelSpec
from wsgi_ts.plugins.report import counts
from wsgi_ts.plugins.testing import PluginServer
from wsgi_ts.settings.config import Config

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
ENDLESS = """
import os

class Hangs:
    def key(self, head):
        while True:
            pass

class Ends:
    def key(self, head):
        os._exit(3)

class Fine:
    def key(self, head):
        return 1
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

        eventually(are_off, within=20, what="states of the policies")
        assert server.output.count("ValueError: no batch today; the model's batches are formed by the built-in") == 1
        assert "module bad_policies has no Nothing" in server.output
        lines = server.get("/metrics", api="metrics").text.splitlines()
        assert sorted(line for line in lines if line.startswith("ts_plugin_errors_total{")) == [
            f'ts_plugin_errors_total{{plugin="{name}",}} 1.0' for name in sorted(names.values())
        ]
    finally:
        assert server.stop() == 0


def rows_of(server: PluginServer) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in server.get("/plugins", api="management").json()["plugins"]}


def test_one_that_never_comes_back_is_off_in_the_next_batcher(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(dedent(ENDLESS))
    lines = "batchSize: 4\nmaxBatchDelay: 20\nminWorkers: 1\nmaxWorkers: 1\nbatching: endless:{}\n"
    names = {"hangs": "Hangs", "ends": "Ends", "fine": "Fine"}
    models = tuple(archive(tmp_path, name, config_yaml=lines.format(named)) for name, named in names.items())
    server = PluginServer(tmp_path / "server", tmp_path / "endless.py", models=models)
    server.start()
    try:
        eventually(lambda: is_served(server, "fine"), within=30, what="model fine")
        for number, model in enumerate(("hangs", "ends"), 1):
            server.post(f"/predictions/{model}", b"x")
            eventually(partial(is_served, server, model), within=40, what=f"model {model} without its plugin")
            eventually(partial(is_served, server, "fine"), within=20, what="model fine")
            assert server.output.count("batcher 0 (cpu) started again") == number
        for model in names:
            assert server.post(f"/predictions/{model}", b"again").body == b"again"
        told = (
            "Plugin endless:{}: a call of it for {} 1.0 did not come back, and ended the batcher; the model's batches"
        )
        for model in ("hangs", "ends"):
            assert server.output.count(told.format(names[model], model)) == 1
        eventually(lambda: rows_of(server)["endless:Ends"]["state"] == "off", within=20, what="state of the policy")
        rows = {name.partition(":")[2]: row for name, row in rows_of(server).items()}
        assert {name: row["errors"] for name, row in rows.items()} == {"Hangs": 1, "Ends": 1, "Fine": 0}
        # Registered anew it is asked again: it may have been mended.
        assert server.request("DELETE", "/models/ends", api="management").status == 200
        assert server.post("/models?url=ends.mar&initial_workers=1", api="management").status == 200
        server.post("/predictions/ends", b"x")
        eventually(lambda: server.output.count(told.format("Ends", "ends")) == 2, within=40, what="another end")
    finally:
        assert server.stop() == 0


def test_an_import_that_hangs_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_policy.py").write_text("while True: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("wsgi_ts.plugins.batching.LOAD_LIMIT_S", 0.2)
    monkeypatch.setattr("wsgi_ts.batcher.batching_plugins.LOAD_LIMIT_S", 0.2)
    (tmp_path / "run" / "plugins").mkdir(parents=True)
    prefix = f"wts-test-policy-{os.getpid()}"
    with closing(Board.create(prefix, 1)) as board:
        Board.unlink(prefix)
        plugins = BatchingPlugins(Config(), tmp_path / "run", board, 0)
        specs = [
            ModelSpec(index, f"m{index}", "1.0", "/m", "h", None, batching="slow_policy:Policy") for index in (0, 1)
        ]
        assert [plugins.queue_for(spec) for spec in specs] == [None, None]
        eventually(lambda: counts(tmp_path / "run", "errors") == {"slow_policy:Policy": 1}, within=20, what="the count")
    # What nobody waits for any more takes no time either.
    eventually(
        lambda: not [each for each in threading.enumerate() if each.name == "plugin call"], within=20, what="its end"
    )
