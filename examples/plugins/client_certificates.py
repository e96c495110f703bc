"""Mutual TLS: what a client may do is said for the name in its certificate.

    client_ca_file=/etc/wsgi-ts/clients-ca.pem
    plugin=client_certificates:ClientCertificates

CLIENTS_FILE names a JSON file, which is read anew when it changes; a model or an action may be "*":

    {"team-a": {"models": ["resnet"], "actions": ["predict", "explain"]}}

The name is the certificate's common name. What is for no model in particular, such as the list of all, takes "*".
`/ping` and `/metrics` are everybody's who has a certificate at all.
"""

import json
import os
from pathlib import Path

from wsgi_ts.plugins import Principal, Refuse, plugin


@plugin("auth", name="client-certificates")
class ClientCertificates:
    headers = ()
    open_actions = ("ping", "metrics")

    def __init__(self):
        self._file = Path(os.environ["CLIENTS_FILE"])
        self._read_at, self._clients = None, {}

    def authenticate(self, head):
        if head.certificate is None:
            return Refuse(401, "A client certificate is wanted.")
        subject = dict(pair for part in head.certificate["subject"] for pair in part)
        name = subject.get("commonName", "")
        may = self._known().get(name)
        return Principal(name, may) if may is not None else Refuse(403, f"{name!r} is no client of this server.")

    def authorize(self, principal, action, model):
        may = principal.claims
        return allows(may.get("actions", ()), action) and allows(may.get("models", ()), model)

    def _known(self):
        changed_at = self._file.stat().st_mtime_ns
        if changed_at != self._read_at:
            self._clients = json.loads(self._file.read_text())
            self._read_at = changed_at
        return self._clients


def allows(allowed, wanted):
    return "*" in allowed or wanted in allowed
