"""`replace=true`: another workflow takes over a name, and no request is lost."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
from support.archives import archive
from support.eventually import eventually
from support.http import Reply
from support.server import ServerProcess
from support.slots import slots_in_use
from support.wars import war

from wsgi_ts.cli.status import print_status

ADD = """
import time

def handle(data, context):
    if data is None:
        return None
    time.sleep(0.002)
    return [bytes(row["body"]) + b" {mark}" for row in data]
"""
SPEC = """
models:
  m: {{url: {archive}}}
  {more}
dag:
  before: [m]
  m: [{last}]
"""
FUNCTIONS = """
def before(data, context):
    return None if data is None else [data[0]["body"] + b" {mark}"]

def after(data, context):
    return None if data is None else [bytes(data[0]["body"]) + b" {mark}"]
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(web_workers=2) as running:
        for mark in ("one", "two", "three"):
            archive(running.store, mark, ADD.replace("{mark}", mark))
            text = SPEC.format(archive=f"{mark}.mar", more="", last="after")
            war(running.store, "w", text, FUNCTIONS.replace("{mark}", mark), file_name=f"{mark}.war")
        assert register(running, "one.war").status == 200
        yield running


def register(server: ServerProcess, url: str, replace: bool = False) -> Reply:
    query = f"url={url}" + ("&replace=true" if replace else "")
    return server.request("management", "POST", f"/workflows?{query}", timeout=60)


def names(server: ServerProcess) -> list[str]:
    return [each["modelName"] for each in server.request("management", "GET", "/models").json()["models"]]


def _has_more(answers: Counter[tuple[int, str]], answer: tuple[int, str], count: int) -> bool:
    return answers[answer] > count


def test_no_request_is_lost_or_mixed_up(server: ServerProcess) -> None:
    answers: Counter[tuple[int, str]] = Counter()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            reply = server.request("inference", "POST", "/wfpredict/w", body=b"x")
            answers[reply.status, reply.text] += 1

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        eventually(lambda: sum(answers.values()) > 50, within=20, what="requests under way")
        for mark in ("two", "three", "one"):
            reply = register(server, f"{mark}.war", replace=True)
            assert (reply.status, reply.text) == (200, reply.text)
            present = (200, f"x {mark} {mark} {mark}")
            before = answers[present]
            eventually(partial(_has_more, answers, present, before + 20), within=20, what="answers of the new one")
            assert names(server) == ["w__m"]
            for node in ("w__m", "w__before", "w__after"):
                [described] = server.request("management", "GET", f"/models/{node}").json()
                assert described["modelName"] == node
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert set(answers) == {(200, f"x {mark} {mark} {mark}") for mark in ("one", "two", "three")}
    assert server.request("inference", "POST", "/predictions/w__before", body=b"y").text == "y one"
    eventually(lambda: not slots_in_use(server.prefix), within=20, what="no slot in use")
    eventually(lambda: len(server.processes("model-worker")) == 2, within=20, what="the end of the workers of before")


def test_workers_have_the_names_of_the_nodes_and_status_lists_the_workflow(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    for mark in ("two", "one"):
        assert register(server, f"{mark}.war", replace=True).status == 200
    assert server.request("inference", "POST", "/wfpredict/w", body=b"x").text == "x one one one"

    def workers() -> list[str]:
        return sorted(worker.command.split()[-2] for worker in server.processes("model-worker"))

    eventually(lambda: workers() == ["w__functions", "w__m"], within=20, what="workers with the nodes' names")
    lines = [line for name in ("ts_log.log", "model_log.log") for line in server.log(name).splitlines()]
    told = [line for line in lines if " W-90" in line]
    assert any("-w__m_1.0" in line for line in told)
    assert not [line for line in told if "~" in line]
    eventually(lambda: "ModelName:w__m," in server.log("model_metrics.log"), within=20)
    assert "ModelName:w~" not in server.log("model_metrics.log")
    assert print_status(server.run_dir, as_json=True) == 0
    [workflow] = json.loads(capsys.readouterr().out)["workflows"]
    assert (workflow["workflow"], workflow["url"], workflow["ready"]) == ("w", "one.war", True)
    assert (workflow["nodes"], workflow["models"], workflow["functions"]) == (3, 1, 2)
    assert print_status(server.run_dir, as_json=False) == 0
    text = capsys.readouterr().out
    assert "\nworkflows\n" in text
    assert "~" not in text


def test_one_that_fails_leaves_the_present_one(server: ServerProcess) -> None:
    text = SPEC.format(archive="gone.mar", more="", last="after")
    war(server.store, "w", text, FUNCTIONS.replace("{mark}", "bad"), file_name="bad.war")
    reply = register(server, "bad.war", replace=True)
    assert reply.status == 500
    assert "Workflow Node w__m failed to register. Details: Model not found at: gone.mar" in reply.json()["message"]
    assert server.request("inference", "POST", "/wfpredict/w", body=b"x").text == "x one one one"
    assert names(server) == ["w__m"]


def test_a_name_of_somebody_else_is_not_taken(server: ServerProcess) -> None:
    assert server.register("one.mar", model_name="w__more").status == 200
    text = SPEC.format(archive="two.mar", more="more: {url: two.mar}", last="more")
    war(server.store, "w", text, FUNCTIONS.replace("{mark}", "two"), file_name="more.war")
    reply = register(server, "more.war", replace=True)
    assert reply.status == 500
    assert "Workflow Node w__more failed to register." in reply.json()["message"]
    assert names(server) == ["w__m", "w__more"]


def test_a_workflow_that_is_unregistered_under_load_ends_what_it_has_begun(server: ServerProcess) -> None:
    answers: Counter[int] = Counter()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers[server.request("inference", "POST", "/wfpredict/again", body=b"x").status] += 1

    reply = server.request("management", "POST", "/workflows?url=one.war&workflow_name=again", timeout=60)
    assert reply.status == 200
    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    eventually(lambda: answers[200] > 50, within=20, what="requests under way")
    assert server.request("management", "DELETE", "/workflows/again", timeout=60).status == 200
    eventually(lambda: answers[404] > 5, within=20, what="requests that find nothing")
    stop.set()
    for client in clients:
        client.join()
    assert set(answers) == {200, 404}


def test_without_the_word_the_name_is_taken_and_afterwards_it_is_free(server: ServerProcess) -> None:
    assert register(server, "two.war").status == 409
    assert server.request("management", "DELETE", "/workflows/w", timeout=60).status == 200
    assert names(server) == ["w__more"]
    assert register(server, "two.war", replace=True).status == 200
    assert server.request("inference", "POST", "/wfpredict/w", body=b"x").text == "x two two two"
