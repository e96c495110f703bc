"""Doorbells: nothing is missed, and no step of the wall clock lengthens a wait."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wsgi_ts.batcher.shm import semaphore
from wsgi_ts.batcher.shm.doorbell import Doorbell
from wsgi_ts.batcher.shm.shared_memory import unlink_prefix

#: Far more than any wait below, and less than a test may take.
STEP_S = 30
#: As if the clock were set back by STEP_S while a wait is under way: the moment it waits for comes so much later.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <semaphore.h>
#include <time.h>

int sem_timedwait(sem_t *sem, const struct timespec *until) {
    int (*real)(sem_t *, const struct timespec *) = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec later = {until->tv_sec + STEP_S, until->tv_nsec};
    return real(sem, &later);
}

int sem_clockwait(sem_t *sem, clockid_t clock, const struct timespec *until) {
    int (*real)(sem_t *, clockid_t, const struct timespec *) = dlsym(RTLD_NEXT, "sem_clockwait");
    struct timespec later = {until->tv_sec + (clock == CLOCK_REALTIME ? STEP_S : 0), until->tv_nsec};
    return real(sem, clock, &later);
}
"""
WAITER = """
import sys, time
from array import array
from wsgi_ts.batcher.shm.doorbell import Doorbell
began = time.monotonic()
assert not Doorbell(sys.argv[1], memoryview(array("Q", [0])), 0).wait(lambda: False, 0.05)
print(time.monotonic() - began)
"""


@pytest.fixture
def name() -> Iterator[str]:
    found = f"wsgi-ts-{uuid.uuid4().hex}"
    Doorbell.create(found)
    yield found
    unlink_prefix(found)


@pytest.fixture
def bell(name: str) -> Doorbell:
    return Doorbell(name, memoryview(array("Q", [0])), 0)


def test_a_clock_that_is_set_back_lengthens_no_wait(name: str, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or semaphore._clock_wait is None:
        pytest.skip("needs a C compiler, and a C library with sem_clockwait")
    (tmp_path / "shim.c").write_text(SHIM)
    library = tmp_path / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-DSTEP_S={STEP_S}", "-o", library, tmp_path / "shim.c", "-ldl"], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    words = [sys.executable, "-c", WAITER, name]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert float(ended.stdout) < STEP_S / 2


def test_without_sem_clockwait_a_wait_is_ended_by_the_alarm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semaphore, "_clock_wait", None)
    monkeypatch.setattr(semaphore, "CHECK_S", 0.02)
    waiting = semaphore.Semaphore(name)
    handle: Any = waiting._handle

    class SteppedBack:
        """A semaphore that is waited for while the wall clock is set back."""

        release = handle.release

        def acquire(self, seconds: float) -> None:
            handle.acquire(seconds + STEP_S)

    monkeypatch.setattr(waiting, "_handle", SteppedBack())
    began = time.monotonic()
    waiting.wait(0.05)
    assert time.monotonic() - began < STEP_S / 2
    # One that is posted in time is over at once, and says so.
    waiting.post()
    assert waiting.wait(1.0)


def test_without_sem_clockwait_a_wait_ends_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semaphore, "_clock_wait", None)
    # One of them may be ended by the alarm, where this thread is late.
    assert not all(semaphore.Semaphore(name).wait(0.01) for _ in range(5))


def test_what_comes_between_the_look_and_the_sleep_is_not_missed(bell: Doorbell) -> None:
    looks: list[int] = []

    def ready() -> bool:
        looks.append(bell._words[0])
        if len(looks) == 2:  # it says that it sleeps, and looks once more: the news comes right after that
            bell.ring()
        return len(looks) > 2

    assert bell.wait(ready, 60.0, wanted=2)
    assert (looks, bell._words[0]) == ([0, 2, 0], 0)


def test_a_wait_ends_at_its_limit(bell: Doorbell) -> None:
    assert not bell.wait(lambda: False, 0.0)
    assert not bell.wait(lambda: False, 0.01, spin_ns=1_000)


def test_spinning_finds_news_without_a_ring(bell: Doorbell) -> None:
    asleep: list[int] = []

    def ready() -> bool:
        asleep.append(bell._words[0])
        return len(asleep) == 5

    assert bell.wait(ready, spin_ns=60_000_000_000)
    assert asleep == [0] * 5


def test_another_thread_wakes_the_sleeper(bell: Doorbell) -> None:
    news = threading.Event()

    def bring() -> None:
        news.set()
        bell.ring()

    timer = threading.Timer(0.02, bring)
    timer.start()
    assert bell.wait(news.is_set, 60.0)
    timer.join()


def test_news_that_are_not_wanted_wake_nobody(bell: Doorbell) -> None:
    bell.fall_asleep(1)
    bell.ring(2)
    assert not bell.sleep(0.01)
    bell.ring(1)
    assert bell.sleep(60.0)
    bell.wake_up()


def test_a_doorbell_that_is_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        Doorbell(f"{name}-none", memoryview(array("Q", [0])), 0)
