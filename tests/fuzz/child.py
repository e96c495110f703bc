"""The process that libFuzzer runs one target in; see `fuzz.run`."""

from __future__ import annotations

import logging
import os
import sys

import atheris

with atheris.instrument_imports(include=["wsgi_ts", "multipart"]):
    from fuzz.targets import TARGETS

logging.disable()
_name, *_arguments = sys.argv[1:]
# The first is what libFuzzer starts where it needs processes of its own.
atheris.Setup([os.environ["FUZZ_PROGRAM"], *_arguments], TARGETS[_name])
atheris.Fuzz()
