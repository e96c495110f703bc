"""The one field of a form that says which model is meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsgi_ts.http.form_field import form_field, is_form

FORM = b"application/x-www-form-urlencoded"
PARTS = b"multipart/form-data; boundary=X"


def part(name: str, value: str, more: str = "") -> str:
    return f'--X\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


@pytest.mark.parametrize(
    ("content_type", "body", "value"),
    [
        (FORM, "model_name=m", "m"),
        (FORM + b"; charset=utf-8", "a=1&model_name=m%20x+y&b", "m x y"),
        (FORM, "model_name=%C3%BC", "ü"),
        (FORM, "model_name=ü", "ü"),
        (FORM, "model%5Fname=m\r\n", "m"),
        (FORM, "model_name=&a=1", ""),
        (FORM, "a=1", None),
        (FORM, "", None),
        (FORM, "&".join(f"f{n}=1" for n in range(100)) + "&model_name=m", None),
        (FORM, "model_name=" + "m" * 2000, None),
        (PARTS, part("a", "1") + part("model_name", "ü ") + "--X--\r\n", "ü"),
        (PARTS, part("model_name", "m", '; filename="f"') + "--X--\r\n", None),
        (PARTS, part("model_name", "m" * 2000) + "--X--\r\n", None),
        (PARTS, part("model_name", "") + "--X--\r\n", ""),
        (PARTS, "no parts", None),
        (b"multipart/form-data", part("model_name", "m") + "--X--\r\n", None),
    ],
)
def test_field(content_type: bytes, body: str, value: str | None) -> None:
    assert is_form(content_type)
    assert form_field(content_type, body.encode(), "model_name") == value


@pytest.mark.parametrize("content_type", [b"", b"application/json", b"text/plain; x=multipart/form-data"])
def test_other_bodies_are_no_forms(content_type: bytes) -> None:
    assert not is_form(content_type)


@given(st.sampled_from([FORM, PARTS, b"multipart/form-data; boundary=", PARTS + b'"']), st.binary(max_size=300))
def test_any_body_has_a_field_or_none(content_type: bytes, body: bytes) -> None:
    assert isinstance(form_field(content_type, b"--X\r\n" + body, "model_name"), str | None)
