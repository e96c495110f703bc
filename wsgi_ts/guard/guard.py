"""`python -m wsgi_ts.guard`: the process that a user starts. It starts the supervisor, and again when that has died.

What has to outlive a supervisor is kept here as open descriptors under names: the lock of the run directory, listening
sockets, what is known of tokens and models. The supervisor hands them over on a socket (`link`), the next one
inherits them. The guard looks into none of them, has no threads, and imports nothing large: there is little to it that
could end it. Signals go on to the supervisor. What a killed supervisor has left is removed by a fork of the guard
(`aftermath`), so that the guard stays small.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence

from wsgi_ts.guard import notify
from wsgi_ts.guard.notify import Notify
from wsgi_ts.guard.protocol import ALIVE, CAME_UP, DROP, FORWARDED, KEEP, LOCK, PACKET_BYTES, REPLACE, STARTED, STOPPING
from wsgi_ts.restart_backoff import RestartBackoff

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
#: They must not end a guard either.
_IGNORED = (signal.SIGALRM, signal.SIGWINCH, signal.SIGTTIN, signal.SIGTTOU)
_CLEAN_UP_TRIES = 3
#: What a dead supervisor has left must not lie about for so many seconds.
_LONG_S = 1.0


class Guard:
    """One instance from start to stop: `run` is all of its life.

    Args:
        command: the supervisor's command, without what the guard adds.
        config_fd: a file in memory with the configuration.
        foreground: started in a terminal: a signal that is ignored stays so, and SIGHUP is a wish to stop.
        kept: what is there to keep from the beginning: descriptors by name.
        owner: the process that the instance is an engine of: it ends with that process, and a supervisor that has died
            is not followed, since the owner's segment has died with it; None for an instance of its own.
    """

    def __init__(
        self,
        command: Sequence[str],
        run_dir: str,
        config_fd: int,
        *,
        foreground: bool,
        kept: Mapping[str, int] | None = None,
        owner: int | None = None,
    ) -> None:
        self._program = tuple(command), config_fd
        self._owner_pid = owner
        self._owner_fd = -1
        self._next_program: tuple[tuple[str, ...], int] | None = None
        self._program_before: tuple[tuple[str, ...], int] | None = None
        self._run_dir = run_dir
        self._foreground = foreground
        self._kept = dict(kept or {})
        self._notify = Notify(os.environ)
        self._backoff = RestartBackoff()
        self._process: subprocess.Popen[bytes] | None = None
        self._lives = 0
        self._last_end = ""
        self._ever_came_up = False
        self._came_up = False
        self._stop_wanted = False
        self._signals, self._signals_in = socket.socketpair()

    def run(self) -> int:
        """Returns the exit status: that of the last supervisor, as a shell shows it."""
        self._listen_for_signals()
        if self._owner_pid is not None:
            try:
                self._owner_fd = os.pidfd_open(self._owner_pid)
            except ProcessLookupError:
                return 0
        while True:
            status = self._one_life()
            _reap_orphans()
            if self._takes_other_program():
                continue
            if self._stop_wanted or not self._ever_came_up or status == 0 or self._owner_pid is not None:
                break
            delay_s = self._backoff.on_death(time.monotonic(), came_up=self._came_up)
            _say(f"The supervisor has ended ({self._last_end}); it is started again in {delay_s:g} s.")
            if delay_s >= _LONG_S:
                # Else the supervisor that follows does it, at its start.
                self._clean_up(for_good=False)
            if self._is_stopped_within(delay_s):
                status = 0
                break
        if LOCK in self._kept and os.path.exists(os.path.join(self._run_dir, "record.json")):
            self._clean_up(for_good=True)
        return status if status >= 0 else 128 - status

    def _takes_other_program(self) -> bool:
        """Looks, after a life, whether the next is another program: a newer one, or the old one where that fails."""
        if self._stop_wanted:
            return False
        if self._next_program is not None:
            self._program_before, self._program, self._next_program = self._program, self._next_program, None
            return True
        if self._program_before is not None:
            _say(f"The new supervisor has never served ({self._last_end}); the one before is started again.")
            os.close(self._program[1])
            self._program, self._program_before = self._program_before, None
            return True
        return False

    def _one_life(self) -> int:
        """Starts a supervisor and waits for its end; returns its return code."""
        self._came_up = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # recv_fds takes no notice of its flags.
        ours.setblocking(False)
        with ours:
            with theirs:
                try:
                    process = self._start(theirs)
                except OSError as error:
                    self._last_end = f"cannot be started: {error.strerror}"
                    _say(f"The supervisor {self._last_end}")
                    return 1
            self._process = process
            pidfd = os.pidfd_open(process.pid)
            try:
                self._serve(ours, pidfd)
            finally:
                os.close(pidfd)
                self._process = None
        code = process.wait()
        self._last_end = f"exit code {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
        return code

    def _start(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        self._lives += 1
        command, config_fd = self._program
        arguments = ["--config-fd", config_fd, "--run-dir", self._run_dir, "--guard-fd", theirs.fileno()]
        arguments += ["--guard-pid", os.getpid(), "--life", self._lives, "--last-end", self._last_end]
        arguments += ["--trial"] if self._program_before is not None else []
        arguments += ["--watched"] if self._notify.is_watched else []
        for name, fd in self._kept.items():
            arguments += ["--kept", f"{name}={fd}"]
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        try:
            return subprocess.Popen(
                [*command, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), config_fd, *self._kept.values()),
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _serve(self, link: socket.socket, pidfd: int) -> None:
        """Does what the supervisor asks for, and passes signals on, until it has ended."""
        poll = select.poll()
        for fd in (link.fileno(), self._signals.fileno(), pidfd, self._owner_fd):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        ended = False
        while not ended:
            ready = {fd for fd, _ in poll.poll()}
            ended = pidfd in ready
            if self._owner_fd in ready:
                # Nobody waits for an answer any more: at once.
                poll.unregister(self._owner_fd)
                self._pass_on(signal.SIGQUIT)
            if self._signals.fileno() in ready:
                self._take_signals()
            if link.fileno() in ready:
                while self._take_packet(link):
                    pass
                if not ended and self._is_closed(link):
                    poll.unregister(link.fileno())

    def _take_packet(self, link: socket.socket) -> bool:
        """Takes one packet; False where there is none."""
        try:
            data, fds, _, _ = socket.recv_fds(link, PACKET_BYTES, 1)
        except (BlockingIOError, ConnectionResetError):
            return False
        if data.startswith(KEEP) and fds:
            self._drop(name := data[len(KEEP) :].decode())
            self._kept[name] = fds[0]
        elif data.startswith(DROP):
            self._drop(data[len(DROP) :].decode())
        elif data == CAME_UP:
            self._came_up = self._ever_came_up = True
            if self._program_before is not None:
                os.close(self._program_before[1])
                self._program_before = None
        elif data.startswith(REPLACE) and fds:
            self._next_program = tuple(json.loads(data[len(REPLACE) :])), fds[0]
            self._notify.reloading()
        elif data == STARTED:
            self._notify.say(notify.READY)
        elif data == ALIVE:
            self._notify.beat()
        elif data == STOPPING:
            self._want_stop()
            try:
                link.send(STOPPING)
            except OSError as error:
                _say(f"The supervisor does not hear: {error.strerror}")
        return bool(data)

    @staticmethod
    def _is_closed(link: socket.socket) -> bool:
        try:
            return not link.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _drop(self, name: str) -> None:
        fd = self._kept.pop(name, -1)
        if fd >= 0:
            os.close(fd)

    def _listen_for_signals(self) -> None:
        """Every signal becomes a byte on a socket; whoever has started the guard may have blocked them until now."""
        self._signals.setblocking(False)
        self._signals_in.setblocking(False)
        signal.set_wakeup_fd(self._signals_in.fileno(), warn_on_full_buffer=False)
        handled = (*FORWARDED, *_IGNORED, signal.SIGHUP, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
        for number in handled:
            # What is ignored in the foreground (nohup, a shell's background job) stays so.
            if not self._foreground or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _nothing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*FORWARDED, signal.SIGHUP))

    def _take_signals(self) -> None:
        try:
            numbers = self._signals.recv(4096)
        except BlockingIOError:
            return
        for number in numbers:
            # The terminal is closed.
            hung_up = number == signal.SIGHUP and self._foreground
            wanted = int(signal.SIGTERM) if hung_up else number
            if wanted in FORWARDED:
                self._pass_on(wanted)

    def _pass_on(self, number: int) -> None:
        """Sends the supervisor a signal; one that says stop is meant for the guard, too."""
        if number in _STOPS:
            self._want_stop()
        if self._process is not None:
            self._process.send_signal(number)

    def _want_stop(self) -> None:
        if not self._stop_wanted:
            self._stop_wanted = True
            self._notify.say(notify.STOPPING)

    def _is_stopped_within(self, seconds: float) -> bool:
        """Waits so long, or until somebody wants a stop; returns whether one is wanted."""
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._signals.fileno(), select.POLLIN)
        self._take_signals()
        while not self._stop_wanted and (left_s := until - time.monotonic()) > 0:
            self._notify.beat()
            poll.poll(min(left_s, _LONG_S) * 1000)
            self._take_signals()
        return self._stop_wanted

    def _clean_up(self, *, for_good: bool) -> None:
        """Removes what is left of the instance, in a fork; unless `for_good` the next supervisor tries once more."""
        for _ in range(_CLEAN_UP_TRIES):
            pid = os.fork()
            if pid == 0:
                self._clean_up_and_exit(for_good)
            if os.waitpid(pid, 0)[1] == 0:
                return
        _say(f"Not everything that the supervisor has left could be removed; see {self._run_dir}.")

    def _clean_up_and_exit(self, for_good: bool) -> None:
        status = 1
        try:
            guard = os.getppid()
            signal.set_wakeup_fd(-1)
            from wsgi_ts.guard.aftermath import clean_up

            clean_up(self._run_dir, self._kept, guard, for_good=for_good)
            status = 0
        except Exception as error:
            _say(f"Cleaning up: {type(error).__name__}: {error}")
        finally:
            os._exit(status)


def _reap_orphans() -> None:
    """As the first process of a container a guard inherits what a dead supervisor's processes leave."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _nothing(number: int, frame: object) -> None:
    """The byte on the wake-up socket tells."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    # Not print: a closed standard error must not end the guard.
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        return


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one instance; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m wsgi_ts.guard")
    parser.add_argument("--config-fd", type=int, required=True, help="a file in memory with the configuration")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--kept", type=_kept, action="append", default=[], help="a listening socket: NAME=FD")
    parser.add_argument("--pid-file-fd", type=int, default=-1, help="the locked pid file; closed at once")
    parser.add_argument("--owner", type=int, help="the process that the instance is an engine of, and ends with")
    parser.add_argument("--like", help="for those who look for a server by its command line; without effect")
    parser.add_argument("command", nargs="+", help="the supervisor's")
    options = parser.parse_args(arguments)
    if options.pid_file_fd >= 0:
        os.close(options.pid_file_fd)
    kept = dict(options.kept)
    for fd in kept.values():
        os.set_inheritable(fd, False)
    flags = {"foreground": options.foreground, "owner": options.owner}
    return Guard(options.command, options.run_dir, options.config_fd, kept=kept, **flags).run()


def _kept(text: str) -> tuple[str, int]:
    name, _, fd = text.rpartition("=")
    return name, int(fd)
