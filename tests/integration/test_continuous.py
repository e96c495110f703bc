"""Continuous batching: a token generator whose steps are watched through its own log."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

#: Answers `name0 name1 …`, a word a step: so many as asked for, or until a file is there. A step can be held by a file.
GENERATOR = """
import json, os, time

class Generator:
    def initialize(self, context):
        context.cache = {}

    def handle(self, data, context):
        if context.get_request_header(0, "describe"):
            return [{"described": True}]
        step = []
        for row, request_id in context.request_ids.items():
            if data[row]:
                context.cache[request_id] = dict(data[row]["body"], sent=0)
            state = context.cache[request_id]
            state["new"] = bool(data[row])
            step.append([state["name"], state["new"], context.get_request_header(row, "x-name")])
        with open(os.path.join(os.environ["STEPS"], "steps"), "a") as log:
            log.write(json.dumps(step) + "\\n")
        context.stopping_criteria = [self.criterion(context.cache[id]) for id in context.request_ids.values()]
        states = [context.cache[id] for id in context.request_ids.values()]
        if any(state.get("raise_at") == state["sent"] for state in states):
            raise ValueError("asked to")
        while not all(os.path.exists(os.path.join(os.environ["STEPS"], state.get("held_by", ""))) for state in states):
            time.sleep(0.002)
        time.sleep(max(state.get("step_s", 0.002) for state in states))
        words = []
        for state in states:
            words.append("" if state.get("silent") else "%s%d " % (state["name"], state["sent"]))
            state["sent"] += 1
        return words

    def criterion(self, state):
        def ends(word):
            if "until" in state:
                return os.path.exists(os.path.join(os.environ["STEPS"], state["until"]))
            return state["sent"] >= state["tokens"]
        return ends
"""

#: Sets the header itself, and never says that it goes on where it is told not to.
OWN_HEADER = """
def handle(data, context):
    if data is None:
        return None
    context.cache = getattr(context, "cache", {})
    for row, request_id in context.request_ids.items():
        left = context.cache[request_id] = int(data[row]["body"]) if data[row] else context.cache[request_id] - 1
        if left:
            context.set_response_header(row, "ts_stream_next", "true")
        context.set_response_status(201, "Made", row)
    return [str(context.cache[id]) for id in context.request_ids.values()]
"""


def config_yaml(**more: object) -> str:
    """The model-config.yaml of one generator with places for four requests."""
    keys = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 4, "continuousBatching": True}
    return json.dumps(keys | more)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the handler's log and of the files that end its streams."""
    return tmp_path_factory.mktemp("steps")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, steps: Path) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "generator", GENERATOR, config_yaml=config_yaml())
    archive(store, "limited", GENERATOR, config_yaml=config_yaml(responseTimeout=1))
    archive(store, "long", GENERATOR, config_yaml=config_yaml(responseTimeout=10))
    archive(store, "own_header", OWN_HEADER, config_yaml=config_yaml())
    with ServerProcess(store=store, environment={"STEPS": str(steps)}, web_workers=2) as server:
        assert server.register("generator.mar").status == 200
        yield server


@pytest.fixture(autouse=True)
def clean(steps: Path) -> Iterator[None]:
    """Each test begins with an empty log."""
    for path in steps.iterdir():
        path.unlink()
    yield


def seen(steps: Path) -> list[list[list[Any]]]:
    """The handler's steps so far: for each row its name, whether it was new, and its header."""
    path = steps / "steps"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_names(steps: Path) -> list[str]:
    """Whose rows were in the newest step."""
    found = seen(steps)
    return [row[0] for row in found[-1]] if found else []


class Stream(http.RawConnection):
    """A request whose answer is read chunk by chunk."""

    chunks: Iterator[bytes]

    def __init__(self, server: ServerProcess, model: str = "generator", **body: object) -> None:
        super().__init__(server.ports["inference"])
        data = json.dumps(body).encode()
        self.send(
            f"POST /predictions/{model} HTTP/1.1\r\nHost: x\r\nx-name: {body['name']}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode()
            + data
        )

    def begin(self) -> dict[str, str]:
        """Waits for the head and the first chunk."""
        line, headers = self.read_head()
        assert line.startswith(b"HTTP/1.1 200"), line
        self.chunks = self.read_chunks()
        next(self.chunks)
        return headers

    def rest(self) -> str:
        """The chunks that are still to come."""
        return b"".join(self.chunks).decode()


def generate(server: ServerProcess, model: str = "generator", **body: object) -> http.Reply:
    """The whole answer to a request."""
    return server.request(
        "inference",
        "POST",
        f"/predictions/{model}",
        headers={"content-type": "application/json", "x-name": str(body["name"])},
        body=json.dumps(body),
    )


