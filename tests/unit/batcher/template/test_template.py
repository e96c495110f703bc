"""The worker template as a real process: what its workers find, how their ends are seen, what of them remains."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from wsgi_ts.control.channel import Channel
from wsgi_ts.control.codec import TO_TEMPLATE
from wsgi_ts.logs.plan import default_plan
from wsgi_ts.messages import KillWorker, ModelSpec, SpawnWorker
from wsgi_ts.process import start_time

HERE = Path(__file__).parent
LIMIT_S = 60.0


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {LIMIT_S:g} s: {what}"
        time.sleep(0.01)


class TemplateProcess:
    """A template, spoken to as its batcher does."""

    def __init__(self, folder: Path, *preload: str) -> None:
        self.folder = folder
        self.prefix = "wsgi-ts-" + secrets.token_hex(16)
        ours, theirs = socket.socketpair()
        warm, their_warm = socket.socketpair()
        for each in (ours, warm):
            each.settimeout(LIMIT_S)
        self.channel, self.warm = Channel(ours), Channel(warm)
        plan = folder / "logging.json"
        default_plan(folder / "logs", folder / "logs").write(plan)
        modules = [word for name in preload for word in ("--preload", name)]
        with (folder / "stdout").open("wb") as stdout, theirs, their_warm:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "wsgi_ts.batcher.template", "--fd", str(theirs.fileno())),
                    *("--log-plan", str(plan), "--entry", "template_workers:run"),
                    *(("--warm-fd", str(their_warm.fileno()), *modules) if preload else ()),
                ],
                pass_fds=[theirs.fileno(), their_warm.fileno()] if preload else [theirs.fileno()],
                stdout=stdout,
                env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent.parent}"},
            )
        if preload:
            assert self.channel.receive() == {"event": "template_started"}
        ready = (self.warm if preload else self.channel).receive()
        assert ready == {"event": "template_ready", "missing": {}}

    def start(self, worker_id: int, behaviour: str, start_count: int = 1, **spec: Any) -> None:
        model = ModelSpec(1, "probe", "1.0", str(self.folder), behaviour, None, **spec)
        order = SpawnWorker(worker_id, start_count, model, None, None, self.prefix, 0, 1)
        self.channel.send(TO_TEMPLATE.encode(order))

    def expect(self, event: str, worker_id: int) -> dict[str, Any]:
        message = self.channel.receive()
        assert (message["event"], message["worker_id"]) == (event, worker_id), message
        return message

    def started_and_loaded(self, worker_id: int, behaviour: str, **spec: Any) -> tuple[int, dict[str, Any]]:
        self.start(worker_id, behaviour, **spec)
        pid = self.expect("worker_started", worker_id)["pid"]
        return pid, json.loads(self.expect("worker_loaded", worker_id)["message"])

    def kill(self, worker_id: int, start_count: int = 1) -> None:
        self.channel.send(TO_TEMPLATE.encode(KillWorker(worker_id, start_count)))

    def log(self, name: str) -> str:
        return (self.folder / "logs" / name).read_text()

    def close(self) -> None:
        """Goes away, as a batcher that dies does."""
        self.channel.close()
        self.warm.close()
        try:
            self.process.wait(LIMIT_S)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemplateProcess]:
    """One template for the tests that leave it as it was: its start imports torch."""
    template = TemplateProcess(tmp_path_factory.mktemp("template"))
    yield template
    template.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[TemplateProcess]:
    template = TemplateProcess(tmp_path)
    yield template
    template.close()


def test_a_worker_finds_a_clean_process(shared: TemplateProcess) -> None:
    pid, facts = shared.started_and_loaded(9000, "wait")
    assert facts["arguments"] == [9000, 1, None, shared.prefix, 0, 1]
    assert facts["cwd"] == str(shared.folder)
    assert facts["fds"] == [0, 1, 2, 3]
    assert facts["session"] == pid
    assert facts["threads"] == 1
    assert facts["stdin"] == ""
    assert facts["sigterm_is_default"]
    title = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0 ")
    assert title == "wsgi-ts: model worker 9000 probe 1.0"
    shared.kill(9000)
    shared.expect("worker_exited", 9000)


def test_workers_do_not_share_random_numbers(shared: TemplateProcess) -> None:
    first = shared.started_and_loaded(9001, "wait")[1]
    second = shared.started_and_loaded(9002, "wait")[1]
    assert first["numpy_random"] != second["numpy_random"]
    for worker_id in (9001, 9002):
        shared.kill(worker_id)
        shared.expect("worker_exited", worker_id)


@pytest.mark.parametrize(
    ("behaviour", "code", "signal_name", "line"),
    [
        ("return", 0, None, ""),
        ("leave", 3, None, ""),
        ("raise", 1, None, "RuntimeError: on purpose"),
        ("crash", None, "SIGSEGV", "Fatal Python error: Segmentation fault"),
    ],
)
def test_an_exit_is_reported_with_its_cause(
    shared: TemplateProcess, behaviour: str, code: int | None, signal_name: str | None, line: str
) -> None:
    pid, _ = shared.started_and_loaded(9003, behaviour)
    exit_event = shared.expect("worker_exited", 9003)
    assert (exit_event["pid"], exit_event["start_count"]) == (pid, 1)
    assert (exit_event["code"], exit_event["signal"]) == (code, signal_name)
    assert any(line in text for text in exit_event["last_lines"]) or not line
    assert start_time(pid) is None


def test_a_kill_ends_only_the_life_that_it_names(shared: TemplateProcess) -> None:
    shared.started_and_loaded(9004, "wait")
    shared.kill(9004, start_count=2)
    shared.kill(9005)
    shared.kill(9004)
    assert shared.expect("worker_exited", 9004)["signal"] == "SIGKILL"


def test_output_goes_to_the_models_logs(shared: TemplateProcess) -> None:
    shared.started_and_loaded(9006, "print")
    lines = shared.expect("worker_exited", 9006)["last_lines"]
    model_log = [line for line in shared.log("model_log.log").splitlines() if "W-9006-" in line]
    shown = {line[24:] for line in model_log}  # without the time
    assert "[INFO ] W-9006-probe_1.0-stdout MODEL_LOG - plain line äö" in shown
    assert "[WARN ] W-9006-probe_1.0-stderr MODEL_LOG - to stderr" in shown
    assert "[INFO ] W-9006-probe_1.0-stdout MODEL_LOG - bytes \\xff\\x00 and \\x1b[31m" in shown
    assert f"[INFO ] W-9006-probe_1.0-stdout MODEL_LOG - {'z' * 8192} [cut]" in shown
    assert "[INFO ] W-9006-probe_1.0-stdout MODEL_LOG - no line end" in shown
    assert not any("METRICS" in line for line in model_log)
    assert "plain line äö" in lines
    assert "to stderr" in lines
    metric = "HandlerTime.ms:1.5|#ModelName:probe,Level:Model|#hostname:h,requestID:r-1,timestamp:17"
    assert shared.log("model_metrics.log").endswith(f" - {metric}\n")
    everywhere = (shared.folder / "stdout").read_text()
    assert "MODEL_LOG - plain line äö" in everywhere
    assert 'Failed to parse metrics line: "[METRICS]nonsense".' in everywhere
    assert "MODEL_LOG - plain line äö" in shared.log("ts_log.log")


def test_a_flood_is_bounded_and_never_blocks_the_worker(shared: TemplateProcess) -> None:
    before = len(shared.log("model_log.log"))
    shared.started_and_loaded(9007, "flood")
    assert shared.expect("worker_exited", 9007)["code"] == 0
    text = shared.log("model_log.log")[before:]
    assert "lines dropped: more than 1000000 bytes per second" in text
    assert len(text) < 6_000_000


def test_what_a_handler_started_ends_with_its_worker(shared: TemplateProcess) -> None:
    other_pid, _ = shared.started_and_loaded(9008, "wait")
    shared.started_and_loaded(9009, "descendants")
    pids_file = shared.folder / "pids.json"
    eventually(lambda: pids_file.exists() and pids_file.read_text().endswith("]"), "descendants")
    shared.kill(9009)
    shared.expect("worker_exited", 9009)
    descendants = json.loads(pids_file.read_text())
    assert len(descendants) == 3
    eventually(lambda: all(start_time(pid) is None for pid in descendants), "end of the descendants")
    assert start_time(other_pid) is not None
    shared.kill(9008)
    shared.expect("worker_exited", 9008)


def test_rubbish_on_the_status_socket_hurts_nobody(shared: TemplateProcess) -> None:
    shared.start(9010, "rubbish")
    shared.expect("worker_started", 9010)
    shared.started_and_loaded(9011, "wait")
    for worker_id in (9010, 9011):
        shared.kill(worker_id)
        assert shared.expect("worker_exited", worker_id)["signal"] == "SIGKILL"


def test_a_model_with_its_own_python_is_executed(shared: TemplateProcess) -> None:
    pid, facts = shared.started_and_loaded(9011, "wait", python=sys.executable)
    assert facts["arguments"] == [9011, 1, None, shared.prefix, 0, 1]
    assert facts["fds"] == [0, 1, 2, 3]
    assert facts["numpy_random"] == 0.0  # a fresh interpreter: numpy is not imported
    assert facts["cwd"] == str(shared.folder)
    shared.kill(9011)
    assert shared.expect("worker_exited", 9011)["pid"] == pid


def test_a_start_that_fails_is_an_exit(shared: TemplateProcess) -> None:
    shared.start(9012, "wait", python="/nonexistent/python")
    shared.expect("worker_started", 9012)
    exit_event = shared.expect("worker_exited", 9012)
    assert exit_event["code"] == 1
    assert any("FileNotFoundError" in line for line in exit_event["last_lines"])


def test_log_files_are_opened_again_when_the_batcher_says_so(shared: TemplateProcess) -> None:
    log = shared.folder / "logs" / "model_log.log"
    log.rename(log.with_suffix(".old"))
    shared.channel.send({"op": "reopen_logs"})
    eventually(log.exists, "a new model_log.log")
    shared.started_and_loaded(9013, "print")
    shared.expect("worker_exited", 9013)
    assert "plain line" in log.read_text()


def test_the_warm_template_has_workers_of_its_own_and_the_modules(tmp_path: Path) -> None:
    template = TemplateProcess(tmp_path, "wave", "colorsys")
    try:
        template.started_and_loaded(9000, "wait")
        template.channel, template.warm = template.warm, template.channel
        warm_worker, facts = template.started_and_loaded(9001, "wait")
        assert (facts["fds"], facts["threads"], facts["session"]) == ([0, 1, 2, 3], 1, warm_worker)
        warm = psutil.Process(warm_worker).parent()
        assert warm is not None
        assert warm.parent() == psutil.Process(template.process.pid)
        assert warm.cmdline()[0].startswith("wsgi-ts: warm worker template cpu")
        # The end of another worker of the first one finds nothing of the warm one's.
        template.channel, template.warm = template.warm, template.channel
        template.kill(9000)
        template.expect("worker_exited", 9000)
        assert start_time(warm_worker) is not None
        os.kill(warm.pid, signal.SIGKILL)
        template.process.wait(LIMIT_S)
        eventually(lambda: start_time(warm_worker) is None, "end of the warm template's worker")
        assert "The warm worker template ended: killed by SIGKILL." in template.log("ts_log.log")
    finally:
        template.close()


@pytest.mark.parametrize("end", ["channel", "SIGTERM", "SIGKILL"])
def test_no_worker_outlives_the_template(own: TemplateProcess, end: str) -> None:
    own.started_and_loaded(9000, "wait")
    worker_pid, _ = own.started_and_loaded(9001, "descendants")
    pids_file = own.folder / "pids.json"
    eventually(lambda: pids_file.exists() and pids_file.read_text().endswith("]"), "descendants")
    descendants = json.loads(pids_file.read_text())
    if end == "channel":
        own.channel.close()
    else:
        own.process.send_signal(signal.Signals[end])
    own.process.wait(LIMIT_S)
    eventually(lambda: start_time(worker_pid) is None, "end of the worker")
    if end == "SIGKILL":
        # Nobody was left to find them: whoever cleans up after the instance finds them by their marks.
        for pid in descendants:
            os.kill(pid, signal.SIGKILL)
    else:
        assert own.process.returncode == 0
    eventually(lambda: all(start_time(pid) is None for pid in descendants), "end of the descendants")
