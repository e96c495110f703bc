"""The launcher, with real processes: pid file, running check, foreground, stop; and doctor and status.

Where a test needs no model server but only a process that the launcher has started, a small program (`RECORDER`) stands
for the supervisor; the guard between them is the real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.eventually import eventually

from wsgi_ts.checks import start as start_checks
from wsgi_ts.checks.configuration import check_addresses, check_leftovers, check_shared_memory
from wsgi_ts.checks.machine import Finding
from wsgi_ts.checks.start import StartError
from wsgi_ts.cli import commands as cli
from wsgi_ts.cli import start as cli_start
from wsgi_ts.cli import stop as cli_stop
from wsgi_ts.cli.doctor import examine
from wsgi_ts.cli.status import format_state, print_status
from wsgi_ts.control.channel import Channel
from wsgi_ts.control.client import ControlPlane, NotReachable
from wsgi_ts.errors import ModelNotFound, ServerError
from wsgi_ts.instance.listeners import BindError, bind, grpc_sockets
from wsgi_ts.instance.pid_file import PidFile, ServerHandle, is_server, parse_pid
from wsgi_ts.instance.shared_memory import start_bytes
from wsgi_ts.process import boot_id, start_time
from wsgi_ts.security.certificates import self_signed
from wsgi_ts.settings.config import Config
from wsgi_ts.settings.sources import CommandLine, load_config
from wsgi_ts.supervisor.start import open_certificates

ROOT = Path(__file__).resolve().parents[3]

#: Takes over the configuration, says that it runs, and exits with 5 on SIGTERM, with 6 on SIGINT.
RECORDER = """
import os, signal, sys
for number, status in ((signal.SIGTERM, 5), (signal.SIGINT, 6)):
    signal.signal(number, lambda *_, status=status: os._exit(status))
signal.pthread_sigmask(signal.SIG_SETMASK, ())
config = open(f"/proc/self/fd/{sys.argv[sys.argv.index('--config-fd') + 1]}").read()
open("taken.json", "w").write(config)
open("server.pid", "w").write(str(os.getpid()))
print("server up", os.getsid(0) == os.getpid(), os.getcwd(), flush=True)
while True:
    signal.pause()
"""

LAUNCHER = f"""
import signal, sys
from wsgi_ts.cli import commands as cli, start
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # a background job of a shell inherits them ignored
start.supervisor_command = lambda: [sys.executable, "-c", {RECORDER!r}]
sys.exit(cli.torchserve())
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a model store, which is the directory of temporary files too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "store").mkdir()
    yield tmp_path
    pid = parse_pid((tmp_path / "server.pid").read_text()) if (tmp_path / "server.pid").exists() else None
    if pid is not None and start_time(pid) is not None:
        os.kill(pid, signal.SIGKILL)