def pending(server: ServerProcess) -> int:
    """How many requests wait for a place."""
    described = server.request("management", "GET", "/models/generator").json()[0]
    return int(described["jobQueueStatus"]["pendingRequests"])


def words(name: str, count: int, first: int = 0) -> str:
    """What the generator answers."""
    return "".join(f"{name}{number} " for number in range(first, count))


def test_each_step_s_word_is_a_chunk(server: ServerProcess, steps: Path) -> None:
    with Stream(server, name="a", tokens=5) as stream:
        headers = stream.begin()
        assert (headers["transfer-encoding"], headers["ts_stream_next"]) == ("chunked", "true")
        assert "content-length" not in headers
        assert list(stream.chunks) == [b"a1 ", b"a2 ", b"a3 ", b"a4 "]
    # The row is empty from the second step on; id, headers and cache stay.
    assert seen(steps) == [[["a", True, "a"]]] + [[["a", False, "a"]]] * 4


def test_what_ends_in_its_first_step_is_a_plain_answer(server: ServerProcess) -> None:
    reply = generate(server, name="a", tokens=1)
    assert (reply.status, reply.text, reply.headers["ts_stream_next"]) == (200, "a0 ", "false")
    assert reply.headers["content-length"] == "3"


def test_requests_join_between_steps_and_leave_by_themselves(server: ServerProcess, steps: Path) -> None:
    with Stream(server, name="long", until="open") as long:
        long.begin()
        assert generate(server, name="short", tokens=3).text == words("short", 3)
        with_short = [[row[:2] for row in step] for step in seen(steps) if len(step) == 2]
        assert with_short == [
            [["long", False], ["short", True]],
            [["long", False], ["short", False]],
            [["long", False], ["short", False]],
        ]
        (steps / "open").touch()
        assert long.rest().startswith("long1 ")


def test_no_more_than_the_batch_size_are_under_way(server: ServerProcess, steps: Path) -> None:
    streams = [Stream(server, name=name, until=name) for name in "abcd"]
    for stream in streams:
        stream.begin()
    waiting = Stream(server, name="e", tokens=2)
    eventually(lambda: pending(server) == 1, within=5)
    assert not any("e" in [row[0] for row in step] for step in seen(steps))
    (steps / "b").touch()
    waiting.begin()
    assert waiting.rest() == "e1 "
    for name in "acd":
        (steps / name).touch()
    for name, stream in zip("abcd", streams, strict=True):
        assert stream.rest().startswith(f"{name}1 ")
        stream.close()
    waiting.close()
    assert max(map(len, seen(steps))) == 4


def test_a_client_that_leaves_frees_its_place(server: ServerProcess, steps: Path) -> None:
    with Stream(server, name="stayer", until="open") as stayer:
        with Stream(server, name="leaver", until="never") as leaver:
            leaver.begin()
            stayer.begin()
        eventually(lambda: last_names(steps) == ["stayer"], within=5)
        eventually(lambda: "Connection to client got closed; Removing job: " in server.log(), within=5)
        (steps / "open").touch()
        assert stayer.rest().startswith("stayer1 ")


def test_an_error_ends_all_requests_of_the_step_and_the_worker_lives(server: ServerProcess, steps: Path) -> None:
    workers = [process.pid for process in server.processes("model-worker")]
    with Stream(server, name="victim", until="never") as victim:
        victim.begin()
        reply = generate(server, name="raiser", tokens=5, raise_at=0)
        assert (reply.status, reply.json()["message"]) == (503, "Prediction failed")
        with pytest.raises(ValueError, match="invalid literal"):  # the end of the connection instead of a chunk's size
            victim.rest()
    assert generate(server, name="after", tokens=2).text == words("after", 2)
    assert [process.pid for process in server.processes("model-worker")] == workers


def test_a_step_has_the_response_timeout_and_a_stream_has_not(server: ServerProcess) -> None:
    for name in ("limited", "long"):
        assert server.register(f"{name}.mar").status == 200
    reply = generate(server, "long", name="a", tokens=22, step_s=0.5)
    assert reply.text == words("a", 22)
    reply = generate(server, "limited", name="hangs", tokens=1, step_s=3600)
    assert (reply.status, reply.json()["message"]) == (500, "Worker died.")
    for name in ("limited", "long"):
        assert server.request("management", "DELETE", f"/models/{name}").status == 200


def test_a_dead_worker_s_streams_end_at_once(server: ServerProcess, steps: Path) -> None:
    streams = [Stream(server, name=name, until="never") for name in "ab"]
    for stream in streams:
        stream.begin()
    [worker] = server.request("management", "GET", "/models/generator").json()[0]["workers"]
    os.kill(worker["pid"], signal.SIGKILL)
    for stream in streams:
        with pytest.raises(ValueError, match="invalid literal"):
            stream.rest()
        stream.close()
    eventually(lambda: generate(server, name="after", tokens=2).text == words("after", 2), within=20)


