"""The server as an engine inside another process: asked from its event loop, and gone with it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from support.archives import archive
from support.eventually import eventually
from support.processes import MARKER, Member, server_processes, shared_memory
from support.server import REPOSITORY

from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.dataplane.async_call import Call
from wsgi_ts.errors import ServerError, ServiceUnavailable
from wsgi_ts.instance.record import Record
from wsgi_ts.integrations.engine import Engine, EngineError
from wsgi_ts.process import processes_of_instance

#: Says how many requests came together, in parts when asked to; waits where a file is named, until that is there,
#: with another one that says that it does.
COUNTS = """
import os, time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    bodies = [bytes(row["body"]).decode() for row in data]
    for body in bodies:
        if body.startswith("/"):
            open(body + ".begun", "w").close()
        while body.startswith("/") and not os.path.exists(body):
            time.sleep(0.01)
    if bodies[0] == "parts":
        send_intermediate_predict_response([b"a"], context.request_ids, "ok", 200, context)
        return [b"b"]
    if bodies[0] == "fails":
        raise ValueError("no")
    context.set_response_status(201, "Made", 0)
    return [f"{body} of {len(data)}" for body in bodies]
"""
#: An owner: starts an engine, says where its run directory is, and waits.
OWNER = """
import signal, sys
from pathlib import Path
from wsgi_ts.integrations.engine import Engine

engine = Engine({"preload_modules": ""}, Path("logs"))
engine.register(sys.argv[1], initial_workers=1)
print(engine.run_dir, flush=True)
signal.pause()
"""
T = TypeVar("T")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short directory for temporary files, since sockets have short paths: nothing is left there."""
    with tempfile.TemporaryDirectory(prefix="wts-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("PYTHONPATH", os.fspath(REPOSITORY))
        yield Path(folder)


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch) -> str:
    """What the processes of engines have in their environment."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARKER, value)
    monkeypatch.setenv("SPT_NOENV", "1")
    return value


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    return archive(tmp_path, "counts", COUNTS)


def homes(place: Path) -> list[Path]:
    """The run directories that are there."""
    return list(place.glob("*-engines/*"))


def prefix_of(run_dir: Path) -> str:
    """What the names of an engine's shared memory begin with."""
    record = Record.read(run_dir)
    assert record is not None and record.prefix is not None
    assert shared_memory(record.prefix)
    return record.prefix


def run(counts: Path, ask: Callable[[Engine], Awaitable[T]], **arguments: object) -> T:
    """Runs an engine with the model for as long as `ask` takes."""

    async def main() -> T:
        engine = Engine({"preload_modules": ""}, counts.parent / "logs")
        try:
            assert engine.register(str(counts), initial_workers=1, **arguments) == "counts"
            engine.attach()
            return await ask(engine)
        finally:
            engine.stop()

    return asyncio.run(main())


def submit(engine: Engine, body: str) -> Call:
    target = engine.routes.version_target("counts", None, flags=RequestFlag.URL_PATH)
    return engine.submit(target, b"POST / HTTP/1.1\r\n\r\n", [body.encode()], b"application/octet-stream")


async def whole(engine: Engine, body: str) -> tuple[int, bytes]:
    call = submit(engine, body)
    try:
        await call.begin()
        return call.status, await call.whole()
    finally:
        call.close()


def test_requests_are_batched_and_answered_with_status_parts_or_error(counts: Path, place: Path) -> None:
    gate = counts.parent / "gate"

    async def ask(engine: Engine) -> tuple[object, ...]:
        held = asyncio.create_task(whole(engine, str(gate)))
        while not gate.with_name("gate.begun").exists():
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(whole(engine, "x")) for _ in range(4)]
        while (await asyncio.to_thread(engine.load, "counts"))["ts_queue_depth"] < 4:
            await asyncio.sleep(0.01)
        gate.touch()
        one, several = await held, await asyncio.gather(*others)
        call = submit(engine, "parts")
        await call.begin()
        assert call.is_streamed
        parts = [part async for part in call]
        call.close()
        with pytest.raises(ServerError, match="Prediction failed"):
            await whole(engine, "fails")
        # The gauge is renewed a few times a second.
        while (await asyncio.to_thread(engine.load, "counts"))["ts_queue_depth"]:
            await asyncio.sleep(0.05)
        return one, several, parts, engine.state(), engine.under_way, prefix_of(engine.run_dir)

    one, several, parts, *ends, prefix = run(counts, ask, batch_size=4)
    assert one == (201, f"{gate} of 1".encode())
    assert sorted(several) == [(200, b"x of 4")] * 3 + [(201, b"x of 4")]
    assert parts == [b"a", b"b"]
    assert ends == ["", 0]
    assert not homes(place) and not shared_memory(str(prefix))


