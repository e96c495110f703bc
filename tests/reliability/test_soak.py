"""A server under load, with models that come and go, holds no more as time passes. `make prove`: half an hour of it."""

from __future__ import annotations

import pytest

from reliability.measures import measure_soak

pytestmark = pytest.mark.slow

SECONDS = 120.0
#: As many in this time as `make prove` has in its own.
REGISTRATIONS = 60
#: What may be more for each model that came and went, of things and of megabytes: a leak leaves one.
MOST = 0.25


def test_nothing_grows_while_models_come_and_go() -> None:
    soak = measure_soak("wsgi-ts", SECONDS, REGISTRATIONS, lambda passed: None)
    print(soak)
    assert not soak.bad, "all requests are answered well"
    assert soak.registered > REGISTRATIONS / 4
    most = MOST * soak.registered
    grown = {name: getattr(soak, name) for name in ("descriptors", "threads", "processes", "names")}
    assert max(grown.values()) < most, grown
    assert soak.slope / 3600 * soak.seconds < most * 1e6, f"{soak.slope / 1e6:.0f} MB an hour"
