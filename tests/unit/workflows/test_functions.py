"""Functions of a handler file, found by reading it."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsgi_ts.workflows.functions import read_handler_file

TEXT = """
import json, os.path
from x import y as z
def plain(data, context): ...
async def waits(data, context): ...
def more(data, context, scale=1): ...
def rest(*parts): ...
def few(data): ...
def many(data, context, third): ...
def keyword(data, *, context): ...
@cached
def decorated(data): ...
short = lambda data, context: data
one = two = plain
typed: object = plain
if True:
    def inside(data, context): ...
else:
    def elsewhere(data, context): ...
try:
    import fast as chosen
except ImportError:
    import slow as chosen
def outer(data, context):
    def hidden(data, context): ...
"""


def test_names_at_the_top_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text(TEXT)
    found = read_handler_file(tmp_path / "h.py")
    by_call = {
        True: {"plain", "waits", "more", "rest", "short", "inside", "elsewhere", "outer"},
        False: {"few", "many", "keyword"},
        None: {"json", "os", "z", "decorated", "one", "two", "typed", "chosen"},
    }
    assert {name: function.takes_two for name, function in found.functions.items()} == {
        name: takes_two for takes_two, names in by_call.items() for name in names
    }
    assert found.functions["plain"].line == 4
    assert found.has("plain") and not found.has("hidden") and not found.is_open


@pytest.mark.parametrize(
    "text", ["from x import *", "globals()['f'] = print", "def __getattr__(name): ...", "setattr(m, 'f', 1)"]
)
def test_a_file_that_may_define_more_than_can_be_seen(tmp_path: Path, text: str) -> None:
    (tmp_path / "h.py").write_text(text)
    assert read_handler_file(tmp_path / "h.py").has("anything")


def test_the_only_class_stands_in_for_a_function(tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text("class H:\n    def handle(self, data, context): ...\n")
    assert read_handler_file(tmp_path / "h.py").has("anything")
    (tmp_path / "h.py").write_text("class H: ...\nclass I: ...\n")
    assert not read_handler_file(tmp_path / "h.py").has("anything")


@pytest.mark.parametrize("content", [b"def f(:", b"\0", b"\xff = 1"])
def test_what_is_no_python(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "h.py").write_bytes(content)
    with pytest.raises(SyntaxError):
        read_handler_file(tmp_path / "h.py")
