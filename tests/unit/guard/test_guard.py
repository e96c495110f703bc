"""The guard, with real processes: small programs stand for the supervisor, and talk to it as the supervisor does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.eventually import eventually

from wsgi_ts.control.memory_file import memory_file, read_memory_file
from wsgi_ts.guard.link import GuardLink
from wsgi_ts.instance.run_directory import RunDirectory
from wsgi_ts.process import boot_id

ROOT = Path(__file__).resolve().parents[3]

#: What every stand-in begins with: `guard` is the link, `life` counts from 1, `note` appends a line to a file.
SUPERVISOR = """
import argparse, os, signal, sys, time
from wsgi_ts.guard.link import GuardLink
from wsgi_ts.process import die_with_parent

parser = argparse.ArgumentParser()
for name in ("config-fd", "guard-fd", "guard-pid", "life"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--run-dir")
parser.add_argument("--last-end")
parser.add_argument("--kept", action="append", default=[])
options = parser.parse_args()
die_with_parent(options.guard_pid)
kept = {name: int(fd) for name, fd in (each.split("=") for each in options.kept)}
guard = GuardLink(options.guard_fd, options.guard_pid, options.life, kept)
life = options.life

def note(*words):
    with open("notes", "a") as file:
        print(life, *words, file=file)

def unblock():
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def wait():
    note("waits")
    while True:
        signal.pause()
"""
EXIT_7_ON_SIGTERM = "signal.signal(signal.SIGTERM, lambda *_: os._exit(7)); unblock(); "


class Place:
    """A directory in which guards are started; what their supervisors note."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._running: list[subprocess.Popen[str]] = []

    def start(self, code: str, *flags: str, ignored: tuple[signal.Signals, ...] = ()) -> subprocess.Popen[str]:
        """Starts a guard whose supervisors run `code`; `ignored` signals are so from the beginning."""
        config = memory_file("config", b"the configuration")

        def ignore() -> None:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

        command = [sys.executable, "-m", "wsgi_ts.guard", "--config-fd", str(config)]
        command += ["--run-dir", str(self.path / "run")]
        guard = subprocess.Popen(
            [*command, *flags, "--", sys.executable, "-c", SUPERVISOR + code],
            cwd=self.path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.path)},
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(config,),
            preexec_fn=ignore,  # noqa: PLW1509 (no threads here)
        )
        os.close(config)
        self._running.append(guard)
        return guard

    def notes(self) -> list[str]:
        """The lines that supervisors have noted."""
        path = self.path / "notes"
        return path.read_text().splitlines() if path.exists() else []

    def await_note(self, line: str) -> None:
        """Waits for a line."""
        eventually(lambda: line in self.notes(), within=20, what=f"{line!r} among {self.notes()}")

    def end(self) -> None:
        """Kills what still runs."""
        for guard in self._running:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(guard.pid).kill()
            guard.communicate()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.end()


@pytest.mark.parametrize(("code", "status"), [("sys.exit(3)", 3), ("die()", 137), ("sys.exit(0)", 0)])
def test_a_supervisor_that_never_came_up_is_not_followed(place: Place, code: str, status: int) -> None:
    guard = place.start(f"note('is here'); {code}")
    assert guard.wait(120) == status
    assert place.notes() == ["1 is here"]


def test_an_engine_s_supervisor_is_told_to_stop_at_once_when_the_owner_has_ended(place: Place) -> None:
    with subprocess.Popen(["sleep", "1000"]) as owner:
        code = "signal.signal(signal.SIGQUIT, lambda *_: (note('quits'), os._exit(7))); unblock(); wait()"
        guard = place.start(code, "--owner", str(owner.pid))
        place.await_note("1 waits")
        owner.kill()
    assert guard.wait(120) == 7
    assert place.notes() == ["1 waits", "1 quits"]


