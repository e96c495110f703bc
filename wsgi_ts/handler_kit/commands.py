"""`wsgi-ts handler new|run|test|replay`: the command lines of those who write handlers."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from wsgi_ts.errors import ServerError
from wsgi_ts.handler_kit.checks import check, replay
from wsgi_ts.handler_kit.local_model import BatchRun, LocalModel, Source, opened
from wsgi_ts.handler_kit.scaffold import KINDS, write_project
from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.serving.inputs import BadInput
from wsgi_ts.handlers.serving.recording import RecordedRequest, named_requests, read_recording

#: How much of an answer is printed.
SHOWN_BYTES = 2000


def main(arguments: Sequence[str]) -> int:
    """Runs `wsgi-ts handler …` with the words behind it.

    Returns:
        The exit status: 1 when the handler fails, an answer differs, or something named is not there.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    try:
        if options.command == "new":
            written = write_project(Path(options.folder), options.kind)
            print("\n".join(str(path) for path in written))
            return 0
        samples = _samples(options)
        source = Source(Path(options.model), options.serialized_file, options.model_file, options.config_file)
        with opened(source, options.gpu, getattr(options, "batch", None)) as model:
            if options.command == "run":
                return _run(model, samples, options.repeat)
            report = check(model, samples) if options.command == "test" else replay(model, samples, options.batch or 1)
            print("\n".join(report.lines))
            return 0 if report.is_good else 1
    except (ServerError, BadInput, OSError, ValueError) as error:
        print(error, file=sys.stderr)
    except LoadError as error:
        print(f"{options.model}: the handler could not be loaded: {error}", file=sys.stderr)
    return 1


def _run(model: LocalModel, samples: Sequence[RecordedRequest], repeat: int) -> int:
    """Calls the handler with all samples as one batch, and prints the answers of the last call."""
    runs = [model.run(samples) for _ in range(repeat)]
    last = runs[-1]
    for row, answer in enumerate(last.answers):
        print(f"[{row}] {answer.status} {answer.phrase}".rstrip())
        for name, value in answer.headers:
            print(f"    {name}: {value}")
        print(_shown(last.body(row)))
    print(_times(runs), file=sys.stderr)
    return 1 if any(answer.error for answer in last.answers) else 0


def _shown(body: bytes) -> str:
    text = body[:SHOWN_BYTES].decode("utf-8", "backslashreplace")
    return f"{text} … ({len(body)} bytes)" if len(body) > SHOWN_BYTES else text


def _times(runs: Sequence[BatchRun]) -> str:
    """Says how long the handler took: the first call, and the fastest of the others."""
    best = min(runs[1:] or runs, key=lambda run: run.seconds)
    count = len(best.answers)
    parts = [f"{name} {seconds * 1000:.2f}" for name, seconds in best.stages.items()]
    stages = f" ({', '.join(parts)})" if parts else ""
    first = f", first call {runs[0].seconds * 1000:.2f} ms" if len(runs) > 1 else ""
    return f"batch of {count}: {best.seconds * 1000:.2f} ms{stages}{first}"


def _samples(options: argparse.Namespace) -> list[RecordedRequest]:
    """Returns the requests that a command line names.

    Raises:
        ValueError: it names none, or a header without a colon.
        OSError: a file cannot be read.
    """
    if options.command == "replay":
        samples = list(read_recording(Path(options.recording)))
        if not samples:
            raise ValueError(f"{options.recording}: holds no request")
        return samples
    samples = named_requests(options.input, options.data, options.header, options.type)
    if not samples:
        raise ValueError("name at least one --input FILE or --data JSON: each is a request of the batch")
    return samples


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsgi-ts handler", description="Writes, runs and checks a handler without a server."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    new = commands.add_parser("new", help="write a handler, its test and its model-config.yaml into a folder")
    new.add_argument("folder", help="made if it is missing; files that are there are kept")
    new.add_argument(
        "--kind", choices=KINDS, default="base", help="base: torch, from BaseHandler; plain: no base class"
    )
    run = commands.add_parser("run", help="call the handler with one batch and print the answers")
    test = commands.add_parser("test", help="check a handler against what a server asks of it")
    replayed = commands.add_parser("replay", help="ask recorded requests again, and compare the answers")
    for command in (run, test, replayed):
        command.add_argument("model", help="a model archive, a model's folder, or a handler's file")
        command.add_argument("--serialized-file", metavar="FILE", help="weights beside a handler's file")
        command.add_argument("--model-file", metavar="FILE", help="architecture beside a handler's file")
        command.add_argument("--config-file", metavar="FILE", help="default: model-config.yaml beside it, if any")
        command.add_argument("--gpu", type=int, metavar="N", help="run on this GPU; default: on the CPU")
    for command in (run, test):
        command.add_argument("-i", "--input", action="append", default=[], metavar="FILE", help="body of a request")
        command.add_argument("-d", "--data", action="append", default=[], metavar="JSON", help="body of a request")
        command.add_argument("-H", "--header", action="append", default=[], metavar="HEADER", help="'Name: value'")
        command.add_argument("--type", metavar="TYPE", help="content type; default: by the file's suffix, JSON for -d")
    run.add_argument("--repeat", type=_count, default=1, metavar="N", help="call it so often, for the times")
    replayed.add_argument("recording", help="a file of requests, as `handler: record` in model-config.yaml writes it")
    replayed.add_argument("--batch", type=_count, default=None, metavar="N", help="requests in one call; default: 1")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number
