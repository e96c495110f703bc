"""The model that is tuned, on the running server: what holds for it, what is tried on it, and how it is asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wsgi_ts.control.client import ControlPlane
from wsgi_ts.errors import ServerError
from wsgi_ts.handlers.serving.recording import RecordedRequest
from wsgi_ts.run_files import RunFiles
from wsgi_ts.settings.config import Config
from wsgi_ts.tune.generator import Target

#: Headers of a recorded request that are this connection's affair.
_OWN_HEADERS = frozenset(("host", "content-length", "connection", "transfer-encoding", "expect", "keep-alive", "te"))
#: How long putting things back may take, in seconds, on top of what the server itself bounds.
_QUICK_CALL_S = 60.0


@dataclass(frozen=True, order=True)
class Setting:
    """What a tuning decides.

    Attributes:
        threads: CPU threads of each; 0: as many as the cores have room for.
        policy: when a batch that is not full goes.
        delay_ms: maxBatchDelay.
    """

    workers: int
    threads: int
    batch_size: int
    policy: str
    delay_ms: int

    def __str__(self) -> str:
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        threads = f" of {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        unit = "" if self.policy == "none" else " ms"
        return f"{workers}{threads}, batches of {self.batch_size}, {self.rule}{unit}"

    @property
    def rule(self) -> str:
        """When a batch goes: the policy, and its delay if it has one."""
        return self.policy if self.policy == "none" else f"{self.policy} {self.delay_ms}"


class ServedModel:
    """A model version of a running server, on which settings are tried from `begin` to `end`.

    Args:
        cores: what CPU threads are shared out of.

    Attributes:
        facts: what the server says of it (`Trials`), as it was in the beginning.
    """

    def __init__(self, control: ControlPlane, name: str, version: str | None, cores: int) -> None:
        self._control = control
        self._cores = cores
        self.facts: Mapping[str, Any] = control.call(
            "begin_trial", timeout_s=_QUICK_CALL_S, model_name=name, version=version
        )
        self._named = {"model_name": self.facts["model"], "version": self.facts["version"]}
        self.name, self.version = str(self.facts["model"]), str(self.facts["version"])
        numbers = (self.facts["workers"], self.facts["threads"], self.facts["batch_size"])
        self.present = Setting(*numbers, self.facts["batch_policy"], self.facts["max_batch_delay"])

    @property
    def unfit(self) -> str:
        """Why its settings cannot be found in this way; "" where they can."""
        ways = {"steps": "takes requests into its batches step by step", "sequences": "serves sequences"}
        for key, what in ways.items():
            if self.facts[key]:
                return f"{self.name} {what}: its requests are no batches with a cost, which is what is learnt here"
        if not self.facts["batches"]:
            return f"{self.name} refuses what no worker is free for (useJobTicket): there is no queue to tune"
        return ""

    def threads_for(self, workers: int) -> int:
        """The CPU threads that each of so many workers has where nobody says otherwise; 0 on GPUs: as it likes."""
        return 0 if self.facts["on_gpu"] else max(1, self._cores // workers)

    def put(self, setting: Setting) -> None:
        """Has a setting hold; returns when its workers are ready.

        Raises:
            ServerError: a worker does not start; what held before holds.
        """
        if setting == self.present:
            return
        self._control.call(
            "change_trial",
            **self._named,
            workers=setting.workers,
            threads=setting.threads,
            batch_size=setting.batch_size,
            batch_policy=setting.policy,
            max_batch_delay=setting.delay_ms,
        )
        self.present = setting

    def counts(self) -> dict[str, float]:
        """Batches, requests and seconds of service so far."""
        found: dict[str, float] = self._control.call("batch_counts", timeout_s=_QUICK_CALL_S, **self._named)
        return found

    def end(self, *, keep: bool) -> None:
        """Puts back what held in the beginning, or keeps what holds now.

        Raises:
            ServerError: the server has gone, or a worker does not start.
        """
        self._control.call("end_trial", **self._named, keep=keep)


class NoServer(ServerError):
    """Nothing runs in the run directory."""


def read_config(run_dir: Path) -> Config:
    """The configuration of the server that runs in a directory.

    Raises:
        NoServer: none does.
    """
    try:
        return Config.from_json(RunFiles(run_dir).config.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoServer(f"Not running: nothing answers in {run_dir}.") from error


def target(config: Config, model: ServedModel, samples: Iterable[RecordedRequest], token: str | None) -> Target:
    """Where the requests of a tuning go."""
    address = config.inference_address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    path = f"/predictions/{quote(model.name)}/{quote(model.version)}"
    requests = [_bytes_of(sample, path, host or "localhost", token) for sample in samples]
    return Target(requests, host=host, port=address.port, unix_path=address.path, tls=address.is_tls)


def _bytes_of(sample: RecordedRequest, path: str, host: str, token: str | None) -> bytes:
    query = f"?{sample.query}" if sample.query else ""
    lines = [f"POST {path}{query} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(sample.body)}"]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    lines += [f"{name}: {value}" for name, value in sample.headers.items() if name.lower() not in _OWN_HEADERS]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1", "replace") + sample.body


def read_token(config: Config, given: str | None) -> str | None:
    """The inference key: the one that was given, or that of the key file in the current directory; None for none."""
    if given is not None or not config.token_authorization:
        return given
    try:
        key = json.loads(Path("key_file.json").read_text(encoding="utf-8"))["inference"]["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(key)
