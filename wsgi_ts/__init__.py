"""wsgi-ts: a model server that takes over from TorchServe.

This file also decides whether the modules that every request goes through run as machine code or as Python. `setup.py`
compiles them into `_compiled/` and notes what it has read. Where these sources are still the same, the compiled modules
are imported; where one of them has changed, none is: what runs is always what the sources say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

#: The TorchServe release whose interfaces this server speaks; shown where TorchServe shows its own version.
TORCHSERVE_VERSION = "0.12.0"


class CompiledModules:
    """Finds compiled modules before Python's own search finds their sources: an entry of `sys.meta_path`.

    They are compiled against each other, so a process takes all of them or none. It looks once, when the first is
    imported (1 ms).

    Attributes:
        folder: where those for this interpreter lie, each as its name and the suffix of extension modules.
        stated: what they were compiled from: lines of a source's hash, its path, and the module if it was compiled.
    """

    #: Set to 0 it switches the compiled modules off; `setup.py` compiles none then.
    SWITCH = "WSGI_TS_COMPILED"
    #: The module that holds the code of all others.
    LIBRARY = "wsgi_ts__mypyc"

    def __init__(self, package: str) -> None:
        self._package = package
        self.folder = os.path.join(package, "_compiled", EXTENSION_SUFFIXES[0].split(".")[1])
        self.stated = os.path.join(self.folder, "sources.txt")
        self._modules: frozenset[str] | None = None
        self._reason = ""

    @property
    def modules(self) -> frozenset[str]:
        """The modules that are compiled in this process; none where they are not there, not wanted, or out of date."""
        if self._modules is None:
            self._modules = self._find_modules()
        return self._modules

    @property
    def is_switched_off(self) -> bool:
        """Whether the user wants no compiled modules."""
        return os.environ.get(self.SWITCH) == "0"

    def describe(self) -> str:
        """Returns what this process runs, for people: "compiled (36 modules)", or "interpreted" and why."""
        return f"compiled ({len(self.modules)} modules)" if self.modules else f"interpreted: {self._reason}"

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns where a compiled module is loaded from; None leaves the search to Python."""
        if not name.startswith("wsgi_ts") or not (name in self.modules or (name == self.LIBRARY and self.modules)):
            return None
        file = os.path.join(self.folder, name + EXTENSION_SUFFIXES[0])
        return ModuleSpec(name, ExtensionFileLoader(name, file), origin=file)

    def _find_modules(self) -> frozenset[str]:
        if self.is_switched_off:
            self._reason = f"{self.SWITCH}=0"
            return frozenset()
        modules = []
        try:
            with open(self.stated, encoding="utf-8") as lines:
                for line in lines:
                    stated_hash, source, module = line.rstrip("\n").split(" ")
                    with open(os.path.join(self._package, source), "rb") as file:
                        if self.hash_of(file.read()) != stated_hash:
                            self._reason = f"{source} has changed since it was compiled"
                            return frozenset()
                    if module:
                        modules.append(module)
        except FileNotFoundError as error:
            what = "not compiled for this Python" if error.filename == self.stated else f"{error.filename} is missing"
            self._reason = what
            return frozenset()
        return frozenset(modules)

    @staticmethod
    def hash_of(source: bytes) -> str:
        """Returns the hash of a source, as Python takes it for its own compiled files."""
        from importlib.util import source_hash  # not loaded in every process before

        return source_hash(source).hex()


compiled_modules = CompiledModules(os.path.dirname(__file__))
sys.meta_path.insert(0, compiled_modules)
