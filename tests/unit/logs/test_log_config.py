"""Users' log configurations: what they become, and what is said of mistakes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from support.log4j2 import LOG4J2
from support.logs import logging_to

from wsgi_ts.logs.notation import LogConfigError, substitute
from wsgi_ts.logs.plan import LogPlan
from wsgi_ts.logs.user_config import load_plan, log4j_file


def plan_of(folder: Path, text: str, name: str = "logging.yaml", **environ: str) -> LogPlan:
    path = folder / name
    path.write_text(text)
    return load_plan(folder, folder, path, {"LOG_LOCATION": str(folder), **environ})


def error_of(folder: Path, text: str, name: str) -> str:
    with pytest.raises(LogConfigError) as caught:
        plan_of(folder, text, name)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}:")
    assert "\n" not in message
    return message.removeprefix(f"{folder / name}:")


PROPERTIES = r"""
# A comment.
status = warn
appenders = console, file
property.folder = ${env:LOG_LOCATION:-logs}
appender.console.type = Console
appender.console.name = STDOUT
appender.console.layout.type = PatternLayout
appender.console.layout.pattern : CUSTOM %p %c - %m%n
appender.file.type = RollingFile
appender.file.name = FILE
appender.file.fileName = ${folder}/mine.log
appender.file.filePattern = ${folder}/mine.%d{dd-MMM}.log.gz
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %m%n
appender.file.filter.threshold.type = ThresholdFilter
appender.file.filter.threshold.level = warn
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 10MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 3
appender.other.type = Socket
appender.other.name = LOGSTASH
rootLogger.level = info
rootLogger.appenderRef.stdout.ref = STDOUT
logger.model.name = MODEL_LOG
logger.model.level = \
    debug
logger.model.additivity = false
logger.model.appenderRef.one.ref = FILE
"""


def test_a_log4j2_properties_says_what_the_xml_says(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, PROPERTIES, "log4j2.properties")
    assert plan.notes == ("<socket> appender 'LOGSTASH' (line 23)",)
    handlers, loggers = plan.logging["handlers"], plan.logging["loggers"]
    file = handlers["FILE"]
    assert file["filename"] == f"{tmp_path}/mine.log"
    assert (file["max_bytes"], file["keep"], file["level"]) == (10 << 20, 3, logging.WARNING)
    assert handlers["STDOUT"]["target"] == "stdout"
    assert plan.logging["root"] == {"level": logging.INFO, "handlers": ["STDOUT"]}
    assert loggers["MODEL_LOG"] == {"level": logging.DEBUG, "handlers": ["FILE"], "propagate": False}


def test_the_short_form_of_loggers(tmp_path: Path) -> None:
    text = "appender.c.type=Console\nappender.c.name=OUT\nrootLogger=warn, OUT\nlogger.a=error\nlogger.a.name=org.a\n"
    plan = plan_of(tmp_path, text, "log4j2.properties")
    assert plan.logging["root"]["handlers"] == ["OUT"]
    assert plan.logging["loggers"]["org.a"]["handlers"] == []


def test_properties_that_cannot_be_used(tmp_path: Path) -> None:
    old = error_of(tmp_path, "\nlog4j.rootLogger=INFO, OUT\n", "log4j.properties")
    assert old.startswith("2: log4j.rootLogger is a key of log4j 1;")
    assert error_of(tmp_path, "appender.c.name=OUT\n", "log4j2.properties") == "1: c has no type"


def test_a_log4j2_xml_in_the_shape_of_torchserves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, LOG4J2, "log4j2.xml")
    assert plan.notes == ("<socket> appender 'logstash' (line 23)",)
    with logging_to(tmp_path, plan) as files:
        files.access.write(["one", "two"])
        files.model.write(["too low"], logging.INFO, "W-1")
        files.model.write(["high enough"], logging.WARNING, "W-1")
        files.ts_metrics.write(["a metric"])
        logging.getLogger("wsgi_ts.x").debug("ours")
        logging.getLogger("org.pytorch.serve.wlm").debug("theirs")
        logging.getLogger("elsewhere").debug("not shown")
        rotations = files.rotations
    assert re.fullmatch(
        r"(\d\d:\d\d INFO   access: (one|two) \[ACCESS_LOG\]\n){2}", (tmp_path / "requests.log").read_text()
    )
    text = (tmp_path / "ts_log.log").read_text()
    assert [line.partition("] ")[2] for line in text.splitlines()] == [
        "W-1 MODEL_LOG - high enough",
        "main TS_METRICS - a metric",
        "main wsgi_ts.x - ours",
        "main org.pytorch.serve.wlm - theirs",
    ]
    assert capfd.readouterr().out == text
    access = rotations[tmp_path / "requests.log"]
    assert (access.max_bytes, access.period, access.keep) == (2048, "day", 3)
    assert access.archive == f"{tmp_path}/requests.%Y-%m-%d.%i.log.gz"
    server = rotations[tmp_path / "ts_log.log"]
    assert (server.max_bytes, server.period, server.archive) == (0, "day", f"{tmp_path}/ts_log.%d-%b.log.gz")


#: As TorchServe's documentation has it, of a file for each of its metrics logs.
METRIC_LAYOUTS = """<Configuration packages="org.pytorch.serve.util.logging">
  <Appenders>
    <RollingFile name="j" fileName="${env:LOG_LOCATION}/json.log" filePattern="x.%i"><JSONPatternLayout/></RollingFile>
    <RollingFile name="q" fileName="${env:LOG_LOCATION}/qlog.log" filePattern="y.%i"><QLogLayout/></RollingFile>
  </Appenders>
  <Loggers>
    <Logger name="MODEL_METRICS" level="all"><AppenderRef ref="j"/><AppenderRef ref="q"/></Logger>
    <Logger name="ACCESS_LOG" level="info"><AppenderRef ref="j"/></Logger>
  </Loggers>
