"""`wsgi-ts tune`: the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from wsgi_ts.cgroup import usable_cores
from wsgi_ts.control.client import ControlPlane, NotReachable
from wsgi_ts.errors import ServerError
from wsgi_ts.handlers.serving.recording import RecordedRequest, named_requests, read_recording
from wsgi_ts.run_files import default_run_dir
from wsgi_ts.settings.config import Config
from wsgi_ts.tune import report
from wsgi_ts.tune.generator import Generator, LoadError
from wsgi_ts.tune.learning import Learner, Refused, curves
from wsgi_ts.tune.objective import Objective, parse_objective
from wsgi_ts.tune.prediction import Curve, best_rate
from wsgi_ts.tune.progress import Progress
from wsgi_ts.tune.report import Result
from wsgi_ts.tune.search import FINALISTS, LIGHT_LOADS, Candidate, Point, Verifier, candidates
from wsgi_ts.tune.served_model import NoServer, ServedModel, Setting, read_config, read_token, target

#: Exit status where nothing runs, as `wsgi-ts status` has it; and after a Ctrl-C.
EXIT_NOT_RUNNING = 3
EXIT_INTERRUPTED = 130
#: Parts of the time: learning ends after the first, predicting after the second.
_LEARN_UNTIL, _PREDICT_UNTIL = 0.4, 0.55


class TuneError(Exception):
    """Nothing can be tuned; the message says why and what to do."""


def main(arguments: Sequence[str]) -> int:
    """Runs `wsgi-ts tune` with the words behind it.

    Returns:
        The exit status: 1 where nothing was found, 3 where nothing runs, 130 after a Ctrl-C. Wrong flags end with 2.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    run_dir = Path(os.path.abspath(options.run_dir)) if options.run_dir else default_run_dir()
    try:
        objective = parse_objective(options.slo)
        samples = _samples(options)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    try:
        with _signals(_interrupt, signal.SIGTERM, signal.SIGHUP):  # as a Ctrl-C, so that everything is put back
            return _tune(options, run_dir, objective, samples)
    except (NoServer, NotReachable):
        print(f"Not running: nothing answers in {run_dir}.", file=sys.stderr)
        return EXIT_NOT_RUNNING
    except ServerError as error:
        print(error.message, file=sys.stderr)
    except (TuneError, LoadError) as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted; everything is as before.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 1


def _tune(options: argparse.Namespace, run_dir: Path, objective: Objective, samples: list[RecordedRequest]) -> int:
    config = read_config(run_dir)
    if config.embedded_in is not None:
        raise TuneError(
            f"The server in {run_dir} is an engine of process {config.embedded_in} and opens no address that could be "
            "asked: tune the model on a server of its own, and take over what its model-config.yaml is to say."
        )
    cores = usable_cores()
    until = time.monotonic() + options.minutes * 60
    with closing(ControlPlane(run_dir)) as control:
        model = ServedModel(control, options.model, options.model_version, cores)
        keep = False
        try:
            if model.unfit:
                raise TuneError(model.unfit)
            there = target(config, model, samples, read_token(config, options.token))
            with Generator(there, cores) as generator, Progress(options.minutes * 60, sys.stderr) as progress:
                session = Session(model, generator, objective, progress, until, options)
                result = session.run()
            _show(result, session, options, run_dir)
            if options.apply and result.chosen is not None:
                model.put(session.as_kept(result.chosen.setting))
                keep = True
        finally:
            # Putting things back is not ended by a second Ctrl-C.
            with _signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                model.end(keep=keep)
        if result.chosen is None:
            return 1
        print("\n".join(_changes(config, model, session, result.chosen, kept=keep)))
        return 0


class Session:
    """One tuning, from learning to the choice."""

    def __init__(
        self,
        model: ServedModel,
        generator: Generator,
        objective: Objective,
        progress: Progress,
        until: float,
        options: argparse.Namespace,
    ) -> None:
        self._model = model
        self._generator = generator
        self._objective = objective
        self._progress = progress
        self._begun, self._until = time.monotonic(), until
        self._options = options
        self.present = model.present
        self.curves: list[Curve] = []

    def run(self) -> Result:
        """Learns, predicts, measures and chooses.

        Raises:
            TuneError: the model does not answer the sample.
        """
        model, objective, progress = self._model, self._objective, self._progress
        progress.stage("Learning what batches cost")
        learner = Learner(model, self._generator, objective.longest_s, self._options.max_batch_size, progress.tell)
        if not self.present.workers:
            raise TuneError(f"{model.name} has no workers: scale it first.")
        try:
            learner.check()
            self.curves = curves(learner, model, self._most_workers(), objective.longest_s, self._at(_LEARN_UNTIL))
        except Refused as error:
            raise TuneError(
                f"The server answers the sample with {error}\nNothing was tuned: --input FILE names a request that the "
                "model answers, --type its content type."
            ) from error
        result = Result(model.name, model.version, objective, self.present, self._present_point(), self.curves[0])
        progress.stage("Predicting")
        found = candidates(self.curves, self.present, objective, progress.tell, self._at(_PREDICT_UNTIL))
        progress.stage("Measuring")
        verifier = Verifier(model, self._generator, objective, self._until, progress.tell)
        self._verify(result, verifier, found)
        result.points = verifier.points
        result.warnings = list(dict.fromkeys([*learner.warnings, *verifier.warnings]))
        return result

    def _verify(self, result: Result, verifier: Verifier, found: list[Candidate]) -> None:
        present = self._present_candidate()
        tried = [each for each in found if each.setting != present.setting][:FINALISTS]
        best: list[tuple[Point, Candidate]] = []
        # What holds now comes second: where the time is short, the best is what matters.
        for candidate in [*tried[:1], present, *tried[1:]]:
            if not candidate.predicted:
                continue
            point = verifier.verify(candidate)
            if point is not None:
                best.append((point, candidate))
                if candidate is present:
                    result.before = point
        if not best:
            return
        most = max(point.goodput for point, _ in best)
        # Of those that serve about the same, the one that takes less.
        point, chosen = min(
            (each for each in best if each[0].goodput >= 0.95 * most),
            key=lambda each: (each[1].setting.workers, -each[0].goodput),
        )
        result.chosen, result.curve = point, chosen.curve
        self._model.put(chosen.setting)
        for part in LIGHT_LOADS:
            if verifier.has_time(part * point.rate):
                verifier.measure(chosen, part * point.rate)

    def _present_candidate(self) -> Candidate:
        curve = self.curves[0]
        setting = self._present_point()
        known = replace(setting, batch_size=min(setting.batch_size, curve.largest))
        return Candidate(setting, curve, best_rate(curve, known, self._objective))

    def _present_point(self) -> Setting:
        return replace(self.present, threads=self.curves[0].threads)

    def _most_workers(self) -> int:
        given: int | None = self._options.max_workers
        limit: int | None = self._model.facts["most_workers"]
        most = given or max(2 * usable_cores(), self.present.workers)
        return most if limit is None else min(most, limit)

    def _at(self, part: float) -> float:
        return self._begun + part * (self._until - self._begun)

    def as_kept(self, setting: Setting) -> Setting:
        """A setting as it is written down: threads as the server shares them out need no number."""
        shared = setting.threads == self._model.threads_for(setting.workers)
        return replace(
            setting, threads=self.present.threads if shared and not self.present.threads else setting.threads
        )