def test_an_engine_s_supervisor_is_not_followed(place: Place) -> None:
    guard = place.start("note('is here'); guard.say_came_up(); die()", "--owner", str(os.getpid()))
    assert guard.wait(120) == 137
    assert place.notes() == ["1 is here"]


def test_a_guard_whose_owner_is_gone_already_starts_nothing(place: Place) -> None:
    with subprocess.Popen(["true"]) as owner:
        owner.wait()
    guard = place.start("note('is here')", "--owner", str(owner.pid))
    assert guard.wait(120) == 0
    assert place.notes() == []


def test_a_supervisor_that_came_up_is_followed_whatever_its_end(place: Place) -> None:
    code = "note(options.last_end); guard.say_came_up() if life < 4 else None; [die, lambda: sys.exit(5), die, "
    guard = place.start(code + "lambda: sys.exit(0)][life - 1]()")
    assert guard.wait(120) == 0
    # The last one did not come up, but earlier ones did, so that it would have been followed but for its status 0.
    assert place.notes() == ["1 ", "2 killed by SIGKILL", "3 exit code 5", "4 killed by SIGKILL"]
    assert guard.stderr is not None
    assert "The supervisor has ended (killed by SIGKILL); it is started again in 0 s." in guard.stderr.read()


def test_what_is_kept_is_handed_to_the_next(place: Place) -> None:
    code = """
if life == 1:
    guard.keep_json("models", {"a": 1})
    guard.keep_json("models", {"a": 2})
    guard.keep_json("gone", {})
    guard.drop("gone")
    guard.say_came_up()
    die()
note(sorted(kept), guard.kept_json("models"), guard.kept_json("gone"), os.get_inheritable(kept["models"]))
note(open(f"/proc/self/fd/{options.config_fd}").read())
"""
    assert place.start(code).wait(120) == 0
    assert place.notes() == ["2 ['models'] {'a': 2} None False", "2 the configuration"]


def test_signals_go_on_and_wait_until_they_can_be_handled(place: Place) -> None:
    code = (
        """
note("starts")
time.sleep(0.5)
signal.signal(signal.SIGUSR1, lambda *_: note("USR1"))
"""
        + EXIT_7_ON_SIGTERM
        + "guard.say_came_up(); wait()"
    )
    guard = place.start(code)
    place.await_note("1 starts")
    guard.send_signal(signal.SIGUSR1)
    place.await_note("1 waits")
    place.await_note("1 USR1")
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(120) == 7


@pytest.mark.parametrize(
    ("flags", "ignored", "sent", "status"),
    [
        # A background server stops at SIGINT wherever it was started, and outlives its terminal.
        ((), (signal.SIGINT, signal.SIGQUIT), signal.SIGINT, 8),
        ((), (), signal.SIGHUP, None),
        # In the foreground what is ignored stays so (nohup, a script's background job), and SIGHUP is a wish to stop.
        (("--foreground",), (signal.SIGINT, signal.SIGQUIT), signal.SIGINT, None),
        (("--foreground",), (signal.SIGHUP,), signal.SIGHUP, None),
        (("--foreground",), (), signal.SIGHUP, 7),
        (("--foreground",), (), signal.SIGINT, 8),
    ],
)
def test_signals_in_the_background_and_in_the_foreground(
    place: Place, flags: tuple[str, ...], ignored: tuple[signal.Signals, ...], sent: signal.Signals, status: int | None
) -> None:
    code = "signal.signal(signal.SIGUSR2, lambda *_: note('USR2')); "
    code += "signal.signal(signal.SIGINT, lambda *_: os._exit(8)); "
    guard = place.start(code + EXIT_7_ON_SIGTERM + "wait()", *flags, ignored=ignored)
    place.await_note("1 waits")
    guard.send_signal(sent)
    if status is None:
        # Signals are taken in the order of their numbers or arrival: once this one is through, that one is, too.
        guard.send_signal(signal.SIGUSR2)
        place.await_note("1 USR2")
        guard.send_signal(signal.SIGTERM)
        status = 7
    assert guard.wait(120) == status