</Configuration>"""


def test_the_layouts_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALM", "EU")
    plan = plan_of(tmp_path, METRIC_LAYOUTS, "log4j2.xml")
    assert plan.notes == ()
    with logging_to(tmp_path, plan) as files:
        files.model_metrics.write(
            [
                "DiskUsed.Gigabytes:24.5|#Level:Host|#hostname:h,timestamp:1700000000",
                "Time.ms:7.0|#ModelName:m,Kind:a:ü|#hostname:h,requestID:r1,r2,timestamp:1700000001",
                "no metric",
            ]
        )
        files.access.write(['/127.0.0.1:1 "GET /ping HTTP/1.1" 200 0'])
    first, second, other, access = (tmp_path / "json.log").read_text().splitlines()
    assert json.loads(first) == {
        "MetricName": "DiskUsed",
        "Value": "24.5",
        "Unit": "Gigabytes",
        "Dimensions": [{"Name": "Level", "Value": "Host"}],
        "Timestamp": "1700000000",
        "HostName": "h",
    }
    assert json.loads(second)["Dimensions"] == [{"Name": "ModelName", "Value": "m"}, {"Name": "Kind", "Value": "a:ü"}]
    assert json.loads(second)["RequestId"] == "r1,r2"
    assert (other, access) == ("no metric", '/127.0.0.1:1 "GET /ping HTTP/1.1" 200 0')
    assert (tmp_path / "qlog.log").read_text() == (
        "HostName=h\nMarketplace=MXNetModelServer:Unknown:EU\nStartTime=1700000000\nProgram=MXNetModelServer\n"
        "Metrics=DiskUsed=24.5 Gigabytes Level|Host \nEOE\n"
        "HostName=h\nRequestId=r1,r2\nMarketplace=MXNetModelServer:Unknown:EU\nStartTime=1700000001\n"
        "Program=MXNetModelServer\nMetrics=Time=7.0 ms ModelName|m  Kind|a:ü \nEOE\nno metric\n"
    )


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("%d{yyyy/MM/dd HH:mm:ss.SSS} %p %c{1}: %m%n", r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{3} WARN x: 100% of it"),
        ("%date{ISO8601}[%5.5level][%15t]%logger{1} %msg%xEx%n", r"\S{23}\[ WARN\]\[           main\]x 100% of it"),
        ("%%%m %X{id}(%pid)%n", r"%100% of it \(\d+\)"),
        ("%d{'T'HH 'o''clock'} %message", r"T\d\d o'clock 100% of it"),
    ],
)
def test_patterns(tmp_path: Path, capfd: pytest.CaptureFixture[str], pattern: str, line: str) -> None:
    xml = f"""<Configuration><Appenders><Console name="c"><PatternLayout pattern="{pattern}"/></Console></Appenders>
    <Loggers><Root level="all"><AppenderRef ref="c"/></Root></Loggers></Configuration>"""
    plan = plan_of(tmp_path, xml, "log4j2.xml")
    with logging_to(tmp_path, plan):
        logging.getLogger("a.b.x").warning("100%% of %s", "it")
    assert re.fullmatch(line + "\n", capfd.readouterr().out)
    assert [note.partition(" ")[0] for note in plan.notes] == (["%X"] if "%X" in pattern else [])


def test_levels_of_appenders_and_of_references(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    xml = """<Configuration><Appenders>
    <Console name="c"><ThresholdFilter level="INFO"/><PatternLayout pattern="c %m%n"/></Console></Appenders>
    <Loggers><Logger name="ACCESS_LOG" level="off"/><Root level="all"><AppenderRef ref="c" level="error"/></Root>
    <Logger name="y" additivity="false" level="trace"><AppenderRef ref="c"/></Logger></Loggers></Configuration>"""
    with logging_to(tmp_path, plan_of(tmp_path, xml, "log4j2.xml")) as files:
        logging.getLogger("x").warning("no")
        logging.getLogger("x").error("yes")
        logging.getLogger("y").debug("no")
        logging.getLogger("y").info("also")
        assert not files.access.is_on()
        files.access.write(["no"])
    assert capfd.readouterr().out == "c yes\nc also\n"


def test_levels_that_do_not_exist_count_as_for_log4j(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ERROR for the root and a threshold; none for a logger, which then has its parent's, and for a reference."""
    xml = """<Configuration><Appenders>
    <Console name="c"><PatternLayout pattern="c %m%n"/></Console>
    <Console name="d"><ThresholdFilter level="lowd"/><PatternLayout pattern="d %m%n"/></Console></Appenders><Loggers>
    <Root level="loud"><AppenderRef ref="c" level="loudd"/></Root>
    <Logger name="y" level="lout"/>
    <Logger name="z" level="all" additivity="false"><AppenderRef ref="d"/></Logger></Loggers></Configuration>"""
    plan = plan_of(tmp_path, xml, "log4j2.xml")
    with logging_to(tmp_path, plan):
        for name in ("x", "y", "z"):
            logging.getLogger(name).warning("no")
            logging.getLogger(name).error(name)
    assert capfd.readouterr().out == "c x\nc y\nd z\n"
    for level, line in (("lowd", 3), ("loud", 4), ("loudd", 4), ("lout", 5)):
        found = [note for note in plan.notes if f"unknown level {level!r}" in note]
        assert len(found) == 1
        assert found[0].endswith(f"(line {line})")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<Configuration>\n<Loggers>\n</Configuration>", "3: mismatched tag"),
        ('<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>\n<Configuration/>', "1: DOCTYPE and entities are"),
        ("<log4j/>", "1: the outermost element is <log4j>, not <Configuration>"),
        (
            '<Configuration><Loggers>\n<Root level="info"><AppenderRef ref="x"/></Root></Loggers></Configuration>',
            "2: no appender is called 'x'",
        ),
        (
            '<Configuration><Appenders>\n<File name="f" fileName="${nothing}/a"/></Appenders></Configuration>',
            "2: fileName: ${nothing} has no value",
        ),
        ('<Configuration><Appenders>\n<File name="f"/></Appenders></Configuration>', "2: appender 'f' has no fileName"),
        (
            '<Configuration><Appenders><RollingFile name="f" fileName="a">\n<Policies>\n'
            '<SizeBasedTriggeringPolicy size="big"/></Policies></RollingFile></Appenders></Configuration>',
            "3: size='big' is no size",
        ),
    ],
)
def test_mistakes_in_a_log4j2_xml(tmp_path: Path, xml: str, message: str) -> None:
    assert error_of(tmp_path, xml, "log4j2.xml").startswith(message)


