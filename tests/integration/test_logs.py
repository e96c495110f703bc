"""The log files of a running server: contents, rotation, reopening, configuration, and what never gets into them."""

from __future__ import annotations

import gzip
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.archives import archive
from support.eventually import eventually
from support.log4j2 import LOG4J2
from support.server import ServerProcess

FILES = ("access_log.log", "model_log.log", "model_metrics.log", "ts_log.log", "ts_metrics.log")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3} \[(TRACE|DEBUG|INFO |WARN |ERROR)\] \S.* - .*")
LABELS = re.split(
    r"\|",
    "Torchserve version|TS Home|Current directory|Temp directory|Metrics config path|Number of GPUs|Number of CPUs|"
    "Max heap size|Python executable|Config file|Inference address|Management address|Metrics address|Model Store|"
    "Initial Models|Log dir|Metrics dir|Netty threads|Netty client threads|Default workers per model|Blacklist Regex|"
    "Maximum Response Size|Maximum Request Size|Limit Maximum Image Pixels|Prefer direct buffer|Allowed Urls|"
    "Custom python dependency for model allowed|Enable metrics API|Metrics mode|Disable system metrics|"
    "Workflow Store|CPP log config|Model config|System metrics command|Model API enabled",
)
QUIET = {"disable_system_metrics": "true"}
TALKS = """
import sys
def handle(data, context):
    if data is None:
        return None
    print("to stdout")
    print("to stderr", file=sys.stderr)
    return [row.get("body", b"") for row in data]
"""
FAILS_TO_LOAD = """
class Broken:
    def initialize(self, context):
        self.deeper()
    def deeper(self):
        raise RuntimeError("cannot load this")
    def handle(self, data, context):
        return data
"""
SLEEPS = """
import time
def handle(data, context):
    if data is None:
        return None
    print("goes to sleep")
    time.sleep(60)
"""

Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose files a test may move away, but must not judge by their number of lines."""
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    archive(store, "talks", TALKS)
    archive(store, "broken", FAILS_TO_LOAD, config_yaml="maxRetryTimeoutInSec: 600\n")
    archive(store, "sleeps", SLEEPS, config_yaml="responseTimeout: 1\n")
    with ServerProcess(store=store, config=QUIET, web_workers=2) as running:
        for name in ("echo", "talks"):
            assert running.register(f"{name}.mar").status == 200
        yield running


def wait_for(server: ServerProcess, file: str, text: str, within: float = 10) -> str:
    def found() -> str:
        content = server.log(file)
        return content if text in content else ""

    return eventually(found, within=within, what=f"{text!r} in {file}")


def test_all_files_are_there_right_after_the_start(server: ServerProcess) -> None:
    assert {name for name in FILES if (server.home / "logs" / name).exists()} == set(FILES)
    assert server.log("model_metrics.log") == ""
    assert "Model server started" in server.output()


def test_the_start_tells_the_whole_configuration(server: ServerProcess) -> None:
    text = server.log()
    messages = [line.partition(" - ")[2] for line in text.splitlines()]
    assert [label for label in LABELS if not any(message.startswith(f"{label}: ") for message in messages)] == []
    assert f"Model Store: {server.store}" in text


def test_every_line_of_ts_log_has_torchserves_form_and_is_on_stdout_too(server: ServerProcess) -> None:
    lines = server.log().splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    eventually(lambda: set(lines) <= set(server.output().splitlines()), within=5)


def test_a_prediction_makes_one_line_in_the_access_log_and_no_other(server: ServerProcess) -> None:
    def others() -> list[str]:
        lines = server.log("model_log.log").splitlines() + server.log().splitlines()
        # Metrics come by the second and not by the request.
        return [line for line in lines if " TS_METRICS - " not in line and " MODEL_METRICS - " not in line]

    seen = server.log("access_log.log").count("/predictions/echo")
    assert server.predict("echo", b"x").status == 200
    before = others()
    with server.raw() as connection:
        for _ in range(50):
            connection.send(b"POST /predictions/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx")
            assert connection.read_answer()[0].startswith(b"HTTP/1.1 200")
    eventually(lambda: server.log("access_log.log").count("/predictions/echo") == seen + 51, within=5)
    assert others() == before
    last = server.log("access_log.log").splitlines()[-1]
    assert re.fullmatch(r'\S{23} - /127\.0\.0\.1:\d+ "POST /predictions/echo HTTP/1\.1" 200 \d+', last)


def test_what_a_handler_prints(server: ServerProcess) -> None:
    server.predict("talks", b"x")
    wait_for(server, "model_log.log", "to stdout")
    text = wait_for(server, "model_log.log", "to stderr")
    assert re.search(r"\[INFO \] W-\d+-talks_1\.0-stdout MODEL_LOG - to stdout\n", text)
    assert re.search(r"\[WARN \] W-\d+-talks_1\.0-stderr MODEL_LOG - to stderr\n", text)
    for everywhere in (server.log, server.output):
        eventually(lambda everywhere=everywhere: "-stdout MODEL_LOG - to stdout\n" in everywhere(), within=5)


def test_a_failing_load_prints_its_traceback_line_by_line(server: ServerProcess) -> None:
    assert server.register("broken.mar", synchronous="false").status == 202

    def trace() -> list[str]:
        lines = [line for line in server.output().splitlines() if "-broken_1.0-stderr MODEL_LOG - " in line]
        return [line.partition(" MODEL_LOG - ")[2].strip() for line in lines]

    # The first try, and three more after 1, 1 and 2 seconds.
    last = "RuntimeError: cannot load this"
    eventually(lambda: trace().count(last) >= 4, within=60, what="four tracebacks")
    wanted = ["self.deeper()", 'raise RuntimeError("cannot load this")', last]
    assert [message for message in trace() if message in wanted][:12] == wanted * 4
    assert trace().count("Traceback (most recent call last):") >= 4
    for text in ("Auto recovery start timestamp: ", "Retry worker: ", "Worker disconnected."):
        wait_for(server, "ts_log.log", text)
    assert server.request("management", "DELETE", "/models/broken").status == 200


def test_a_worker_that_does_not_answer_in_time(server: ServerProcess) -> None:
    assert server.register("sleeps.mar").status == 200
    assert server.predict("sleeps", b"x").status == 500

    def of_the_model(text: str) -> list[str]:
        return [line for line in text.splitlines() if "sleeps" in line or line.startswith("org.pytorch")]

    eventually(lambda: any("Auto recovery succeeded" in line for line in of_the_model(server.log())), within=10)
    wait_for(server, "ts_log.log", "goes to sleep")
    # What the handler prints comes on a way of its own.
    lines = [line for line in of_the_model(server.log()) if " MODEL_LOG - " not in line]
    at = next(number for number, line in enumerate(lines) if line.endswith(" - Backend worker error"))
    assert lines[at - 1].endswith("Number or consecutive unsuccessful inference 1")
    assert lines[at + 1] == (
        "org.pytorch.serve.wlm.WorkerInitializationException: Backend worker did not respond in given time"
    )
    order = ("Worker disconnected", "Auto recovery start timestamp", "Retry worker")
    assert all(any(part in line for line in lines[at:]) for part in order)
    assert server.request("management", "DELETE", "/models/sleeps").status == 200


HOSTILE = (
    b"GET /models/a%0d%0aforged?token=topsecret HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /predictions/\xc2\x9b31m\x85\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /predictions/echo?url=http://me:topsecret@host/?X-Amz-Signature=topsecret HTTP/1.1\r\nhost: x\r\n"
    b"authorization: Bearer topsecrettopsecret\r\nx-evil: a\x1b[31m\r\ncontent-length: 0\r\n\r\n",
    b"GET /\x1b[2J HTTP/1.1\r\nhost: x\r\n\r\n",
)


@pytest.mark.parametrize("api", ["inference", "management"])
def test_no_request_forges_a_line_or_leaves_a_secret(server: ServerProcess, api: str) -> None:
    for request in HOSTILE:
        with server.raw(api) as connection:
            connection.send(request)
            connection.read_answer()
    url = "http%3A%2F%2Fme%3Atopsecret%40127.0.0.1%3A1%2Fm.mar%3FX-Amz-Signature%3Dtopsecret"
    server.request("management", "POST", f"/models?url={url}%0d%0aforged&model_name=a%1b%0aforged", body=b"")
    wait_for(server, "access_log.log", "POST /models?url=http")
    for name in (*FILES, None):
        data = (server.home / "logs" / name if name else server.home / "output.log").read_bytes()
        assert b"topsecret" not in data
        assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]", data)
        assert not any(line.startswith("forged") for line in data.decode().splitlines())
    access = server.log("access_log.log")
    assert access.isascii()
    assert all(re.fullmatch(r'\S{23} - \S+ ".*" \d{3} \d+', line) for line in access.splitlines())


def test_sigusr1_opens_the_files_again_in_every_process(server: ServerProcess) -> None:
    logs = server.home / "logs"
    for name in FILES:
        (logs / name).rename(logs / f"{name}.moved")
    (supervisor,) = server.processes("supervisor")
    supervisor.kill(signal.SIGUSR1)
    roles = ("supervisor", "inference-arbiter", "web-worker", "management-arbiter", "management-worker")
    roles += ("grpc-server", "batcher", "template")

    def all_have_it() -> bool:
        members = [member for role in roles for member in server.processes(role)]
        return len(members) >= 9 and not any(writes_to(member.pid, logs, ".moved") for member in members)

    eventually(all_have_it, within=10, what="all processes on new files")
    sizes = {name: (logs / f"{name}.moved").stat().st_size for name in FILES}
    server.predict("talks", b"x")  # web worker, template
    server.request("management", "GET", "/models")
    assert server.request("management", "PUT", "/models/echo?min_worker=2&synchronous=true").status == 200  # batcher
    supervisor.kill(signal.SIGUSR2)  # its state goes to the log
    wait_for(server, "ts_log.log", "wsgi_ts.supervisor - State: ")
    wait_for(server, "ts_log.log", "State change null -> WORKER_STARTED")
    wait_for(server, "model_log.log", "to stdout")
    wait_for(server, "access_log.log", "GET /models ")
    wait_for(server, "access_log.log", "POST /predictions/talks ")
    assert sizes == {name: (logs / f"{name}.moved").stat().st_size for name in FILES}


def writes_to(pid: int, folder: Path, suffix: str) -> bool:
    """Whether a process has a file of the folder open whose name ends so."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith(f"{folder}/") and target.endswith(suffix):
            return True
    return False


