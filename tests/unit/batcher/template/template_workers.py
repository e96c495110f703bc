"""What the forked workers of test_template.py run in place of a handler; `spec.handler` names the behaviour."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from wsgi_ts.batcher.shm.mailbox import mailbox_name
from wsgi_ts.batcher.shm.shared_memory import SharedMemory, unlink
from wsgi_ts.control.channel import Channel
from wsgi_ts.control.codec import FROM_WORKER
from wsgi_ts.messages import SpawnWorker, WorkerLoaded

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


def run(order: SpawnWorker, status_fd: int) -> int:
    spec = order.spec
    if spec.handler == "rubbish":
        os.write(status_fd, b"\x00\x00\x00\x02[]")
        time.sleep(600)
    status = Channel(socket.socket(fileno=status_fd))
    facts = {
        "arguments": [
            *(order.worker_id, order.start_count, order.gpu_id, order.prefix, order.batcher_index, order.threads)
        ],
        "cwd": os.getcwd(),
        "fds": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],
        "session": os.getsid(0),
        "threads": threading.active_count(),
        "stdin": sys.stdin.read(),
        "sigterm_is_default": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "numpy_random": _random(),
        "executable": sys.executable,
    }
    status.send(FROM_WORKER.encode(WorkerLoaded(order.worker_id, order.start_count, 200, json.dumps(facts), 7)))
    behaviour = spec.handler
    if behaviour == "print":
        _print_all_kinds()
    elif behaviour == "flood":
        for _ in range(200):
            os.write(1, b"x" * 99 + b"\n" + b"y" * 65436)
        print("end of flood")
    elif behaviour == "raise":
        raise RuntimeError("on purpose")
    elif behaviour == "leave":
        sys.exit(3)
    elif behaviour == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif behaviour == "descendants":
        _leave_descendants(mailbox_name(order.prefix, order.batcher_index, order.worker_id, order.start_count))
    elif behaviour == "wait":
        time.sleep(600)
    return 0


def _random() -> float:
    numpy = sys.modules.get("numpy")
    return 0.0 if numpy is None else float(numpy.random.random())


def _print_all_kinds() -> None:
    print("plain line äö")
    print("to stderr", file=sys.stderr)
    os.write(1, b"bytes \xff\x00 and \x1b[31m\n")
    os.write(1, b"z" * 20000 + b"\n")
    os.write(1, b"[METRICS]HandlerTime.Milliseconds:1.5|#ModelName:probe,Level:Model|#type:GAUGE|#hostname:h,17,r-1\n")
    os.write(1, b"[METRICS]nonsense\n")
    os.write(1, b"no line end")


def _leave_descendants(mailbox: str) -> None:
    """A child in the session, one in a session of its own, and a daemon (forked twice, without exec)."""
    memory = SharedMemory(mailbox, 4096, create=True)  # a model worker has its mailbox mapped, so its forks have it
    unlink(mailbox)
    pids = [subprocess.Popen(SLEEPER).pid, subprocess.Popen(SLEEPER, start_new_session=True).pid]
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setsid()
        daemon = os.fork()
        if daemon == 0:
            time.sleep(600)
        os.write(write_end, str(daemon).encode())
        os._exit(0)
    pids.append(int(os.read(read_end, 20)))
    Path("pids.json").write_text(json.dumps(pids))
    time.sleep(600)
    memory.close()


def main() -> int:
    """The same in an interpreter of its own: takes the arguments that a model worker's `main` takes."""
    _, text, status_fd = sys.argv
    return run(SpawnWorker.from_json(text), int(status_fd))