YAML = """\
version: 1
formatters:
  brief: {format: "%(levelname)s|%(name)s|%(message)s"}
handlers:
  stdout: {formatter: brief}
  ts_log: {maxBytes: 1000, backupCount: 2, when: H}
  access_log: {filename: "${env:LOG_LOCATION}/web.log"}
  extra: {class: logging.handlers.TimedRotatingFileHandler, filename: "${env:LOG_LOCATION}/extra.log", when: midnight}
loggers:
  ACCESS_LOG: {level: OFF}
  org.pytorch.serve: {level: ERROR}
  mine: {level: DEBUG, handlers: [extra], propagate: false}
"""


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_python_configuration_says_what_differs(tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str) -> None:
    import yaml

    text = YAML if form == "yaml" else json.dumps(yaml.safe_load(YAML), indent=2)
    with logging_to(tmp_path, plan_of(tmp_path, text, f"logging.{form}")) as files:
        files.access.write(["switched off"])
        files.model.write(["a line"], logging.INFO, "W-1")
        logging.getLogger("wsgi_ts.x").warning("too low")
        logging.getLogger("mine.own").debug("to the extra file")
        rotations = files.rotations
    assert capfd.readouterr().out == "INFO|MODEL_LOG|a line\n"
    assert (tmp_path / "web.log").read_text() == ""
    assert (tmp_path / "ts_log.log").read_text().endswith(" [INFO ] W-1 MODEL_LOG - a line\n")
    assert (tmp_path / "extra.log").read_text().endswith(" [DEBUG] main mine.own - to the extra file\n")
    server = rotations[tmp_path / "ts_log.log"]
    assert (server.max_bytes, server.keep, server.period) == (1000, 2, "hour")
    assert rotations[tmp_path / "web.log"].archive == f"{tmp_path}/web.%d-%b.log.gz"
    assert rotations[tmp_path / "extra.log"].period == "day"


