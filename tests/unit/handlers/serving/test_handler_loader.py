"""Handler strings of every kind find their entry point, and wrong ones say what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from wsgi_ts.handlers.serving.loader import Entry, list_classes_from_module, load_entry

pytestmark = pytest.mark.usefixtures("imports")

CLASS = """
from json import JSONDecoder

class Handler:
    def initialize(self, context):
        self.name = context.name
    def handle(self, data, context):
        return [self.name] * len(data)
"""

FUNCTION = """
calls = []
def handle(data, context):
    calls.append(data)
    return None if data is None else ["handle"] * len(data)
def other(data, context):
    return None if data is None else ["other"] * len(data)
class One: pass
class Two: pass
"""


def handler_class(entry: Entry) -> str:
    """The name of the class whose method the entry point is."""
    instance: Any = getattr(entry.initialize, "__self__", None)
    return type(instance).__name__


CONTEXT = SimpleNamespace(name="n")


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    sys.path.insert(0, str(tmp_path))
    return str(tmp_path)


def write(model_dir: str, name: str, text: str) -> None:
    Path(model_dir, name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("handler", ["my_handler.py", "my_handler", "some/folder/my_handler.py"])
def test_a_class_is_made_initialised_and_called(model_dir: str, handler: str) -> None:
    write(model_dir, "my_handler.py", CLASS)
    entry = load_entry(handler, model_dir)
    entry.initialize(CONTEXT)
    assert entry.handle([1, 2], None) == ["n", "n"]


@pytest.mark.parametrize(
    ("handler", "answer"),
    [("my_functions", "handle"), ("my_functions.py:other", "other"), ("my_functions:other", "other")],
)
def test_a_function_is_initialised_with_no_data(model_dir: str, handler: str, answer: str) -> None:
    write(model_dir, "my_functions.py", FUNCTION)
    entry = load_entry(handler, model_dir)
    entry.initialize(CONTEXT)
    assert entry.handle([{}], CONTEXT) == [answer]
    if answer == "handle":
        assert sys.modules["my_functions"].calls == [None, [{}]]


def test_a_models_module_comes_before_one_imported_earlier(
    model_dir: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model_dir, "shared_name.py", CLASS)
    other = ModuleType("shared_name")
    other.__file__ = str(tmp_path_factory.mktemp("elsewhere") / "shared_name.py")
    monkeypatch.setitem(sys.modules, "shared_name", other)
    assert handler_class(load_entry("shared_name.py", model_dir)) == "Handler"


def test_a_module_needs_exactly_one_class_of_its_own(model_dir: str) -> None:
    write(model_dir, "two.py", "class A: pass\nclass B: pass\n")
    write(model_dir, "none.py", "from json import JSONDecoder\n")
    write(model_dir, "mute.py", "class A: pass\n")
    for handler in ("two", "none"):
        with pytest.raises(ValueError, match="Expected only one class in custom service code"):
            load_entry(handler, model_dir)
    with pytest.raises(ValueError, match="Expect handle method in class"):
        load_entry("mute", model_dir)


#: The handler among the classes of its file: what TorchServe's examples have in files of their own is here, too.
SEVERAL = """
from dataclasses import dataclass

@dataclass
class Features:
    text: str

class Base:
    def initialize(self, context):
        self.name = context.name

    def handle(self, data, context):
        return [self.name] * len(data)

class Other(Exception):
    pass

class Derived(Base):
    pass

Alias = Derived
"""


@pytest.mark.parametrize("handler", ["several.py", "several", "several.py:Derived", "several:Alias"])
def test_of_several_classes_the_handler_is_found_or_named(model_dir: str, handler: str) -> None:
    write(model_dir, "several.py", SEVERAL)
    entry = load_entry(handler, model_dir)
    entry.initialize(CONTEXT)
    assert handler_class(entry) == "Derived"
    assert entry.handle([{}], None) == ["n"]


def test_a_class_that_is_named_is_the_handler(model_dir: str) -> None:
    write(model_dir, "choice.py", SEVERAL + "class Second(Base): pass\n")
    with pytest.raises(ValueError, match=r"Expected only one class .*Derived.*Second"):
        load_entry("choice", model_dir)
    assert handler_class(load_entry("choice:Second", model_dir)) == "Second"
    assert handler_class(load_entry("choice.py:Base", model_dir)) == "Base"


def test_missing_modules_are_named(model_dir: str) -> None:
    with pytest.raises(ImportError, match="no_such_handler"):
        load_entry("no_such_handler.py", model_dir)
    write(model_dir, "needs_more.py", "import no_such_package_at_all\n")
    with pytest.raises(ImportError, match="no_such_package_at_all"):
        load_entry("needs_more.py", model_dir)
    with pytest.raises(ImportError, match="has no handler"):
        load_entry("", model_dir)


def test_bundled_handlers_are_found_by_name_unless_the_model_has_such_a_file(model_dir: str) -> None:
    assert handler_class(load_entry("image_classifier", model_dir)) == "ImageClassifier"
    assert handler_class(load_entry("ts.torch_handler.image_classifier", model_dir)) == "ImageClassifier"
    write(model_dir, "image_classifier.py", CLASS)
    assert handler_class(load_entry("image_classifier", model_dir)) == "Handler"
    assert handler_class(load_entry("ts.torch_handler.image_classifier", model_dir)) == "ImageClassifier"


def test_an_envelope_wraps_the_entry_point(model_dir: str) -> None:
    write(model_dir, "echo.py", "def handle(data, context):\n    return data\n")
    entry = load_entry("echo", model_dir, "body")
    assert entry.handle([{"data": 1}, {"body": 2}], None) == [1, 2]
    with pytest.raises(ValueError, match='Unknown service_envelope "nosuch"'):
        load_entry("echo", model_dir, "nosuch")


def test_listing_classes_leaves_out_imported_ones(model_dir: str) -> None:
    write(model_dir, "many.py", "from json import JSONDecoder\nclass B(dict): pass\nclass A: pass\n")
    module = __import__("many")
    assert [found.__name__ for found in list_classes_from_module(module)] == ["A", "B"]
    assert [found.__name__ for found in list_classes_from_module(module, dict)] == ["B"]
