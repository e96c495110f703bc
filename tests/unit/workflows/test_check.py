"""`wsgi-ts workflow check` and `show`: findings with their places, exit statuses, pictures."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from wsgi_ts.archiver import WorkflowArchiveRequest, create_workflow_archive
from wsgi_ts.cli.commands import wsgi_ts
from wsgi_ts.workflows import check as check_module

SPEC = """models:
  max-workers: 2
  m: {url: m.mar}
dag:
  pre: [m]
  m: [post]
"""
HANDLER = "def pre(data, context): return data\ndef post(data, context): return data\n"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.yaml").write_text(SPEC)
    (tmp_path / "flow.py").write_text(HANDLER)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "m.mar").write_bytes(bytes(2_000_000))
    return tmp_path


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    status = wsgi_ts(["workflow", "check", *arguments])
    out, err = capsys.readouterr()
    return status, (out + err).splitlines()


def pack(work: Path, handler: str | None = "flow.py") -> str:
    request = WorkflowArchiveRequest("flow", "flow.yaml", handler, export_path=str(work), force=True)
    return str(create_workflow_archive(request))


def test_a_workflow_without_fault(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "OK    processes: 3 nodes: 2 model workers, and one process for 2 functions"
    assert checked(capsys, "flow.yaml", "--handler", "flow.py") == (0, [text])
    stored = f"{text}; each worker loads its model: 4.0 MB of files in all"
    assert checked(capsys, pack(work), "--model-store", "store", "--strict") == (0, [stored])


def findings(capsys: pytest.CaptureFixture[str], spec: str, *arguments: str) -> list[str]:
    Path("flow.yaml").write_text(spec)
    status, lines = checked(capsys, "flow.yaml", "--handler", "flow.py", *arguments)
    assert status == int(any(line.startswith("FAIL") for line in lines))
    return [line for line in lines if not line.startswith("OK    processes")]


def test_the_delay_of_torchserves_documentation(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = """models:
  batch-size: 3
  max-batch-delay: 5000
  timeout-ms: 5000
  m: {url: m.mar}
  n: {url: m.mar}
  o: {url: m.mar, max-batch-delay: 50}
  p: {url: m.mar, batch-size: 1}
