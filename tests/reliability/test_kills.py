"""Random processes are killed one after the other, guard and supervisor among them: all come back, nothing is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from support.eventually import eventually

from reliability.campaign import BACK_S, Campaign, findings
from reliability.load import Load, check, executions
from reliability.subjects import Ours, wait_for_end

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

#: `make prove` kills a thousand.
KILLS = int(os.environ.get("WSGI_TS_KILLS", "20"))


def test_after_many_kills_every_process_is_back_and_a_stop_leaves_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("WSGI_TS_SEED", time.time_ns()))
    print(f"seed {seed}: WSGI_TS_SEED repeats it")
    ours = Ours(tmp_path, {})
    with ours.server:
        eventually(lambda: ours.server.predict("ledger", b"x" * 32).status == 200, within=60, what="an answer")
        with Load(ours, clients=4, hang_s=BACK_S, seed=seed % 1000) as load:
            eventually(lambda: load.count("ok") > 50, within=20, what="load under way")
            campaign = Campaign(ours, load, seed)
            campaign.run(KILLS)
        found = findings(campaign, executions(tmp_path))
        print(found)
        check(load, tmp_path, allowed_statuses={500, 503, 507})
        assert found.by_hand == 0, "only who kills the guard has to start the server"
        assert found.cut_max <= 4, "more requests are lost than there are clients"
        assert load.count("ok") > 100
        ours.end(15)
        assert not wait_for_end(ours)
        assert not ours.server.leftovers()
