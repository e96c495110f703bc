"""What OpenTelemetry wants to know of a request over HTTP, by its names: read of the head, and only for spans."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

from wsgi_ts.logs.text import mask_secrets

#: The longest path and name of a client's program that is told.
MOST_TEXT: Final = 512
#: What stands behind a model in a path and is no version.
_VERBS: Final = ("predict", "invoke", "infer", "explain")
_MOST_PARTS: Final = 6
_PORT_DIGITS: Final = len("65535")
_HOST: Final = re.compile(r"\r\nhost:([^\r\n]*)", re.IGNORECASE)
_AGENT: Final = re.compile(r"\r\nuser-agent:([^\r\n]*)", re.IGNORECASE)


def client_of(peer: str) -> tuple[str, int | None]:
    """Returns a client's address and port; `peer` is `/address:port`, or whatever stands for a socket with a name."""
    address, _, port = peer.lstrip("/").rpartition(":")
    return address, int(port) if port.isdigit() else None


def http_facts(head: str, address: str, *, is_tls: bool, name: str, is_workflow: bool) -> dict[str, Any]:
    """Returns the attributes of a span of kind SERVER, but for method, path, status and the client's port.

    `head` is the request line and the header lines, `address` the client's, `name` the model or workflow.
    """
    line = head.partition("\r\n")[0]
    host, _, server_port = _value(_HOST, head).partition(":")
    target, _, protocol = line.partition(" ")[2].rpartition(" ")
    path, _, query = target.partition("?")
    agent = _value(_AGENT, head)
    return {
        "url.scheme": "https" if is_tls else "http",
        "url.query": mask_secrets(f"?{query}")[1:][:MOST_TEXT] if query else None,
        "http.route": route_of(path, name, is_workflow=is_workflow),
        "network.protocol.version": protocol.rpartition("/")[2],
        "client.address": address,
        "server.address": host or None,
        # The client's word: it may be anything, also a number that Python refuses to read.
        "server.port": int(server_port) if server_port.isdecimal() and len(server_port) <= _PORT_DIGITS else None,
        "user_agent.original": agent[:MOST_TEXT] or None,
    }


def _value(line: re.Pattern[str], head: str) -> str:
    found = line.search(head)
    return found[1].strip() if found is not None else ""


@lru_cache(maxsize=1024)
def route_of(path: str, name: str, *, is_workflow: bool) -> str:
    """Returns the route of a prediction's path: what varies has a name instead of its value."""
    shown_name = "{workflow}" if is_workflow else "{model}"
    shown: list[str] = []
    for part in path.split("/")[:_MOST_PARTS]:
        if part == name or part.startswith(f"{name}:"):
            shown.append(shown_name + part[len(name) :])
        elif shown[-1:] == ["{model}"] and part not in _VERBS:
            shown.append("{version}")
        elif shown[-1:] == ["{version}"] and part not in _VERBS:
            return "/".join([*shown, "{rest}"])
        else:
            shown.append(part)
    return "/".join(shown)