def _show(result: Result, session: Session, options: argparse.Namespace, run_dir: Path) -> None:
    saved = report.save(result, run_dir)
    print("\n".join(report.lines(result)))
    if result.points:
        print("\n".join(["", *report.table(result), "", *report.plot(result)]))
    for warning in result.warnings:
        print(f"Warning: {warning}.")
    print(f"Figures: {saved}")
    if result.points:
        print(report.write_png(result, Path(options.plot)))
    if result.chosen is None:
        print(report.nearest(result, session.curves), file=sys.stderr)


def _changes(config: Config, model: ServedModel, session: Session, chosen: Point, *, kept: bool) -> Iterator[str]:
    """What a model-config.yaml would say, and where what holds now lives."""
    keys = report.new_keys(session.present, session.as_kept(chosen.setting))
    if not keys:
        yield "The present settings serve most: there is nothing to change."
        return
    yield ""
    yield from report.config_diff(model.facts["config_name"], model.facts["config_text"], keys)
    yield ""
    if not kept:
        yield "Nothing was changed; --apply has the running server keep this."
        return
    workflow, snapshots = model.facts["workflow"], config.log_dir / "config"
    lives = f"and its newest snapshot in {snapshots}, from which the next start without a configuration file goes on"
    if workflow:
        lives = f"alone: what is to stay belongs into the specification of the workflow {workflow}"
    elif config.no_config_snapshots:
        lives = "alone (--no-config-snapshots), as long as it runs"
    yield f"Applied, without a restart. The settings live in the running server {lives}."
    archive, name = model.facts["url"], model.facts["config_name"]
    yield f"{archive} is as it was: put the lines above into its {name} to have them there, too."


def _samples(options: argparse.Namespace) -> list[RecordedRequest]:
    """The requests that the command line names.

    Raises:
        ValueError: none, or one that makes no sense.
        OSError: a file cannot be read.
    """
    samples = named_requests(options.input, options.data, options.header, options.type)
    for name in options.recording:
        samples += read_recording(Path(name))
    if not samples:
        raise ValueError("name at least one request: --input FILE, --data JSON or --recording FILE")
    return samples


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers, *numbers: int) -> Iterator[None]:
    """Has another handler for some signals."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsgi-ts tune",
        description="Finds the settings of a model that serve most within a latency goal, on the running server.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model, on a running server")
    add("--model-version", metavar="VERSION", help="default: the default version")
    slo_help = "limits of the latency: p50, p99.9, avg, max; several behind commas"
    add("--slo", action="append", required=True, metavar="p99=50ms", help=slo_help)
    add("--minutes", type=_positive, default=3.0, help="how long it may take (default: 3)")
    add("--input", action="append", default=[], metavar="FILE", help="a request's body; several are sent in turn")
    add("--data", action="append", default=[], metavar="JSON", help="a request's body, of JSON")
    add("--type", metavar="TYPE", help="content type of --input; default: by the file's name")
    add("--header", action="append", default=[], metavar="'Name: value'", help="a header of --input and --data")
    add("--recording", action="append", default=[], metavar="FILE", help="requests that `handler: record` has written")
    add("--max-workers", type=_count, metavar="N", help="try no more workers; default: two per core")
    add("--max-batch-size", type=_count, default=64, metavar="N", help="try no larger batches (default: 64)")
    add("--apply", action="store_true", help="keep what was found, in the running server")
    add("--plot", default="tune.png", metavar="FILE", help="where the picture goes (default: tune.png)")
    add("--token", metavar="KEY", help="the inference key; default: that of key_file.json here")
    add("--run-dir", metavar="DIR", help="the instance's run directory")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1024:
        raise ValueError
    return value
