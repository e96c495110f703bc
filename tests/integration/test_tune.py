"""`wsgi-ts tune` on a running server, whose models take a + b*n by sleeping: what is learnt, chosen, kept, put back."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

from wsgi_ts.errors import ServerError

#: A test run in the background ignores Ctrl-C, and so would what it starts.
_LAUNCH = """
import signal, sys
from wsgi_ts.cli.commands import wsgi_ts
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(wsgi_ts())
"""
COMMAND = [sys.executable, "-c", _LAUNCH]
#: A sleep is never shorter than it should be, and takes no CPU from the others.
COST = """
import time
class Cost:
    def initialize(self, context):
        pass
    def handle(self, data, context):
        if any(bytes(row["body"]) == b"bad" for row in data):
            raise ValueError("bad")
        time.sleep({fixed_s} + {per_request_s} * len(data))
        return ["ok"] * len(data)
"""
CONFIG = "# ours\nminWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\nmaxBatchDelay: 50\n"
FIXED_S, PER_REQUEST_S = 0.030, 0.002
PRESENT = {"batchSize": 1, "maxBatchDelay": 50, "minWorkers": 1, "maxWorkers": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    source = COST.format(fixed_s=FIXED_S, per_request_s=PER_REQUEST_S)
    for name in ("cost", "other"):
        archive(store, name, source, config_yaml=CONFIG)
    archive(store, "steps", source, config_yaml=f"{CONFIG}continuousBatching: true\n")
    config = {"load_models": "all", "job_queue_size": "1000", "default_workers_per_model": "1"}
    with ServerProcess(store=store, config=config, snapshots=True) as server:
        yield server


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "input.bin"
    path.write_bytes(b"good")
    return path


def command(server: ServerProcess, model: str, sample: Path, *words: str) -> list[str]:
    flags = ["--run-dir", str(server.run_dir), "--input", str(sample), "--plot", str(sample.with_suffix(".png"))]
    return [*COMMAND, "tune", model, *flags, *words]


def tune(server: ServerProcess, model: str, sample: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(server, model, sample, *words), capture_output=True, text=True, timeout=300, check=False
    )


def described(server: ServerProcess, model: str) -> dict[str, Any]:
    [found] = server.request("management", "GET", f"/models/{model}").json()
    return {key: found[key] for key in PRESENT}


def snapshots(server: ServerProcess) -> list[Path]:
    return sorted(server.home.glob("**/config/*.cfg"))


@pytest.mark.slow
def test_the_curve_is_learnt_a_setting_chosen_and_everything_put_back(server: ServerProcess, sample: Path) -> None:
    before = snapshots(server)
    done = tune(server, "cost", sample, "--slo", "p99=3000ms", "--minutes", "0.5", "--max-batch-size", "16")
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((server.run_dir / "tune" / "cost.json").read_text())
    # A sleep is never shorter; on a busy machine it is longer, and less of that shows in the long ones.
    sizes = {row["n"]: row["ms"] / 1e3 for row in found["sizes"]}
    for size, seconds in sizes.items():
        assert 0.98 * (FIXED_S + PER_REQUEST_S * size) < seconds < 4 * (FIXED_S + PER_REQUEST_S * size)
    assert 0.5 * FIXED_S < found["curve"]["a_ms"] / 1e3 < 4 * FIXED_S
    [chosen] = [row for row in found["points"] if row["chosen"]]
    assert chosen["batch_size"] > 1
    # One after the other a worker does not do more than this, whatever the machine.
    assert chosen["goodput"] > 1.5 / (FIXED_S + PER_REQUEST_S)
    assert 0.5 < chosen["predicted"] / chosen["goodput"] < 2
    assert chosen["p99_ms"] <= 3000
    assert "+batchSize: " in done.stdout
    assert "Nothing was changed" in done.stdout
    assert described(server, "cost") == PRESENT
    assert snapshots(server) == before


@pytest.mark.slow
def test_what_is_applied_is_in_the_snapshot_and_not_in_the_archive(server: ServerProcess, sample: Path) -> None:
    content = (server.store / "other.mar").read_bytes()
    flags = ("--minutes", "0.4", "--max-batch-size", "8", "--max-workers", "2", "--apply")
    done = tune(server, "other", sample, "--slo", "p99=3000ms", *flags)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Applied, without a restart" in done.stdout
    now = described(server, "other")
    assert now["batchSize"] > 1
    assert f"batchSize: {now['batchSize']}" in done.stdout
    newest = snapshots(server)[-1].read_text()
    assert f'\\"batchSize\\"\\: {now["batchSize"]}' in newest or f'"batchSize"\\: {now["batchSize"]}' in newest
    assert (server.store / "other.mar").read_bytes() == content
    assert server.predict("other", b"good").body == b"ok"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "term", "kill"])
def test_everything_is_put_back_when_it_is_ended(server: ServerProcess, sample: Path, number: signal.Signals) -> None:
    words = command(server, "cost", sample, "--slo", "p99=3000ms", "--max-batch-size", "8")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "batches of 4" in line:
                    break
            assert described(server, "cost") != PRESENT
            process.send_signal(number)
            _, told = process.communicate(timeout=200)
        finally:
            process.kill()
    if number != signal.SIGKILL:
        assert process.returncode == 130, told
        assert "everything is as before" in told
        assert described(server, "cost") == PRESENT
    eventually(lambda: described(server, "cost") == PRESENT, within=30, what="the settings of before")
    with contextlib.closing(server.control) as control:
        facts = control.call("begin_trial", model_name="cost")
        assert facts["batch_policy"] == "adaptive"
        assert facts["threads"] == 0
        control.call("end_trial", model_name="cost", version="1.0")


def test_changes_lose_no_request(server: ServerProcess) -> None:
    """Each kind of change, with new workers and without, while clients ask; then the settings are kept, and go back."""
    stop = threading.Event()
    answers: list[tuple[int, bytes]] = []

    def ask() -> None:
        while not stop.is_set():
            reply = server.predict("cost", b"good")
            answers.append((reply.status, reply.body))

    clients = [threading.Thread(target=ask) for _ in range(6)]
    with contextlib.closing(server.control) as control:
        before = control.call("begin_trial", model_name="cost")
        named = {"model_name": "cost", "version": "1.0"}
        keys = ("workers", "threads", "batch_size", "batch_policy", "max_batch_delay")
        for client in clients:
            client.start()
        try:
            for values in (
                (1, 1, 8, "fixed", 20),
                (3, 1, 8, "adaptive", 50),
                (3, 1, 2, "none", 50),
                (1, 2, 4, "fixed", 10),
                (2, 1, 16, "none", 7),
            ):
                shown = control.call("change_trial", **named, **dict(zip(keys, values, strict=True)))
                assert tuple(shown[key] for key in keys) == values
                seen = len(answers)
                eventually(lambda seen=seen: len(answers) > seen + 12, within=60, what="more answers")
            control.call("end_trial", **named, keep=True)
            assert described(server, "cost") == {**PRESENT, "batchSize": 16, "maxBatchDelay": 7, "minWorkers": 2,
                                                 "maxWorkers": 2}  # fmt: skip
            assert '"batchPolicy"' in snapshots(server)[-1].read_text()
            control.call("begin_trial", model_name="cost")
            control.call("change_trial", **named, **{key: before[key] for key in keys})
            control.call("end_trial", **named, keep=True)
        finally:
            stop.set()
            for client in clients:
                client.join()
    assert described(server, "cost") == PRESENT
    assert {answer for answer in answers} == {(200, b"ok")}
    assert '"batchPolicy"' not in snapshots(server)[-1].read_text()


def test_a_model_that_is_tried_on_is_not_changed_by_others(server: ServerProcess) -> None:
    with contextlib.closing(server.control) as control:
        control.call("begin_trial", model_name="cost")
        try:
            reply = server.request("management", "PUT", "/models/cost?min_worker=2")
            assert reply.status == 409
            assert "wsgi-ts tune" in reply.json()["message"]
            with pytest.raises(ServerError, match="tries settings"):
                control.call("begin_trial", model_name="cost")
            with pytest.raises(ServerError, match="must be a number from 1"):
                wrong = {"workers": 1, "threads": 0, "batch_size": 0, "batch_policy": "none", "max_batch_delay": 1}
                control.call("change_trial", model_name="cost", version="1.0", **wrong)
        finally:
            control.call("end_trial", model_name="cost", version="1.0")
        with pytest.raises(ServerError, match="tries nothing"):
            control.call("end_trial", model_name="cost", version="1.0")
    assert described(server, "cost") == PRESENT


def test_who_cannot_be_helped_is_told_why(server: ServerProcess, sample: Path) -> None:
    goal = ("--slo", "p99=3000ms", "--minutes", "0.1")
    unknown = tune(server, "nothing", sample, *goal)
    assert (unknown.returncode, unknown.stderr) == (1, "Model not found: nothing\n")
    bad = sample.with_name("bad.bin")
    bad.write_bytes(b"bad")
    refused = tune(server, "cost", bad, *goal)
    assert refused.returncode == 1
    assert "The server answers the sample with 503 Prediction failed" in refused.stderr
    steps = tune(server, "steps", sample, *goal)
    assert steps.returncode == 1
    assert "step by step" in steps.stderr
    impossible = tune(server, "cost", sample, "--slo", "p99=5ms", "--minutes", "0.1")
    assert impossible.returncode == 1
    assert "p99=5ms cannot be met" in impossible.stderr
    assert tune(server, "cost", sample, "--slo", "p99=5").returncode == 2
    elsewhere = subprocess.run(
        [*COMMAND, "tune", "cost", "--data", "1", "--slo", "p99=5ms", "--run-dir", str(sample.parent)],
        capture_output=True,
        check=False,
        text=True,
    )
    assert elsewhere.returncode == 3
    assert elsewhere.stderr.startswith("Not running")
    assert described(server, "cost") == PRESENT
