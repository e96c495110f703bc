"""Learns what batches of a model cost, on the running server: so many requests at a time that each batch is full."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from wsgi_ts.errors import ServerError
from wsgi_ts.tune.generator import Generator, Measurement
from wsgi_ts.tune.prediction import Curve, noise_of
from wsgi_ts.tune.served_model import ServedModel, Setting

#: A batch that is not full waits so long for a request that was lost, in milliseconds.
_WAIT_MS = 3000
#: So many batches are wanted of each size, within so many seconds at least and at most; and so many at any rate.
_BATCHES, _FEWEST_BATCHES = 25, 6
_SHORTEST_S, _LONGEST_S = 0.6, 2.0
#: A larger batch is of use where it serves at least so much more than the one before.
LEAST_GAIN = 1.03
#: Of the requests at most this part may fail.
MOST_FAILED = 0.02


class Refused(Exception):
    """The model does not answer the sample with 200; the message says what it answers."""


@dataclass(frozen=True)
class Sample:
    """What was measured of batches of one size: the seconds that one takes, and the latencies of its requests."""

    size: int
    seconds: float
    latencies_s: list[float]


@dataclass
class Learner:
    """Measures batches.

    Attributes:
        model: the model, on trial.
        longest_s: batches that take longer are of no interest.
        largest: nor are larger ones.
        tell: is told each thing that was found out.
        warnings: what makes the figures doubtful.
    """

    model: ServedModel
    generator: Generator
    longest_s: float
    largest: int
    tell: Callable[[str], None]
    warnings: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Asks once.

        Raises:
            Refused: the answer is not 200.
        """
        found = self.generator.clients(1, 0.2, 0.0)
        if found.failed or not found.latencies_s:
            raise Refused(found.refusal or "no answer within half a minute")

    def curve(self, workers: int, threads: int, sizes: list[int] | None = None) -> Curve:
        """What batches cost while so many workers are busy.

        Of `sizes`, or (None) of 1, 2, 4 … as long as larger ones serve more.

        Raises:
            ServerError: a worker does not start.
            Refused: not even batches of one are answered.
        """
        wanted = sizes or [1 << power for power in range(self.largest.bit_length()) if 1 << power <= self.largest]
        # All of them ask at once in the beginning, and the queue refuses what it has no room for.
        room = self.model.facts["job_queue_size"] // workers
        if wanted[-1] > room:
            told = (
                f"jobQueueSize {self.model.facts['job_queue_size']} leaves no room for larger batches than were tried"
            )
            self.warnings.append(told)
            wanted = [size for size in wanted if size <= room] or [1]
        largest = wanted[-1]
        samples: list[Sample] = []
        for size in wanted:
            # The workers are started for the largest batch, so that the others need no new ones.
            if not samples:
                self._put(workers, threads, largest)
            try:
                sample = self._sample(workers, threads, size)
            except Refused as refused:
                if not samples:
                    raise
                self.warnings.append(f"batches of {size} are not answered ({refused}); no larger ones are tried")
                break
            samples.append(sample)
            self.tell(f"{workers} busy with batches of {size}: {sample.seconds * 1e3:.2f} ms")
            if sample.seconds > self.longest_s:
                break
            if sizes is None and len(samples) > 1 and not self._goes_on(samples[-2:]):
                break
        return _curve(workers, threads, samples)

    def _goes_on(self, last: list[Sample]) -> bool:
        """Whether batches twice as large are of interest, by what the last two sizes took."""
        smaller, larger = last
        serves_more = larger.size / larger.seconds > LEAST_GAIN * smaller.size / smaller.seconds
        return serves_more and larger.seconds + 2 * (larger.seconds - smaller.seconds) < 1.2 * self.longest_s

    def _put(self, workers: int, threads: int, batch_size: int) -> None:
        self.model.put(Setting(workers, threads, batch_size, "fixed", _WAIT_MS))

    def _sample(self, workers: int, threads: int, size: int) -> Sample:
        self._put(workers, threads, size)
        clients = workers * size
        # A first look tells how long to look.
        first = self.generator.clients(clients, 0.3, 0.1)
        _refuse_failures(first)
        usual_s = median(first.latencies_s)
        seconds = max(min(_LONGEST_S, max(_SHORTEST_S, _BATCHES * usual_s)), _FEWEST_BATCHES * usual_s)
        before = self.model.counts()
        found = self.generator.clients(clients, seconds, 0.1)
        after = self.model.counts()
        _refuse_failures(found)
        self.warnings += found.warnings
        batches = after["batches"] - before["batches"]
        requests = after["requests"] - before["requests"]
        if not batches:
            raise Refused("the server counted no batch")
        mean_size = requests / batches
        if mean_size < 0.9 * size:
            self.warnings.append(f"batches of {size} had {mean_size:.1f} requests: something else asks the model, too")
        return Sample(size, (after["service_s"] - before["service_s"]) / batches, found.latencies_s)


def _refuse_failures(found: Measurement) -> None:
    if not found.latencies_s or found.failed > MOST_FAILED * found.sent:
        raise Refused(found.refusal or "no answer")


def _curve(workers: int, threads: int, samples: list[Sample]) -> Curve:
    first = samples[0]
    overhead_s = max(0.0, median(first.latencies_s) - first.seconds)
    noise = tuple(noise_of(each.latencies_s, overhead_s) for each in samples)
    return Curve(workers, threads, tuple((each.size, each.seconds) for each in samples), overhead_s, noise)


def curves(learner: Learner, model: ServedModel, most_workers: int, longest_s: float, until: float) -> list[Curve]:
    """Learns one curve for each number of workers: twice as many as long as that serves more, and those of now.

    Batches that take longer than `longest_s` are of no interest. At `until` (monotonic seconds) it ends.

    Returns:
        The curves; the first one is that of the present number of workers, with all sizes of batches.
    """
    present = max(1, model.present.workers)
    first = learner.curve(present, model.present.threads or model.threads_for(present))
    found = [first]
    if first.sizes[0][1] > longest_s:
        return found  # more workers make no answer faster
    largest = max((size for size, seconds in first.sizes if seconds <= longest_s), default=1)
    sizes = sorted({1, _middle(largest), largest})
    for step in (2, 0.5):
        workers, best = int(present * step), first
        while 1 <= workers <= most_workers and time.monotonic() < until:
            try:
                curve = learner.curve(workers, model.threads_for(workers), sizes)
            except (ServerError, Refused) as error:
                reason = error.message if isinstance(error, ServerError) else error
                learner.warnings.append(f"{workers} workers cannot be tried: {reason}")
                break
            found.append(curve)
            if step > 1 and _most(curve) < 1.1 * _most(best):
                break
            best = curve
            workers = int(workers * step)
    best = max(found, key=_most)
    if best.threads > 1 and time.monotonic() < until:
        found.append(learner.curve(best.workers, 1, sizes))
    return found


def _middle(largest: int) -> int:
    return int(2 ** (largest.bit_length() // 2)) if largest > 2 else 1


def _most(curve: Curve) -> float:
    return max(curve.capacity(size) for size, _ in curve.sizes)
