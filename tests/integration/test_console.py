"""The console in a browser, on a server under load: every panel, every action, keyboard, both themes, small screens.

WSGI_TS_SCREENSHOTS=1 writes the pictures of docs/images anew.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from support import debian
from support.archives import archive
from support.browser import FAINT, NAMELESS, Watched, chromium
from support.eventually import eventually
from support.server import REPOSITORY, ServerProcess
from support.wars import war

from wsgi_ts.tune.objective import parse_objective
from wsgi_ts.tune.prediction import Curve
from wsgi_ts.tune.report import Result, save
from wsgi_ts.tune.search import Point
from wsgi_ts.tune.served_model import Setting

debian.needs("chromium")

BATCHED = """
import time

def handle(data, context):
    if data is None:
        return None
    time.sleep(0.004 + 0.0008 * len(data))
    if any(row.get("body") == b"fail" for row in data):
        raise ValueError("the tensor has the wrong shape")
    return [b"ok"] * len(data)
"""
#: Its worker ends when it is told to, and says why.
DIES = """
import os, sys

def handle(data, context):
    if data is None:
        return None
    if any(row.get("body") == b"die" for row in data):
        print("out of <b>scratch</b> space in /tmp/cache", file=sys.stderr, flush=True)
        os._exit(3)
    return [b"ok"] * len(data)
"""
BROKEN = """
raise RuntimeError("size mismatch for fc.weight: [1000, 2048] in the file, [10, 2048] in the model")
"""
FUNCTIONS = """
def first(data, context):
    return None if data is None else [data[0]["body"]]

def join(data, context):
    return None if data is None else [bytes(data[0]["a"]) + bytes(data[0]["b"])]
"""
DIAMOND = """
models:
  a: {url: batched.mar}
  b: {url: batched.mar}
dag:
  first: [a, b]
  a: [join]
  b: [join]
"""
#: What tune has measured: batch size, workers, answers a second and p99 in seconds.
MEASURED = ((1, 1, 190, 0.008), (8, 1, 700, 0.015), (16, 2, 1600, 0.031), (16, 1, 850, 0.033), (32, 2, 1900, 0.062))
CHOSEN = 2
PANELS = ("overview", "models", "models/classifier/1.0", "requests", "workflows", "try", "tune", "settings")
CLIENTS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Models of all kinds, and clients that keep them busy."""
    store = tmp_path_factory.mktemp("store")
    config = "batchSize: 16\nmaxBatchDelay: 20\n"
    archive(store, "classifier", BATCHED, config_yaml=config)
    archive(store, "classifier", BATCHED, version="2.0", file_name="classifier2.mar", config_yaml=config)
    archive(store, "batched", BATCHED)
    archive(store, "dies", DIES)
    archive(store, "broken", BROKEN)
    war(store, "pipeline", DIAMOND, FUNCTIONS)
    with ServerProcess(store=store, config={"keystore_pass": "tops3cret"}) as running:
        for url, workers in (("classifier.mar", 2), ("classifier2.mar", 1), ("dies.mar", 1)):
            assert running.register(url, initial_workers=workers).status == 200
        assert running.request("management", "POST", "/workflows?url=pipeline.war", timeout=90).status == 200
        asked = "/models?url=broken.mar&initial_workers=1&synchronous=false"
        assert running.request("management", "POST", asked).status == 202
        with load(running):
            yield running


@contextlib.contextmanager
def load(server: ServerProcess) -> Iterator[None]:
    """Clients that ask until the end."""
    stopped = threading.Event()

    def ask(path: str, pause_s: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.ports["inference"])
        while not stopped.wait(pause_s):
            try:
                connection.request("POST", path, b"x", {"content-type": "application/octet-stream"})
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                connection.close()
        connection.close()

    paths = [("/predictions/classifier", 0.01)] * CLIENTS + [("/wfpredict/pipeline", 0.1), ("/predictions/dies", 0.2)]
    clients = [threading.Thread(target=ask, args=each) for each in paths]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stopped.set()
        for client in clients:
            client.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def address(server: ServerProcess, panel: str = "overview") -> str:
    return f"http://127.0.0.1:{server.ports['management']}/console#/{panel}"


@pytest.fixture
def console(server: ServerProcess, browser: Browser) -> Iterator[Watched]:
    """The console, live; at the end nothing must have gone wrong in the browser."""
    with Watched(browser) as watched:
        watched.page.goto(address(server))
        expect(watched.page.locator(".live")).to_have_text("Live")
        yield watched
        assert watched.complaints == []


