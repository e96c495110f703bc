"""Thirty-two callers at once, on three names: what each is told could have been told by one after the other."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

pytestmark = pytest.mark.chaos

CALLERS, CALLS = 32, 24
NAMES = ("one", "two", "three")


@dataclass(frozen=True)
class Call:
    """What one caller did, from when to when, and what it was told."""

    kind: str
    began: float
    ended: float
    status: int

    def after(self, is_there: bool) -> bool | None:
        """Whether the model is there after this call, if it was (not) before; None where the answer says otherwise."""
        if self.kind == "register":
            return True if self.status == (409 if is_there else 200) else None
        if self.kind == "unregister":
            return False if self.status == (200 if is_there else 404) else None
        return is_there if self.status in ((200, 202) if is_there else (404,)) else None


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as server:
        for name in NAMES:
            archive(server.store, name)
        yield server


def call(server: ServerProcess, kind: str, name: str) -> int:
    method, path = {
        "register": ("POST", f"/models?url={name}.mar&initial_workers=0"),
        "unregister": ("DELETE", f"/models/{name}"),
        "describe": ("GET", f"/models/{name}"),
        "scale": ("PUT", f"/models/{name}?min_worker=1&max_worker=1"),
        "default": ("PUT", f"/models/{name}/1.0/set-default"),
    }[kind]
    return server.request("management", method, path, body=b"" if method != "GET" else None, timeout=60).status


def test_calls_at_the_same_time_are_as_if_one_after_the_other(server: ServerProcess) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    histories: dict[str, list[Call]] = {name: [] for name in NAMES}
    failures: list[BaseException] = []

    def caller(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        try:
            for _ in range(CALLS):
                name = chance.choice(NAMES)
                kind = chance.choices(("register", "unregister", "describe", "default", "scale"), (8, 8, 4, 2, 1))[0]
                began = time.monotonic()
                status = call(server, kind, name)
                histories[name].append(Call(kind, began, time.monotonic(), status))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    listed = {model["modelName"] for model in server.request("management", "GET", "/models").json()["models"]}
    for name, history in histories.items():
        assert len(history) > CALLS
        ends = possible_ends(history)
        assert ends, f"{name}: no order of the calls explains the answers; seed {seed}: {history}"
        assert (name in listed) in ends, f"{name}: it should (not) be there at the end; seed {seed}"
    for name in listed:
        assert call(server, "unregister", name) == 200
    assert eventually(lambda: not server.processes("model-worker"), within=20, what="no worker left over")
    assert not list((server.run_dir / "models").iterdir())


def possible_ends(history: list[Call]) -> set[bool]:
    """Whether the model may be there at the end (it was not at first), by every order that fits times and answers."""
    calls = sorted(history, key=lambda each: each.began)
    ends: set[bool] = set()
    seen: set[tuple[frozenset[int], bool]] = set()
    open_states = [(frozenset(range(len(calls))), False)]
    while open_states:
        left, is_there = open_states.pop()
        if (left, is_there) in seen:
            continue
        seen.add((left, is_there))
        if not left:
            ends.add(is_there)
            continue
        first_end = min(calls[number].ended for number in left)
        may_be_next = [number for number in left if calls[number].began <= first_end]
        # What changes nothing and fits can go first without harm.
        harmless = [number for number in may_be_next if calls[number].after(is_there) is is_there]
        if harmless:
            open_states.append((left - set(harmless), is_there))
            continue
        for number in may_be_next:
            after = calls[number].after(is_there)
            if after is not None:
                open_states.append((left - {number}, after))
    return ends
