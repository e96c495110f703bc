"""Bodies of every content type become the rows that TorchServe's handlers see."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsgi_ts.handlers.serving.inputs import MAX_FIELDS, BadInput, LazyHeaders, build_row

FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=xyz"


def row(content_type: str | None, body: bytes, **options: Any) -> dict[str, Any]:
    return build_row(content_type, memoryview(body), **options)


def part(name: str, value: bytes, *, filename: str | None = None, content_type: str | None = None) -> bytes:
    head = f'--xyz\r\nContent-Disposition: form-data; name="{name}"'
    if filename is not None:
        head += f'; filename="{filename}"'
    if content_type is not None:
        head += f"\r\nContent-Type: {content_type}"
    return head.encode() + b"\r\n\r\n" + value + b"\r\n"


@pytest.mark.parametrize(
    ("content_type", "body", "value"),
    [
        (None, b"hello", bytearray(b"hello")),
        (None, b"", bytearray()),
        ("application/octet-stream", b"hello", bytearray(b"hello")),
        ("application/octet-stream", b"", bytearray()),
        ("application/json", b'{"k": [1, 2.5, null]}', {"k": [1, 2.5, None]}),
        ("application/json; charset=utf-8", b'"s"', "s"),
        ("application/json", '{"input":"教练"}'.encode(), {"input": "教练"}),
        ("application/json", b"{broken", bytearray(b"{broken")),
        ("application/json", b"\xff\xfe", bytearray(b"\xff\xfe")),
        ("application/json", b"9" * 5000, bytearray(b"9" * 5000)),
        ("application/json", b"", bytearray()),
        ("APPLICATION/JSON", b"1", bytearray(b"1")),
        ("application/jsonl", b"1", bytearray(b"1")),
        ("text/plain", "é你".encode(), "é你"),
        ("text/plain", b"\xff", bytearray(b"\xff")),
        ("image/jpeg", b"\xff\xd8", bytearray(b"\xff\xd8")),
    ],
)
def test_body_is_decoded_by_its_content_type(content_type: str | None, body: bytes, value: Any) -> None:
    found = row(content_type, body)
    assert found == {"body": value}
    assert type(found["body"]) is type(value)


def test_without_decoding_all_values_are_bytearrays() -> None:
    assert row("application/json", b"{}", decode=False) == {"body": bytearray(b"{}")}
    assert row("text/plain", b"a", decode=False) == {"body": bytearray(b"a")}
    body = part("j", b"1", filename="f", content_type="application/json") + b"--xyz--\r\n"
    assert row(MULTIPART, body, decode=False) == {"j": bytearray(b"1")}


def test_a_json_body_that_is_nested_too_deep_is_refused() -> None:
    with pytest.raises(BadInput, match="nested deeper than 100 levels"):
        row("application/json", b"[" * 100_000)


def test_the_row_does_not_share_the_memory_of_the_body() -> None:
    memory = bytearray(b"hello")
    found = build_row(None, memoryview(memory))
    memory[:] = b"XXXXX"
    assert found["body"] == b"hello"


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"data=abc&x=1+2", {"data": b"abc", "x": b"1 2"}),
        (b"hello", {}),
        (b"", {}),
        (b"bare&a=1", {"bare": b"", "a": b"1"}),
        (b"a=1&a=2", {"a": b"2"}),
        (b"a=b=c", {"a": b"b=c"}),
        (b"a=%E4%BD%A0%2B&%61b=%zz", {"a": "你+".encode(), "ab": b"%zz"}),
        (b"&=x&a=1\r\n", {"a": b"1"}),
    ],
)
@pytest.mark.parametrize("content_type", [FORM, FORM.title(), FORM + "; charset=utf-8"])
def test_form_fields_become_keys(content_type: str, body: bytes, fields: dict[str, bytes]) -> None:
    found = row(content_type, body)
    assert found == fields
    assert all(type(value) is bytearray for value in found.values())


def test_a_form_with_too_many_fields_is_refused() -> None:
    assert len(row(FORM, b"&".join(b"a%d=1" % number for number in range(MAX_FIELDS)))) == MAX_FIELDS
    with pytest.raises(BadInput, match="more than 1000 fields"):
        row(FORM, b"a=1&" * MAX_FIELDS + b"a=1")


def test_query_parameters_come_before_the_body_and_yield_to_it() -> None:
    assert row(None, b"x", query="a=%31&body=q") == {"a": b"1", "body": b"x"}
    assert row(FORM, b"a=form", query="a=query&b=2") == {"a": b"form", "b": b"2"}


def test_multipart_fields_stay_bytes_and_files_are_decoded_by_their_type() -> None:
    body = (
        part("body", b'{"q":1}', content_type="application/json")
        + part("json", b'{"q":1}', filename="a.json", content_type="application/json")
        + part("text", b"abc", filename="a.txt", content_type="text/plain; charset=utf-8")
        + part("file", b"\x00\xff", filename="a.bin")
        + b"--xyz--\r\n"
    )
    types: dict[str, str] = {}
    assert row(MULTIPART, body, types=types) == {
        "body": bytearray(b'{"q":1}'),
        "json": {"q": 1},
        "text": "abc",
        "file": bytearray(b"\x00\xff"),
    }
    assert types == {
        "body": "",
        "json": "application/json",
        "text": "text/plain",
        "file": "application/octet-stream",
    }


def test_of_parts_with_one_name_the_last_wins_and_a_large_part_is_whole() -> None:
    large = bytes(range(256)) * 12_000
    body = part("a", b"1") + part("a", large, filename="../../etc/passwd") + b"--xyz--\r\n"
    assert row(MULTIPART, body) == {"a": large}


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", part("a", b"1") + b"--xyz--\r\n"),
        ("multipart/form-data; boundary=", part("a", b"1") + b"--xyz--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 10_000, b""),
        ('multipart/form-data; boundary="a\r\nb"', b"--a\r\nb--"),
        (MULTIPART, b""),
        (MULTIPART, b"junk"),
        (MULTIPART, part("a", b"1")),
        (MULTIPART, part("a", b"1") + b"--xyz"),
        (MULTIPART, b"--xyz\r\n\r\nvalue\r\n--xyz--\r\n"),
        (MULTIPART, b"--xyz\r\nContent-Disposition: form-data\r\n\r\nvalue\r\n--xyz--\r\n"),
        (MULTIPART, b"--xyz\r\nX: " + b"y" * 20_000 + b"\r\n\r\nvalue\r\n--xyz--\r\n"),
        (MULTIPART, part("a", b"1") * (MAX_FIELDS + 1) + b"--xyz--\r\n"),
    ],
)
def test_malformed_multipart_is_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(BadInput):
        row(content_type, body)


@given(content_type=st.sampled_from([MULTIPART, FORM, "application/json", "text/plain"]), body=st.binary())
def test_no_body_raises_anything_else(content_type: str, body: bytes) -> None:
    try:
        found = row(content_type, body)
    except BadInput:
        return
    assert isinstance(found, dict)


@given(fields=st.dictionaries(st.text("abcé/_", min_size=1), st.binary()))
def test_multipart_gives_back_what_was_put_in(fields: dict[str, bytes]) -> None:
    usable = {name: value for name, value in fields.items() if b"--xyz" not in value}
    body = b"".join(part(name, value) for name, value in usable.items()) + b"--xyz--\r\n"
    assert row(MULTIPART, body) == usable


HEAD = b"POST /predictions/m HTTP/1.1\r\nHost: a:1\r\nX-In:  one \r\nX-In: two\r\nContent-Type: Text/Plain; a=b\r\n"


@pytest.mark.parametrize("content_type", [None, "application/octet-stream", "application/json; a=b"])
def test_the_row_says_its_types_for_the_headers(content_type: str | None) -> None:
    types: dict[str, str] = {}
    row(content_type, b"1", types=types)
    assert types == {"body": (content_type or "").partition(";")[0]}


def test_headers_keep_their_spelling_and_the_last_one_counts() -> None:
    headers = LazyHeaders(HEAD + b"\r\n", {"url_path": "", "explain": "False"})
    assert headers.get("X-In") == "two"
    assert headers.get("x-in") is None
    assert headers["Host"] == "a:1"
    assert list(headers) == ["body", "Host", "X-In", "Content-Type", "url_path", "explain"]
    assert len(headers) == 6
    assert headers["body"] == {"content-type": "Text/Plain"}
    assert json.loads(json.dumps(headers.to_dict())) == dict(headers)


def test_entries_of_the_server_hide_headers_and_headers_hide_the_rows_keys() -> None:
    head = b"POST / HTTP/1.1\r\nexplain: True\r\ndata: mine\r\n"
    headers = LazyHeaders(head, {"explain": "False"}, {"data": "", "file": "image/png"})
    assert headers.to_dict() == {"data": "mine", "file": {"content-type": "image/png"}, "explain": "False"}


def test_headers_are_latin_1_and_lines_without_a_colon_are_ignored() -> None:
    assert LazyHeaders(b"GET / HTTP/1.1\r\nA: \xe9\r\nrubbish\r\n", {}, {}).to_dict() == {"A": "é"}
