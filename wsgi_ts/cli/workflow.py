"""`wsgi-ts workflow`: looks at a workflow, draws it and runs it, without a server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from wsgi_ts.errors import InvalidDag, ServerError
from wsgi_ts.workflows.source import Source, SourceError, open_source

_FILE_HELP = "the .war file, the directory of one that was unpacked, or the YAML file"


def run_workflow_command(arguments: Sequence[str]) -> int:
    """Runs one of the commands, by the command line behind `wsgi-ts workflow`.

    Returns the exit status: 0; 1 where the workflow or the command has failed. Wrong flags end with 2.
    """
    words = list(arguments)
    if words[:1] == ["run"]:
        # It loads handlers and torch, which no command here may import.
        os.execv(sys.executable, [sys.executable, "-m", "wsgi_ts.workflows.run", *words[1:]])
    options = workflow_parser().parse_args(words)
    try:
        with open_source(options.file, options.handler) as source:
            return _check(source, options) if options.command == "check" else _show(source, options)
    except SourceError as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:
        # Who read has seen enough; nothing is left to be flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def workflow_parser() -> argparse.ArgumentParser:
    """The flags of the commands."""
    parser = argparse.ArgumentParser(prog="wsgi-ts workflow", description="Looks at a workflow without a server.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="say what is wrong with it; exit status 1 if anything FAILs")
    check.add_argument("--model-store", type=Path, metavar="DIR", help="where the archives of its models are")
    check.add_argument("--strict", action="store_true", help="exit status 1 for a WARN as well")
    show = commands.add_parser("show", help="draw its graph")
    show.add_argument("--svg", metavar="PICTURE", help="write a picture; - for standard output")
    show.add_argument("--theme", choices=("auto", "light", "dark"), default="auto", help="colours of the picture")
    for command in (check, show):
        command.add_argument("file", type=Path, metavar="WORKFLOW", help=_FILE_HELP)
        command.add_argument("--handler", type=Path, metavar="FILE", help="the functions, for a YAML file")
    commands.add_parser("run", help="run it on one request, without a server")
    return parser


def _check(source: Source, options: argparse.Namespace) -> int:
    from wsgi_ts.workflows.check import check_workflow

    bad = ("FAIL", "WARN") if options.strict else ("FAIL",)
    status = 0
    for finding in check_workflow(source, options.model_store):
        print(finding, flush=True)
        status = 1 if finding.level in bad else status
    return status


def _show(source: Source, options: argparse.Namespace) -> int:
    from wsgi_ts.workflows.compile import compile_workflow
    from wsgi_ts.workflows.drawing import draw, table
    from wsgi_ts.workflows.longest import longest
    from wsgi_ts.workflows.spec import parse_spec
    from wsgi_ts.workflows.svg import svg

    try:
        spec = parse_spec(source.spec_text, source.spec_name)
        graph = compile_workflow(source.name, spec).graph
    except ServerError as error:
        where = error.where if isinstance(error, InvalidDag) and not error.message.startswith(error.where) else ""
        print(f"{where or source.name}: {error.message}" if where else error.message, file=sys.stderr)
        return 1
    if options.svg is None:
        encoding = (sys.stdout.encoding or "").lower()
        print(f"{draw(spec, ascii_only=not encoding.startswith('utf'))}\n\n{table(spec)}\n\n{longest(graph)}")
        return 0
    picture = svg(spec, source.name, theme=options.theme)
    if options.svg == "-":
        # Without an encoding of its own it is taken for UTF-8, which the terminal need not write.
        sys.stdout.write(picture.encode("ascii", "xmlcharrefreplace").decode())
        return 0
    try:
        Path(options.svg).write_text(picture, encoding="utf-8")
    except OSError as error:
        print(f"{options.svg}: {error.strerror}", file=sys.stderr)
        return 1
    return 0