dag: {pre: [m], m: [n], n: [o], o: [p], p: [post]}
"""
    [line] = findings(capsys, spec)
    assert line.startswith("WARN  flow.yaml:3: m, n: max-batch-delay 5000 ms is not below timeout-ms 5000 ms. ")
    assert wsgi_ts(["workflow", "check", "--strict", "flow.yaml", "--handler", "flow.py"]) == 1


@pytest.mark.parametrize(
    ("spec", "lines"),
    [
        ("models: [", ["FAIL  flow.yaml:1: expected the node content, but found '<stream end>'"]),
        ("models: {}\ndag: {pre: [pre]}", ["FAIL  flow.yaml:2: Self loop exception"]),
        ("models: {}\ndag: {pre: 5}", ["FAIL  flow.yaml:2: key dag.pre: 5 is not a list of nodes"]),
        ("models: {}", ["FAIL  flow.yaml: the section dag is missing"]),
        (
            "models:\n  m: {url: m.mar}\n  spare: {url: m.mar}\ndag: {pre: [m]}",
            ["WARN  flow.yaml:3: the graph does not name spare: it is not loaded. Add it to dag, or remove it"],
        ),
        (
            "models:\n  m: {url: m.mar, batch-sise: 4}\n  batch-size: 2\ndag: {pre: [m]}\nnotes: 5",
            [
                "WARN  flow.yaml:2: key models.m.batch-sise is unknown and ignored; there are url, min-workers, "
                "max-workers, batch-size, max-batch-delay, retry-attempts, timeout-ms",
                "WARN  flow.yaml:3: batch-size does not count for m, which stands before it: put it in front of the "
                "models",
                "WARN  flow.yaml:5: section notes is unknown and ignored",
            ],
        ),
        (
            "models: {}\ndag:\n  pre: [post]\n  pre: [post]",
            ["WARN  flow.yaml:4: key dag.pre stands in line 3 too: that one does not count"],
        ),
        (
            "models: {}\ndag:\n  pre: [absent]\n",
            ["FAIL  flow.yaml:3: node absent: flow.py has no function absent, and models has no model of that name"],
        ),
        (
            "models: {}\ndag: {pre: [post]}\noptions:\n  nodes:\n    post: {when: is_dog}",
            [
                "FAIL  flow.yaml:5: when of node post: flow.py has no function is_dog, and models has no model of that "
                "name"
            ],
        ),
        (
            "models:\n  m: {url: none.mar}\n  n: {}\n  o: {url: m.mar, max-workers: 0}\n"
            "  p: {url: m.mar, min-workers: 3}\ndag: {pre: [m, n, o, p]}",
            [
                "FAIL  flow.yaml:4: o: max-workers 0 starts no worker: every request fails",
                "WARN  flow.yaml:5: p: min-workers 3 is above max-workers 1, and ignored",
                "FAIL  flow.yaml:2: m: none.mar is not in the model store store",
                "FAIL  flow.yaml:3: n has no url: no model can be loaded",
                "OK    flow.yaml:6: the leaves m, n, o, p answer together: each has to answer with a JSON object",
            ],
        ),
        (
            f"models: {{m: {{url: {'y' * 300}}}}}\ndag: {{pre: [m]}}",
            [f"FAIL  flow.yaml:1: m: {'y' * 300} is not in the model store store"],
        ),
        ("models: {}\ndag: {pre: [2020-99-99]}", ["FAIL  flow.yaml:2: month must be in 1..12"]),
        ("models: {}\ndag:\n  [pre]: []", ["FAIL  flow.yaml:3: a key that is a list or a mapping"]),
        (
            'models: {}\ndag:\n  pre: ["\\ud800"]',
            ["FAIL  flow.yaml:3: a text with half of a surrogate pair"],
        ),
        (
            "models: {m: {url: 'https://example.org/m9.mar'}}\ndag: {pre: [m], m: [n]}\n"
            "options: {nodes: {n: {model: minilm}}}",
            ["WARN  flow.yaml:3: n has no url: TorchServe takes it for a function. With a url it loads there too"],
        ),
    ],
)
def test_findings_name_file_and_line(
    work: Path, capsys: pytest.CaptureFixture[str], spec: str, lines: list[str]
) -> None:
    assert findings(capsys, spec, "--model-store", "store") == lines


def test_the_handler_file(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = work / "flow.py"
    handler.write_text("def pre(data, context): ...\n\ndef post(data): ...\n")
    expected = "FAIL  flow.py:3: post cannot be called as post(data, context), which node post is"
    assert findings(capsys, SPEC) == [expected]
    handler.write_text("class H:\n    def handle(self, data, context): ...\n")
    assert findings(capsys, "models: {}\ndag: {pre: []}") == [
        "WARN  flow.yaml:2: node pre: flow.py has no function pre; the method handle of its one class is used"
    ]
    handler.write_text("def pre(:")
    assert findings(capsys, SPEC) == ["FAIL  flow.py:1: no Python: invalid syntax"]
    handler.unlink()
    assert findings(capsys, SPEC) == ["FAIL  flow.py: the handler cannot be read: No such file or directory"]


def test_an_archive_without_handler(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(capsys, pack(work, None))[1][:2] == [
        "WARN  flow.yaml: the archive names no handler: TorchServe refuses it (500)",
        "FAIL  flow.yaml:5: pre is a function, but no handler is given",
    ]
    assert checked(capsys, "flow.yaml")[0] == 0


def test_more_models_than_memory(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type("Memory", (), {"total": 3_000_000})
    monkeypatch.setattr(check_module.psutil, "virtual_memory", lambda: memory)
    (work / "store" / "m.mar").unlink()
    (work / "store" / "m.mar").mkdir()
    (work / "store" / "m.mar" / "weights").write_bytes(bytes(2_000_000))
    status, lines = checked(capsys, "flow.yaml", "--handler", "flow.py", "--model-store", "store")
    assert status == 0 and lines[-1].startswith("WARN  processes: ")
    assert lines[-1].endswith("4.0 MB of files in all, and this machine has 3.0 MB of memory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.war"], "none.war: No such file or directory"),
        (["none.yaml"], "none.yaml: No such file or directory"),
        (["store"], "store: Workflow name is not defined."),
        (["flow.py"], "flow.py: Workflow archive is neither zip nor tar.gz."),
        (["store", "--handler", "flow.py"], "--handler goes with a YAML file; an archive names its own"),
    ],
)
@pytest.mark.parametrize("command", ["check", "show"])
def test_what_is_no_workflow(
    work: Path, capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], message: str
) -> None:
    assert wsgi_ts(["workflow", command, *arguments]) == 1
    assert capsys.readouterr() == ("", message + "\n")


def test_a_graph_is_shown(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wsgi_ts(["workflow", "show", "flow.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pre ───▶ m ───▶ post"
    assert lines[3:] == [
        "pre   function           1             2         10000 ms",
        "m     m.mar     2        1      50 ms  2         10000 ms",
        "post  function           1             2         10000 ms",
        "",
        "a request is answered within 60 s, all attempts of pre, m, post",
    ]
    (work / "flow.yaml").write_text("models: {}\ndag: {pre: [pre]}")
    assert wsgi_ts(["workflow", "show", "flow.yaml"]) == 1
    assert capsys.readouterr() == ("", "flow.yaml:2: Self loop exception\n")
    (work / "flow.yaml").write_text("models: {}\ndag: {pre: 5}")
    assert wsgi_ts(["workflow", "show", "flow.yaml"]) == 1
    assert capsys.readouterr().err == "flow.yaml:2: key dag.pre: 5 is not a list of nodes\n"


def test_a_picture_is_drawn(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "flow.yaml").write_text(
        SPEC.replace("m: [post]", "m: [post, 'a<b']\n  post: [end]\n  'a<b': [end]")
        + "options: {nodes: {post: {when: is_dog}, end: {model: minilm/2.0, pass: [request]}}}"
    )
    assert wsgi_ts(["workflow", "show", pack(work), "--svg", "picture.svg"]) == 0
    text = (work / "picture.svg").read_text()
    assert "prefers-color-scheme: dark" in text
    root = ET.fromstring(text)
    shown = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for part in ("a<b", "2 workers", "when is_dog", "uses minilm 2.0", "request", "answer"):
        assert part in shown
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 5
    for theme in ("light", "dark"):
        assert wsgi_ts(["workflow", "show", "flow.yaml", "--svg", "-", "--theme", theme]) == 0
        picture = capsys.readouterr().out
        assert "prefers-color-scheme" not in picture and "var(" not in picture
        ET.fromstring(picture)
    assert wsgi_ts(["workflow", "show", "flow.yaml", "--svg", "none/picture.svg"]) == 1
    assert capsys.readouterr().err == "none/picture.svg: No such file or directory\n"


def test_a_terminal_that_lacks_letters(work: Path) -> None:
    (work / "flow.yaml").write_text("models: {}\ndag: {prüfen: [日本]}", encoding="utf-8")
    code = "import sys; from wsgi_ts.cli.commands import wsgi_ts; sys.exit(wsgi_ts())"

    def told(*words: str) -> bytes:
        command = [sys.executable, "-c", code, "workflow", *words, "flow.yaml"]
        environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    assert told("show").startswith(b"pr\xfcfen ---> \\u65e5\\u672c\n")
    assert b"pr\xfcfen is a function, but no handler is given" in told("check")
    picture = ET.fromstring(told("show", "--svg", "-"))
    assert "日本" in "".join(picture.itertext())


def test_who_reads_may_have_seen_enough(work: Path) -> None:
    spec = "models: {}\ndag:\n" + "".join(f"  {number:0200}: [{number + 1:0200}]\n" for number in range(1000))
    spec = spec.replace("  ", "  x").replace("[", "[x")  # else they would be numbers
    (work / "long.yaml").write_text(spec)
    code = "import sys; from wsgi_ts.cli.commands import wsgi_ts; sys.exit(wsgi_ts(['workflow', 'check', 'long.yaml']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    child.wait(60)
    assert errors == b""


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["check"], ["paint", "x"], ["show", "x", "--theme", "pink"]):
        with pytest.raises(SystemExit, match="2"):
            wsgi_ts(["workflow", *words])
    assert "usage: wsgi-ts workflow" in capsys.readouterr().err
