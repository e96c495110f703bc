"""A handler's stray write to the words that say where requests stand: no client gets another's answer, or half of one.

Handlers map the shared memory that requests lie in. What they write there is not prevented, but noticed: an answer
counts only where slot and answer name the request that the client has sent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead

import pytest
from support import http
from support.archives import archive
from support.eventually import eventually
from support.server import ServerProcess

from abuse.behaviours import HANDLER

pytestmark = pytest.mark.chaos

#: Answers with the body, some of them late or in parts.
VICTIM = """
import time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    bodies = [bytes(row.get("body") or b"") for row in data]
    if bodies[0].startswith(b"stream"):
        for part in range(4):
            parts = [body + b" %d " % part for body in bodies]
            send_intermediate_predict_response(parts, context.request_ids, "", 200, context)
            time.sleep(0.4)
    elif bodies[0].startswith(b"slow"):
        time.sleep(1.5)
    return bodies
"""
#: `words` are the words of all slots, generation << 8 | state; 6 is RUNNING, 7 STREAMING, 8 DONE and 0 FREE.
FIND = """
import gc
segments = [o for o in gc.get_objects() if type(o).__name__ == "Segment"]
assert segments
for segment in segments:
    words = segment.states
    for slot in range(len(words)):
"""
WRITES = {
    "requests under way are said to be done": "if words[slot] & 255 == 6: words[slot] += 2",
    "streams are said to be done": "if words[slot] & 255 == 7: words[slot] += 1 + (77 << 8)",
    "all words are ones": "words[slot] = (1 << 64) - 1",
    "all words are zeros": "words[slot] = 0",
    "all words are eights": "words[slot] = 0x0808080808080808",
    "all generations are one more": "words[slot] += 256",
    "free slots are said to be done": "if words[slot] & 255 == 0: words[slot] += 8",
    "free slots are said to have failed": "if words[slot] & 255 == 0: words[slot] = 9",
    "answers are shorter": "segment.slot_words[slot * 512 + (72 + 2048) // 8 + 2] //= 2",
    "answers are said to be large": "segment.slot_words[slot * 512 + (72 + 2048) // 8 + 2] = 1 << 40",
}


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess(config={"web_workers": "1"}) as server:
        archive(server.store, "odd", HANDLER)
        archive(server.store, "victim", VICTIM)
        assert server.register("odd.mar", response_timeout=5).status == 200
        assert server.register("victim.mar", initial_workers=4, response_timeout=5).status == 200
        yield server


def ask(server: ServerProcess, model: str, body: bytes) -> http.Reply | None:
    """The reply; None for a broken connection or a stream without its end."""
    try:
        return server.predict(model, body, content_type="application/octet-stream")
    except (IncompleteRead, ConnectionError):
        return None


def is_own(reply: http.Reply | None, body: bytes) -> bool:
    """Whether a client got its own answer; an error is none, and may not be taken for one."""
    if reply is None:
        return False
    if reply.status != 200:
        assert reply.status in (500, 503, 507), reply
        assert set(reply.json()) == {"code", "type", "message"}
        return False
    whole = b"".join(b"%b %d " % (body, part) for part in range(4)) + body if body.startswith(b"stream") else body
    assert reply.body == whole, (body, reply.body[:300])
    return True


def storm(server: ServerProcess, pool: ThreadPoolExecutor, name: str) -> int:
    """Many requests at a time; returns how many got their own answer."""
    bodies = [f"{name} {number} ".encode() * (1 + number % 7) for number in range(200)]
    return sum(map(is_own, pool.map(lambda body: ask(server, "victim", body), bodies), bodies))


@pytest.mark.parametrize("write", WRITES)
def test_no_answer_is_another_s(server: ServerProcess, write: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert storm(server, pool, "before") == 200, "slots have answers of others in them"
        kind = "stream" if "stream" in write else "slow"
        bodies = [f"{kind} {number} of {write}".encode() for number in range(6)]  # for four workers
        under_way = [pool.submit(ask, server, "victim", body) for body in bodies]
        time.sleep(0.6)
        pool.submit(ask, server, "odd", b"do:" + (FIND + " " * 8 + WRITES[write]).encode()).result()
        for body, reply in zip(bodies, under_way, strict=True):
            is_own(reply.result(), body)
        storm(server, pool, "during")
        assert eventually(lambda: is_own(ask(server, "victim", b"after"), b"after"), within=20, what="service goes on")
        assert storm(server, pool, "after") == 200
    assert len(server.processes("web-worker")) == 1
    assert "Traceback" not in server.output()
