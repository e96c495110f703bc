"""What the section `options` of a workflow's specification adds, and streams of the last node."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess
from support.slots import slots_in_use
from support.wars import NAMED, war

#: Runs what the request's first letter does not forbid; `other` reads both branches.
CONDITIONS = """
models:
  branch: {url: named.mar}
dag:
  first: [branch, side]
  branch: [behind]
  behind: [join]
  side: [join]
options:
  nodes:
    branch: {when: wants_branch}
    side: {when: wants_side}
"""
CONDITION_FUNCTIONS = """
def text(row):
    return bytes(row["body"]).decode()

def first(data, context):
    return None if data is None else [data[0]["body"]]

def wants_branch(data, context):
    return None if data is None else ["b" in text(data[0])]

def wants_side(data, context):
    return None if data is None else ["s" in text(data[0])]

def behind(data, context):
    return None if data is None else [text(data[0]) + " behind"]

def side(data, context):
    return None if data is None else [text(data[0]) + " side"]

def join(data, context):
    return None if data is None else [{key: bytes(value).decode() for key, value in data[0].items()}]
"""
FAILURES = """
models:
  retry-attempts: 0
  broken: {url: raises.mar}
  absent: {url: absent.mar}
dag:
  first: [broken, absent, stands_in, fine]
  broken: [join]
  absent: [join]
  stands_in: [join]
  fine: [join]
options:
  nodes:
    broken: {on-error: skip}
    absent: {optional: true}
    stands_in: {on-error: default, default: {a: 1}}
"""
FAILURE_FUNCTIONS = (
    CONDITION_FUNCTIONS
    + """
def stands_in(data, context):
    if data is not None:
        raise ValueError("no")

def fine(data, context):
    return None if data is None else ["fine"]
"""
)
TELLING = """
models:
  retry-attempts: 1
  download: {url: download.mar}
dag:
  first: [download]
  download: [behind]
options:
  nodes:
    download: {on-error: tell}
    behind: {on-error: tell}
"""
#: Raises the status that the request names, and tells how often it was asked.
DOWNLOAD = """
from collections import Counter
from ts.utils.util import PredictionException

calls = Counter()

def handle(data, context):
    if data is None:
        return None
    word = bytes(data[0]["body"]).decode()
    calls[word] += 1
    if word.isdigit():
        raise PredictionException(f"no image, call {calls[word]}", int(word))
    return [b"\\xff" if word == "no text" else word]
"""
ITEMS = """
models:
  batched: {url: counted.mar, batch-size: 16, max-batch-delay: 100}
dag:
  split: [batched]
  batched: [mark]
  mark: [join]
options:
  nodes:
    split: {scatter: true}
    mark: {on-error: skip, pass: [request]}
    join: {gather: true, pass: [request]}
"""
ITEM_FUNCTIONS = """
def split(data, context):
    return None if data is None else [[word for word in data[0]["body"].decode().split()] if data[0]["body"] else []]

def mark(data, context):
    if data is None:
        return None
    value = bytes(data[0]["body"])
    if value.startswith(b"skip"):
        raise ValueError("skipped")
    return [value + b"/" + str(len(data[0]["request.body"])).encode()]

def join(data, context):
    if data is None:
        return None
    row = data[0]
    return [{"items": [None if item is None else bytes(item).decode() for item in row["body"]],
             "request": bytes(row["request.body"]).decode()}]
"""
COUNTED = """
def handle(data, context):
    if data is None:
        return None
    return [bytes(row["body"]) + b":%d" % len(data) for row in data]
"""
SHARED = """
models: {}
dag:
  first: [theirs, second]
  second: [join]
  theirs: [join]
options:
  nodes:
    theirs: {model: named/1.0}
    second: {model: named}
"""
STREAMED = """
models: {}
dag:
  first: [words]
"""
INNER = """
models: {}
dag:
  words: [after]
"""
STREAM_FUNCTIONS = """
from ts.handler_utils.utils import send_intermediate_predict_response

def first(data, context):
    return None if data is None else [data[0]["body"]]

def words(data, context):
    if data is None:
        return None
    *before, last = bytes(data[0]["body"]).decode().split()
    for word in before:
        send_intermediate_predict_response([word + "\\n"], context.request_ids, "ok", 200, context)
    return [last]

def after(data, context):
    return None if data is None else [bytes(data[0]["body"]) + b"after"]
"""


#: Goes on for as many steps as the body has words; notes how many requests each step has.
STEPS = """
def handle(data, context):
    if data is None:
        return None
    context.words = getattr(context, "words", {})
    answers = []
    for row, request_id in context.request_ids.items():
        if data[row]:
            context.words[request_id] = bytes(data[row]["body"]).decode().split()
        words = context.words[request_id]
        answers.append(words.pop(0) + " ")
        if words:
            context.set_response_header(row, "ts_stream_next", "true")
    return answers
