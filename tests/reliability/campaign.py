"""Processes are killed one after the other under load; what that cost the clients, and when all was back."""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from support.processes import Member

from reliability.load import Load, Outcome
from reliability.subjects import Subject, wait_for_end

#: A server that is not whole after so long is started by hand. The bound of ARCHITECTURE.md is the longest back-off of
#: a process that died before it was up (30 s) and a start; the rest is for a machine that does other things besides.
BACK_S = 180.0
#: Every third kill follows the last one while the server is still busy with that.
RAPID = 0.33
RAPID_GAP_S = 0.4
POLL_S = 0.05


@dataclass
class Fault:
    """One kill.

    Attributes:
        role: of the process.
        at: when (monotonic).
        back_s: seconds until the server was whole and answered again; None where that was not waited for.
        by_hand: somebody had to start it again: its main process was killed or has ended, or it did not come back.
        status: how the requests that were under way ended.
    """

    role: str
    at: float
    back_s: float | None = None
    by_hand: bool = False
    ends: list[Outcome] = field(default_factory=list)


class Campaign:
    """Kills under load.

    Args:
        subject: a running server.
        load: under way.
        seed: of what is killed when.
        back_limit_s: how long it may take to come back by itself.
    """

    def __init__(self, subject: Subject, load: Load, seed: int, back_limit_s: float = BACK_S) -> None:
        self.subject = subject
        self.load = load
        self.faults: list[Fault] = []
        self._chance = random.Random(seed)
        self._back_limit_s = back_limit_s
        self._whole = subject.whole()

    def run(self, count: int, progress: Callable[[int], None] = lambda done: None) -> None:
        """Kills so many processes: of a role at random, one of them at random; leaves the server whole."""
        while len(self.faults) < count:
            rapid = self._chance.random() < RAPID and len(self.faults) < count - 1
            self.kill(wait=not rapid)
            if rapid:
                time.sleep(self._chance.uniform(0, RAPID_GAP_S))
            progress(len(self.faults))

    def kill(self, role: str = "", *, wait: bool = True) -> None:
        """Kills a process of a role, or of any, and waits until the server is whole again."""
        victim = self._victim(role)
        fault = Fault("none left" if victim is None else victim.role, time.monotonic())
        if victim is not None:
            victim.kill(signal.SIGKILL)
            self.faults.append(fault)
        if not wait and self.subject.is_up and self._is_watched(fault):
            return
        back = self._wait_until_whole(fault)
        if not back:
            fault.by_hand = True
            self._start_by_hand()
        fault.back_s = time.monotonic() - fault.at

    def _is_watched(self, fault: Fault) -> bool:
        return fault.role not in ("guard", "main", "none left")

    def _victim(self, role: str) -> Member | None:
        found = [each for each in self.subject.processes() if role in ("", each.role) and each.role != "guard-fork"]
        roles = sorted({each.role for each in found})
        if not roles:
            return None
        chosen = self._chance.choice(roles)
        return self._chance.choice([each for each in found if each.role == chosen])

    def _wait_until_whole(self, fault: Fault) -> bool:
        # Looked at again: a process that was killed may be a zombie for a moment.
        deadline = time.monotonic() + self._back_limit_s
        seen = len(self.load.outcomes)
        while time.monotonic() < deadline:
            if not self.subject.is_up:
                return False
            if self.subject.whole() >= self._whole:
                new = self.load.outcomes[seen:]
                if any(each.result == "ok" and each.sent_at > fault.at for each in new):
                    return True
            time.sleep(POLL_S)
        return False

    def _start_by_hand(self) -> None:
        """What a service manager does: ends what is left, and starts it."""
        wait_for_end(self.subject, 2.0)
        self.subject.discard()
        self.subject.start()

    def collect(self) -> None:
        """Gives each fault the requests that were under way when it came."""
        outcomes = sorted(self.load.outcomes, key=lambda each: each.sent_at)
        for fault in self.faults:
            fault.ends = [each for each in outcomes if each.sent_at <= fault.at < each.ended_at]


@dataclass(frozen=True)
class Findings:
    """What a campaign has found; seconds.

    Attributes:
        kills: by role.
        by_hand: how often somebody had to start it though its main process was not what was killed.
        results: how many requests ended how.
        twice: requests that were run more than once.
        cut_max, cut_mean: requests under way that got no answer, for each kill.
        back: by role, the seconds until it was whole, of the kills after which that was waited for.
        told: by role, the seconds until requests that failed were told so.
    """

    kills: dict[str, int]
    by_hand: int
    results: dict[str, int]
    twice: int
    cut_max: int
    cut_mean: float
    back: dict[str, list[float]]
    told: dict[str, list[float]]


def findings(campaign: Campaign, runs: Counter[str]) -> Findings:
    """Sums up a campaign whose load has ended.

    Args:
        campaign: it.
        runs: how often each request was run.
    """
    campaign.collect()
    back: dict[str, list[float]] = {}
    told: dict[str, list[float]] = {}
    cuts = []
    for fault in campaign.faults:
        cuts.append(sum(1 for each in fault.ends if each.result == "closed"))
        failed = [each.ended_at - fault.at for each in fault.ends if each.result not in ("ok", "refused")]
        told.setdefault(fault.role, []).extend(failed)
        if fault.back_s is not None and not fault.by_hand:
            back.setdefault(fault.role, []).append(fault.back_s)
    known = {each.nonce for each in campaign.load.outcomes}
    return Findings(
        dict(Counter(fault.role for fault in campaign.faults)),
        sum(1 for fault in campaign.faults if fault.by_hand and fault.role not in ("guard", "main")),
        dict(Counter(each.result for each in campaign.load.outcomes)),
        sum(1 for nonce, count in runs.items() if count > 1 and nonce in known),
        max(cuts, default=0),
        statistics.fmean(cuts) if cuts else 0.0,
        back,
        told,
    )
