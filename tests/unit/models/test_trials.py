"""Settings tried on a model: what batchers are told, what is recorded meanwhile, what comes back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.eventually import eventually

from wsgi_ts.archive.manifest import Manifest
from wsgi_ts.archive.model_directory import ModelDirectory
from wsgi_ts.control.server import Peer
from wsgi_ts.errors import BadRequest, ConflictStatus, InternalServerError, ServiceUnavailable
from wsgi_ts.gpu.assign import place
from wsgi_ts.messages import LoadModel, ModelSpec, SetWorkers, ToBatcher, WorkerReport, WorkerState
from wsgi_ts.models.numbers import Numbers
from wsgi_ts.models.recorded import RecordedModel
from wsgi_ts.models.registry import Registry
from wsgi_ts.models.trials import Trials
from wsgi_ts.models.version import ModelVersion
from wsgi_ts.models.workers import WorkerScaler
from wsgi_ts.settings.config import Config

PEER = Peer(os.getpid(), os.getuid())
NAMED: dict[str, Any] = {"model_name": "m", "version": "1.0"}
OTHER = {"workers": 2, "threads": 1, "batch_size": 8, "batch_policy": "none", "max_batch_delay": 5}


class Server:
    """A registry with one model of two workers, and a batcher that starts and stops workers at once.

    Attributes:
        fails_after_s: workers that are started from now on fail so many seconds later, 0: before anybody can wait for
            them; None: they get ready.
    """

    def __init__(self) -> None:
        self.registry = Registry(Numbers(9000))
        self.messages: list[ToBatcher] = []
        self.records = 0
        self.fails_after_s: float | None = None
        self._there: set[int] = set()
        self.scaler = WorkerScaler(self.registry, 0, self._send, lambda: None)
        self.trials = Trials(Config(), self.registry, self.scaler, self._operation_on, self._record)
        directory = ModelDirectory(Path("/m"), Manifest("m"), "m.mar", extracted=True)
        spec = ModelSpec(self.registry.numbers.allocate_index(), "m", "1.0", "/m", "h.py", None, batch_size=2)
        self.model = ModelVersion(spec, directory, None, place(0))
        self.registry.add(self.model)
        self.scaler.set_limits(self.model, 2, 2)
        self.messages.clear()

    def _send(self, batcher: int, message: ToBatcher) -> None:
        self.messages.append(message)
        if not isinstance(message, SetWorkers):
            return
        wanted = {each.worker_id for each in message.workers}
        for worker_id in wanted - self._there:
            ready = WorkerReport(worker_id, 0, WorkerState.READY, load_status=200)
            failed = WorkerReport(worker_id, 0, WorkerState.FAILED, load_status=500)
            if self.fails_after_s:
                self.registry.apply_report(batcher, WorkerReport(worker_id, 0, WorkerState.LOADING))
                threading.Timer(self.fails_after_s, self.registry.apply_report, (batcher, failed)).start()
            else:
                self.registry.apply_report(batcher, ready if self.fails_after_s is None else failed)
        for worker_id in self._there - wanted:
            self.registry.apply_report(batcher, WorkerReport(worker_id, 0, WorkerState.STOPPED))
        self._there = wanted

    @contextlib.contextmanager
    def _operation_on(self, name: str, version: str | None) -> Iterator[ModelVersion]:
        with self.model.operation:
            yield self.model

    def _record(self) -> None:
        self.records += 1

    def recorded(self) -> dict[str, Any]:
        return RecordedModel.from_model(self.model, is_default=True, config=Config()).to_json()

    def replaced(self) -> bool:
        """Whether workers were replaced since the last look."""
        found = any(isinstance(each, SetWorkers) and each.replaced for each in self.messages)
        self.messages.clear()
        return found


@pytest.fixture
def server() -> Server:
    return Server()


def test_smaller_batches_and_rules_need_no_new_workers(server: Server) -> None:
    server.trials.begin(peer=PEER, model_name="m")
    shown = server.trials.change(
        peer=PEER, **NAMED, workers=2, threads=0, batch_size=1, batch_policy="none", max_batch_delay=7
    )
    assert (shown["batch_size"], shown["batch_policy"], shown["max_batch_delay"]) == (1, "none", 7)
    assert [type(each) for each in server.messages] == [LoadModel]
    server.trials.end(peer=PEER, **NAMED)
    assert not server.replaced()
    assert server.model.spec.batch_size == 2


def test_those_that_go_are_told_so_and_are_not_counted_as_wanted(server: Server) -> None:
    """A worker's CPU threads are shared out among those that stay: a replaced one once halved them."""
    server.trials.begin(peer=PEER, model_name="m")
    server.trials.change(peer=PEER, **NAMED, **OTHER)
    counts = [(len(each.workers), each.replaced) for each in server.messages if isinstance(each, SetWorkers)]
    assert counts == [(4, 2), (2, 0)]
    assert {worker.started_with for worker in server.model.workers.values()} == {(8, 1)}


