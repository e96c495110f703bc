"""Requests to Amazon S3 for archives that are not public: AWS's Signature Version 4.

Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`), else from
botocore where it is installed (profiles, SSO, the roles of EC2 machines and EKS pods), else from the profile
`AWS_PROFILE` of `AWS_SHARED_CREDENTIALS_FILE` or ~/.aws/credentials. Without any, requests go unsigned.
"""

from __future__ import annotations

import configparser
import hashlib
import hmac
import importlib
import logging
import os
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote

from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: `{bucket}.s3.amazonaws.com`, `{bucket}.s3.{region}.amazonaws.com`, `s3.{region}.amazonaws.com`, with `-` for the dot
#: before the region in older addresses, and `.cn` at the end in China.
_HOST = re.compile(
    r"(?:[a-z0-9][a-z0-9.\-]*\.)?s3(?:[.-](?P<region>[a-z]{2}(?:-[a-z]+)+-[0-9]))?\.amazonaws\.com(?:\.cn)?"
)
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_UNRESERVED = "-_.~"
#: Parameters of a presigned URL, of version 4 and of version 2: S3 answers 400 to a request that is signed twice.
_PRESIGNED = frozenset(("x-amz-algorithm", "x-amz-signature", "signature"))
_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An AWS access key; `token` for those that last for a while only."""

    key_id: str
    secret: str
    token: str | None = None

    def __repr__(self) -> str:
        """Without the secrets: this may get into a log."""
        return f"Credentials({self.key_id!r})"


def find_credentials(environ: Mapping[str, str]) -> Credentials | None:
    """The credentials of whoever runs the server; None where there are none."""
    key_id, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if key_id and secret:
        return Credentials(key_id, secret, environ.get("AWS_SESSION_TOKEN") or None)
    try:
        session = importlib.import_module("botocore.session")
    except ImportError:
        return _from_file(environ)
    try:
        found = session.get_session().get_credentials()
        frozen = None if found is None else found.get_frozen_credentials()
    # A role that cannot be assumed, an SSO session that has ended: botocore has dozens of errors of its own.
    except Exception as error:
        log.warning("botocore has no credentials, requests to S3 go unsigned: %s", error)
        return None
    return None if frozen is None else Credentials(frozen.access_key, frozen.secret_key, frozen.token)


def _from_file(environ: Mapping[str, str]) -> Credentials | None:
    file = Path(os.path.expanduser(environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"))
    profiles = configparser.RawConfigParser()
    try:
        profiles.read(file, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read, requests to S3 go unsigned: %s", file, type(error).__name__)
        return None
    profile = environ.get("AWS_PROFILE") or "default"
    if not profiles.has_section(profile):
        return None
    key_id = profiles.get(profile, "aws_access_key_id", fallback="")
    secret = profiles.get(profile, "aws_secret_access_key", fallback="")
    token = profiles.get(profile, "aws_session_token", fallback="")
    return Credentials(key_id, secret, token or None) if key_id and secret else None


def s3_headers(parts: SplitResult, environ: Mapping[str, str], *, sse_kms: bool) -> dict[str, str]:
    """The headers with which S3 is asked for an object; empty where nothing is to be added, as to a presigned URL.

    Credentials are used over https only. `sse_kms`: say that the object is encrypted with a key of KMS.
    """
    match = _HOST.fullmatch((parts.hostname or "").lower())
    if match is None or _PRESIGNED.intersection(name.lower() for name, _ in parse_qsl(parts.query)):
        return {}
    headers = {"x-amz-server-side-encryption": "aws:kms"} if sse_kms else {}
    credentials = find_credentials(environ) if parts.scheme == "https" else None
    if credentials is None:
        return headers
    region = match["region"] or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    headers["x-amz-content-sha256"] = _EMPTY_SHA256
    now = datetime.now(timezone.utc)
    return headers | sign(parts, headers, credentials, region or _DEFAULT_REGION, now)


def sign(
    parts: SplitResult, headers: Mapping[str, str], credentials: Credentials, region: str, now: datetime
) -> dict[str, str]:
    """The headers that authenticate a GET request without a body: date, token and signature.

    The path is percent-encoded as it will be sent; `headers` are the others to sign, Host is added; `now` is in UTC.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    added = {"x-amz-date": stamp}
    if credentials.token is not None:
        added["x-amz-security-token"] = credentials.token
    default_port = {"http": 80, "https": 443}.get(parts.scheme)
    host = parts.hostname or ""
    signed = {"host": host if parts.port in (None, default_port) else f"{host}:{parts.port}", **headers, **added}
    lines = sorted((name.lower(), " ".join(value.split())) for name, value in signed.items())
    names = ";".join(name for name, _ in lines)
    # S3 encodes each part of the path once: what is encoded already must not be encoded again.
    path = quote(unquote(parts.path or "/"), safe=f"/{_UNRESERVED}")
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = "&".join(sorted("=".join(quote(word, safe=_UNRESERVED) for word in pair) for pair in pairs))
    canonical = "\n".join(["GET", path, query, *(f"{name}:{value}" for name, value in lines), "", names, _EMPTY_SHA256])
    scope = (stamp[:8], region, "s3", "aws4_request")
    key = f"AWS4{credentials.secret}".encode()
    for part in scope:
        key = hmac.digest(key, part.encode(), "sha256")
    place = "/".join(scope)
    to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, place, hashlib.sha256(canonical.encode()).hexdigest()])
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={credentials.key_id}/{place}"
    added["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
    return added