def test_when_the_engine_has_ended_calls_end_and_it_says_so(counts: Path, place: Path) -> None:
    async def ask(engine: Engine) -> tuple[str, str]:
        prefix = prefix_of(engine.run_dir)
        held = asyncio.create_task(whole(engine, str(counts.parent / "none")))
        while not engine.under_way:
            await asyncio.sleep(0.01)
        record = json.loads((engine.run_dir / "record.json").read_text())
        (supervisor,) = [each["pid"] for each in record["children"] if each["role"] == "supervisor"]
        os.kill(supervisor, signal.SIGKILL)
        with pytest.raises(ServiceUnavailable, match="The engine has ended"):
            await asyncio.wait_for(held, 60)
        with pytest.raises(ServiceUnavailable, match="The engine has ended"):
            submit(engine, "x")
        return engine.state(), prefix

    state, prefix = run(counts, ask)
    assert state == "The engine has ended: its supervisor was killed or has failed"
    assert not homes(place) and not shared_memory(prefix)


def test_what_cannot_be_started_or_loaded_is_said_and_leaves_nothing(counts: Path, place: Path) -> None:
    with pytest.raises(EngineError, match=r"started: key job_queue_size.*'many'"):
        Engine({"job_queue_size": "many"}, counts.parent / "logs")
    with pytest.raises(EngineError, match=r"started: slots_per_worker=65536.*set one of them lower"):
        Engine({"slots_per_worker": 65536, "max_request_size": 2**31 - 1}, counts.parent / "logs")
    with pytest.raises(EngineError, match=r"none\.mar: there is no such file"):
        run(counts.with_name("none.mar"), lambda engine: asyncio.sleep(0))
    broken = archive(counts.parent, "broken", "import nothing_of_this_name\ndef handle(data, context): return data")
    with pytest.raises(ServerError, match=r"nothing_of_this_name|Failed to start workers"):
        run(broken, lambda engine: asyncio.sleep(0))
    assert not homes(place)


def test_a_model_is_named_by_the_server_whatever_is_registered_already(counts: Path) -> None:
    newer = archive(counts.parent, "counts", COUNTS, version="2.0", file_name="newer.mar")

    async def ask(engine: Engine) -> str:
        with pytest.raises(ServerError, match=r"^Model version 1\.0 is already registered for model counts$"):
            engine.register(str(counts), initial_workers=1)
        return engine.register(str(newer), initial_workers=1)

    assert run(counts, ask) == "counts"


class Owner:
    """A process with an engine."""

    def __init__(self, counts: Path, marker: str) -> None:
        command = [sys.executable, "-c", OWNER, os.fspath(counts)]
        self._marker = marker
        self.process = subprocess.Popen(command, cwd=counts.parent, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.run_dir = Path(self.process.stdout.readline().strip())
        self.prefix = prefix_of(self.run_dir)

    def kill(self) -> None:
        """Kills the owner alone."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def engine(self) -> list[Member]:
        """The engine's processes."""
        return [each for each in server_processes(self._marker) if each.pid != self.process.pid]


def test_a_killed_owner_leaves_nothing(counts: Path, marker: str, place: Path) -> None:
    owner = Owner(counts, marker)
    assert len(owner.engine()) >= 4
    owner.kill()
    eventually(lambda: not owner.engine(), within=30, what="the end of the engine")
    assert not shared_memory(owner.prefix)
    assert not homes(place)


def test_the_next_engine_removes_what_a_killed_owner_and_its_guard_have_left(
    counts: Path, marker: str, place: Path
) -> None:
    owner, beside = Owner(counts, marker), Owner(counts, marker)
    guards = [each for each in owner.engine() if "wsgi_ts.guard" in each.command and str(owner.run_dir) in each.command]
    (guard,) = guards
    guard.kill()
    owner.kill()
    eventually(lambda: not list(processes_of_instance(owner.prefix)), within=30, what="the end of the first engine")
    assert shared_memory(owner.prefix)
    third = Owner(counts, marker)
    assert not shared_memory(owner.prefix) and not owner.run_dir.exists()
    assert beside.run_dir.exists() and shared_memory(beside.prefix)
    for each in (beside, third):
        each.kill()
    eventually(lambda: not owner.engine(), within=30, what="the end of the engines")
    assert not homes(place)
