"""The command lines: `torchserve`, as TorchServe has it, and `wsgi-ts` with what TorchServe lacks.

They import nothing heavy: whoever types them waits.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from wsgi_ts import TORCHSERVE_VERSION, __version__
from wsgi_ts.cli.start import start
from wsgi_ts.cli.stop import STOP_LIMIT_S, stop_instance, stop_server
from wsgi_ts.cli.upgrade import UPGRADE_LIMIT_S, upgrade
from wsgi_ts.run_files import default_run_dir
from wsgi_ts.settings.config import ConfigError
from wsgi_ts.settings.sources import CommandLine

#: The flags that TorchServe has.
_OF_TORCHSERVE = (
    *("--version", "--start", "--stop", "--ts-config", "--model-store", "--workflow-store", "--models", "--log-config"),
    *("--cpp-log-config", "--foreground", "--no-config-snapshots", "--ncs", "--plugins-path", "--ppath"),
    *("--disable-token-auth", "--dt", "--enable-model-api"),
)


def torchserve(arguments: Sequence[str] | None = None) -> int:
    """The `torchserve` command with `arguments`, by default those of this process; returns the exit status."""
    options = torchserve_parser().parse_args(arguments)
    _print_any_letter()
    if options.version:
        print(f"TorchServe Version is {TORCHSERVE_VERSION}")
        return 0
    try:
        if options.stop:
            return stop_server(default_run_dir(), wait=options.foreground)
        return start(_command_line(options), wait=options.foreground)
    except ConfigError as error:
        print(error)
        return 1


def wsgi_ts(arguments: Sequence[str] | None = None) -> int:
    """The `wsgi-ts` command; arguments and result as `torchserve`."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    _print_any_letter()
    if words and words[0] in ("llm", "handler", "tune", "workflow"):
        return _run_own(words[0], words[1:])
    options = _wsgi_ts_parser().parse_args(words)
    given = getattr(options, "run_dir", None)
    run_dir = Path(os.path.abspath(given)) if given else default_run_dir()
    try:
        return _run(options, run_dir)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


def _print_any_letter() -> None:
    """Has letters that the terminal's encoding lacks printed as escapes: names of models and nodes may have them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(options: argparse.Namespace, run_dir: Path) -> int:
    if options.command == "serve":
        return start(_command_line(options), wait=True)
    if options.command == "upgrade":
        return upgrade(_command_line(options), run_dir, limit_s=options.timeout)
    if options.command == "doctor":
        from wsgi_ts.cli.doctor import run_doctor, run_migration

        if options.migrate is not None:
            return run_migration(options.migrate, os.environ, as_json=options.json, strict=options.strict)
        flags = {"in_pod": options.k8s, "as_json": options.json, "strict": options.strict}
        return run_doctor(_command_line(options), os.environ, **flags)
    if options.command == "plugins":
        from wsgi_ts.cli.plugins import print_plugins

        return print_plugins(_command_line(options), run_dir, as_json=options.json)
    if options.command == "plugin":
        from wsgi_ts.cli.plugins import new_plugin

        return new_plugin(options.group, options.name, Path.cwd())
    if options.command == "explain":
        from wsgi_ts.cli.explain import explain

        return explain(run_dir, options.request_id, as_json=options.json)
    if options.command == "stop":
        return stop_instance(run_dir, fast=options.fast, limit_s=options.timeout)
    from wsgi_ts.cli.status import print_status

    return print_status(run_dir, as_json=options.json)


def _run_own(command: str, words: list[str]) -> int:
    """Runs a command that has flags of its own; each loads what only it needs."""
    if command == "llm":
        from wsgi_ts.llm_launcher import main as llm

        return llm(words, "wsgi-ts llm")
    if command == "handler":
        from wsgi_ts.handler_kit.commands import main as handler

        return handler(words)
    if command == "tune":
        from wsgi_ts.tune.commands import main as tune

        return tune(words)
    from wsgi_ts.cli.workflow import run_workflow_command

    return run_workflow_command(words)


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ts-config", metavar="FILE", help="configuration file (config.properties)")
    add("--model-store", metavar="DIR", help="directory of the model archives (here or in the file)")
    add("--workflow-store", metavar="DIR", help="directory of the workflow archives; default: the model store")
    add(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="models to load at startup: archive or name=archive, or the word all",
    )
    add(
        "--workflows",
        nargs="+",
        metavar="WORKFLOW",
        help="workflows to load at startup: archive or name=archive, or the word all",
    )
    add("--log-config", metavar="FILE", help="log configuration")
    add("--cpp-log-config", metavar="FILE", help="log configuration of the C++ backend (no effect)")
    add("--no-config-snapshots", "--ncs", action="store_true", help="neither write nor read snapshots")
    add("--log-format", choices=("text", "json"), help="json: one JSON object for each request (log_format)")
    add("--plugins-path", "--ppath", metavar="DIR", help="folders with plugins, separated by colons")
    add("--disable-token-auth", "--dt", action="store_true", help="answer requests without a token")
    add("--enable-model-api", action="store_true", help="allow registering and unregistering over the API")
    add("--drain-delay", metavar="SECONDS", help="after SIGTERM, serve on for so long, not ready (drain_delay)")
    add("--drain-timeout", metavar="SECONDS", help="then wait so long for requests under way (graceful_timeout)")


class _TorchServeParser(argparse.ArgumentParser):
    """Takes a flag's first letters for it where TorchServe, which has fewer flags, does."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads a command line, as its base class does."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_whole_flag(word) for word in words], namespace)


