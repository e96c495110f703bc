"""From the bytes of a request to what a handler sees: its row of `data` and its headers. Pure functions.

A row follows TorchServe: one key for a plain body (`body`), one per form field, values decoded by their type.
Nothing here touches shared memory: a `memoryview` of the body is copied into the value a handler may keep.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus, unquote_to_bytes

import multipart  # type: ignore[import-untyped]

from wsgi_ts.handlers.serving import json_text
from wsgi_ts.quick_dataclass import dataclass

log = logging.getLogger(__name__)

#: A form with more fields than this, or a multipart body with more parts, is refused.
MAX_FIELDS = 1000
#: JSON with more arrays and objects inside one another is refused.
MAX_JSON_DEPTH = 100
#: Header lines, and bytes of all header lines together, of one part of a multipart body.
MAX_PART_HEADERS = 32
MAX_PART_HEADER_BYTES = 8192
#: RFC 2046 allows 70 characters; clients do not keep to it.
MAX_BOUNDARY_CHARS = 256
#: How much of a multipart body the parser is given at once: it copies what it is given.
_CHUNK_BYTES = 1 << 20

#: A string of JSON text; one without an end goes to the end of the text, so that no text is looked at twice.
_JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.?[^"\\]*)*(?:"|\Z)', re.DOTALL)
#: Deletes everything but brackets, and makes all of them square.
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_PILE = b"[" * (MAX_JSON_DEPTH + 1)
_NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))


@dataclass(slots=True)
class Request:
    """One request of a batch, as the handler will see it.

    `function` is the name of the function that is asked, where a workflow's functions share a worker.
    """

    request_id: str
    row: dict[str, Any]
    headers: Mapping[str, Any]
    is_describe: bool = False
    function: str = ""


class BadInput(ValueError):
    """The body cannot be understood; answered 400 to this one request with the exception's text."""


def mime_type(content_type: str | None) -> str:
    """Returns the content type without its parameters ("application/json; charset=utf-8" -> "application/json")."""
    if not content_type:
        return ""
    return content_type.partition(";")[0].strip()


