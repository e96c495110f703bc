"""Who may look at the console, how many at a time, and what becomes of them: tokens, viewers, the end of the server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from support import debian, http
from support.archives import archive
from support.browser import Watched, chromium
from support.eventually import eventually
from support.server import ServerProcess

from wsgi_ts.plugins.testing import PluginServer
from wsgi_ts.web.viewers import MAX_VIEWERS

EVENTS = b"GET /console/events HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("store")
    archive(store, "echo")
    config = {"disable_token_authorization": "false", "load_models": "all", "default_workers_per_model": "1"}
    with ServerProcess(store=store, config=config) as running:
        yield running


def keys(server: ServerProcess) -> dict[str, str]:
    found = json.loads((server.home / "key_file.json").read_text())
    return {scope: entry["key"] for scope, entry in found.items()}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_page_is_for_everybody_and_nothing_else_is(server: ServerProcess) -> None:
    for path in ("/console", "/console/", "/docs"):
        page = server.request("management", "GET", path)
        assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "'sha256-" in page.headers["content-security-policy"]
    packed = server.request("management", "GET", "/console", headers={"accept-encoding": "br, gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert server.request("inference", "GET", "/docs").status == 200
    assert server.request("inference", "GET", "/console").status == 404
    paths = ("data", "events", "settings", "tune", "inference/ping", "x")
    for path in paths:
        refused = server.request("management", "GET", f"/console/{path}")
        assert (refused.status, refused.json()["type"]) == (400, "InvalidKeyException"), path
        # The inference key opens none of them.
        headers = bearer(keys(server)["inference"])
        assert server.request("management", "GET", f"/console/{path}", headers=headers).status == 400, path
    for path in paths[:4]:
        headers = bearer(keys(server)["management"])
        with server.raw("management") as raw:
            raw.send(
                f"GET /console/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['authorization']}\r\n\r\n".encode()
            )
            assert raw.read_head()[0] == b"HTTP/1.1 200 OK", path


def test_a_prediction_takes_the_inference_key_too(server: ServerProcess) -> None:
    both = {**bearer(keys(server)["management"]), "content-type": "text/plain"}
    target = "/console/inference/predictions/echo?a=%2Fb"
    assert server.request("management", "POST", target, headers=both, body="hi").status == 400
    both["x-inference-authorization"] = f"Bearer {keys(server)['inference']}"
    answer = server.request("management", "POST", target, headers=both, body="hi")
    assert (answer.status, answer.body) == (200, b"hi")
    assert server.request("management", "GET", "/console/inference/nothing/here", headers=both).status == 404


def test_signing_in(server: ServerProcess) -> None:
    debian.needs("chromium")
    with chromium() as browser, Watched(browser) as watched:
        page = watched.page
        page.goto(f"http://127.0.0.1:{server.ports['management']}/console")
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        key = page.get_by_label("Management key")
        expect(key).to_be_focused()
        key.fill("guessed")
        page.keyboard.press("Enter")
        expect(page.get_by_text("That key does not count")).to_be_visible()
        key.fill(keys(server)["management"])
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name="echo", exact=True).first).to_be_visible()
        page.get_by_role("link", name="Try it").click()
        page.get_by_label("Inference key").fill(keys(server)["inference"])
        page.get_by_role("button", name="Use").click()
        page.get_by_role("button", name="POST /predictions/{model_name}", exact=True).click()
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_label("Answer", exact=True)).to_contain_text("200 OK")
        command = page.get_by_label("The same with curl").locator("pre")
        expect(command).to_contain_text("Authorization: Bearer $KEY")
        assert keys(server)["inference"] not in command.inner_text()
        # Who has another key from now on is not looked after any more, and is told so.
        renewed = server.request("management", "GET", "/token?type=management", headers=bearer(keys(server)["API"]))
        assert renewed.status == 200
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        # That the browser speaks of refused calls is all that it speaks of.
        others = [each for each in watched.complaints if "400 (Bad Request)" not in each]
        assert others == []


#: A browser that is so busy that what waits for a picture, or for a moment, has to wait for seconds.
BUSY = """
const later = setTimeout;
window.setTimeout = (call, wait, ...rest) => later(call, Math.max(wait ?? 0, 1500), ...rest);
window.requestAnimationFrame = (call) => later(() => call(performance.now()), 1500);
"""


def test_signing_in_where_the_browser_is_busy(server: ServerProcess) -> None:
    debian.needs("chromium")
    with chromium() as browser, Watched(browser) as watched:
        watched.page.add_init_script(BUSY)
        watched.page.goto(f"http://127.0.0.1:{server.ports['management']}/console")
        expect(watched.page.get_by_role("heading", name="Sign in")).to_be_visible()


ROLES = """
from wsgi_ts.plugins import Principal, Refuse, plugin

