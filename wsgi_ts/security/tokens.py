"""Token authorization, the supervisor's side: the keys, and the file that clients take them from.

No other process ever holds a key. What the others check tokens by are the keys' SHA-256 sums: a key is 256 random
bits, so its sum tells nothing that could be sent as a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

KEY_FILE = "key_file.json"
#: The scopes of the keys, as key_file.json names them. The API key renews the other two, and never expires.
MANAGEMENT, INFERENCE, API = "management", "inference", "API"
_KEY_BYTES = 32
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class KeyFileError(Exception):
    """The key file cannot be written; the message says why and what to do, on one line."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    Attributes:
        text: what clients send.
        wall_end: end of its life in seconds of the wall clock, None for no end.
        monotonic_end: the same on the monotonic clock; the key ends when the first of both is reached, so that no
            change of the wall clock prolongs it.
    """

    text: str
    wall_end: float | None = None
    monotonic_end: float | None = None

    @classmethod
    def from_kept(cls, fields: Mapping[str, Any]) -> Key:
        """The key that `dataclasses.asdict` gave these fields of."""
        return cls(fields["text"], fields["wall_end"], fields["monotonic_end"])

    @classmethod
    def new(cls, lifetime_s: float | None) -> Key:
        """A fresh key that lasts `lifetime_s` seconds, None for ever."""
        text = secrets.token_urlsafe(_KEY_BYTES)
        if lifetime_s is None:
            return cls(text)
        return cls(text, time.time() + lifetime_s, time.monotonic() + lifetime_s)

    def to_file(self) -> dict[str, str]:
        """Its entry in key_file.json."""
        if self.wall_end is None:
            return {"key": self.text}
        end = datetime.fromtimestamp(self.wall_end, timezone.utc).isoformat(timespec="microseconds")
        return {"key": self.text, "expiration time": end.replace("+00:00", "Z")}

    def to_public(self) -> dict[str, Any]:
        """What other processes check tokens by."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return {"sha256": digest, "wall_end": self.wall_end, "monotonic_end": self.monotonic_end}


class KeyRing:
    """The three keys of an instance. Used from any thread.

    Args:
        folder: where key_file.json lies: the server's working directory.
        lifetime_min: minutes that a management or inference key lasts.
        publish: called with what other processes check tokens by; returns when they can see it, or raises
            KeyFileError.
        keep: called with what `create` has to be given after the supervisor's death; the guard alone sees it.
    """

    def __init__(
        self,
        folder: Path,
        lifetime_min: float,
        publish: Callable[[dict[str, Any]], None],
        keep: Callable[[dict[str, Any]], None] = lambda kept: None,
    ) -> None:
        self.path = folder / KEY_FILE
        self._lifetime_s = lifetime_min * 60
        self._publish = publish
        self._keep = keep
        self._lock = threading.Lock()
        self._keys: dict[str, Key] = {}
        self._kept: dict[str, Any] = {}

    def create(self, kept: Mapping[str, Any] | None = None) -> None:
        """Makes all keys, or takes over what clients hold of a supervisor that has died; writes the file and publishes.

        Raises:
            KeyFileError: the file cannot be written.
        """
        with self._lock:
            scopes = {MANAGEMENT: self._lifetime_s, INFERENCE: self._lifetime_s, API: None}
            if kept is None:
                self._replace({scope: Key.new(lifetime_s) for scope, lifetime_s in scopes.items()})
            else:
                self._replace({scope: Key.from_kept(kept["keys"][scope]) for scope in scopes})
        self._warn_of_open_folder()

    def renew(self, scope: str) -> None:
        """Replaces a key but the API's; when this returns, the new one counts everywhere and the old one nowhere.

        Raises:
            KeyFileError: the file cannot be written; the old key stays.
        """
        with self._lock:
            self._replace({**self._keys, scope: Key.new(self._lifetime_s)})
        log.info("New %s token in %s", scope, self.path)

    def remove(self) -> None:
        """Removes the file, unless it is another instance's by now."""
        with self._lock:
            if self._kept:
                remove_kept_key_file(self._kept)

    def _replace(self, keys: dict[str, Key]) -> None:
        text = json.dumps({scope: key.to_file() for scope, key in keys.items()}, indent=2) + "\n"
        # The name is random, so that nobody can have put anything there; it is renamed over whatever is at `path`.
        temporary = self.path.with_name(f".{KEY_FILE}.{secrets.token_hex(8)}")
        try:
            fd = os.open(temporary, _FLAGS, 0o600)
            try:
                with open(fd, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    written = os.fstat(file.fileno())
                self._publish_all(keys)
                try:
                    os.replace(temporary, self.path)
                except OSError:
                    self._publish_all(self._keys)
                    raise
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise KeyFileError(
                f"{self.path} (the tokens) cannot be written: {error.strerror}; start the server in a directory that "
                "it may write to, or set disable_token_authorization=true"
            ) from error
        self._keys = keys
        fields = {scope: asdict(key) for scope, key in keys.items()}
        self._kept = {"path": str(self.path), "file": [written.st_dev, written.st_ino], "keys": fields}
        self._keep(self._kept)

    def _publish_all(self, keys: Mapping[str, Key]) -> None:
        self._publish({scope: key.to_public() for scope, key in keys.items()})

    def _warn_of_open_folder(self) -> None:
        mode = self.path.parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            log.warning(
                "Everybody may write to %s and so put another %s there: chmod o-w it", self.path.parent, KEY_FILE
            )


def remove_kept_key_file(kept: Mapping[str, Any]) -> None:
    """Removes the key file of a supervisor that has died (see `keep`), unless it is another instance's by now."""
    path = Path(kept["path"])
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        if [status.st_dev, status.st_ino] == kept["file"]:
            path.unlink()
