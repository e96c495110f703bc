"""One text field of a form body, for the only route whose model may be named there (`/invocations`).

The handler's own view of a form is made in the model worker (`handlers.serving.inputs`), which no web worker loads.
"""

from __future__ import annotations

from urllib.parse import unquote_plus, unquote_to_bytes

import multipart  # type: ignore[import-untyped]

URL_ENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"
#: Fields looked at, and bytes of the value looked for; what lies beyond is not found.
MAX_FIELDS = 100
MAX_VALUE_BYTES = 1024


def is_form(content_type: bytes) -> bool:
    """Returns whether a body of this content type, as sent, has fields."""
    return content_type.partition(b";")[0].strip().lower().decode("latin-1") in (URL_ENCODED, MULTIPART)


def form_field(content_type: bytes, body: bytes, name: str) -> str | None:
    """Returns the value of a field of a form.

    `content_type` is as sent; `is_form` holds.

    Returns:
        Its text; None when there is no such field, or the form is malformed (its model worker says so, if it gets it).
    """
    declared, options = multipart.parse_options_header(content_type.decode("latin-1"))
    if declared == MULTIPART:
        return _part(options.get("boundary", ""), body, name)
    for field in body.split(b"&", MAX_FIELDS)[:MAX_FIELDS]:
        key, _, value = field.partition(b"=")
        if len(value) <= MAX_VALUE_BYTES and unquote_plus(key.decode("latin-1")) == name:
            return unquote_to_bytes(value.replace(b"+", b" ")).decode("utf-8", "replace").strip()
    return None


def _part(boundary: str, body: bytes, name: str) -> str | None:
    try:
        parser = multipart.PushMultipartParser(boundary, max_segment_count=MAX_FIELDS)
        wanted, value = False, bytearray()
        for event in parser.parse(body):
            if isinstance(event, multipart.MultipartSegment):
                wanted = event.name == name and event.filename is None
            elif event is None and wanted:
                return value.decode("utf-8", "replace").strip()
            elif wanted and event:
                value += event
                if len(value) > MAX_VALUE_BYTES:
                    return None
    except (multipart.MultipartError, ValueError, LookupError):
        return None
    return None