def test_the_overview_shows_what_happens(console: Watched) -> None:
    page = console.page
    requests = page.locator(".tile", has_text="Requests").locator(".value")
    eventually(
        lambda: float(re.sub(r"[^\d.]", "", requests.inner_text()) or 0) > 5, within=30, what="requests a second"
    )
    expect(page.locator(".tile", has_text="p99").locator(".value")).to_have_text(re.compile(r"[\d.]+ (ms|s)"))
    row = page.get_by_role("row", name=re.compile("^classifier 1.0 · default"))
    expect(row.get_by_role("img", name="2 of 2 workers ready")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile(r"^Latency: now p99 \d"))).to_be_visible()
    expect(page.locator(".uplot canvas")).to_have_count(3)
    # What is wrong is said at the top.
    expect(page.locator(".notice", has_text="broken")).to_contain_text("size mismatch for fc.weight")


def test_a_model_shows_batches_and_what_they_cost(console: Watched, server: ServerProcess) -> None:
    page = console.page
    page.get_by_role("link", name="classifier", exact=True).first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("classifier")
    expect(page.get_by_role("img", name=re.compile("Batches by size: .*requests: "))).to_be_visible()
    curve = page.get_by_role("img", name=re.compile("Service time by batch size, measured: .*learnt"))
    expect(curve).to_be_visible()
    said = curve.get_attribute("aria-label") or ""
    sizes = [float(size) for size in re.findall(r"([\d.]+) requests [\d.]+ ", said)]
    learnt = re.search(r"learnt ([\d.]+) (ms|µs) \+ ([\d.]+) (ms|µs) · n", said)
    assert sizes and learnt is not None, said
    fixed_ms, per_request_ms = (float(learnt[at]) / (1 if learnt[at + 1] == "ms" else 1000) for at in (1, 3))
    # The handler sleeps 4 ms and 0.8 ms for each request; a busy machine adds to that, and takes nothing away. How
    # it splits into the two parts is a matter of noise, but the line goes through what a mean batch took: it is not
    # below the handler's own line at both ends of the sizes that there were.
    above = [fixed_ms - 4 + (per_request_ms - 0.8) * size for size in (min(sizes), max(sizes))]
    assert max(above) > -0.1, said
    rows = page.get_by_role("table").get_by_role("row").filter(has_text="ready")
    expect(rows).to_have_count(2)
    seen = json.loads(server.request("management", "GET", "/models/classifier").body)[0]["workers"]
    for worker in seen:
        expect(
            page.get_by_role("row", name=re.compile(f"^{worker['id']} ready {worker['pid']} [\\d.]+ MB"))
        ).to_be_visible()


def test_why_a_worker_has_ended_is_shown(console: Watched, server: ServerProcess) -> None:
    page = console.page
    assert server.predict("dies", b"die").status == 500
    page.goto(address(server, "models/dies/1.0"))
    end = page.get_by_role("button", name=re.compile("exit code 3"))
    expect(end).to_be_visible()
    if end.get_attribute("aria-expanded") == "false":
        end.click()
    # As text, whatever it looks like.
    expect(page.locator("pre.stderr")).to_contain_text("out of <b>scratch</b> space in /tmp/cache")
    page.goto(address(server, "models/broken/1.0"))
    expect(page.locator("pre.stderr")).to_contain_text("RuntimeError: size mismatch for fc.weight")
    eventually(lambda: server.predict("dies", b"").status == 200, within=20, what="the next worker")


def test_a_request_is_shown_as_a_waterfall(console: Watched, server: ServerProcess) -> None:
    page = console.page
    page.get_by_role("link", name="Requests").click()
    page.get_by_role("row", name=re.compile("^classifier POST")).first.click()
    spans = page.get_by_role("list", name="Spans").get_by_role("listitem")
    for name in ("request", "queue", "batch", "inference", "respond"):
        expect(spans.filter(has_text=re.compile(rf"^{name}[\d.]+ (ms|µs|s)$")).first).to_be_visible()
    shown = page.get_by_label("Waterfall").locator("pre")
    asked = shown.inner_text().removeprefix("wsgi-ts explain ")
    kept = server.request("management", "GET", f"/debug/traces/{asked}").json()
    expect(page.get_by_label("Waterfall")).to_contain_text(f"{kept['model']} {kept['version']}")
    assert server.predict("classifier", b"fail").status == 503
    page.get_by_role("button", name="Failed").click()
    row = page.get_by_role("row", name=re.compile("^classifier POST .* 503 "))
    expect(row.first).to_be_visible()
    page.get_by_role("row").get_by_role("button", name="classifier").first.press("Enter")
    # Which is the first one may change: others of its batch have failed with it, and are told a moment later.
    failed = page.get_by_role("row", name=re.compile("^classifier POST .* 503 "), selected=True)
    expect(failed).to_have_count(1)


