"""Clients that begin with HTTP/2 on a port of HTTP/1.1: they are refused in their own protocol, and logged."""

from __future__ import annotations

import logging
import time

from wsgi_ts.http2.refusal import Refusal
from wsgi_ts.rest.responses import encode_json
from wsgi_ts.web.connection import Connection, Phase
from wsgi_ts.web.report import Report
from wsgi_ts.web.sending import Sender, send_now
from wsgi_ts.web.table import ConnectionTable

log = logging.getLogger(__name__)

STATUS = 505
_MESSAGE = "HTTP/1.1 is spoken here. gRPC has ports of its own: grpc_inference_port, grpc_management_port."
#: How long a client may take until its first request.
_LIMIT_S = 10.0


class Http2Clients:
    """Refuses them."""

    def __init__(self, table: ConnectionTable, sender: Sender, report: Report) -> None:
        self._table = table
        self._sender = sender
        self._report = report
        self._has_told = False

    def begin(self, connection: Connection) -> None:
        """Takes a connection over whose client has begun with HTTP/2."""
        log.log(
            logging.DEBUG if self._has_told else logging.WARNING,
            "%s speaks HTTP/2 to a port of HTTP/1.1 and is answered %d; further ones are told of at DEBUG. "
            "gRPC has ports of its own, and the name of this one in Kubernetes and Knative is http1, not h2c",
            connection.peer,
            STATUS,
        )
        self._has_told = True
        self._table.name_request(connection)
        body = encode_json({"code": STATUS, "type": "HttpVersionNotSupportedException", "message": _MESSAGE})
        fields = [
            (":status", str(STATUS)),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("x-request-id", connection.request_id),
        ]
        connection.refusal = Refusal(fields, body)
        connection.phase = Phase.REFUSE
        connection.limit_at = time.monotonic() + _LIMIT_S
        data, connection.buffer = connection.buffer, b""
        self._table.received.note(connection, 0)
        self.go_on(connection, data)

    def go_on(self, connection: Connection, data: bytes) -> None:
        """Takes what the client has sent.

        Raises:
            OSError: the client has gone.
        """
        refusal = connection.refusal
        if refusal is None:
            raise RuntimeError("this client is not refused")
        answer = refusal.receive(data)
        if refusal.is_over:
            self._report.note(connection, STATUS)
            connection.close_after = True
            connection.phase = Phase.SEND
            self._sender.send(connection, answer)
        elif answer and not send_now(connection, answer):  # it reads nothing, and wants nothing but answers to frames
            self._table.client_gone(connection)