class Collecting(logging.Handler):
    """A handler of a user's own."""

    seen: list[tuple[str, str]] = []  # noqa: RUF012

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps what a formatter would get."""
        self.seen.append((str(record.threadName), record.getMessage()))


def test_a_handler_of_the_users_own_gets_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Collecting, "seen", [])
    text = f"handlers: {{own: {{class: {__name__}.Collecting}}}}\nloggers: {{MODEL_LOG: {{handlers: [own]}}}}\n"
    with logging_to(tmp_path, plan_of(tmp_path, text)) as files:
        files.model.write(["one", "two %s"], logging.INFO, "W-1")
    assert Collecting.seen == [("W-1", "one"), ("W-1", "two %s")]


INI = """\
[loggers]
keys=root,access
[handlers]
keys=screen,file
[formatters]
keys=short
[logger_root]
level=WARNING
handlers=screen,file
[logger_access]
qualname=ACCESS_LOG
level=INFO
handlers=file
propagate=0
[handler_screen]
class=StreamHandler
args=(sys.stdout,)
formatter=short
[handler_file]
class=handlers.RotatingFileHandler
args=('FOLDER/all.log', 'a', 5000, 4)
formatter=short
[formatter_short]
format=%(levelname)s %(message)s
"""


def test_a_fileconfig(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path, INI.replace("FOLDER", str(tmp_path)), "logging.ini")
    with logging_to(tmp_path, plan) as files:
        files.access.write(["one"])
        logging.getLogger("x").warning("two")
        rotation = files.rotations[tmp_path / "all.log"]
    assert capfd.readouterr().out == "WARNING two\n"
    assert (tmp_path / "all.log").read_text() == "INFO one\nWARNING two\n"
    assert (rotation.max_bytes, rotation.keep, rotation.period) == (5000, 4, "")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.yaml", "handlers:\n  a: [", "2: expected the node content"),
        ("l.yaml", "- a", "1: no table of keys"),
        ("l.yaml", "version: 1\nhandler: {}", "2: unknown key 'handler'"),
        ("l.yaml", "handlers:\n  ts_log: {formatter: nice}", "2: handler 'ts_log': no formatter is called 'nice'"),
        ("l.yaml", "handlers:\n  a: {level: INFO}", "2: handler 'a' has no class"),
        ("l.yaml", "handlers:\n  a: {class: no.such.Class}", "2: handler 'a': class 'no.such.Class' cannot be imp"),
        ("l.yaml", "handlers:\n  ts_log: {maxBytes: many}", "2: handler 'ts_log': max_bytes is no whole number"),
        ("l.yaml", "handlers:\n  ts_log: {when: X}", "2: handler 'ts_log': unknown period 'X'"),
        ("l.yaml", "loggers:\n  x: {}\n  y: {handlers: [z]}", "3: logger 'y': no handler is called 'z'"),
        ("l.yaml", "root:\n  level: LOUD", "1: 'root': unknown level 'LOUD'"),
        ("l.json", '{\n"root": {"level": }}', "2: "),
        ("l.ini", "[loggers]\nkeys=root\n", "1: there is no section [logger_root]"),
        ("l.ini", "[loggers\n", "1: File contains no section headers."),
        (
            "l.ini",
            "[loggers]\n[handlers]\nkeys=a\n[handler_a]\nclass=FileHandler\nargs=(open('x'),)",
            "4: handler 'a': args and kwargs",
        ),
    ],
)
def test_mistakes_in_a_python_configuration(tmp_path: Path, name: str, text: str, message: str) -> None:
    assert error_of(tmp_path, text, name).startswith(message)


def test_lookups() -> None:
    rows = {"a": "${b}/x", "b": "${env:HOME_OF_LOGS:-${c:-/var}}"}
    assert substitute("${a}!", rows, {}) == "/var/x!"
    assert substitute("${a}!", rows, {"HOME_OF_LOGS": "/l"}) == "/l/x!"
    with pytest.raises(ValueError, match="each other without end"):
        substitute("${a}", {"a": "${b}", "b": "${a}"}, {})


@pytest.mark.parametrize(
    ("vmargs", "path"),
    [
        ("-Xmx4g -Dlog4j.configurationFile=file:///x/log4j2.xml -Dother=1", Path("/x/log4j2.xml")),
        ("-Dlog4j.configurationFile=conf/log4j2.xml", Path("conf/log4j2.xml")),
        ("-Dlog4j2.configurationFile=file:/x.xml", Path("/x.xml")),
        ("-Xmx4g", None),
    ],
)
def test_the_file_that_java_arguments_name(vmargs: str, path: Path | None) -> None:
    assert log4j_file(vmargs) == path
