"""Sequences over HTTP: an accumulator per sequence, on several workers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

REFUSED = (
    'Model "{}" has no worker to serve inference request. Please use scale workers API to add workers. If this is a '
    "sequence inference, please check if it is closed, or expired; or exceeds maxSequenceJobQueueSize"
)

#: Sums up the numbers of each sequence; a body that names a file waits for it.
ACCUMULATOR = """
import os, time

class Accumulator:
    def initialize(self, context):
        self.sums = {}

    def handle(self, data, context):
        keys = [context.get_sequence_id(row) for row in range(len(data))]
        answers = []
        for row, key in enumerate(keys):
            text = bytes(data[row]["body"]).decode()
            if text.startswith("wait"):
                gate = os.path.join(os.environ["GATES"], text)
                open(gate + ".begun", "w").close()
                while not os.path.exists(gate):
                    time.sleep(0.005)
                text = "0"
            self.sums[key] = self.sums.get(key, 0) + int(text)
            answers.append({"sequence": key, "sum": self.sums[key], "pid": os.getpid(), "batch": keys,
                            "start": context.get_request_header(row, context.header_key_sequence_start)})
        return answers
"""

#: One word a step; `end` in a body ends the sequence with the stream, `end:other` another one at once.
CHAT = """
import os, time

class Chat:
    def initialize(self, context):
        context.cache = {}

    def handle(self, data, context):
        words, criteria = [], []
        keys = [context.get_sequence_id(row) for row in range(len(data))]
        assert len(set(keys)) == len(keys), keys
        for row, key in enumerate(keys):
            state = context.cache.setdefault(key, {"said": 0})
            if data[row]:
                state.update(data[row]["body"], left=data[row]["body"].get("words", 1))
            state["said"] += 1
            if "until" in state:
                open(os.path.join(os.environ["GATES"], state["until"] + ".begun"), "w").close()
            if "until" not in state or os.path.exists(os.path.join(os.environ["GATES"], state["until"])):
                state["left"] -= 1
            words.append("%s%d " % (key, state["said"]))
            if "ends" in state:
                context.set_response_header(row, context.header_key_sequence_end, state.pop("ends"))
            criteria.append(lambda word, state=state: state["left"] <= 0)
        context.stopping_criteria = criteria
        time.sleep(0.002)
        return words
"""


def config_yaml(**more: object) -> str:
    """The model-config.yaml of a stateful model on two workers."""
    keys = {
        "minWorkers": 2, "maxWorkers": 2, "batchSize": 4, "sequenceBatching": True, "sequenceMaxIdleMSec": 60000,
        "maxNumSequence": 8, "maxSequenceJobQueueSize": 2,
    }  # fmt: skip
    return json.dumps(keys | more)


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files that handlers wait for."""
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "sums", ACCUMULATOR, config_yaml=config_yaml())
    one = {"minWorkers": 1, "maxWorkers": 1}
    two = config_yaml(**one, batchSize=2, maxNumSequence=1, sequenceMaxIdleMSec=300)
    archive(store, "few", ACCUMULATOR, config_yaml=two)
    archive(store, "old", ACCUMULATOR, config_yaml=config_yaml(**one, sequenceTimeoutMSec=400))
    archive(store, "off", ACCUMULATOR, config_yaml=config_yaml(**one, sequenceMaxIdleMSec=0))
    with ServerProcess(store=store, environment={"GATES": str(gates)}, web_workers=2) as server:
        yield server


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, gates: Path) -> Iterator[ServerProcess]:
    """A server with sequences whose answers are streamed, and a name of its own for the header."""
    store = tmp_path_factory.mktemp("store")
    yaml = config_yaml(minWorkers=1, maxWorkers=1, batchSize=2, continuousBatching=True, maxNumSequence=20)
    archive(store, "chat", CHAT, config_yaml=yaml)
    config = {"ts_header_key_sequence_id": "my_conversation"}
    with ServerProcess(store=store, config=config, environment={"GATES": str(gates)}) as server:
        assert server.register("chat.mar").status == 200
        yield server


def ask(server: ServerProcess, model: str, key: str | None, body: str, name: str = "ts_request_sequence_id") -> Any:
    """The answer to a request of a sequence."""
    headers = {"content-type": "application/octet-stream"} | ({} if key is None else {name: key})
    return server.request("inference", "POST", f"/predictions/{model}", headers=headers, body=body)