def test_a_workflow_has_live_numbers(console: Watched, server: ServerProcess) -> None:
    page = console.page
    page.get_by_role("link", name="Workflows").click()
    graph = page.get_by_role("img", name=re.compile(r"^Graph of pipeline\."))
    expect(graph).to_have_attribute("aria-label", re.compile(r"join: [\d.]+ a second, [\d.]+ (ms|µs|s)"))
    expect(graph.locator("g.node")).to_have_count(4)
    expect(graph.locator("path.edge")).to_have_count(6)  # four edges, the request and the answer
    graph.locator("a", has_text="a").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("pipeline__a")


def test_a_prediction_is_tried(console: Watched, server: ServerProcess) -> None:
    page = console.page
    page.get_by_role("link", name="Try it").click()
    page.get_by_role("button", name="POST /predictions/{model_name}", exact=True).click()
    page.get_by_label("model_name").fill("dies")
    page.get_by_label("Body").fill('{"it\'s": 1}')
    command = page.get_by_label("The same with curl").locator("pre")
    target = f"http://127.0.0.1:{server.ports['inference']}/predictions/dies"
    expect(command).to_have_text(re.compile(rf"curl -X POST {re.escape(target)} "))
    expect(command).to_contain_text("""-d '{"it'\\''s": 1}'""")
    page.get_by_role("button", name="Send").click()
    answer = page.get_by_label("Answer", exact=True)
    expect(answer.locator("pre").first).to_have_text("ok")
    expect(answer).to_contain_text("200 OK")
    page.get_by_role("button", name="GET /workflows", exact=True).click()
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("Answer", exact=True)).to_contain_text('"workflowName": "pipeline"')


def test_settings_say_where_they_come_from(console: Watched) -> None:
    page = console.page
    page.get_by_role("link", name="Settings").click()
    expect(page.get_by_role("row", name=re.compile("^slots_per_worker.* 256 1024 config.properties:"))).to_be_visible()
    secret = page.get_by_role("row", name=re.compile("^keystore_pass"))
    expect(secret).to_contain_text("••••••")
    assert "tops3cret" not in page.content()
    page.get_by_label("Search settings").fill("drain_delay")
    page.get_by_role("button", name="All", exact=True).click()
    expect(page.get_by_role("row", name=re.compile("^drain_delay"))).to_contain_text("default")
    expect(page.get_by_label("Doctor")).to_contain_text("open files")


def test_the_result_of_tune_is_drawn(console: Watched, server: ServerProcess) -> None:
    points = [
        Point(Setting(workers, 1, size, "adaptive", 20), rate, rate, p99_s, rate, 1650.0, True, [p99_s])
        for size, workers, rate, p99_s in MEASURED
    ]
    points.append(replace(points[0], p99_s=math.inf, goodput=0.0, holds=False))
    curve = Curve(2, 1, ((1, 0.005), (8, 0.0104), (16, 0.0168)), 0.0, ((1.0,), (1.0,), (1.0,)))
    objective, present = parse_objective(["p99=50ms"]), points[0].setting
    warnings = ["the machine is busy"]
    save(
        Result("classifier", "1.0", objective, present, present, curve, points[0], points[CHOSEN], points, warnings),
        server.run_dir,
    )
    (server.run_dir / "tune" / "half-written.json").write_text('{"model": ')
    page = console.page
    page.get_by_role("link", name="Tune").click()
    plot = page.get_by_role("img", name=re.compile("^Measured configurations; chosen: 1,600 requests.s at p99 31 ms"))
    expect(plot).to_be_visible()
    assert plot.locator("circle").count() == len(MEASURED)
    assert plot.locator("circle.front").count() == 4
    expect(
        page.get_by_role("img", name=re.compile("^Service time by batch size, measured: 1 requests 5 ms"))
    ).to_be_visible()
    expect(page.get_by_label("Chosen", exact=True)).to_contain_text("the machine is busy")
    expect(page.get_by_role("row", name=re.compile("chosen$"))).to_contain_text("1,600")


