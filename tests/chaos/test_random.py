"""Random processes are killed one after the other, the supervisor among them: all come back, and nothing is left."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from support.eventually import eventually
from support.server import ServerProcess

from chaos.load import Load, check, ledger_server

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

KILLS = 60
#: Mean time between two kills, in seconds.
GAP_S = 0.4
#: The bound of ARCHITECTURE.md is the longest back-off of a process that died before it was up (30 s) and a start; the
#: rest is for a machine that runs other tests beside this one.
BACK_S = 60.0


def roles(server: ServerProcess) -> Counter[str]:
    return Counter(each.role for each in server.processes())


def test_after_many_kills_every_process_is_back_and_a_stop_leaves_nothing(tmp_path: Path) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    with ledger_server(tmp_path, web_workers=2, config={"job_queue_size": "1000"}) as server:
        server.register("ledger.mar", initial_workers=2, batch_size=4, max_batch_delay=5)
        whole = roles(server)
        killed: Counter[str] = Counter()
        with Load(server, clients=4, hang_s=BACK_S) as load:
            eventually(lambda: load.count("ok") > 50, within=20, what="load under way")
            while killed.total() < KILLS:
                assert server.returncode is None, server.output()[-3000:]
                victims = [each for each in server.processes() if each.role not in ("guard", "guard-fork")]
                # A supervisor that is killed again and again while it is all that runs is a loop, which slows down.
                if len(victims) > 1:
                    server.note_prefix()
                    victim = chance.choice(victims)
                    victim.kill()
                    killed[victim.role] += 1
                time.sleep(chance.uniform(0, 2 * GAP_S))
            last_kill = time.monotonic()
            eventually(lambda: roles(server) == whole, within=BACK_S, what=f"{whole} after {killed}")
            print(f"killed {dict(killed)}; back {time.monotonic() - last_kill:.1f} s after the last")
            good = load.count("ok")
            eventually(lambda: load.count("ok") > good + 50, within=20, what="answers")
        print(load.summary)
        check(load, tmp_path, allowed_statuses={500, 503, 507})
        assert load.count("ok") > 100
        # The clean stop, and what is left after it, is checked at the end of the block.