# Servers of their own


def test_files_are_rotated_while_all_processes_write(start_server: Start, store: Path, tmp_path: Path) -> None:
    archive(store, "talks", TALKS)
    config = tmp_path / "logging.yaml"
    rows = "".join(
        f"  {name}: {{maxBytes: {size}, backupCount: 0}}\n"
        for name, size in (("access_log", 3000), ("model_log", 3000), ("ts_log", 6000))
    )
    config.write_text(f"handlers:\n{rows}")
    server = start_server(store=store, config=QUIET, arguments=["--log-config", str(config)])
    assert server.register("talks.mar").status == 200
    logs = server.home / "logs"
    sent = 0

    def rotated() -> bool:
        nonlocal sent
        for _ in range(20):
            assert server.predict("talks", b"x").status == 200
            sent += 1
        return all(len(list(logs.glob(f"{name}.*.log.gz"))) >= 2 for name in ("access_log", "model_log", "ts_log"))

    eventually(rotated, within=30, what="two rotations of each file")

    def whole(name: str) -> str:
        """All that there is of a file; nothing while one of the rotated ones is just being compressed."""
        try:
            packed = [gzip.decompress(path.read_bytes()).decode() for path in logs.glob(f"{name}.*.log.gz")]
            return "".join(packed) + "".join(path.read_text() for path in logs.glob(f"{name}*.log"))
        except FileNotFoundError:
            return ""

    counts = {"access_log": "POST /predictions/talks ", "model_log": "- to stdout\n", "ts_log": "- to stdout\n"}
    for name, mark in counts.items():
        eventually(lambda name=name, mark=mark: whole(name).count(mark) == sent, within=10, what=name)
    assert all(re.fullmatch(r"\w+\.\d\d-[A-Z][a-z]{2}(\.\d+)?\.log\.gz", path.name) for path in logs.glob("*.gz"))