def say(server: ServerProcess, key: str, **body: object) -> http.Reply:
    """The answer to a request of a conversation."""
    headers = {"content-type": "application/json", "my_conversation": key}
    return server.request("inference", "POST", "/predictions/chat", headers=headers, body=json.dumps(body))


def pending(server: ServerProcess, model: str) -> int:
    """How many of a model's requests wait."""
    described = server.request("management", "GET", f"/models/{model}").json()[0]
    return int(described["jobQueueStatus"]["pendingRequests"])


@pytest.fixture(scope="module")
def sums(server: ServerProcess) -> str:
    """The accumulator, registered."""
    assert server.register("sums.mar").status == 200
    return "sums"


def test_each_sequence_has_one_worker_and_its_own_state(server: ServerProcess, sums: str) -> None:
    def converse(key: str) -> set[int]:
        pids = set()
        for number in range(1, 16):
            answer = ask(server, sums, key, str(number)).json()
            assert (answer["sequence"], answer["sum"]) == (key, number * (number + 1) // 2)
            assert len(set(answer["batch"])) == len(answer["batch"])
            pids.add(answer["pid"])
        return pids

    with ThreadPoolExecutor(8) as pool:
        homes = list(pool.map(converse, [f"s{number}" for number in range(8)]))
    assert all(len(pids) == 1 for pids in homes)
    # Each worker has room for half of the sequences.
    assert sorted(sum(pid in pids for pids in homes) for pid in set().union(*homes)) == [4, 4]
    described = server.request("management", "GET", "/models/sums").json()[0]
    assert (described["stateful"], described["maxNumSequence"]) == (True, 8)
    assert (described["sequenceMaxIdleMSec"], described["maxSequenceJobQueueSize"]) == (60000, 2)
    eventually(lambda: server.log().count("added jobGroup for sequenceId:s") == 8, within=20)


def test_too_many_sequences_and_too_many_waiting(server: ServerProcess, gates: Path) -> None:
    assert server.register("few.mar").status == 200
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, server, "few", "a", "wait-few")
        eventually((gates / "wait-few.begun").exists, within=20)
        queued = []
        for number in range(2):
            queued.append(pool.submit(ask, server, "few", "a", "1"))
            eventually(lambda count=number + 1: pending(server, "few") == count, within=20)
        refused = ask(server, "few", "a", "1")
        assert (refused.status, refused.json()["message"]) == (503, REFUSED.format("few"))
        (gates / "wait-few").touch()
        assert first.result().json()["sum"] == 0
        # One request of a sequence at a time, in order.
        answers = [each.result().json() for each in queued]
        assert [(answer["sum"], answer["batch"]) for answer in answers] == [(1, ["a"]), (2, ["a"])]
    # Two sequences that are busy, however long the third one takes to come.
    with ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(ask, server, "few", "a", "wait-for-c")]
        eventually((gates / "wait-for-c.begun").exists, within=20)
        busy.append(pool.submit(ask, server, "few", "b", "1"))
        eventually(lambda: pending(server, "few") == 1, within=20)
        assert ask(server, "few", "c", "1").status == 503
        (gates / "wait-for-c").touch()
        assert [each.result().status for each in busy] == [200, 200]
    eventually(lambda: "for sequence: c due to exceeding maxNumSequence: 2" in server.log(), within=20)
    # Idle sequences make room.
    eventually(lambda: ask(server, "few", "c", "1").status == 200, within=20)
    eventually(lambda: "Clean jobGroup: b" in server.log(), within=20)


def test_a_sequence_has_an_end_however_busy_it_is(server: ServerProcess) -> None:
    assert server.register("old.mar").status == 200

    def began_again() -> bool:
        assert ask(server, "old", "aged", "1").status in (200, 503)
        return server.log().count("added jobGroup for sequenceId:aged") > 1

    eventually(began_again, within=20)


def test_without_an_id_the_server_makes_one(server: ServerProcess, sums: str) -> None:
    server.request("management", "DELETE", "/models/sums")
    assert server.register("sums.mar").status == 200
    made = [ask(server, sums, None, "1").json() for _ in range(2)]
    assert made[0]["sequence"] != made[1]["sequence"]
    assert all(each["sequence"].startswith("ts-seq-") and each["start"] == "true" for each in made)
    # It is an id like any other.
    answer = ask(server, sums, made[0]["sequence"], "1").json()
    assert (answer["sum"], answer["pid"], answer["start"]) == (2, made[0]["pid"], None)