@plugin("auth")
class Roles:
    def authenticate(self, head):
        name = head.headers.get("authorization", "").removeprefix("Bearer ")
        return Principal(name) if name in ("reader", "nobody") else Refuse(401, "A key is wanted.")

    def authorize(self, principal, action, model):
        return principal.name == "reader" and action != "scale"
"""


def test_who_must_not_do_something_is_told_so_and_keeps_the_key(tmp_path: Path) -> None:
    debian.needs("chromium")
    (tmp_path / "roles.py").write_text(ROLES)
    server = PluginServer(tmp_path / "server", tmp_path / "roles.py")
    server.start(wait_for_model=False)
    try:
        with chromium() as browser, Watched(browser) as watched:
            page = watched.page
            page.goto(f"http://127.0.0.1:{server.ports['management']}/console")
            key = page.get_by_label("Management key")
            key.fill("nobody")
            page.keyboard.press("Enter")
            expect(page.get_by_text("nobody is not allowed to ask for this: other")).to_be_visible()
            page.get_by_role("button", name="Use another key").click()
            key.fill("reader")
            page.keyboard.press("Enter")
            page.get_by_role("link", name="Models").click()
            page.get_by_role("link", name="echo", exact=True).first.click()
            page.get_by_role("button", name="Scale…").click()
            page.get_by_role("button", name="Scale", exact=True).click()
            expect(page.get_by_text("reader is not allowed to ask for this: scale of model echo")).to_be_visible()
            expect(page.get_by_role("heading", name="Sign in")).to_have_count(0)
    finally:
        assert server.stop() == 0


def test_only_so_many_look_at_a_time_and_all_see_the_same(tmp_path: Path) -> None:
    archive(tmp_path, "echo")
    with ServerProcess(store=tmp_path, config={"load_models": "all"}) as server, ExitStack() as viewers:
        raws = [viewers.enter_context(server.raw("management")) for _ in range(MAX_VIEWERS)]
        for raw in raws:
            raw.send(EVENTS)
            line, headers = raw.read_head()
            assert line == b"HTTP/1.1 200 OK"
            assert headers["content-type"] == "text/event-stream"
        with server.raw("management") as one_more:
            one_more.send(EVENTS)
            line, _, body = one_more.read_answer()
            assert b"503" in line
            assert json.loads(body)["message"].startswith(f"{MAX_VIEWERS} viewers")
        first, *others = [snapshots(raw) for raw in raws]
        times = [next(first)["at"] for _ in range(4)]
        assert times == sorted(set(times))
        assert all(next(each)["at"] > 0 for each in others)
        # Nobody holds a thread: the management API answers as ever.
        assert server.request("management", "GET", "/models").status == 200
        raws[0].close()
        eventually(lambda: begins(server), within=10, what="room for another viewer")
        assert server.stop() == []
        # All of them were told that the stream is whole: it ends with its last chunk.
        for each in others:
            assert all(found["at"] > 0 for found in each)


def test_each_puts_the_same_models_together_of_what_has_changed(tmp_path: Path) -> None:
    archive(tmp_path, "echo")
    with ServerProcess(store=tmp_path) as server, ExitStack() as viewers:
        assert server.register("echo.mar", model_name="first").status == 200

        def look() -> Iterator[tuple[int, dict[str, int]]]:
            raw = viewers.enter_context(server.raw("management"))
            raw.send(EVENTS)
            assert b"200" in raw.read_head()[0]
            known: dict[int, dict[str, Any]] = {}
            for found in snapshots(raw):
                known |= {model["id"]: known.get(model["id"], {}) | model for model in found["models"]}
                whole = [known[number] for number in found["order"]]
                yield len(found["models"]), {model["name"]: model["requests"] for model in whole}

        def wait_for(viewer: Iterator[tuple[int, dict[str, int]]], wanted: dict[str, int]) -> list[int]:
            sent = []
            gives_up_at = time.monotonic() + 60
            # However many have come while nobody read.
            for count, models in viewer:
                sent.append(count)
                if models == wanted:
                    return sent
                assert time.monotonic() < gives_up_at, f"{wanted} was not shown; with {sent} models a snapshot"
            raise AssertionError(f"the stream has ended; with {sent} models a snapshot")

        def wait_for_nothing(viewer: Iterator[tuple[int, dict[str, int]]]) -> None:
            gives_up_at = time.monotonic() + 60
            while next(viewer)[0]:
                assert time.monotonic() < gives_up_at, "models that do not change are sent again and again"

        early = look()
        assert wait_for(early, {"first": 0}) == [1]
        assert server.register("echo.mar", model_name="second").status == 200
        wait_for(early, {"first": 0, "second": 0})
        assert server.predict("second", b"x").status == 200
        wait_for(early, {"first": 0, "second": 1})
        late = look()
        assert wait_for(late, {"first": 0, "second": 1}) == [2]
        # Where nothing happens next to nothing is sent: once all of it more for who has come, then what changes.
        wait_for_nothing(early)
        wait_for_nothing(late)
        assert server.request("management", "DELETE", "/models/first").status == 200
        wait_for(early, {"second": 1})
        wait_for(late, {"second": 1})


def begins(server: ServerProcess) -> bool:
    with server.raw("management") as raw:
        raw.send(EVENTS)
        return b"200" in raw.read_head()[0]


def snapshots(raw: http.RawConnection) -> Iterator[dict[str, Any]]:
    """The snapshots that come, until the stream's end."""
    text = b""
    for chunk in raw.read_chunks():
        text += chunk
        while b"\n\n" in text:
            event, text = text.split(b"\n\n", 1)
            data = next(line for line in event.split(b"\n") if line.startswith(b"data: "))
            found: dict[str, Any] = json.loads(data[6:])
            yield found


NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *--query-gpu=index*) echo 0 ;;
  *) echo 'NVIDIA H100 80GB HBM3, 37 %, 20480 MiB, 81920 MiB, 41, 350.00 W, 700.00 W' ;;
esac
"""


def test_gpus_have_a_panel_where_there_are_any(tmp_path: Path) -> None:
    debian.needs("chromium")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    store = tmp_path / "store"
    store.mkdir()
    archive(store, "echo")
    environment = {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    with (
        ServerProcess(store=store, environment=environment) as server,
        chromium() as browser,
        Watched(browser) as watched,
    ):
        assert server.register("echo.mar").status == 200
        page = watched.page
        page.goto(f"http://127.0.0.1:{server.ports['management']}/console")
        page.get_by_role("link", name="GPUs").click()
        card = page.get_by_label("GPU 0")
        expect(card).to_contain_text("NVIDIA H100 80GB HBM3")
        expect(card.get_by_role("meter", name="Busy")).to_have_attribute("aria-valuenow", "37")
        expect(card.get_by_role("meter", name="Memory")).to_have_attribute("aria-valuenow", "25")
        expect(card).to_contain_text("350 W")
        expect(card).to_contain_text("echo/1.0")
        assert watched.complaints == []


def test_the_console_can_be_switched_off(tmp_path: Path) -> None:
    with ServerProcess(config={"console": "false"}) as server:
        for path in ("/console", "/console/data", "/docs"):
            assert server.request("management", "GET", path).status == 404
        assert server.request("inference", "GET", "/docs").status == 404
