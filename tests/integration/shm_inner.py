"""Run by test_data_path.py inside a mount namespace with a small /dev/shm; not collected on its own."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
from support.archives import archive
from support.server import ServerProcess

MEGABYTE = 1 << 20


def inner_docker_default(tmp_path: Path) -> None:
    """Docker gives a container 64 MB of /dev/shm: the default configuration starts there and serves."""
    archive(tmp_path, "echo")
    config = {"web_workers": "2", "slots_per_worker": "1024"}
    with ServerProcess(store=tmp_path, config=config) as server:
        assert server.register("echo.mar").status == 200
        for size in (100, 100_000, 5 * MEGABYTE):
            body = os.urandom(size)
            assert server.predict("echo", body).body == body


def inner_too_small(tmp_path: Path) -> None:
    """A start that cannot fit says what it needs, and what to do, and leaves nothing."""
    server = ServerProcess(store=tmp_path)
    with pytest.raises(RuntimeError, match="the server ended with 1"):
        server.start()
    assert re.search(r"/dev/shm.*--shm-size", server.output()), server.output()
    assert not server.leftovers()
    assert not [name for name in os.listdir("/dev/shm") if "wsgi-ts" in name]


def inner_full_while_serving(tmp_path: Path) -> None:
    """Another program fills /dev/shm: large bodies are refused with a sentence, small ones served; then all is well."""
    archive(tmp_path, "echo")
    with ServerProcess(store=tmp_path) as server:
        server.register("echo.mar")
        status = os.statvfs("/dev/shm")
        hog = Path("/dev/shm/hog")
        with hog.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
        refused = server.predict("echo", bytes(5 * MEGABYTE))
        assert refused.status == 507
        assert "shared memory" in refused.json()["message"]
        assert server.predict("echo", b"small").body == b"small"
        # The management API makes a segment of its own for such a question, and tries again each time.
        describe = "/models/echo?customized=true"
        assert server.request("management", "GET", describe).status == 507
        processes = [*server.processes("supervisor"), *server.processes("management-worker")]
        assert len(processes) == 2

        def descriptors_after(count: int) -> list[int]:
            for _ in range(count):
                assert server.request("management", "GET", describe).status == 507
            return [len(os.listdir(f"/proc/{each.pid}/fd")) for each in processes]

        # Threads of the pool keep a connection to the supervisor each, until there are as many as there may be.
        rounds = [descriptors_after(20) for _ in range(5)]
        for kept in zip(*rounds, strict=True):
            assert min(now - then for then, now in pairwise(kept)) < 10, rounds
        hog.unlink()
        assert server.request("management", "GET", describe).status == 200
        body = os.urandom(5 * MEGABYTE)
        assert server.predict("echo", body).body == body


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """The store's directory."""
    path = tmp_path / "store"
    path.mkdir()
    return path