def test_nothing_is_done_without_a_confirmation(console: Watched, server: ServerProcess) -> None:
    page = console.page
    page.goto(address(server, "models/classifier/2.0"))
    page.get_by_role("button", name="Scale…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Workers").fill("2")
    dialog.get_by_role("button", name="Cancel").click()
    assert workers_of(server, "classifier/2.0") == 1
    page.get_by_role("button", name="Scale…").click()
    dialog.get_by_label("Workers").fill("2")
    dialog.get_by_role("button", name="Scale").click()
    eventually(lambda: workers_of(server, "classifier/2.0") == 2, within=60, what="the second worker")
    page.get_by_role("button", name="Set default…").click()
    expect(dialog).to_contain_text("go to 2.0 from then on")
    dialog.get_by_role("button", name="Set default").click()
    eventually(lambda: described(server, "classifier")["modelVersion"] == "2.0", within=30, what="the new default")
    # Back to 1.0, which the other tests look at.
    page.goto(address(server, "models/classifier/1.0"))
    page.get_by_role("button", name="Set default…").click()
    dialog.get_by_role("button", name="Set default").click()
    eventually(lambda: described(server, "classifier")["modelVersion"] == "1.0", within=30, what="the old default")
    page.goto(address(server, "models/classifier/2.0"))
    page.get_by_role("button", name="Drain…").click()
    dialog.get_by_role("button", name="Drain").click()
    eventually(lambda: workers_of(server, "classifier/2.0") == 0, within=60, what="no worker")
    page.get_by_role("button", name="Unregister…").click()
    page.keyboard.press("Escape")
    assert workers_of(server, "classifier/2.0") == 0
    page.get_by_role("button", name="Unregister…").click()
    dialog.get_by_role("button", name="Unregister").click()
    expect(page.get_by_text("is not registered (any more)")).to_be_visible()
    assert server.request("management", "GET", "/models/classifier/2.0").status == 404


def described(server: ServerProcess, model: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(server.request("management", "GET", f"/models/{model}").body)[0]
    return found


def workers_of(server: ServerProcess, model: str) -> int:
    workers = described(server, model)["workers"]
    assert isinstance(workers, list)
    return len(workers)


def test_a_keyboard_is_enough(console: Watched) -> None:
    page = console.page
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the content")
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    link = page.get_by_role("link", name="Models", exact=False).first
    link.focus()
    page.keyboard.press("Enter")
    # Whoever hears the page is told where they are.
    expect(page.get_by_role("heading", level=1, name="Models")).to_be_focused()
    expect(link).to_have_attribute("aria-current", "page")
    page.get_by_role("link", name="classifier", exact=True).first.focus()
    page.keyboard.press("Enter")
    scale = page.get_by_role("button", name="Scale…")
    scale.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_label("Workers")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("width", [1440, 390])
def test_every_panel_fits(server: ServerProcess, browser: Browser, theme: str, width: int) -> None:
    """Nothing is wider than the screen, everything that can be operated has a name, and the colours are told apart."""
    with Watched(browser, width=width, theme=theme) as watched:
        page = watched.page
        for panel in PANELS:
            page.goto(address(server, panel))
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width, panel
            assert page.evaluate(NAMELESS) == [], panel
            assert page.evaluate(FAINT) == [], panel
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        assert watched.complaints == []


def test_who_chooses_a_theme_keeps_it(console: Watched, server: ServerProcess) -> None:
    page = console.page
    page.get_by_role("button", name="Switch to light colours").click()
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.get_by_role("button", name="Switch to dark colours").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_both_apis_have_a_page_of_their_own(server: ServerProcess, browser: Browser) -> None:
    with Watched(browser, theme="light") as watched:
        page = watched.page
        page.goto(f"http://127.0.0.1:{server.ports['inference']}/docs")
        page.get_by_role("button", name="GET /ping", exact=True).click()
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_label("Answer", exact=True)).to_contain_text('"status": ')
        page.goto(f"http://127.0.0.1:{server.ports['management']}/docs")
        page.get_by_role("button", name="POST /models", exact=True).click()
        expect(page.get_by_text("initial_workers", exact=True).first).to_be_visible()
        assert watched.complaints == []


def test_pictures_for_the_documents(server: ServerProcess, browser: Browser) -> None:
    """Takes the pictures; they are written only when that is asked for."""
    pictures = {"console-overview": ("overview", "dark"), "console-model": ("models/classifier/1.0", "light")}
    is_asked_for = "WSGI_TS_SCREENSHOTS" in os.environ
    for name, (panel, theme) in pictures.items():
        with Watched(browser, theme=theme, width=1280) as watched:
            watched.page.goto(address(server, panel))
            expect(watched.page.get_by_role("heading", level=1)).to_be_visible()
            expect(watched.page.locator("main svg, main canvas").first).to_be_visible()
            if is_asked_for:
                time.sleep(40)  # the charts fill
            picture = watched.page.screenshot()
        assert len(picture) > 20_000
        if is_asked_for:
            (Path(REPOSITORY) / "docs" / "images" / f"{name}.png").write_bytes(picture)