def test_a_log4j2_xml_reaches_every_process(start_server: Start, store: Path, tmp_path: Path) -> None:
    archive(store, "talks", TALKS)
    config = tmp_path / "log4j2.xml"
    config.write_text(LOG4J2.replace("2 KB", "2 MB"))
    where = tmp_path / "elsewhere"
    vmargs = f"-Xmx4g -Dlog4j.configurationFile=file://{config}"
    server = start_server(store=store, config={**QUIET, "vmargs": vmargs}, environment={"LOG_LOCATION": str(where)})
    assert server.register("talks.mar").status == 200
    server.predict("talks", b"x")
    access = where / "requests.log"
    eventually(lambda: "/predictions/talks" in access.read_text(), within=5)
    form = r'\d\d:\d\d INFO   access: /127\.0\.0\.1:\d+ "(GET|POST) \S+ HTTP/1\.1" \d+ \d+ \[ACCESS_LOG\]'
    assert all(re.fullmatch(form, line) for line in access.read_text().splitlines())
    ts_log = where / "ts_log.log"
    eventually(lambda: "MODEL_LOG - to stderr" in ts_log.read_text(), within=5)
    assert "MODEL_LOG - to stdout" not in ts_log.read_text()  # below WARN
    told = "left out, has no counterpart here: <socket> appender 'logstash' (line 23)"
    eventually(lambda: ts_log.read_text().count(told) == 1, within=5)
    assert "/predictions/talks" not in server.output()
    assert sorted(path.name for path in where.iterdir()) == ["requests.log", "ts_log.log"]


