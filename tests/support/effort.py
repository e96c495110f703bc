"""How much a test does: what CI has time for, or all that `make prove` asks for."""

from __future__ import annotations

import os

import pytest

#: Set by `make prove`.
PROVING = "WSGI_TS_PROVE" in os.environ
#: For tests, or parameters of tests, that only `make prove` runs.
only_in_proofs = pytest.mark.skipif(not PROVING, reason="only make prove runs it (WSGI_TS_PROVE=1)")
