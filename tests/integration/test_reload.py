"""`reload=true`: files of models change while clients ask, and no request is lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

SOURCE = "def handle(data, context):\n    return data and ['{answer}'] * len(data)\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "packed", SOURCE.format(answer="first"))
    folder = store / "folder"
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "handler.py").write_text(SOURCE.format(answer="first"))
    model = {"modelName": "folder", "modelVersion": "1.0", "handler": "handler.py:handle"}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"runtime": "python", "model": model}))
    config = {"reload": "true", "default_workers_per_model": "2", "load_models": "packed.mar,folder"}
    with ServerProcess(store=store, config=config) as server:
        yield server


class Asking:
    """Asks a model again and again, on a thread of its own, and keeps what it is answered."""

    def __init__(self, server: ServerProcess, model: str) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self._server, self._model = server, model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            reply = self._server.predict(self._model)
            self.answers.append((reply.status, reply.body))

    def wait_for(self, answer: bytes) -> None:
        eventually(lambda: self.answers[-1:] == [(200, answer)], within=30, what=f"the answer {answer!r}")


def workers_of(server: ServerProcess, model: str) -> list[str]:
    described = server.request("management", "GET", f"/models/{model}").json()
    return [worker["id"] for worker in described[0]["workers"]]


def are_two_others(now: list[str], before: list[str]) -> bool:
    return len(now) == 2 and not set(now) & set(before)


@pytest.mark.parametrize("model", ["folder", "packed"])
def test_a_change_is_served_without_losing_a_request(server: ServerProcess, model: str) -> None:
    store = server.store

    def write(source: str) -> None:
        if model == "packed":
            archive(store, model, source, file_name="new.mar").replace(store / "packed.mar")
        else:
            # Whole at once: a handler that is read while it is written would be another change.
            new = server.home / "handler.py.new"
            new.write_text(source)
            new.replace(store / model / "handler.py")

    with Asking(server, model) as asking:
        asking.wait_for(b"first")
        before = workers_of(server, model)
        write(SOURCE.format(answer="second"))
        asking.wait_for(b"second")
        # A worker that was just starting may have read the changed file; it is replaced all the same.
        eventually(lambda: are_two_others(workers_of(server, model), before), within=30, what="the old workers' end")
        write("import does_not_exist\n")
        told = f"Model {model} version 1.0 stays as it was: Failed to start workers for model {model} version: 1.0"
        eventually(lambda: told in server.log(), within=30, what="the error in the log")
        eventually(lambda: len(workers_of(server, model)) == 2, within=30, what="the broken workers' end")
        asking.wait_for(b"second")
        write(SOURCE.format(answer="third"))
        asking.wait_for(b"third")
    assert {status for status, _ in asking.answers} == {200}
    assert {body for _, body in asking.answers} == {b"first", b"second", b"third"}