def _whole_flag(word: str) -> str:
    """Returns a flag of TorchServe whose first letters were given, which may be those of several here."""
    given, equals, value = word.partition("=")
    meant = [flag for flag in _OF_TORCHSERVE if flag.startswith(given)] if given.startswith("--") else []
    return f"{meant[0]}{equals}{value}" if len(meant) == 1 else word


def torchserve_parser() -> argparse.ArgumentParser:
    """The flags of the `torchserve` command."""
    parser = _TorchServeParser(prog="torchserve", description="Starts or stops the model server.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("-v", "--version", action="store_true", help="print the version")
    action.add_argument("--start", action="store_true", help="start the server (the default)")
    action.add_argument("--stop", action="store_true", help="stop the running server")
    _add_start_flags(parser)
    parser.add_argument("--foreground", action="store_true", help="wait until the server has exited")
    return parser


def _wsgi_ts_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wsgi-ts", description="Runs and examines the model server.")
    parser.add_argument("--version", action="version", version=f"wsgi-ts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="start a server and wait for its end")
    _add_start_flags(serve)
    serve.add_argument("--reload", action="store_true", help="replace a model's workers when its files change")
    stop = commands.add_parser("stop", help="stop the running server and wait for its end")
    stop.add_argument("--fast", action="store_true", help="do not wait for requests under way")
    stop.add_argument("--timeout", type=float, default=STOP_LIMIT_S, metavar="SECONDS", help="default: 60")
    replace = commands.add_parser("upgrade", help="put this version and configuration in a running server's place")
    _add_start_flags(replace)
    replace.add_argument("--timeout", type=float, default=UPGRADE_LIMIT_S, metavar="SECONDS", help="default: 600")
    status = commands.add_parser("status", help="show processes, models and workers")
    status.add_argument("--json", action="store_true", help="for programs")
    told = commands.add_parser("explain", help="tell the story of one slow or failed request")
    told.add_argument("request_id", metavar="REQUEST_ID", help="from the header x-request-id of its answer")
    told.add_argument("--json", action="store_true", help="for programs")
    plugins = commands.add_parser("plugins", help="show the plugins, and what is wrong with them")
    _add_start_flags(plugins)
    plugins.add_argument("--json", action="store_true", help="for programs")
    making = commands.add_parser("plugin", help="make a plugin").add_subparsers(required=True, metavar="ACTION")
    new = making.add_parser("new", help="write the files of a new plugin into a folder of its name")
    new.add_argument("group", choices=("endpoint",), help="what kind of plugin")
    new.add_argument("name", metavar="NAME", help="its name, such as model-ready")
    commands.add_parser("llm", help="serve one large language model without an archive")
    commands.add_parser("handler", help="write, run, check and replay a handler without a server")
    commands.add_parser("tune", help="find the settings of a model that serve most within a latency goal")
    commands.add_parser("workflow", help="check, draw or run a workflow without a server")
    doctor = commands.add_parser("doctor", help="check whether this machine can run the configuration")
    _add_start_flags(doctor)
    doctor.add_argument("--k8s", action="store_true", help="also what a pod of Kubernetes needs")
    doctor.add_argument(
        "--migrate",
        nargs="+",
        metavar="PATH",
        help="only: what will differ with a config.properties, an archive or a model store of TorchServe",
    )
    doctor.add_argument("--strict", action="store_true", help="warnings count as failures")
    doctor.add_argument("--json", action="store_true", help="for programs")
    for command in (serve, stop, replace, status, told, plugins, doctor):
        command.add_argument("--run-dir", metavar="DIR", help="the instance's run directory")
    return parser


def _command_line(options: argparse.Namespace) -> CommandLine:
    given = {each.name: getattr(options, each.name) for each in fields(CommandLine) if hasattr(options, each.name)}
    return CommandLine(**given)