def test_the_access_log_can_be_switched_off(start_server: Start, tmp_path: Path) -> None:
    config = tmp_path / "logging.json"
    config.write_text('{"loggers": {"ACCESS_LOG": {"level": "OFF"}}}')
    server = start_server(config={**QUIET, "async_logging": "true"}, arguments=["--log-config", str(config)])
    server.request("inference", "GET", "/ping")
    # Asynchronous: what a process logs last is written before it ends.
    assert server.stop() == []
    assert server.log("access_log.log") == ""
    assert server.log().endswith(" - Torchserve stopped.\n")
    assert server.output().count("Model server started.") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log4j2.xml", "<Configuration>\n<Loggers>\n", "log4j2.xml:3: no element found"),
        ("l.yaml", "root:\n  handlers: [nobody]\n", "l.yaml:1: logger 'root': no handler is called 'nobody'"),
        ("l.yaml", "handlers:\n  own: {class: logging.handlers.SocketHandler}\n", "configure handler 'own'"),
    ],
)
def test_a_bad_log_configuration_stops_the_start(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    server = ServerProcess(arguments=["--log-config", str(path)])
    try:
        server.start(ready=False)
        eventually(lambda: server.returncode is not None, within=20, what="end of the launcher")
        assert server.returncode == 1
        (line,) = server.output().splitlines()
        assert message in line
        assert server.leftovers() == []
    finally:
        server.__exit__(None)


def test_locations_and_a_folder_that_cannot_be_written(start_server: Start, tmp_path: Path) -> None:
    blocked, metrics = tmp_path / "file", tmp_path / "metrics"
    blocked.touch()
    environment = {"LOG_LOCATION": str(blocked / "logs"), "METRICS_LOCATION": str(metrics)}
    server = start_server(config=QUIET, environment=environment)
    assert server.request("inference", "GET", "/ping").status == 200
    assert sorted(path.name for path in metrics.iterdir()) == ["model_metrics.log", "ts_metrics.log"]
    assert not (server.home / "logs").exists()
    assert f"Cannot write {blocked}/logs/ts_log.log: going on without it" in server.output()
    assert "Model server started." in server.output()


def test_a_start_notices_that_yesterdays_log_is_due(start_server: Start, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    old = logs / "ts_log.log"
    old.write_text("a line of yesterday\n")
    yesterday = time.time() - 86400
    os.utime(old, (yesterday, yesterday))
    start_server(config=QUIET, environment={"LOG_LOCATION": str(logs)})
    packed = logs / time.strftime("ts_log.%d-%b.log.gz", time.localtime(yesterday))
    eventually(packed.exists, within=15)
    assert gzip.decompress(packed.read_bytes()).startswith(b"a line of yesterday\n")
