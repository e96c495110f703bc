"""Starting, filling and stopping a server from Python, as the tests of models do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.archives import archive
from support.http import request
from support.server import REPOSITORY, free_ports

SCRIPT = """
import sys
from wsgi_ts.launcher import register_model, start, stop

store, config, url = sys.argv[1:]
lines = start(store, config, True, disable_token=True, models="echo=echo.mar", enable_model_api=True)
reply = register_model("second", "echo.mar", management_url=url)
print("registered:", reply.status_code, reply.json()["status"])
again = register_model("second", "echo.mar", management_url=url)
print("again:", again.status_code, again.ok, again.reason, again.headers["Content-Type"], again.content[:1])
reply.raise_for_status()
try:
    again.raise_for_status()
except OSError as error:
    print("raised:", error)
print("ready", flush=True)
sys.stdin.readline()
stop()
while (line := lines.get(timeout=60)) is not None:
    pass
print("end of output")
"""


def test_a_servers_life(tmp_path: Path) -> None:
    archive(tmp_path, "echo")
    inference, management, metrics, *grpc = free_ports(5)
    config = tmp_path / "config.properties"
    ports = {"inference": inference, "management": management, "metrics": metrics}
    lines = [f"{api}_address=http://127.0.0.1:{port}\n" for api, port in ports.items()]
    lines += [f"grpc_{api}_port={port}\n" for api, port in zip(("inference", "management"), grpc, strict=True)]
    config.write_text("".join(lines))
    (tmp_path / "tmp").mkdir()
    # A directory for temporary files of its own: there `torchserve --stop` finds the server that it means.
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(config), f"http://127.0.0.1:{management}"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    output = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            output.append(line)
            if line == "ready\n":
                break
        assert 'registered: 200 Model "second" Version: 1.0 registered with 1 initial workers\n' in output, output
        assert "again: 409 False Conflict application/json b'{'\n" in output
        assert "raised: HTTP Error 409: Conflict\n" in output
        for model in ("echo", "second"):
            assert request(inference, "POST", f"/predictions/{model}", body="hello").text == "hello"
    finally:
        rest, _ = process.communicate("stop\n", timeout=300)
    assert "end of output" in rest
    assert process.returncode == 0