def test_the_worker_s_death_ends_its_sequences(server: ServerProcess, sums: str, gates: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, server, sums, "doomed", "wait-doomed")
        eventually((gates / "wait-doomed.begun").exists, within=20)
        queued = pool.submit(ask, server, sums, "doomed", "1")
        eventually(lambda: pending(server, sums) == 1, within=20)
        for worker in server.processes("model-worker"):
            worker.kill()
        assert (running.result().status, running.result().json()["message"]) == (507, "Worker died.")
        assert (queued.result().status, queued.result().json()["message"]) == (503, REFUSED.format("sums"))
    answer = eventually(lambda: _answered(ask(server, sums, "doomed", "5")), within=30)
    assert answer["sum"] == 5


def _answered(reply: http.Reply) -> Any:
    return reply.json() if reply.status == 200 else None


def test_without_an_idle_time_there_are_no_sequences(server: ServerProcess) -> None:
    assert server.register("off.mar").status == 200
    assert server.request("management", "GET", "/models/off").json()[0]["stateful"] is False
    assert ask(server, "off", None, "1").json()["sequence"] == ""
    eventually(lambda: "key sequenceBatching: needs a sequenceMaxIdleMSec above 0" in server.log(), within=20)


def test_a_conversation_is_streamed_and_stays_open(chat: ServerProcess) -> None:
    first = say(chat, "k", words=3)
    assert (first.text, first.headers["transfer-encoding"]) == ("k1 k2 k3 ", "chunked")
    # Its last part does not end the sequence: the handler still knows it, and so does the server.
    assert say(chat, "k", words=2).text == "k4 k5 "
    eventually(lambda: chat.log().count("added jobGroup for sequenceId:k\n") == 1, within=20)
    ended = say(chat, "k", words=1, ends="k;unknown")
    assert (ended.text, ended.headers["ts_request_sequence_end"]) == ("k6 ", "k;unknown")
    eventually(lambda: "Clean jobGroup: k\n" in chat.log(), within=20)
    assert say(chat, "k", words=1).status == 200
    eventually(lambda: chat.log().count("added jobGroup for sequenceId:k\n") == 2, within=20)


def test_what_waits_in_a_sequence_that_is_ended_is_refused(chat: ServerProcess, gates: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(say, chat, "closed", until="closed.gate")
        eventually((gates / "closed.gate.begun").exists, within=20)
        queued = pool.submit(say, chat, "closed")
        eventually(lambda: pending(chat, "chat") == 1, within=20)
        assert say(chat, "closer", ends="closed").status == 200
        assert (queued.result().status, queued.result().json()["message"]) == (503, REFUSED.format("chat"))
        (gates / "closed.gate").touch()
        assert running.result().text.startswith("closed1 ")


def test_twice_the_batch_size_converse_at_a_time(chat: ServerProcess, gates: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        talks = [pool.submit(say, chat, f"t{number}", until="talks.gate") for number in range(5)]
        eventually(lambda: pending(chat, "chat") == 1, within=20)
        (gates / "talks.gate").touch()
        assert all(talk.result().status == 200 for talk in talks)


def test_many_conversations(chat: ServerProcess) -> None:
    def converse(key: str) -> list[str]:
        return [say(chat, key, words=2, **({"ends": key} if last else {})).text for last in (False, False, True)]

    with ThreadPoolExecutor(3) as pool:
        for number, texts in enumerate(pool.map(converse, [f"m{number}-" for number in range(12)])):
            key = f"m{number}-"
            assert texts == [f"{key}{count} {key}{count + 1} " for count in (1, 3, 5)]


@pytest.mark.slow
def test_a_sequence_stays_on_its_device(tmp_path: Path, gates: Path) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\ncase \"$*\" in *--query-gpu=index*) printf '0\\n1\\n' ;; *) printf '0, 0, 0, 0\\n' ;; esac\n"
    )
    tool.chmod(0o755)
    store = tmp_path / "store"
    store.mkdir()
    archive(store, "sums", ACCUMULATOR, config_yaml=config_yaml(maxNumSequence=24))
    environment = {"GATES": str(gates), "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    with ServerProcess(store=store, environment=environment, web_workers=2) as server:
        assert server.register("sums.mar").status == 200
        keys = [f"d{number}" for number in range(24)]
        with ThreadPoolExecutor(6) as pool:
            rounds = [list(pool.map(lambda key: ask(server, "sums", key, "1").json(), keys)) for _ in range(3)]
        assert [[each["sum"] for each in answers] for answers in rounds] == [[count] * 24 for count in (1, 2, 3)]
        assert len({each["pid"] for each in rounds[0]}) == 2
