"""What is sent to a model that is tuned, and where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.handlers.serving.recording import RecordedRequest
from wsgi_ts.settings.address import parse_address
from wsgi_ts.settings.config import Config
from wsgi_ts.tune.served_model import NoServer, ServedModel, read_config, read_token, target

FACTS = {
    "model": "my model",
    "version": "1.0",
    "workers": 1,
    "threads": 0,
    "batch_size": 1,
    "batch_policy": "adaptive",
    "max_batch_delay": 100,
    "batches": True,
    "steps": False,
    "sequences": False,
    "on_gpu": False,
}


class Supervisor:
    """Answers each call with the facts."""

    def __init__(self, **other: object) -> None:
        self.facts = {**FACTS, **other}
        self.calls: list[str] = []

    def call(self, op: str, **_: object) -> dict[str, Any]:
        self.calls.append(op)
        return self.facts


def model(**other: object) -> ServedModel:
    return ServedModel(Supervisor(**other), "my model", None, 4)  # type: ignore[arg-type]


def test_a_recorded_request_keeps_its_headers_and_its_query() -> None:
    headers = {
        "Content-Type": "text/plain",
        "X-Mine": "a",
        "Host": "old",
        "Content-Length": "99",
        "Connection": "close",
    }
    sample = RecordedRequest("POST /predictions/x?top=3 HTTP/1.1", headers, b"body")
    config = Config(inference_address=parse_address("https://0.0.0.0:8443"))
    there = target(config, model(), [sample], "secret")
    assert (there.host, there.port, there.tls) == ("127.0.0.1", 8443, True)
    [request] = there.requests
    head, _, body = request.partition(b"\r\n\r\n")
    assert body == b"body"
    assert head.decode().split("\r\n") == [
        "POST /predictions/my%20model/1.0?top=3 HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Length: 4",
        "Authorization: Bearer secret",
        "Content-Type: text/plain",
        "X-Mine: a",
    ]


def test_a_socket_of_the_file_system() -> None:
    config = Config(inference_address=parse_address("unix:/run/a.sock"))
    there = target(config, model(), [RecordedRequest()], None)
    assert (there.unix_path, there.tls) == ("/run/a.sock", False)
    assert b"Authorization" not in there.requests[0]


@pytest.mark.parametrize(
    ("fact", "text"),
    [({"steps": True}, "step by step"), ({"sequences": True}, "sequences"), ({"batches": False}, "useJobTicket")],
)
def test_models_without_batches_are_not_tuned(fact: dict[str, object], text: str) -> None:
    assert text in model(**fact).unfit
    assert not model().unfit


def test_what_holds_already_is_not_asked_for() -> None:
    supervisor = Supervisor()
    served = ServedModel(supervisor, "my model", None, 4)  # type: ignore[arg-type]
    served.put(served.present)
    served.put(replace(served.present, batch_size=2))
    assert supervisor.calls == ["begin_trial", "change_trial"]


def test_threads_are_shared_out() -> None:
    assert [model().threads_for(workers) for workers in (1, 2, 3, 9)] == [4, 2, 1, 1]
    assert model(on_gpu=True).threads_for(1) == 0


def test_the_key_file_is_read_where_tokens_are_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    on, off = Config(disable_token_authorization=False), Config(disable_token_authorization=True)
    assert read_token(on, None) is None
    Path("key_file.json").write_text(json.dumps({"inference": {"key": "k"}}))
    assert (read_token(on, None), read_token(off, None), read_token(on, "given")) == ("k", None, "given")


def test_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(NoServer, match="Not running"):
        read_config(tmp_path)
