"""The context: TorchServe's public names and no others, and a state that changes with each batch."""

from __future__ import annotations

import pytest

from wsgi_ts.handlers.serving.context import Context, RequestProcessor
from wsgi_ts.handlers.serving.inputs import LazyHeaders

PUBLIC_NAMES = [
    "cl_socket",
    "get_all_request_header",
    "get_request_header",
    "get_request_id",
    "get_response_content_type",
    "get_response_headers",
    "get_response_status",
    "get_sequence_id",
    "header_key_sequence_end",
    "header_key_sequence_id",
    "header_key_sequence_start",
    "manifest",
    "metrics",
    "model_name",
    "model_yaml_config",
    "request_ids",
    "request_processor",
    "set_all_response_status",
    "set_response_content_type",
    "set_response_header",
    "set_response_status",
    "stopping_criteria",
    "system_properties",
]


def make_context() -> Context:
    return Context("m", "/dir", {"model": {}}, 4, None)


def test_public_names_and_system_properties_are_torchserves() -> None:
    context = make_context()
    assert sorted(name for name in dir(context) if not name.startswith("_")) == PUBLIC_NAMES
    assert context.system_properties == {
        "model_dir": "/dir",
        "gpu_id": None,
        "batch_size": 4,
        "server_name": "MMS",
        "server_version": "0.12.0",
        "limit_max_image_pixels": True,
    }
    assert context.model_yaml_config == {}
    assert context.stopping_criteria is None


def test_each_row_has_its_own_request_and_response() -> None:
    context = make_context()
    heads = [LazyHeaders(b"GET / HTTP/1.1\r\nX: %d\r\n" % row, {}) for row in range(2)]
    context._begin_batch({0: "id0", 1: "id1"}, heads)
    assert context.get_request_id() == "id0"
    assert context.get_request_id(1) == "id1"
    assert context.get_request_id(2) is None
    assert context.get_request_header(1, "X") == "1"
    assert context.get_request_header(1, "Y") is None
    assert context.get_all_request_header(0) == {"body": {"content-type": ""}, "X": "0"}
    assert type(context.get_all_request_header(0)) is dict

    assert context.get_response_status(0) == (200, None)
    context.set_all_response_status(201, "made")
    context.set_response_status(418, idx=1)
    context.set_response_header(0, "A", "b")
    context.set_response_content_type(1, "text/x")
    assert context.get_response_status(0) == (201, "made")
    assert context.get_response_status(1) == (418, "")
    assert context.get_response_headers(0) == {"A": "b"}
    assert context.get_response_content_type(0) is None
    assert context.get_response_content_type(1) == "text/x"

    context._begin_batch({0: "id2"}, heads[:1])
    assert context.get_response_status(0) == (200, None)
    assert context.get_response_headers(0) == {}
    assert len(context.request_processor) == 1


def test_request_processors_may_be_replaced() -> None:
    context = make_context()
    processor = RequestProcessor({"a": "b"})
    context.request_processor = [processor]
    context.set_response_header(0, "k", "v")
    assert processor.get_response_header("k") == "v"
    assert processor.get_response_header("other") is None
    assert processor.get_request_properties() == {"a": "b"}


def test_sequence_headers_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_context().header_key_sequence_id == "ts_request_sequence_id"
    monkeypatch.setenv("TS_REQUEST_SEQUENCE_ID", "my-seq")
    context = make_context()
    context._begin_batch({0: "a", 1: "b"}, [{"my-seq": "s1"}, {}])
    assert context.get_sequence_id(0) == "s1"
    assert context.get_sequence_id(1) == ""


def test_contexts_are_equal_by_value_and_take_a_handlers_attributes() -> None:
    one, other = make_context(), make_context()
    one.request_processor = other.request_processor = []
    assert one == other
    one.cache = {}  # type: ignore[attr-defined]
    assert one != other
    assert one != "context"