def test_a_worker_that_is_scaled_away_ends_its_streams_first(server: ServerProcess, steps: Path) -> None:
    with Stream(server, name="last", until="open") as stream, ThreadPoolExecutor(1) as pool:
        stream.begin()
        scaled = pool.submit(
            server.request, "management", "PUT", "/models/generator?min_worker=0&synchronous=true", body=b""
        )
        eventually(lambda: generate(server, name="late", tokens=1).status == 503, within=5)
        count = len(seen(steps))
        eventually(lambda: len(seen(steps)) > count, within=5)
        (steps / "open").touch()
        assert stream.rest().split()[0] == "last1"
        assert scaled.result().status in (200, 202)
    reply = server.request("management", "PUT", "/models/generator?min_worker=1&synchronous=true", body=b"")
    assert reply.status == 200
    assert generate(server, name="back", tokens=2).text == words("back", 2)


def test_streams_of_a_dead_web_worker_leave_the_batch(server: ServerProcess, steps: Path) -> None:
    streams = [Stream(server, name=f"s{number}", until="never") for number in range(2)]
    for stream in streams:
        stream.begin()
    for process in server.processes("web-worker"):
        process.kill(signal.SIGKILL)
    eventually(lambda: pending(server) == 0, within=5)
    eventually(lambda: generate(server, name="after", tokens=2).text == words("after", 2), within=20)
    eventually(lambda: last_names(steps) == ["after"], within=5)
    for stream in streams:
        stream.close()


def test_a_handler_may_set_the_header_itself(server: ServerProcess) -> None:
    assert server.register("own_header.mar").status == 200
    reply = server.predict("own_header", "2")
    assert (reply.status, reply.reason, reply.text) == (201, "Made", "210")
    assert server.predict("own_header", "0").text == "0"


def test_describe_is_by_itself(server: ServerProcess, steps: Path) -> None:
    with Stream(server, name="a", until="open") as stream:
        stream.begin()
        described = server.request("management", "GET", "/models/generator/1.0?customized=true")
        assert described.json()[0]["customizedMetadata"] == {"described": True}
        (steps / "open").touch()
        assert stream.rest().startswith("a1 ")


def test_many_clients(server: ServerProcess, steps: Path) -> None:
    def ask(number: int) -> bool:
        return generate(server, name=f"n{number}-", tokens=1 + number % 7).text == words(f"n{number}-", 1 + number % 7)

    with Stream(server, name="first", tokens=1, held_by="open"), ThreadPoolExecutor(12) as pool:
        eventually(lambda: last_names(steps) == ["first"], within=5)
        answers = pool.map(ask, range(120))
        # There is one at least for each place before the next step, besides those that have been given one already.
        eventually(lambda: pending(server) >= 4, within=5)
        (steps / "open").touch()
        assert all(answers)
    sizes = [len(step) for step in seen(steps)]
    assert max(sizes) == 4
    assert sum(sizes) == 1 + sum(1 + number % 7 for number in range(120))


#: Two ranks that must see the same rows in every step: they add up what each has.
GROUP = """
import json
import torch
import torch.distributed as dist

class Generator:
    def initialize(self, context):
        dist.init_process_group("gloo")
        context.cache = {}

    def handle(self, data, context):
        ids = list(context.request_ids.values())
        for row, request_id in enumerate(ids):
            if data[row]:
                context.cache[request_id] = {"tokens": data[row]["body"]["tokens"], "sent": 0}
        mine = torch.tensor([float(context.cache[id]["sent"]) for id in ids])
        both = mine.clone()
        dist.all_reduce(both)
        for id in ids:
            context.cache[id]["sent"] += 1
        context.stopping_criteria = [
            lambda word, state=context.cache[id]: state["sent"] >= state["tokens"] for id in ids
        ]
        return ["%d+%d " % (a, b - a) for a, b in zip(mine.tolist(), both.tolist())]
"""


@pytest.mark.slow
def test_the_ranks_of_a_group_take_the_same_steps(server: ServerProcess) -> None:
    yaml = config_yaml(parallelType="tp", torchrun={"nproc-per-node": 2})
    archive(server.store, "group", GROUP, config_yaml=yaml)
    assert server.register("group.mar").status == 200

    def ask(count: int) -> bool:
        reply = generate(server, "group", name="g", tokens=count)
        return reply.text == "".join(f"{number}+{number} " for number in range(count))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, [1, 5, 2, 8, 3, 1, 13, 4, 2, 6]))
    assert server.request("management", "DELETE", "/models/group").status == 200