"""
#: Fails the first attempt of each request after its first chunk.
BREAKS_OFF = """
import time

from ts.handler_utils.utils import send_intermediate_predict_response

seen = set()

def handle(data, context):
    if data is None:
        return None
    body = bytes(data[0]["body"]).decode()
    if body not in seen:
        seen.add(body)
        send_intermediate_predict_response(["stale"], context.request_ids, "ok", 200, context)
        time.sleep(0.3)
        raise ValueError("broken off")
    return ["fresh "]
"""
SLOW = """
models: {timeout-ms: 100000}
dag:
  before: [slow]
"""
#: Ends when the file is there that the body names.
SLOW_FUNCTIONS = """
import os
import time

def before(data, context):
    return None if data is None else [data[0]["body"]]

def slow(data, context):
    if data is None:
        return None
    ends_at = time.monotonic() + 100
    while not os.path.exists(bytes(data[0]["body"])) and time.monotonic() < ends_at:
        time.sleep(0.005)
    return [data[0]["body"]]
"""
RETRIED = """
models:
  breaks: {url: breaks.mar, retry-attempts: 1}
dag:
  breaks: [after]
"""
CONTINUOUS = """
models:
  steps: {{url: steps.mar, batch-size: 4}}
dag:
  {dag}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess() as running:
        store = running.store
        archive(store, "named", NAMED)
        archive(store, "counted", COUNTED)
        archive(store, "raises", "def handle(data, context):\n    if data:\n        raise ValueError('no')\n")
        running.register("named.mar")
        war(store, "conditions", CONDITIONS, CONDITION_FUNCTIONS)
        war(store, "failures", FAILURES, FAILURE_FUNCTIONS)
        archive(store, "download", DOWNLOAD)
        war(store, "telling", TELLING, CONDITION_FUNCTIONS)
        war(store, "items", ITEMS, ITEM_FUNCTIONS)
        war(store, "shared", SHARED, CONDITION_FUNCTIONS)
        war(store, "streamed", STREAMED, STREAM_FUNCTIONS)
        war(store, "inner", INNER, STREAM_FUNCTIONS)
        archive(store, "breaks", BREAKS_OFF)
        war(store, "slow", SLOW, SLOW_FUNCTIONS)
        war(store, "retried", RETRIED, STREAM_FUNCTIONS)
        archive(store, "steps", STEPS, config_yaml="continuousBatching: true\nbatchSize: 4\n")
        war(store, "continuous", CONTINUOUS.format(dag="steps: []"), STREAM_FUNCTIONS)
        war(store, "continuous_inner", CONTINUOUS.format(dag="steps: [after]"), STREAM_FUNCTIONS)
        for name in (
            "conditions",
            "failures",
            "telling",
            "items",
            "shared",
            "streamed",
            "inner",
            "retried",
            "continuous",
            "continuous_inner",
        ):
            reply = running.request("management", "POST", f"/workflows?url={name}.war", timeout=60)
            assert reply.status == 200, reply.text
        yield running
        eventually(lambda: not slots_in_use(running.prefix), within=20, what="no slot in use")


def ask(server: ServerProcess, workflow: str, body: str = "", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.request("inference", "POST", f"/wfpredict/{workflow}", body=body, headers=named)


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("bs", {"behind": "bs conditions__branch behind", "side": "bs side"}),
        ("b", {"behind": "b conditions__branch behind"}),
        ("s", {"side": "s side"}),
    ],
)
def test_when(server: ServerProcess, body: str, answer: dict[str, str]) -> None:
    assert ask(server, "conditions", body).json() == answer


def test_where_every_last_node_is_skipped_the_last_that_ran_answers(server: ServerProcess) -> None:
    assert ask(server, "conditions", "none").text == "none"


def test_errors_that_are_no_end(server: ServerProcess) -> None:
    assert ask(server, "failures", "x").json() == {"stands_in": '{\n  "a": 1\n}', "fine": "fine"}


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ("501", 501, "InternalServerException", "no image, call 2"),
        # The client's mistake: another attempt would meet it again.
        ("404", 404, "InternalServerException", "no image, call 1"),
        ("400", 400, "BadRequestException", "no image, call 1"),
        ("no text", 503, "InternalServerException", "Prediction failed"),
    ],
)
def test_an_error_is_told_as_the_node_has_raised_it(
    server: ServerProcess, body: str, status: int, kind: str, message: str
) -> None:
    reply = ask(server, "telling", body)
    assert (reply.status, reply.json()) == (status, {"code": status, "type": kind, "message": message})
    assert ask(server, "telling", "x").text == "x behind"


