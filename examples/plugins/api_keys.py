"""API keys in a file: each has a name, and the models that it is good for.

API_KEYS_FILE names a JSON file, which is read anew when it changes. It holds no key, only what
`printf %s KEY | sha256sum` says of it; a model or an action may be "*":

    {"e2217d3e...": {"name": "team-a", "models": ["resnet"], "actions": ["predict", "explain"]}}

Clients send `X-Api-Key: KEY`. What is for no model in particular, such as the list of all, takes "*". `/ping` and
`/metrics` are everybody's.
"""

import hashlib
import json
import os
from pathlib import Path

from wsgi_ts.plugins import Principal, Refuse, plugin


@plugin("auth", name="api-keys")
class ApiKeys:
    headers = ("x-api-key",)
    open_actions = ("ping", "metrics")

    def __init__(self):
        self._file = Path(os.environ["API_KEYS_FILE"])
        self._read_at, self._keys = None, {}

    def authenticate(self, head):
        key = head.headers.get("x-api-key", "")
        entry = self._known().get(hashlib.sha256(key.encode()).hexdigest())
        return (
            Principal(entry["name"], entry) if entry else Refuse(401, "An API key is wanted, in the header X-Api-Key.")
        )

    def authorize(self, principal, action, model):
        may = principal.claims
        return allows(may.get("actions", ()), action) and allows(may.get("models", ()), model)

    def _known(self):
        changed_at = self._file.stat().st_mtime_ns
        if changed_at != self._read_at:
            self._keys = json.loads(self._file.read_text())
            self._read_at = changed_at
        return self._keys


def allows(allowed, wanted):
    return "*" in allowed or wanted in allowed
