"""Recorded requests asked again of a handler, their answers compared with those of then."""

from __future__ import annotations

from collections.abc import Sequence

from wsgi_ts.handler_kit.local_model import LocalModel
from wsgi_ts.handler_kit.report import Report
from wsgi_ts.handlers.serving.recording import RecordedRequest

#: How much of two answers that differ is shown.
SHOWN_CHARS = 200


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
