"""Which requests a browser sends for a page of another site, by the headers that no page can set.

Such a page cannot read the answer, but what it asked for would be done all the same: a form can be sent anywhere.
Programs that are no browsers send none of these headers. Before a request that a form cannot make, the browser asks
whether the page may send it (a preflight); that question carries no token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Methods that change nothing.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN = ("same-origin", "none")


def is_cross_site_change(environ: Mapping[str, Any], allowed_origin: str) -> bool:
    """Tells whether a request, as WSGI variables, would change something for a page from elsewhere.

    `allowed_origin` is the value of `cors_allowed_origin`, which may send what it likes; "" for none. A browser that
    says whose page it is counts, even where a proxy has changed the host; an older one is judged by the page's origin.
    """
    if environ.get("REQUEST_METHOD", "GET") in _SAFE:
        return False
    origin = environ.get("HTTP_ORIGIN", "")
    if allowed_origin == "*" or (origin and origin == allowed_origin):
        return False
    site = environ.get("HTTP_SEC_FETCH_SITE", "")
    if site:
        return site not in _OWN
    # What a proxy says of the host no page can say: a browser would ask first whether it may send that header.
    hosts = (environ.get("HTTP_HOST", ""), environ.get("HTTP_X_FORWARDED_HOST", ""))
    return bool(origin) and origin.partition("://")[2].lower() not in [host.lower() for host in hosts if host]


def is_preflight(environ: Mapping[str, Any]) -> bool:
    """Tells whether a browser asks here what a page from elsewhere may send, as WSGI variables."""
    asks = "HTTP_ORIGIN" in environ and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
    return asks and environ.get("REQUEST_METHOD") == "OPTIONS"
