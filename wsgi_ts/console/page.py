"""The pages as they are served: one file each with script and style in it, and a policy that allows nothing else.

They are made of `src` with `make console`, which writes the sum of all sources into them.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from pathlib import Path

from wsgi_ts.quick_dataclass import dataclass

FOLDER = Path(__file__).parent
#: What the pages are made of, besides the files in `src`.
_RECIPE = ("build.mjs", "package.json", "package-lock.json")
_SUM = re.compile(rb"<!-- sources: ([0-9a-f]{64}) -->")
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)
_HTML = "text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Page:
    """One page.

    Attributes:
        html: the file.
        packed: the same, compressed by gzip.
        headers: those that go with it, names in lower case.
        sources: the sum of the sources that it was made of, in hex.
    """

    html: bytes
    packed: bytes
    headers: dict[str, str]
    sources: str

    @classmethod
    def load(cls, name: str) -> Page:
        """Reads a page: `console` or `docs`.

        Raises:
            ValueError: the file was not made by `make console`.
        """
        path = FOLDER / f"{name}.html"
        html = path.read_bytes()
        found = _SUM.search(html)
        if found is None:
            raise ValueError(f"{path} does not say what it was made of; make it again: make console")
        headers = {
            "content-type": _HTML,
            "content-security-policy": policy(html),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "vary": "accept-encoding",
        }
        return cls(html, gzip.compress(html, 9, mtime=0), headers, found[1].decode())


def policy(html: bytes) -> str:
    """The Content-Security-Policy of a page: its own script and style by their sums, and its own server; no more."""
    sums: dict[str, list[str]] = {"script": [], "style": []}
    for match in _INLINE.finditer(html):
        digest = base64.b64encode(hashlib.sha256(match[2]).digest()).decode()
        sums[match[1].decode()].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(sums['script'])}",
            f"style-src {' '.join(sums['style'])}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def sources_sum() -> str:
    """The sum of what the pages are to be made of, as `build.mjs` works it out, too."""
    paths = [*(FOLDER / name for name in _RECIPE), *(path for path in (FOLDER / "src").iterdir() if path.is_file())]
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.relative_to(FOLDER).as_posix()):
        digest.update(path.relative_to(FOLDER).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