def test_items_fill_the_batch_of_the_next_model_and_come_back_in_order(server: ServerProcess) -> None:
    words = [f"w{number}" for number in range(40)]
    answer = ask(server, "items", " ".join(words)).json()
    items = [item.split(":")[0] for item in answer["items"]]
    assert items == words
    assert answer["request"] == " ".join(words)
    assert max(int(item.split(":")[1].split("/")[0]) for item in answer["items"]) > 1, "they are batched"
    assert {item.split("/")[1] for item in answer["items"]} == {str(len(" ".join(words)))}


def test_items_that_are_skipped_and_no_items(server: ServerProcess) -> None:
    answer = ask(server, "items", "one skip two").json()["items"]
    assert [item and item.split(":")[0] for item in answer] == ["one", None, "two"]
    assert ask(server, "items").json() == {"items": [], "request": ""}


def test_a_registered_model_is_shared(server: ServerProcess) -> None:
    assert ask(server, "shared", "x").json() == {"second": "x named", "theirs": "x named"}
    listed = server.request("management", "GET", "/models").json()["models"]
    assert not [each for each in listed if each["modelName"].startswith("shared__")]


def test_a_shared_model_has_to_be_there(server: ServerProcess) -> None:
    war(server.store, "alone", SHARED.replace("named/1.0", "nobody"), CONDITION_FUNCTIONS)
    reply = server.request("management", "POST", "/workflows?url=alone.war", timeout=60)
    assert reply.status == 500
    assert "Workflow Node alone__theirs failed to register. Details: Model not found: nobody" in reply.json()["message"]


def test_the_last_node_s_stream_goes_through(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"], timeout=60)
    connection.request("POST", "/wfpredict/streamed", "a b c")
    reply = connection.getresponse()
    assert reply.getheader("transfer-encoding") == "chunked"
    assert reply.read() == b"a\nb\nc"
    connection.close()


def test_of_an_inner_stream_the_first_chunk_counts(server: ServerProcess) -> None:
    assert ask(server, "inner", "a b c").text == "a\nafter"
    assert ask(server, "inner", "alone").text == "aloneafter"


def test_of_a_stream_that_broke_off_nothing_counts_after_another_attempt(server: ServerProcess) -> None:
    assert ask(server, "retried", "one").text == "fresh after"


def test_a_workflow_that_leaves_is_none_any_more_and_its_name_is_told_as_busy(
    server: ServerProcess, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"

    def manage(method: str, path: str) -> Reply:
        return server.request("management", method, path, body=b"", timeout=60)

    assert manage("POST", "/workflows?url=slow.war").status == 200
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask, server, "slow", str(gate))
        try:
            eventually(lambda: slots_in_use(server.prefix), within=20, what="a request under way")
            leaves = pool.submit(manage, "DELETE", "/workflows/slow")
            eventually(lambda: manage("GET", "/workflows/slow").status == 404, within=20, what="no such workflow")
            again = manage("DELETE", "/workflows/slow")
            assert (again.status, again.json()["message"]) == (404, "Workflow not found: slow")
            busy = manage("POST", "/workflows?url=slow.war")
            assert busy.status == 409
            assert busy.json()["message"] == "Workflow slow is being unregistered; try again when that is done."
        finally:
            gate.touch()
        assert asked.result().text == str(gate)
        assert leaves.result().status == 200
    assert manage("POST", "/workflows?url=slow.war").status == 200


def test_a_model_with_a_continuous_batch_as_node(server: ServerProcess) -> None:
    bodies = [" ".join(f"{name}{number}" for number in range(20)) for name in "abcdef"]
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: ask(server, "continuous", body).text, bodies))
        assert found == [f"{body} " for body in bodies]
        # Of an inner stream the first chunk counts, and the others hold up nobody.
        found = list(pool.map(lambda body: ask(server, "continuous_inner", body).text, [*bodies, "alone"]))
        assert found == [f"{body.split()[0]} after" for body in [*bodies, "alone"]]


def events(server: ServerProcess, path: str, body: str, accept: str = "text/event-stream") -> list[tuple[str, str]]:
    reply = server.request("inference", "POST", path, body=body, headers={"accept": accept})
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    found = []
    for block in reply.text.split("\n\n")[:-1]:
        kind, *data = block.split("\n")
        found.append((kind.removeprefix("event: "), "\n".join(line.removeprefix("data: ") for line in data)))
    return found


def test_events_tell_of_each_node(server: ServerProcess) -> None:
    *nodes, (kind, answer) = events(server, "/wfpredict/conditions", "b")
    assert [kind for kind, _ in nodes] == ["node"] * len(nodes)
    told = {fields["node"]: fields for fields in (json.loads(data) for _, data in nodes)}
    assert {name: fields["state"] for name, fields in told.items()} == {
        **{"first": "done", "branch": "done", "behind": "done", "side": "skipped", "join": "done"}
    }
    assert all(fields["ms"] > 0 for fields in told.values())
    assert (kind, json.loads(answer)) == ("answer", {"behind": "b conditions__branch behind"})


