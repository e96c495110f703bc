"""Bytes held for clients, against one limit for all."""

from __future__ import annotations

from wsgi_ts.dataplane.ledger import Ledger


def test_all_together_have_one_limit_and_the_largest_is_known() -> None:
    ledger: Ledger[str] = Ledger(100)
    ledger.note("a", 60)
    ledger.note("b", 40)
    assert not ledger.is_exceeded
    ledger.note("b", 41)
    assert ledger.is_exceeded
    assert ledger.largest() == "a"
    ledger.note("a", 0)
    assert ledger.total == 41
    assert "a" not in ledger
    assert not ledger.is_exceeded
