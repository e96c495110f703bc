"""What a server asks of a handler, tried on its author's own samples, and recorded requests asked of it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wsgi_ts.handler_kit.local_model import BatchRun, LocalModel
from wsgi_ts.handlers.serving.inputs import BadInput
from wsgi_ts.handlers.serving.recording import RecordedRequest

#: Sizes of the batches that are tried, and timed.
BATCHES = (1, 2, 4, 8)
#: The fastest of so many calls is the time of a batch.
ROUNDS = 5
#: A body that no handler expects, under the sample's own content type.
_GARBAGE = b"\x00\xff not what you expect"
#: How much of two answers that differ is shown by `replay`.
SHOWN_CHARS = 200


@dataclass(slots=True)
class Report:
    """Lines for people, and whether all is well.

    Attributes:
        lines: what was found, each begun with OK, WARN or FAIL.
        is_good: false once something has failed.
    """

    lines: list[str] = field(default_factory=list)
    is_good: bool = True

    def ok(self, text: str) -> None:
        """Notes what is as it should be."""
        self.lines.append(f"OK    {text}")

    def warn(self, text: str) -> None:
        """Notes what works, but not as its author may think."""
        self.lines.append(f"WARN  {text}")

    def fail(self, text: str) -> None:
        """Notes what is wrong."""
        self.lines.append(f"FAIL  {text}")
        self.is_good = False


def check(model: LocalModel, samples: Sequence[RecordedRequest]) -> Report:
    """Tries a loaded handler on requests that it should answer, at least one.

    Returns:
        What was found: each sample alone, all in one batch with the same answers, what batches cost, and whether a bad
        request fails those beside it.

    Raises:
        BadInput: a sample's body is not what its content type says.
    """
    report = Report()
    alone = [_answers_of(model.run([sample]))[0] for sample in samples]
    for number, (status, body) in enumerate(alone, start=1):
        say = report.ok if 200 <= status < 300 else report.fail
        say(f"sample {number} alone: {status}, {len(body)} bytes")
    if not report.is_good:
        return report
    _check_batch(model, samples, alone, report)
    _check_cost(model, samples, report)
    _check_bad_row(model, samples, report)
    return report


def _answers_of(run: BatchRun) -> list[tuple[int, bytes]]:
    return [(answer.status, run.body(row)) for row, answer in enumerate(run.answers)]


def _batch_of(samples: Sequence[RecordedRequest], size: int) -> list[RecordedRequest]:
    """The samples in turn, until there are enough."""
    return [samples[row % len(samples)] for row in range(size)]


def _check_batch(
    model: LocalModel, samples: Sequence[RecordedRequest], alone: Sequence[tuple[int, bytes]], report: Report
) -> None:
    """Compares what each sample is answered in a batch with what it was answered alone."""
    size = max(len(samples), BATCHES[1])
    together = _answers_of(model.run(_batch_of(samples, size)))
    failed = next((answer for answer in together if answer[0] >= 300), None)
    if failed is not None:
        report.fail(f"a batch of {size} is answered {failed[0]}: {failed[1].decode('utf-8', 'backslashreplace')}")
    elif any(answer != alone[row % len(alone)] for row, answer in enumerate(together)):
        report.warn(f"a batch of {size}: other bytes than alone (rounding, randomness, or rows that are mixed up)")
    else:
        report.ok(f"a batch of {size}: the same answers as alone")


def _check_cost(model: LocalModel, samples: Sequence[RecordedRequest], report: Report) -> None:
    """Says what a batch costs, and what batching would gain."""
    times = []
    for size in BATCHES:
        batch = _batch_of(samples, size)
        times.append(min(model.run(batch).seconds for _ in range(ROUNDS)) * 1000)
    shown = ", ".join(f"{size}: {milliseconds:.2f}" for size, milliseconds in zip(BATCHES, times, strict=True))
    gain = BATCHES[-1] * times[0] / times[-1]
    report.lines.append(
        f"      ms a batch of {shown}; a batch of {BATCHES[-1]} does {gain:.1f} times as much as single calls"
    )


def _check_bad_row(model: LocalModel, samples: Sequence[RecordedRequest], report: Report) -> None:
    """Says whether a request that the handler cannot read fails the others of its batch."""
    bad = RecordedRequest(samples[0].request, samples[0].headers, _GARBAGE)
    try:
        answers = _answers_of(model.run([samples[0], bad]))
    except BadInput:
        report.ok("a bad request never reaches the handler")
        return
    if answers[0][0] < 300:
        report.ok("a bad request leaves the others of its batch alone")
    else:
        report.warn(
            "a bad request fails the others of its batch, too: answer it by itself, with "
            "context.set_response_status(code, phrase, idx=row)"
        )


def replay(model: LocalModel, samples: Sequence[RecordedRequest], batch_size: int) -> Report:
    """Asks requests, recorded with or without the answers of then, again in their order, `batch_size` in one call.

    Returns:
        A line for each answer that differs, and one with the counts and the time.

    Raises:
        BadInput: a body is not what its content type says.
    """
    report = Report()
    seconds, same, compared = 0.0, 0, 0
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        run = model.run(batch)
        seconds += run.seconds
        for row, sample in enumerate(batch):
            if sample.status is None:
                continue
            compared += 1
            ours = run.answers[row].status, run.body(row)
            if ours == (sample.status, sample.answer):
                same += 1
            else:
                then = f"{sample.status} {_shown(sample.answer)}"
                report.fail(f"request {start + row + 1}: {ours[0]} {_shown(ours[1])}, then {then}")
    milliseconds = 1000 * seconds / len(samples)
    counts = f"{same} of {compared} answers are the same" if compared else "no answers to compare"
    report.lines.append(f"{len(samples)} requests, {milliseconds:.2f} ms each; {counts}")
    return report


def _shown(body: bytes) -> str:
    text = body.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…")
