"""Starts and stops a server from Python, as the tests of models do: TorchServe's `ts.launcher`.

All calls speak to the one server that the commands `torchserve --start` and `--stop` mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from queue import Empty, Queue
from typing import IO, Any

#: Where the management API listens unless config.properties says otherwise.
MANAGEMENT_URL = "http://127.0.0.1:8081"
#: Lines of output that are kept for the caller; beyond them the oldest go.
KEPT_LINES = 1000
_STARTED = "Model server started"
_REGISTER_LIMIT_S = 600
_TORCHSERVE = (sys.executable, "-m", "wsgi_ts.cli")


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of the management API, with the names of `requests.Response`, which TorchServe's launcher returns.

    Attributes:
        status_code: of the answer.
        text: the body.
        url: what was called.
        reason: the phrase that came with the status.
        headers: of the answer; names in any case.
    """

    status_code: int
    text: str
    url: str = ""
    reason: str = ""
    headers: Message = field(default_factory=Message)

    @property
    def content(self) -> bytes:
        """The body as bytes."""
        return self.text.encode()

    @property
    def ok(self) -> bool:
        """Whether it is no error."""
        return self.status_code < 400

    def json(self) -> Any:
        """Returns the body, read as JSON."""
        return json.loads(self.text)

    def raise_for_status(self) -> None:
        """Does nothing, unless the answer is an error.

        Raises:
            HTTPError: it is one; an OSError, as that of `requests`.
        """
        if not self.ok:
            raise urllib.error.HTTPError(self.url, self.status_code, self.reason, self.headers, None)


def start(
    model_store: str | os.PathLike[str] | None = None,
    snapshot_file: str | os.PathLike[str] | None = None,
    no_config_snapshots: bool = False,
    plugin_folder: str | os.PathLike[str] | None = None,
    disable_token: bool = False,
    models: str | None = None,
    enable_model_api: bool = False,
) -> Queue[str | None]:
    """Stops a server that runs, starts a new one, and waits until it says that it has started, or ends.

    Args:
        model_store: folder of the model archives; a fresh one by default.
        snapshot_file: configuration file or snapshot (`--ts-config`).
        no_config_snapshots: neither write nor read snapshots.
        plugin_folder: a folder with plugins.
        disable_token: answer requests without a token.
        models: models to load at startup, as one argument.
        enable_model_api: allow registering and unregistering over the API.

    Returns:
        The lines that the server prints from then on; None after the last one.
    """
    stop()
    store = tempfile.mkdtemp(prefix="model_store-") if model_store is None else os.fspath(model_store)
    command = [*_TORCHSERVE, "--start", "--model-store", store]
    named = {"--plugins-path": plugin_folder, "--ts-config": snapshot_file, "--models": models}
    command += [part for flag, value in named.items() if value is not None for part in (flag, os.fspath(value))]
    switches = {
        "--no-config-snapshots": no_config_snapshots,
        "--disable-token-auth": disable_token,
        "--enable-model-api": enable_model_api,
    }
    command += [flag for flag, wanted in switches.items() if wanted]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    output = process.stdout
    assert output is not None  # a pipe was asked for
    for line in output:
        print(line, end="")
        if _STARTED in line:
            break
    lines: Queue[str | None] = Queue(KEPT_LINES)
    threading.Thread(target=_collect, args=(process, output, lines), name="server output", daemon=True).start()
    return lines


def _collect(process: subprocess.Popen[str], output: IO[str], lines: Queue[str | None]) -> None:
    with output:
        for line in output:
            print(line, end="")
            _add(lines, line)
    process.wait()
    _add(lines, None)


def _add(lines: Queue[str | None], line: str | None) -> None:
    if lines.full():
        # Its reader may have emptied it by now.
        with contextlib.suppress(Empty):
            lines.get_nowait()
    lines.put(line)


def stop(wait: bool = True) -> None:
    """Stops the server, if one runs, and by default waits until it has ended."""
    command = [*_TORCHSERVE, "--stop"]
    subprocess.run([*command, "--foreground"] if wait else command, stdin=subprocess.DEVNULL, check=False)


def register_model(model_name: str, url: str, *, management_url: str = MANAGEMENT_URL) -> Reply:
    """Registers a model, from the model store or the address `url`, with one worker, and waits for it."""
    params = {"model_name": model_name, "url": url, "initial_workers": "1", "synchronous": "true"}
    return register_model_with_params(params, management_url=management_url)


def register_model_with_params(
    params: Mapping[str, Any] | tuple[tuple[str, Any], ...], *, management_url: str = MANAGEMENT_URL
) -> Reply:
    """Registers a model with these parameters; returns the answer, also where it is an error.

    Raises:
        OSError: nobody answers there.
    """
    query = urllib.parse.urlencode(params)
    request = urllib.request.Request(f"{management_url}/models?{query}", data=b"", method="POST")
    # Never through a proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_REGISTER_LIMIT_S) as reply:
            return Reply(reply.status, reply.read().decode(), reply.url, reply.reason, reply.headers)
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.read().decode(), error.url, error.reason, error.headers)