def test_nothing_of_a_trial_is_recorded_until_it_is_kept(server: Server) -> None:
    before = server.recorded()
    server.trials.begin(peer=PEER, model_name="m")
    server.trials.change(peer=PEER, **NAMED, **{**OTHER, "workers": 3})
    assert server.recorded() == before
    server.trials.end(peer=PEER, **NAMED, keep=True)
    assert server.records == 1
    kept = server.recorded()
    changed = {key: kept[key] for key in kept if kept[key] != before.get(key)}
    assert changed == {
        "minWorkers": 3,
        "maxWorkers": 3,
        "batchSize": 8,
        "maxBatchDelay": 5,
        "batchPolicy": "none",
        "threadsPerWorker": 1,
    }
    read = RecordedModel.from_json("m", "1.0", kept)
    assert read.tuned == {"batch_policy": "none", "threads_per_worker": 1}
    assert read.to_json() == kept


def test_what_held_before_comes_back_exactly(server: Server) -> None:
    before = server.recorded()
    server.trials.begin(peer=PEER, model_name="m")
    server.trials.change(peer=PEER, **NAMED, **{**OTHER, "workers": 1})
    server.trials.end(peer=PEER, **NAMED)
    assert server.recorded() == before
    assert len(server.model.workers) == 2
    assert {worker.started_with for worker in server.model.workers.values()} == {(2, 0)}
    assert server.records == 0


@pytest.mark.parametrize("after_s", [0, 0.1])
def test_workers_that_do_not_start_leave_all_as_it_was(server: Server, after_s: float) -> None:
    server.trials.begin(peer=PEER, model_name="m")
    ids = set(server.model.workers)
    server.fails_after_s = after_s
    with pytest.raises(InternalServerError, match="Failed to start workers"):
        server.trials.change(peer=PEER, **NAMED, **OTHER)
    assert set(server.model.workers) == ids
    assert not any(worker.is_replaced for worker in server.model.workers.values())
    with pytest.raises(InternalServerError):
        server.trials.change(peer=PEER, **NAMED, **{**OTHER, "workers": 3, "threads": 0, "batch_size": 2})
    assert set(server.model.workers) == ids
    server.trials.end(peer=PEER, **NAMED)
    assert server.model.trial is None


def test_what_cannot_be_put_back_exactly_holds_for_what_comes(server: Server) -> None:
    server.trials.begin(peer=PEER, model_name="m")
    server.trials.change(peer=PEER, **NAMED, **OTHER)
    server.fails_after_s = 0
    server.trials.end(peer=PEER, **NAMED)
    assert server.model.trial is None
    assert server.model.spec.batch_size == 2
    assert len(server.model.workers) == 2


def test_one_at_a_time_and_only_who_has_begun(server: Server) -> None:
    server.trials.begin(peer=PEER, model_name="m")
    with pytest.raises(ConflictStatus, match="wsgi-ts tune"):
        server.trials.begin(peer=PEER, model_name="m")
    with pytest.raises(ConflictStatus, match="tries nothing"):
        server.trials.end(peer=Peer(1, 0), **NAMED)
    for wrong in ({"workers": 0}, {"batch_size": True}, {"batch_policy": "sometimes"}):
        with pytest.raises(BadRequest):
            server.trials.change(peer=PEER, **NAMED, **{**OTHER, **wrong})
    server.trials.end(peer=PEER, **NAMED)
    with pytest.raises(ConflictStatus, match="tries nothing"):
        server.trials.change(peer=PEER, **NAMED, **OTHER)


def test_the_end_of_who_tries_puts_everything_back(server: Server) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        peer = Peer(process.pid, os.getuid())
        server.trials.begin(peer=peer, model_name="m")
        server.trials.change(peer=peer, **NAMED, **OTHER)
        process.kill()
    eventually(lambda: server.model.trial is None, within=10, what="the end of the trial")
    assert server.model.spec.batch_size == 2


def test_not_while_the_server_stops(server: Server) -> None:
    server.registry.draining = True
    with pytest.raises(ServiceUnavailable):
        server.trials.begin(peer=PEER, model_name="m")