ENDS = """
models:
  retry-attempts: 0
  gone: {url: raises.mar, max-workers: 0}
  slow: {url: sleeps.mar, timeout-ms: 200}
dag:
  first: [gone, slow, stands_in, fine]
  gone: [behind]
  slow: [side]
  stands_in: [join]
  fine: [fails]
  behind: [fails]
  side: [fails]
  join: [fails]
options:
  nodes:
    gone: {on-error: skip}
    slow: {on-error: skip}
    stands_in: {on-error: default, default: x}
"""
ENDS_FUNCTIONS = (
    FAILURE_FUNCTIONS
    + """
def fails(data, context):
    if data is not None:
        raise ValueError("no")
"""
)


def test_events_tell_how_each_node_has_ended(server: ServerProcess) -> None:
    archive(server.store, "sleeps", "import time\n\ndef handle(data, context):\n    time.sleep(1 if data else 0)\n")
    war(server.store, "ended", ENDS, ENDS_FUNCTIONS)
    reply = server.request("management", "POST", "/workflows?url=ended.war", timeout=60)
    assert reply.status == 200, reply.text
    *nodes, (kind, data) = events(server, "/wfpredict/ended", "x")
    assert (kind, json.loads(data)["message"]) == ("error", "Error executing fails")
    told = [json.loads(data) for _, data in nodes]
    assert {fields["node"]: fields["state"] for fields in told} == {
        **{"first": "done", "fine": "done", "stands_in": "default", "join": "done"},
        **{"gone": "skipped", "behind": "skipped", "slow": "skipped", "side": "skipped", "fails": "failed"},
    }
    assert len(told) == 9, "each once"
    assert server.request("management", "DELETE", "/workflows/ended", timeout=60).status == 200


def test_events_by_query_of_items_and_of_a_stream(server: ServerProcess) -> None:
    found = events(server, "/wfpredict/items?events=true", "one two", accept="*/*")
    items = [json.loads(data).get("item") for kind, data in found if kind == "node"]
    assert sorted(item for item in items if item is not None) == [0, 0, 1, 1]
    found = events(server, "/wfpredict/streamed", "a b c")
    assert [kind for kind, _ in found][:2] == ["node", "chunk"]
    assert "".join(data for kind, data in found if kind == "chunk").split() == ["a", "b", "c"]
    assert found[-1] == ("answer", "")


def test_an_error_is_an_event_too(server: ServerProcess) -> None:
    war(server.store, "failing", "models: {}\ndag:\n  first: [stands_in]\n", FAILURE_FUNCTIONS)
    assert server.request("management", "POST", "/workflows?url=failing.war", timeout=60).status == 200
    *_, (kind, data) = events(server, "/wfpredict/failing", "x")
    assert (kind, json.loads(data)["message"]) == ("error", "Error executing stands_in")


def test_a_client_of_events_that_hangs_up(server: ServerProcess) -> None:
    for _ in range(5):
        with server.raw() as connection:
            head = "POST /wfpredict/items HTTP/1.1\r\nhost: a\r\naccept: text/event-stream\r\ncontent-length: 5\r\n\r\n"
            connection.send(head.encode() + b"a b c")
            assert connection.read_head()[1]["content-type"] == "text/event-stream"
    eventually(lambda: not slots_in_use(server.prefix), within=20, what="no slot in use")


def test_a_model_with_sequences_is_no_node(server: ServerProcess) -> None:
    archive(server.store, "sequences", NAMED, config_yaml="sequenceBatching: true\nsequenceMaxIdleMSec: 1000\n")
    war(server.store, "stateful", "models:\n  m: {url: sequences.mar}\ndag:\n  first: [m]\n", CONDITION_FUNCTIONS)
    reply = server.request("management", "POST", "/workflows?url=stateful.war", timeout=60)
    assert reply.status == 500
    assert "Details: A model with sequenceBatching cannot be a node." in reply.json()["message"]
    assert server.request("management", "GET", "/models/stateful__m").status == 404


def test_options_that_do_not_go_together(server: ServerProcess) -> None:
    text = ITEMS.replace("split: {scatter: true}", "split: {scatter: true, on-error: default, default: []}")
    war(server.store, "odd", text, ITEM_FUNCTIONS)
    reply = server.request("management", "POST", "/workflows?url=odd.war", timeout=60)
    assert (reply.status, reply.json()["type"]) == (400, "InvalidDAGException")
    fault = "spec.yaml:10: key options.nodes.split.on-error: scatter does not go with a default: remove one of them"
    assert reply.json()["message"] == fault