def environment(place: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TS_", "LOG_", "METRICS_"))}
    kept.pop("TEMP", None)
    return kept | {"TMPDIR": str(place), "PYTHONPATH": str(ROOT)} | more


def start(place: Path, *flags: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *flags],
        cwd=place,
        env=environment(place, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchserve(place: Path, *flags: str, **more: str) -> tuple[int, str, str]:
    """Runs the real launcher, for commands that start nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "wsgi_ts.cli", *flags],
        cwd=place,
        env=environment(place, **more),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def marked_process(*arguments: str) -> subprocess.Popen[str]:
    """A process that waits, with these elements in its command line."""
    code = "import signal; print('up', flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.fixture
def server(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that looks like a server, named in the pid file."""
    process = marked_process("wsgi_ts.supervisor")
    (place / ".model_server.pid").write_text(str(process.pid))
    with process:
        yield process
        process.kill()


@pytest.fixture
def stranger(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of somebody else, whose pid stands in the pid file."""
    process = marked_process("not-wsgi_ts.supervisor")
    (place / ".model_server.pid").write_text(str(process.pid))
    with process:
        yield process
        process.kill()


# --- torchserve: what starts nothing ---


def test_version(place: Path) -> None:
    assert torchserve(place, "--version") == (0, "TorchServe Version is 0.12.0\n", "")
    assert torchserve(place, "-v")[0] == 0


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--log", "x.xml"], "log_config", "x.xml"),
        (["--workflow=store"], "workflow_store", "store"),
        (["--d"], None, None),  # of two, in TorchServe as well
        (["--disable"], "disable_token_auth", True),
        (["--drain-del", "2"], "drain_delay", "2"),  # ours alone
        (["--models", "a=--log"], "models", ["a=--log"]),
    ],
)
def test_the_first_letters_of_a_flag(words: list[str], name: str | None, value: Any) -> None:
    if name is None:
        with pytest.raises(SystemExit):
            cli.torchserve_parser().parse_args(words)
    else:
        assert getattr(cli.torchserve_parser().parse_args(words), name) == value


def test_contradicting_flags(place: Path) -> None:
    status, _, errors = torchserve(place, "--start", "--stop")
    assert status == 2
    assert "not allowed with" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Missing mandatory parameter --model-store"),
        (["--start", "--model-store", "no"], "--model-store directory not found: no"),
        (["--model-store", "store", "--ts-config", "no"], "--ts-config file not found: no"),
        (["--model-store", "store", "--log-config", "no"], "--log-config file not found: no"),
    ],
)
def test_start_errors(place: Path, flags: list[str], message: str) -> None:
    assert torchserve(place, *flags) == (1, message + "\n", "")
    assert list(place.iterdir()) == [place / "store"]


def test_bad_configuration_is_reported_before_anything_starts(place: Path) -> None:
    (place / "config.properties").write_text("model_store=store\nmax_request_size=abc\n")
    expected = "config.properties:2: key max_request_size: 'abc' is not a whole number\n"
    assert torchserve(place, "--start", "--ncs") == (1, expected, "")
    assert not (place / ".model_server.pid").exists()


def test_stop_without_a_server(place: Path) -> None:
    assert torchserve(place, "--stop") == (0, "TorchServe is not currently running.\n", "")


def test_stop_removes_the_pid_file_of_a_server_that_has_died(place: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    pid_file = place / ".model_server.pid"
    pid_file.write_bytes(ended.stdout)
    said = "Removing orphan pid file.\nTorchServe is not currently running.\n"
    assert torchserve(place, "--stop") == (0, said, "")
    assert not pid_file.exists()


def test_the_launcher_imports_nothing_heavy(place: Path) -> None:
    code = (
        "import sys, wsgi_ts.cli.commands; "
        "heavy = {'torch', 'yaml', 'falcon', 'gunicorn', 'numpy', 'psutil', 'asyncio'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(place), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_directory_for_temporary_files_that_cannot_be_written(place: Path) -> None:
    status, output, errors = torchserve(place, "--model-store", "store", "--ncs", TEMP="/proc")
    assert (status, errors) == (1, "")
    assert output.startswith("directory for temporary files /proc: cannot be written: ")
    assert output.endswith("; change its permissions, or set TEMP to another\n")


# --- torchserve: starting ---


def test_start_returns_at_once(place: Path) -> None:
    with start(place, "--start", "--ncs", "--model-store", "store", "--models", "a=b.mar", "c.mar") as launcher:
        assert launcher.wait(120) == 0
        assert launcher.stdout is not None
        # The server writes to the launcher's output, and is a session of its own.
        assert launcher.stdout.readline() == f"server up True {place}\n"
        pid = int((place / ".model_server.pid").read_text())
        guard, supervisor = psutil.Process(pid), psutil.Process(int((place / "server.pid").read_text()))
        assert "wsgi_ts.guard" in guard.cmdline()
        assert os.getsid(pid) == pid
        assert supervisor.ppid() == pid
        config = Config.from_json((place / "taken.json").read_text())
        assert config.load_models == (("a", "b.mar"), (None, "c.mar"))
        assert config.no_config_snapshots
        assert config.temp_dir == place
        again = torchserve(place, "--start", "--ncs", "--model-store", "store")
        assert again == (
            1, "TorchServe is already running, please use torchserve --stop to stop TorchServe.\n", "",
        )  # fmt: skip
        (place / "key_file.json").touch()
        assert torchserve(place, "--stop") == (0, "TorchServe has stopped.\n", "")
        assert launcher.stdout.read() == ""
        assert not (place / "key_file.json").exists()
        assert not (place / ".model_server.pid").exists()
        assert eventually(lambda: start_time(pid) is None, within=10)


def test_warnings_are_printed(place: Path) -> None:
    (place / "my.cfg").write_text("model_store=store\nmax_reqest_size=1\nmodel_store=store\n")
    with start(place, "--ts-config", "my.cfg") as launcher:
        assert launcher.stderr is not None
        assert launcher.wait(120) == 0
        assert "Warning: my.cfg:2: unknown key 'max_reqest_size'" in launcher.stderr.readline()
        assert torchserve(place, "--stop", "--foreground") == (0, "", "")


@pytest.mark.parametrize(
    ("sent", "status"),
    [(signal.SIGTERM, 5), (signal.SIGINT, 6), (signal.SIGHUP, 5)],
)
def test_foreground_forwards_signals(place: Path, sent: signal.Signals, status: int) -> None:
    with start(place, "--start", "--foreground", "--model-store", "store") as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline().startswith("server up")
        # The launcher has become the guard.
        assert (place / ".model_server.pid").read_text() == str(launcher.pid)
        launcher.send_signal(sent)
        assert launcher.wait(120) == status


def test_foreground_server_killed_by_a_signal(place: Path) -> None:
    with start(place, "--foreground", "--model-store", "store") as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline().startswith("server up")
        os.kill(int((place / "server.pid").read_text()), signal.SIGKILL)
        assert launcher.wait(120) == 128 + 9


def test_two_starts_at_the_same_time(place: Path) -> None:
    launchers = [start(place, "--model-store", "store") for _ in range(4)]
    statuses = []
    for launcher in launchers:
        with launcher:
            statuses.append(launcher.wait(120))
            if statuses[-1] == 0:
                assert launcher.stdout is not None
                assert launcher.stdout.readline().startswith("server up")
                os.kill(int((place / ".model_server.pid").read_text()), 0)
    assert sorted(statuses) == [0, 1, 1, 1]
    assert torchserve(place, "--stop", "--foreground")[0] == 0


# --- the pid file ---


@pytest.mark.parametrize("content", ["", "0", "-1", "12x", "99999999999999", "\xff\xfe", "4194304999"])
def test_orphan_pid_files(place: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = place / ".model_server.pid"
    path.write_bytes(content.encode("latin-1"))
    with PidFile(path) as pid_file:
        assert not cli_start._running_server(pid_file, place)
    assert capsys.readouterr().out == ("Removing orphan pid file.\n" if content else "")
    assert not path.exists()


def test_orphan_pid_of_a_dead_process(place: Path) -> None:
    with marked_process("wsgi_ts.supervisor") as process:
        process.kill()
    (place / ".model_server.pid").write_text(str(process.pid))
    assert torchserve(place, "--model-store", "no")[1].splitlines() == [
        "Removing orphan pid file.",
        "--model-store directory not found: no",
    ]
    assert not (place / ".model_server.pid").exists()


def test_a_zombie_does_not_run(place: Path) -> None:
    with marked_process("wsgi_ts.supervisor") as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_server(process.pid, place)


def test_a_foreign_process_is_never_signalled(place: Path, stranger: subprocess.Popen[str]) -> None:
    assert torchserve(place, "--stop", "--foreground") == (0, "TorchServe is not currently running.\n", "")
    with start(place, "--model-store", "store") as launcher:
        assert launcher.wait(120) == 0
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "Removing orphan pid file.\n"
        assert launcher.stdout.readline().startswith("server up")
        torchserve(place, "--stop", "--foreground")
    assert stranger.poll() is None


def test_a_symbolic_link_is_refused(place: Path) -> None:
    (place / "precious").write_text("data")
    (place / ".model_server.pid").symlink_to(place / "precious")
    status, output, _ = torchserve(place, "--model-store", "store")
    assert status == 1
    assert "is a symbolic link; remove it" in output
    assert torchserve(place, "--stop")[0] == 1
    assert (place / "precious").read_text() == "data"


def test_a_directory_in_the_place_of_the_pid_file(place: Path) -> None:
    (place / ".model_server.pid").mkdir()
    assert "cannot be written" in torchserve(place, "--model-store", "store")[1]
    assert "is a directory; remove it" in torchserve(place, "--stop")[1]


def test_a_fifo_in_the_place_of_the_pid_file_does_not_block(place: Path) -> None:
    os.mkfifo(place / ".model_server.pid")
    assert torchserve(place, "--stop")[0] in (0, 1)


def test_running_server_is_found_by_its_command_line(place: Path, server: subprocess.Popen[str]) -> None:
    assert "already running" in torchserve(place, "--model-store", "store")[1]
    assert torchserve(place, "--stop", "--foreground") == (0, "", "")
    assert server.wait(60) == -signal.SIGTERM


def test_running_server_is_found_by_its_record(place: Path, stranger: subprocess.Popen[str]) -> None:
    started = start_time(stranger.pid)
    assert started is not None
    record = {"pid": stranger.pid, "start_time": started, "boot_id": boot_id(), "prefix": "wsgi-ts-x"}
    assert not is_server(stranger.pid, place)
    for change, expected in (({}, True), ({"start_time": started - 1}, False), ({"boot_id": "x"}, False)):
        (place / "record.json").write_text(json.dumps(record | change))
        assert is_server(stranger.pid, place) is expected
    (place / "record.json").write_text("{broken")
    assert not is_server(stranger.pid, place)


def test_stop_takes_too_long(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_stop, "STOP_LIMIT_S", 0.05)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    command = [sys.executable, "-c", code, "wsgi_ts.supervisor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        (place / ".model_server.pid").write_text(str(process.pid))
        assert cli.torchserve(["--stop", "--foreground"]) == 0
        assert capsys.readouterr().out == "Stopping TorchServe took too long.\n"
        assert not (place / ".model_server.pid").exists()
        process.kill()


def test_server_handle(place: Path) -> None:
    assert ServerHandle.find(os.getpid(), place) is None
    with marked_process("org.pytorch.serve.ModelServer") as process:
        found = ServerHandle.find(process.pid, place)
        assert found is not None
        assert not found.wait(0.01)
        process.kill()
        assert found.wait(60)
        process.wait()
        with pytest.raises(ProcessLookupError):
            found.send(signal.SIGTERM)
        found.close()


# --- wsgi-ts ---


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """A control socket whose answers the test chooses, by operation."""
    answers: dict[str, object] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    channel = Channel(connection)
                    request = channel.receive()
                    channel.send(answers[request["op"]])  # type: ignore[arg-type]

        thread = threading.Thread(target=serve)
        thread.start()
        yield tmp_path, answers
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_calls_to_the_supervisor(supervisor: tuple[Path, dict[str, object]]) -> None:
    run_dir, answers = supervisor
    answers["status"] = {"ok": {"pid": 1}}
    plane = ControlPlane(run_dir)
    assert plane.call("status") == {"pid": 1}
    plane.close()
    answers["status"] = {"error": ModelNotFound.named("m").to_dict()}
    with pytest.raises(ServerError, match="Model not found: m"):
        plane.call("status")
    plane.close()
    with pytest.raises(NotReachable):
        ControlPlane(run_dir / "none").call("status")


def test_status(supervisor: tuple[Path, dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, answers = supervisor
    state = {
        "pid": 7,
        "healthy": True,
        "models": [{"name": "m", "workers": 2}, {"name": "long", "gpu": None}],
    }
    answers["status"] = {"ok": state}
    assert print_status(run_dir, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == state
    assert cli.wsgi_ts(["status", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "pid      7",
        "healthy  yes",
        "",
        "models",
        "  name  workers  gpu",
        "  m     2        -",
        "  long  -        -",
    ]


def test_status_where_nothing_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.wsgi_ts(["status", "--run-dir", str(place)]) == 3
    assert "Not running" in capsys.readouterr().err


def test_status_while_the_guard_starts_the_supervisor_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"pid": os.getpid(), "start_time": start_time(os.getpid()), "boot_id": boot_id()}
    (place / "record.json").write_text(json.dumps(record))
    assert cli.wsgi_ts(["status", "--run-dir", str(place)]) == 1
    assert f"Process {os.getpid()} starts the server" in capsys.readouterr().err


def test_status_shows_nested_objects() -> None:
    lines = list(format_state({"a_b": [], "models": {"m": {"versions": ["1.0", "2.0"], "set": {"x": 1}}}}))
    assert lines == ["a b  -", "", "models", "  name  versions  set", "  m     1.0, 2.0  x=1"]


def test_stop_by_run_dir(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.wsgi_ts(["stop", "--run-dir", str(place)]) == 0
    assert "Not running" in capsys.readouterr().out
    with marked_process("wsgi_ts.supervisor") as process:
        (place / "record.json").write_text(json.dumps({"pid": process.pid}))
        # There is no control socket yet: the signal must do.
        assert cli.wsgi_ts(["stop", "--run-dir", str(place)]) == 0
        assert capsys.readouterr().out == "Stopped.\n"
        assert process.wait(60) == -signal.SIGTERM


def test_serve_with_a_run_dir_leaves_the_pid_file_alone(place: Path) -> None:
    launcher = LAUNCHER.replace("cli.torchserve()", "cli.wsgi_ts()")
    command = [sys.executable, "-c", launcher, "serve", "--model-store", "store", "--run-dir", "mine"]
    with subprocess.Popen(command, cwd=place, env=environment(place), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("server up")
        assert Config.from_json((place / "taken.json").read_text()).run_dir == place / "mine"
        assert not (place / ".model_server.pid").exists()
        process.terminate()
        assert process.wait(60) == 5


# --- doctor ---


def findings(command_line: CommandLine) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(command_line, {"PATH": ""})}


def free_port_config(place: Path, *, imports_torch: bool = False) -> None:
    """Writes a configuration on free ports; the doctor tries to import torch only where it is to: that takes long."""
    ports = []
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
    for sock in sockets:
        ports.append(sock.getsockname()[1])
        sock.close()
    names = ("inference_address", "management_address", "metrics_address")
    lines = [f"{name}=http://127.0.0.1:{port}\n" for name, port in zip(names, ports[:3], strict=True)]
    lines += [f"grpc_inference_port={ports[3]}\n", f"grpc_management_port={ports[4]}\n"]
    lines += [] if imports_torch else ["preload_modules=\n"]
    (place / "config.properties").write_text("".join(lines))


def test_doctor_on_a_good_configuration(place: Path) -> None:
    free_port_config(place, imports_torch=True)
    (place / "store" / "m.mar").touch()
    found = findings(CommandLine(model_store="store", run_dir="run", models=("m.mar", "x.mar")))
    assert found["inference_address"].level == "OK"
    assert found["torch"].level == "OK"
    assert found["preload_modules"].text == "torch can be imported"
    assert found["model store"].text == f"{place / 'store'}: 1 archives"
    assert found["load_models"].level == "WARN"
    assert found["left-overs"].level == "OK"
    assert found["GPUs"].level in ("OK", "WARN")
    assert all(finding.level != "FAIL" for finding in found.values())


def test_doctor_finds_a_taken_port(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free_port_config(place)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with (place / "config.properties").open("a") as file:
            file.write(f"inference_address={address}\n")
        assert cli.wsgi_ts(["doctor", "--model-store", "store", "--run-dir", "run"]) == 1
    output = capsys.readouterr().out
    assert re.search(rf"(?m)^FAIL +inference_address +{re.escape(address)}: Address already in use", output)


def test_doctor_finds_a_taken_grpc_port(place: Path) -> None:
    free_port_config(place)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (place / "config.properties").open("a") as file:
            file.write(f"grpc_management_port={port}\n")
        found = findings(CommandLine(model_store="store", run_dir="run"))
    assert found["grpc_inference_port"].level == "OK"
    assert found["grpc_management_port"].level == "FAIL"
    assert f"grpc://127.0.0.1:{port}: Address already in use" in found["grpc_management_port"].text


def test_doctor_checks_unix_addresses(place: Path) -> None:
    free_port_config(place)
    with (place / "config.properties").open("a") as file:
        file.write(f"inference_address=unix:{place}/i.sock\nmanagement_address=unix:{place}/no/m.sock\n")
    command_line = CommandLine(model_store="store", run_dir="run")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("i.sock")
        assert findings(command_line)["inference_address"].level == "OK"
        listener.listen()
        found = findings(command_line)
    assert "a server listens there" in found["inference_address"].text
    assert "not a directory" in found["management_address"].text


def test_doctor_without_a_usable_configuration(place: Path) -> None:
    found = findings(CommandLine())
    assert found["configuration"] == Finding("FAIL", "configuration", "Missing mandatory parameter --model-store")


def test_doctor_measures_shared_memory() -> None:
    many = Config(web_workers=1024, slots_per_worker=65536, max_request_size=1, max_response_size=1)
    (finding,) = check_shared_memory(many)
    free = os.statvfs("/dev/shm")
    assert free.f_bavail * free.f_frsize < 2**38
    assert finding.level == "FAIL"
    assert "--shm-size" in finding.text
    # Kept warm is what large bodies took, so no start takes it.
    odd = Config(slots_per_worker=1025, number_of_gpu=0, shm_warm_bytes=2**30)
    (finding,) = check_shared_memory(odd)
    assert f", {start_bytes(odd, 1) / 2**20:.1f} MiB needed" in finding.text


def test_what_no_process_can_address(place: Path) -> None:
    """16,384 slots of 4 GiB of addresses each, for two web workers and gRPC: only a batcher would find out."""
    config = Config(slots_per_worker=16384, max_request_size=2**31 - 1, max_response_size=2**31 - 1, number_of_gpu=0)
    with pytest.raises(StartError, match="take 192 TiB of addresses, of which a process has 64; set one") as caught:
        start_checks.check_shared_memory(config, 1)
    assert [(each.level, each.text) for each in check_shared_memory(config)] == [("FAIL", str(caught.value))]


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(StartError) as caught:
        check()
    return str(caught.value)


def test_doctor_says_what_the_start_would_say(place: Path) -> None:
    made = self_signed([])
    (place / "server.key").write_bytes(made.to_pem())
    (place / "server.pem").write_bytes(self_signed([]).to_pem())
    free_port_config(place, imports_torch=True)
    with (place / "config.properties").open("a") as file:
        file.write(
            "enable_grpc_ssl=true\nprivate_key_file=server.key\ncertificate_file=server.pem\npython=/bin/false\n"
            "preload_modules=json, nothing_of_this_name\nmetrics_config=none.yaml\nasync_logging=2\n"
        )
    command_line = CommandLine(model_store="store", run_dir="d" * 100)
    config = load_config(command_line, {})
    found = {(finding.level, finding.text) for finding in examine(command_line, {"PATH": ""})}
    with ExitStack() as stack:
        assert ("FAIL", refusal(lambda: open_certificates(config, stack))) in found
    assert ("FAIL", refusal(lambda: start_checks.check_interpreter(config))) in found
    assert ("FAIL", refusal(lambda: start_checks.check_run_directory(config.run_dir))) in found
    assert ("WARN", config.warnings[0]) in found
    assert "async_logging: '2' is neither true nor false" in config.warnings[0]
    assert any(
        level == "FAIL" and text.startswith("nothing_of_this_name cannot be imported (ModuleNotFoundError: ")
        for level, text in found
    )
    assert ("OK", "json can be imported") in found
    assert ("WARN", f"{place}/none.yaml: No such file or directory; no metrics are recorded") in found


def test_addresses_that_are_wrong_are_told_by_the_key_to_correct() -> None:
    """A name that nobody knows is no port in use."""
    wrong = Config(grpc_management_address="nobody.invalid", grpc_inference_port=0)
    with pytest.raises(BindError) as caught:
        bind(grpc_sockets(wrong), {})
    said = str(caught.value)
    assert said.startswith("Failed to bind to address: grpc://nobody.invalid:7071 (grpc_management_address): ")
    assert said.endswith("; correct grpc_management_address")
    found = {each.subject: each for each in check_addresses(wrong)}
    assert found["grpc_management_port"].level == "FAIL"
    assert found["grpc_management_port"].text.endswith("; correct grpc_management_address")


def test_doctor_warns_of_a_certificate_as_the_start_does(place: Path) -> None:
    free_port_config(place)
    with (place / "config.properties").open("a") as file:
        file.write("enable_grpc_ssl=true\ntls_security_level=1\n")
    found = list(examine(CommandLine(model_store="store", run_dir="run"), {"PATH": ""}))
    said = [(each.level, each.text) for each in found if each.subject == "certificate"]
    assert [level for level, _ in said] == ["OK", "WARN", "WARN"]
    assert said[1][1].startswith("tls_security_level=1 is below OpenSSL's own, which is 2")
    assert said[2][1].startswith("TLS with a self-signed certificate made at this start")


def test_doctor_finds_what_a_dead_instance_left(place: Path) -> None:
    with marked_process("wsgi_ts.supervisor") as process:
        process.kill()
    prefix = f"wsgi-ts-{os.urandom(16).hex()}"
    record = {"pid": process.pid, "start_time": 1, "boot_id": boot_id(), "prefix": prefix}
    (place / "record.json").write_text(json.dumps(record))
    names = [Path("/dev/shm") / f"{prefix}-s1", Path("/dev/shm") / f"sem.{prefix}-b0"]
    for name in names:
        name.touch()
    try:
        (finding,) = check_leftovers(dataclasses.replace(Config(), run_dir=place))
    finally:
        for name in names:
            name.unlink()
    assert finding.level == "WARN"
    assert "left 2 shared-memory objects" in finding.text
