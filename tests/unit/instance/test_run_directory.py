from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsgi_ts.batcher.shm.shared_memory import SHM_DIRECTORY, SharedMemory, unlink_prefix
from wsgi_ts.instance.record import Record
from wsgi_ts.instance.run_directory import AlreadyRunning, RunDirectory, RunDirectoryError, write_json
from wsgi_ts.process import boot_id
from wsgi_ts.supervisor.child_process import Child


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def orphan() -> Iterator[Child]:
    child = Child("orphan", [sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.send_signal(signal.SIGKILL)
    child.wait(60.0)
    child.close()


def dead_instance(path: Path, **changes: object) -> str:
    """Makes the directory of an instance that was killed; returns its prefix."""
    directory = RunDirectory.acquire(path)
    os.close(directory.lock_fd)
    record = json.loads((path / "record.json").read_text())
    write_json(path / "record.json", record | changes)
    return directory.prefix


def names_of(prefix: str) -> list[str]:
    return [name for name in os.listdir(SHM_DIRECTORY) if prefix in name]


def test_directory_is_private_and_records_the_prefix_first(path: Path) -> None:
    directory = RunDirectory.acquire(path)
    assert path.stat().st_mode & 0o777 == 0o700
    record = json.loads((path / "record.json").read_text())
    assert record["prefix"] == directory.prefix
    assert record["pid"] == os.getpid()
    assert record["boot_id"] == boot_id()
    assert record["children"] == []
    assert (path / "record.json").stat().st_mode & 0o777 == 0o600
    directory.release()


def test_release_leaves_nothing(path: Path) -> None:
    directory = RunDirectory.acquire(path)
    SharedMemory(f"{directory.prefix}-board", 4096, create=True).close()
    (directory.models / "abc").mkdir()
    (directory.models / "abc" / "file").touch()
    directory.routes.touch()
    directory.release()
    assert not path.exists()
    assert names_of(directory.prefix) == []


def test_second_instance_is_refused_and_names_the_first(path: Path) -> None:
    directory = RunDirectory.acquire(path)
    with pytest.raises(AlreadyRunning, match=rf"already running, pid {os.getpid()} "):
        RunDirectory.acquire(path)
    directory.release()
    RunDirectory.acquire(path).release()


def test_prefixes_differ(path: Path) -> None:
    first = RunDirectory.acquire(path)
    first.release()
    second = RunDirectory.acquire(path)
    second.release()
    assert first.prefix != second.prefix


def test_children_are_recorded(path: Path, orphan: Child) -> None:
    directory = RunDirectory.acquire(path)
    directory.add_child(orphan.identity, "batcher 0")
    record = Record.read(path)
    assert record is not None
    assert record.children == (orphan.identity,)
    directory.remove_child(orphan.pid)
    record = Record.read(path)
    assert record is not None
    assert record.children == ()
    directory.release()


def test_start_removes_what_a_dead_instance_left(path: Path, orphan: Child) -> None:
    child = {"pid": orphan.pid, "start_time": orphan.identity.start_time, "role": "batcher 0"}
    prefix = dead_instance(path, children=[child])
    SharedMemory(f"{prefix}-s1", 4096, create=True).close()
    (path / "models" / "abc").mkdir()
    (path / "control.sock").touch()

    directory = RunDirectory.acquire(path)

    assert orphan.wait(60.0) == "killed by SIGKILL"
    assert names_of(prefix) == []
    assert list(directory.models.iterdir()) == []
    assert not directory.control_socket.exists()
    directory.release()


def test_start_kills_unrecorded_processes_that_hold_the_old_memory(path: Path) -> None:
    prefix = dead_instance(path)
    name = f"{prefix}-b0-w9000-1"
    SharedMemory(name, 4096, create=True).close()
    code = (
        "import sys, time; from wsgi_ts.batcher.shm.shared_memory import SharedMemory; "
        f"memory = SharedMemory({name!r}); print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout as output:
        assert output.readline() == b"1\n"
    RunDirectory.acquire(path).release()
    assert holder.wait(60.0) == -signal.SIGKILL


def test_a_process_that_only_has_the_pid_of_an_old_child_lives(path: Path, orphan: Child) -> None:
    dead_instance(path, children=[{"pid": orphan.pid, "start_time": orphan.identity.start_time - 1}])
    RunDirectory.acquire(path).release()
    assert orphan.wait(0.2) is None


def test_after_a_reboot_no_process_is_ours(path: Path, orphan: Child) -> None:
    child = {"pid": orphan.pid, "start_time": orphan.identity.start_time}
    dead_instance(path, children=[child], boot_id="another boot")
    RunDirectory.acquire(path).release()
    assert orphan.wait(0.2) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"prefix": "../x", "children": 3}', '{"prefix": ""}', "\xff"])
def test_a_damaged_record_removes_nothing_else(path: Path, text: str) -> None:
    stranger = f"wsgi-ts-{os.urandom(16).hex()}"
    SharedMemory(f"{stranger}-board", 4096, create=True).close()
    path.mkdir()
    (path / "record.json").write_bytes(text.encode("latin-1"))
    RunDirectory.acquire(path).release()
    assert names_of(stranger) == [f"{stranger}-board"]
    unlink_prefix(stranger)


def test_a_symbolic_link_in_its_place_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirectoryError, match="not a directory of this user"):
        RunDirectory.acquire(path)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_missing_parent_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="No such file or directory; set another --run-dir"):
        RunDirectory.acquire(tmp_path / "missing" / "run")


def test_write_json_replaces_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "routes.json"
    write_json(file, {"a": 1})
    inode = file.stat().st_ino
    write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2}
    assert file.stat().st_ino != inode
    assert [entry.name for entry in tmp_path.iterdir()] == ["routes.json"]
