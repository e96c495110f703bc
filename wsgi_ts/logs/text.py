"""What may stand in a log line: no character that forges a line or steers a terminal, and no secret."""

from __future__ import annotations

import re

#: Line ends, C0, DEL and C1 would let one line pass for several or steer a terminal; the rest turns text around.
_ESCAPES = {
    **{code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if code != ord("\t")},
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    **{code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}
#: In a request line also what is not ASCII, and what the line is quoted with.
_TARGET_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(33), ord('"'), ord("\\"), *range(127, 256))}

_SECRET_NAMES = (
    "token|access_token|id_token|refresh_token|api[_-]?key|password|passwd|secret|sig|signature|awsaccesskeyid|"
    "x-(?:amz|goog)-(?:signature|credential|security-token)"
)
#: Parameters of a URL, also of one that is percent-encoded inside another.
_PARAMETER = re.compile(
    rf"((?:(?<![\w-])|(?<=%3F)|(?<=%26))(?:{_SECRET_NAMES})(?:=|%3D))(?:(?!%26|%23)[^\s&;#\"'])+", re.IGNORECASE
)
_USERINFO = re.compile(r"((?::|%3A)(?:/|%2F){2})(?:(?!%2F)[^\s/?#\"'])+(?:@|%40)", re.IGNORECASE)
_AUTHORIZATION = re.compile(
    r"(\bauthorization[\"']?\s*[:=,]\s*[\"']?(?:(?:bearer|basic|digest)\s+)?|\bbearer\s+(?=\S{16}))[^\s\"',;]+",
    re.IGNORECASE,
)


def escape_controls(text: str) -> str:
    r"""`text` on one line: control characters as `\n`, `\x1b` and so on; a tab stays."""
    return text if text.isprintable() else text.translate(_ESCAPES)


def mask_secrets(text: str) -> str:
    """`text` with `***` for tokens, signatures of URLs, URL user names with passwords, and Authorization values."""
    if "=" in text or "%3" in text:
        text = _PARAMETER.sub(r"\1***", text)
    if "@" in text or "%40" in text:
        text = _USERINFO.sub(r"\1***@", text)
    if "earer" in text or "uthorization" in text or "AUTHORIZATION" in text:
        text = _AUTHORIZATION.sub(r"\1***", text)
    return text


def safe_text(text: str) -> str:
    """A message of unknown origin, fit for a log."""
    return escape_controls(mask_secrets(text))


def safe_target(target: str) -> str:
    r"""A request target (latin-1) for the access log: printable ASCII without quotes, other bytes as `\xNN`."""
    if "?" in target or "@" in target or "%" in target:
        target = mask_secrets(target)
    clean = target.isascii() and target.isprintable() and '"' not in target and "\\" not in target
    return target if clean else target.translate(_TARGET_ESCAPES)
