"""What a path means, and the ids of requests."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from wsgi_ts.batcher.shm.board import Board
from wsgi_ts.batcher.shm.layout import RequestFlag
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix
from wsgi_ts.dataplane.exchange import RequestIds, header_value
from wsgi_ts.dataplane.routes import RoutingTable, prediction_parts
from wsgi_ts.errors import ResourceNotFound
from wsgi_ts.run_files import RunFiles

PATH, EXPLAIN, QUERY = RequestFlag.URL_PATH, RequestFlag.EXPLAIN, RequestFlag.QUERY_ROW
STATE = {"started": True, "ready": True, "draining": False}


@pytest.mark.parametrize(
    ("path", "meaning"),
    [
        ("/predictions/m", ("m", None, "", PATH)),
        ("/predictions/m/", ("m", None, "", PATH)),
        ("/predictions/m/1.0", ("m", "1.0", "", PATH)),
        ("/predictions/m/1.0/a/b", ("m", "1.0", "a/b", PATH)),
        ("/explanations/m", ("m", None, "", PATH | EXPLAIN)),
        ("/invocations", ("", None, "", QUERY)),
        ("/models/m/invoke", ("m", None, "", QUERY)),
        ("/m/predict", ("m", None, "", QUERY)),
        ("/m/1.0/predict", ("m", "1.0", "", QUERY)),
        ("/v1/models/m:predict", ("m", None, "", 0)),
        ("/v1/models/m:explain", ("m", None, "", EXPLAIN)),
        ("/v2/models/m/infer", ("m", None, "", 0)),
        ("/v2/models/m/explain", ("m", None, "", EXPLAIN)),
        ("/", None),
        ("/ping", None),
        ("/models/m", None),
        ("/v1/models/m", None),
        ("/v2/health/live", None),
        ("/nope", None),
    ],
)
def test_prediction_routes(path: str, meaning: tuple[str, str | None, str, int] | None) -> None:
    assert prediction_parts(path, "") == meaning


def test_a_prediction_without_a_model_is_no_resource() -> None:
    with pytest.raises(ResourceNotFound):
        prediction_parts("/predictions", "")


def test_the_model_of_an_invocation_stands_in_the_query() -> None:
    assert prediction_parts("/invocations", "model_name=a&model_name=b") == ("a", None, "", QUERY)


def test_request_ids_are_version_4_uuids_and_all_different() -> None:
    ids, others = RequestIds(), RequestIds()
    made = [source.new() for source in (ids, others) for _ in range(1000)]
    assert len(set(made)) == len(made)
    assert all(uuid.UUID(each).version == 4 and str(uuid.UUID(each)) == each for each in made)


def test_a_header_is_found_by_its_name_in_any_case() -> None:
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTS_Request_Sequence_Id:  s 1\t\r\nts_request_sequence_id_2: no\r\n\r\n"
    assert header_value(head, b"ts_request_sequence_id") == b"s 1"
    assert header_value(head, b"post /x http/1.1") == header_value(head, b"other") == b""


def test_routes_that_cannot_be_read_leave_those_that_are_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process may be out of descriptors when something new is published; it must go on, and try again."""
    prefix = f"wsgi-ts-{uuid.uuid4().hex}"
    board = Board.create(prefix)
    unlink_prefix(prefix)
    board.bump_epoch()
    table = RoutingTable(tmp_path, board)
    routes = RunFiles(tmp_path).routes
    routes.write_text(json.dumps({"models": {}, "workflows": {}, "healthy": False, **STATE}))
    table.refresh()
    assert not table.healthy
    board.bump_epoch()
    routes.unlink()
    routes.mkdir()
    table.refresh()
    table.refresh()
    assert not table.healthy
    assert len(caplog.records) == 1
    routes.rmdir()
    routes.write_text(json.dumps({"models": {}, "workflows": {}, "healthy": True, **STATE}))
    table.refresh()
    assert table.healthy
    board.close()
