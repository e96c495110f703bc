"""`dataclass` as Python's own, made in a quarter of the time.

Python compiles each method of each dataclass when its module is imported, above a millisecond for a frozen one, and
each start of a server imports some hundred of them. Here `__init__` alone is compiled; the other methods read the
fields when they are called. That a class is frozen is for the type checker alone, which takes this for Python's.

For classes that are compared, hashed and printed now and then. Compiled modules have Python's own, and so have classes
that plugins are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ("dataclass",)

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    import dataclasses

    def dataclass(made_from=None, /, *, frozen=False, slots=False):
        """Makes a dataclass of the class `made_from`; without it, returns what makes one."""

        def make(kind):
            written = kind.__dict__
            made = dataclasses.dataclass(slots=slots, eq=False, repr=False)(kind)
            methods = {"__eq__": _equal, "__repr__": _text, "__hash__": _hash if frozen else None}
            for name, method in methods.items():
                # A class that compares in its own way has `__hash__` None, which it has not written.
                if name not in written or (name == "__hash__" and written[name] is None and frozen):
                    setattr(made, name, method)
            return made

        return make if made_from is None else make(made_from)

    def _compared(given: Any) -> tuple[Any, ...]:
        return tuple(getattr(given, each.name) for each in dataclasses.fields(given) if each.compare)

    def _equal(self: Any, other: object) -> Any:
        return _compared(self) == _compared(other) if other.__class__ is self.__class__ else NotImplemented

    def _hash(self: Any) -> int:
        return hash(_compared(self))

    def _text(self: Any) -> str:
        shown = (f"{each.name}={getattr(self, each.name)!r}" for each in dataclasses.fields(self) if each.repr)
        return f"{self.__class__.__qualname__}({', '.join(shown)})"