def build_row(
    content_type: str | None,
    body: memoryview,
    *,
    decode: bool = True,
    query: str = "",
    types: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Returns the element of a handler's `data` list that stands for one request.

    Args:
        content_type: the request's Content-Type header as sent, None where it has none.
        body: the request's body; copied, so the memory may be reused afterwards.
        decode: whether JSON and text become Python objects (`decode_input_request`); False leaves bytearrays.
        query: the raw query string where its parameters are passed on to the handler, else "".
        types: filled with the content type of each key, for `LazyHeaders`.

    Raises:
        BadInput: a multipart body is malformed, a form has too many fields, or JSON is nested too deep.
    """
    if not query and (content_type is None or content_type == "application/octet-stream"):
        if types is not None:
            types["body"] = content_type or ""
        return {"body": bytearray(body)}
    mime = mime_type(content_type)
    form = mime.lower()
    row: dict[str, Any] = {}
    if query:
        _add_fields(query.encode("latin-1", "replace"), row, types, is_query=True)
    if form == "application/x-www-form-urlencoded":
        _add_fields(bytes(body), row, types)
    elif form == "multipart/form-data":
        _add_parts(content_type or "", body, row, types, decode)
    else:
        row["body"] = decode_value(mime, body) if decode else bytearray(body)
        if types is not None:
            types["body"] = mime
    return row


def decode_value(mime: str, raw: memoryview | bytearray) -> Any:
    """Returns JSON and text as Python objects, by a content type without its parameters.

    What cannot be decoded stays a bytearray, as TorchServe leaves it.

    Raises:
        BadInput: JSON is nested too deep.
    """
    if mime == "application/json":
        text = bytes(raw)
        if is_too_deep(text):
            raise BadInput(f"The JSON body is nested deeper than {MAX_JSON_DEPTH} levels.")
        try:
            return json_text.loads(text)
        except ValueError:
            log.warning("Failed json decoding of input data. Forwarding encoded payload")
    elif mime.startswith("text"):
        try:
            return str(raw, "utf-8")
        except ValueError:
            log.warning("Failed utf-8 decoding of input data. Forwarding encoded payload")
    return raw if isinstance(raw, bytearray) else bytearray(raw)


def content_of(row: Any) -> Any:
    """Returns what a request brought: `data` or `body` of its row. What an envelope has unwrapped stays as it is."""
    if not isinstance(row, Mapping):
        return row
    data = row.get("data")
    return row.get("body") if data is None else data


def is_too_deep(text: bytes) -> bool:
    """Returns whether arrays and objects stand more than `MAX_JSON_DEPTH` deep in one another; linear for real texts.

    Args:
        text: JSON; of text that is none the answer says only that reading it will not recurse deeper.
    """
    if text.count(b"[") + text.count(b"{") <= MAX_JSON_DEPTH:
        return False
    brackets = _JSON_STRING.sub(b"", text).translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(MAX_JSON_DEPTH):
        if _PILE in brackets:
            return True
        inner_removed = brackets.replace(b"[]", b"")
        if len(inner_removed) == len(brackets):
            break
        brackets = inner_removed
    # What is left are brackets without a partner, or those that stand too deep.
    return b"[]" in brackets or brackets.count(b"[") > MAX_JSON_DEPTH


def _add_fields(raw: bytes, row: dict[str, Any], types: dict[str, str] | None, *, is_query: bool = False) -> None:
    """Adds `name=value&…` to the row. In a body a last field without "=" is no field: a bare body gives no key."""
    if raw.count(b"&") >= MAX_FIELDS:
        raise BadInput(f"The form has more than {MAX_FIELDS} fields.")
    fields = raw.rstrip(b"\r\n").split(b"&")
    last = len(fields) - 1
    for position, field in enumerate(fields):
        name, equals, value = field.partition(b"=")
        if not name or (not equals and position == last and not is_query):
            continue
        key = unquote_plus(name.decode("utf-8", "replace"))
        row[key] = bytearray(unquote_to_bytes(value.replace(b"+", b" ")))
        if types is not None:
            types[key] = ""


def _add_parts(
    content_type: str, body: memoryview, row: dict[str, Any], types: dict[str, str] | None, decode: bool
) -> None:
    """Adds the parts of a multipart body to the row; of parts with one name, the last wins."""
    for segment, value in _read_parts(content_type, body):
        if segment.disposition != "form-data" or not segment.name:
            raise BadInput('Malformed multipart body: a part has no Content-Disposition with a "name".')
        mime = ""
        if segment.filename is not None:
            mime = segment.content_type or "application/octet-stream"
        row[segment.name] = decode_value(mime, value) if decode else value
        if types is not None:
            types[segment.name] = mime


def _read_parts(content_type: str, body: memoryview) -> Iterator[tuple[multipart.MultipartSegment, bytearray]]:
    boundary = multipart.parse_options_header(content_type)[1].get("boundary", "")
    if not boundary or len(boundary) > MAX_BOUNDARY_CHARS:
        raise BadInput("Malformed multipart body: the Content-Type header has no usable boundary.")
    try:
        parser = multipart.PushMultipartParser(
            boundary,
            max_header_size=MAX_PART_HEADER_BYTES,
            max_header_count=MAX_PART_HEADERS,
            max_segment_count=MAX_FIELDS,
        )
        segment: multipart.MultipartSegment | None = None
        value = bytearray()
        for start in range(0, len(body), _CHUNK_BYTES):
            for event in parser.parse(bytes(body[start : start + _CHUNK_BYTES])):
                if isinstance(event, multipart.MultipartSegment):
                    segment, value = event, bytearray()
                elif event:
                    value += event
                elif segment is not None:
                    yield segment, value
        parser.close()
    except (multipart.MultipartError, ValueError, LookupError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"Malformed multipart body: {error}.") from error


class LazyHeaders(Mapping[str, Any]):
    """The headers of one request, parsed when a handler first asks for one.

    Names are spelt as the client sent them and looked up exactly so; the last of repeated headers counts.
    As in TorchServe each key of the row has an entry (`{"content-type": …}`), unless a header has its name.

    Args:
        raw_head: request line and header lines with CRLF line ends, with or without the empty line.
        extra: entries the server adds (`url_path`, `explain`, …); they hide headers of the same name.
        types: content type of each key of the row; None where the row has only `body`.
    """

    __slots__ = ("_extra", "_parsed", "_raw_head", "_types")

    def __init__(self, raw_head: bytes, extra: Mapping[str, str], types: Mapping[str, str] | None = None) -> None:
        self._raw_head = raw_head
        self._extra = extra
        self._types = types
        self._parsed: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns all entries, as one dict that stays the same object."""
        if self._parsed is None:
            self._parsed = self._parse()
        return self._parsed

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def _parse(self) -> dict[str, Any]:
        headers: dict[str, str] = {}
        body_type = ""
        for line in self._raw_head.decode("latin-1").split("\r\n")[1:]:
            name, colon, value = line.partition(":")
            if not colon:
                continue
            headers[name] = value.strip(" \t")
            if name.lower() == "content-type":
                body_type = mime_type(value)
        types = self._types if self._types is not None else {"body": body_type}
        parsed: dict[str, Any] = {key: {"content-type": mime} for key, mime in types.items()}
        parsed.update(headers)
        parsed.update(self._extra)
        return parsed