def test_a_supervisor_that_is_stopping_is_not_followed(place: Place) -> None:
    guard = place.start("guard.keep_json('models', {}); guard.say_came_up(); guard.say_stopping(); note('said'); die()")
    assert guard.wait(120) == 137
    assert place.notes() == ["1 said"]


def test_a_guard_that_is_told_to_stop_while_it_waits_removes_what_is_left(place: Place) -> None:
    """The supervisor dies six times before it comes up again, so that the guard waits for ten seconds."""
    code = """
from pathlib import Path
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.instance.run_directory import RunDirectory
directory = RunDirectory.acquire(Path(options.run_dir), lock_fd=kept.get("lock"), owner_pid=options.guard_pid)
guard.keep("lock", directory.lock_fd)
Doorbell.create(directory.prefix + "-b0")
Path(".model_server.pid").write_text(str(options.guard_pid))
note(directory.prefix)
if life == 1:
    guard.say_came_up()
die()
"""
    guard = place.start(code)
    assert guard.stderr is not None
    assert any("in 10 s" in line for line in guard.stderr)
    assert len(place.notes()) == 7
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(120) == 0
    assert len(place.notes()) == 7
    assert not (place.path / "run").exists()
    assert not (place.path / ".model_server.pid").exists()
    prefixes = [line.split()[1] for line in place.notes()]
    assert len(set(prefixes)) == 7
    assert not [name for name in os.listdir("/dev/shm") for prefix in prefixes if prefix in name]


def test_everything_ends_with_the_guard(place: Place) -> None:
    guard = place.start("guard.say_came_up(); note(os.getpid()); wait()")
    eventually(lambda: len(place.notes()) == 2, within=20, what="the supervisor")
    supervisor = psutil.Process(int(place.notes()[0].split()[1]))
    guard.kill()
    eventually(lambda: not supervisor.is_running(), within=20, what="end of the supervisor")


def test_the_guard_is_small(place: Place) -> None:
    """Its fork that cleans up has to load more: none of that stays."""
    code = "import sys; import wsgi_ts.guard.guard; print(*sorted(set(sys.modules) - set(sys.stdlib_module_names)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("wsgi_ts")}
    modules = ("guard", "guard.guard", "guard.notify", "guard.protocol", "restart_backoff")
    assert ours == {"wsgi_ts", *(f"wsgi_ts.{name}" for name in modules)}
    assert not {"numpy", "yaml", "falcon", "cryptography", "psutil", "posix_ipc"} & set(done.stdout.split())
    guard = place.start("guard.say_came_up(); die() if life == 1 else wait()")
    place.await_note("2 waits")
    assert psutil.Process(guard.pid).memory_full_info().uss < 12 * 2**20


def test_the_record_names_the_guard(tmp_path: Path) -> None:
    parent = os.getppid()
    directory = RunDirectory.acquire(tmp_path / "run", owner_pid=parent)
    record = (tmp_path / "run" / "record.json").read_text()
    assert f'"pid":{parent},' in record
    assert f'"pid":{os.getpid()},' in record
    assert boot_id() in record
    directory.release(for_good=False)
    assert (tmp_path / "run" / "lock").exists()
    again = RunDirectory.acquire(tmp_path / "run", lock_fd=os.dup(directory.lock_fd), owner_pid=parent)
    os.close(directory.lock_fd)
    again.release()
    assert not (tmp_path / "run").exists()


def test_without_a_guard_nothing_is_kept() -> None:
    link = GuardLink()
    link.keep_json("models", {"a": 1})
    link.say_came_up()
    link.say_stopping()
    assert link.kept_json("models") is None


def test_a_memory_file_is_read_from_its_beginning() -> None:
    fd = memory_file("test", b"abc" * 100_000)
    assert read_memory_file(fd) == read_memory_file(fd) == b"abc" * 100_000
    os.close(fd)
