"""deploy/kubernetes and deploy/helm: as the schemas want them, and as the server is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support import helm, http
from support.archives import archive
from support.container_image import DOCKER, image_variables
from support.eventually import eventually
from support.sandbox import environment, is_possible, sandboxed
from support.server import REPOSITORY, free_ports

from wsgi_ts.cli.commands import torchserve_parser
from wsgi_ts.settings.config import property_settings
from wsgi_ts.supervisor.metrics import load

FOLDER = REPOSITORY / "deploy" / "kubernetes"
CHART = REPOSITORY / "deploy" / "helm" / "wsgi-ts"
SCHEMAS = REPOSITORY / "tests" / "schemas"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
EVERYTHING = {"autoscaling.enabled": True, "serviceMonitor.enabled": True}
KEDA = {**EVERYTHING, "autoscaling.by": "keda"}
#: The oldest and the newest Kubernetes that the manifests are held to.
VERSIONS = ("1.27", "1.34")
VARIABLES = {row.variable(name) for name, row in property_settings().items()}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def chart(**overrides: Any) -> list[dict[str, Any]]:
    """What the chart makes."""
    texts = helm.render(CHART, "mine", overrides).values()
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def all_documents() -> list[dict[str, Any]]:
    return [*(each for name in FILES for each in documents(name)), *chart(**EVERYTHING), *chart(**KEDA)]


def check(document: dict[str, Any]) -> None:
    """Holds a manifest to the schema of its kind.

    Raises:
        Exception: it does not fit.
    """
    own = SCHEMAS / f"{document['kind']}.json"
    if own.exists():
        jsonschema.validate(document, json.loads(own.read_text()))
        return
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for version in VERSIONS:
        validate.validate(document, version, strict=True)


@pytest.mark.parametrize("name", FILES)
def test_manifests_fit_the_schemas(name: str) -> None:
    for document in documents(name):
        check(document)


def test_the_schemas_find_mistakes() -> None:
    (monitor,) = documents("servicemonitor.yaml")
    monitor["spec"]["endpoint"] = monitor["spec"].pop("endpoints")
    with pytest.raises(jsonschema.ValidationError):
        check(monitor)


@pytest.mark.parametrize("overrides", [{}, EVERYTHING, KEDA], ids=["as it is", "everything", "keda"])
def test_the_chart_makes_what_fits_the_schemas(overrides: dict[str, Any]) -> None:
    made = chart(**overrides)
    assert len(made) == (5 if overrides else 3)
    for document in made:
        check(document)


@pytest.mark.parametrize(("overrides", "scaler"), [(EVERYTHING, "hpa.yaml"), (KEDA, "keda.yaml")])
def test_the_chart_and_the_manifests_say_the_same(overrides: dict[str, Any], scaler: str) -> None:
    """With the release's name in the place of ours, in queries, too."""
    made = {document["kind"]: document for document in chart(**overrides)}
    ours = {
        document["kind"]: document
        for name in ("deployment.yaml", scaler, "servicemonitor.yaml")
        for document in documents(name)
    }
    text = json.dumps(made, sort_keys=True).replace(', "app.kubernetes.io/instance": "mine"', "")
    text = text.replace('"app.kubernetes.io/instance": "mine", ', "").replace('"mine"', '"wsgi-ts"')
    assert json.loads(text.replace(r"\"mine\"", r"\"wsgi-ts\"")) == ours
    assert chart(**{"drain.delay": 7})[0]["spec"]["template"]["spec"]["containers"][0]["args"][2] == "7"


def test_a_scaler_has_the_number_of_servers_to_itself() -> None:
    """A number in the deployment would be set again with each upgrade, whatever the load is."""
    assert chart(replicas=3)[0]["spec"]["replicas"] == 3
    scaled = [*chart(**EVERYTHING), *chart(**KEDA), *documents("deployment.yaml")]
    deployments = [each["spec"] for each in scaled if each["kind"] == "Deployment"]
    assert len(deployments) == 3
    assert not any("replicas" in spec for spec in deployments)


def test_the_chart_takes_values_as_people_write_them() -> None:
    """No further variables or several; a list of models with its commas."""
    rows = [{"name": "TS_JOB_QUEUE_SIZE", "value": "7"}, {"name": "TS_CONSOLE", "value": "false"}]
    for further in ([], rows):
        deployment = next(each for each in chart(env=further, **{"models.load": "a=a.mar,b.mar"}))
        check(deployment)
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["env"] == [{"name": "TS_LOAD_MODELS", "value": "a=a.mar,b.mar"}, *further]


def test_replicas_of_ray_fit_where_they_are_to_run() -> None:
    """A replica reserves a core for each of its model workers, and there are pods with so many for all replicas."""
    (service,) = documents("rayservice.yaml")
    (app,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (deployment,) = app["deployments"]
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    reserved = deployment["ray_actor_options"]["num_cpus"]
    assert reserved == app["args"]["workers"]
    each = int(container["resources"]["limits"]["cpu"]) // reserved
    assert each * group["maxReplicas"] >= deployment["autoscaling_config"]["max_replicas"]
    assert service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"], "or no pod comes for the next replica"


def containers() -> list[dict[str, Any]]:
    pods = [each["spec"]["template"]["spec"] for each in all_documents() if each["kind"] == "Deployment"]
    runtimes = [each["spec"] for each in all_documents() if each["kind"] == "ClusterServingRuntime"]
    return [container for pod in (*pods, *runtimes) for container in pod["containers"]]


def test_flags_variables_and_metrics_are_ours() -> None:
    for container in containers():
        torchserve_parser().parse_args([argument for argument in container["args"][1:]])
        assert {row["name"] for row in container["env"]} <= VARIABLES
    text = "".join((FOLDER / name).read_text() for name in FILES)
    assert set(re.findall(r"\bts_[a-z_]+", text)) <= load.METRICS


def test_a_pod_gets_the_time_that_its_drain_takes() -> None:
    for document in all_documents():
        if document["kind"] == "Deployment":
            pod = document["spec"]["template"]["spec"]
            words = pod["containers"][0]["args"]
            seconds = [int(words[words.index(flag) + 1]) for flag in ("--drain-delay", "--drain-timeout")]
            assert pod["terminationGracePeriodSeconds"] > sum(seconds) + 5
            assert "preStop" not in json.dumps(pod)


# KServe's runtime, in a sandbox


@pytest.fixture
def models() -> Iterator[Path]:
    """What KServe mounts at /mnt/models: the archives, and the file that its guide for TorchServe has people write."""
    folder = Path("/tmp") / f"wts-pod-{os.urandom(6).hex()}"
    folder.mkdir(mode=0o755)
    for name in ("model-store", "config"):
        (folder / "models" / name).mkdir(parents=True)
    archive(folder / "models" / "model-store", "mnist", MNIST)
    snapshot = {"1.0": {"defaultVersion": True, "marName": "mnist.mar", "minWorkers": 1, "maxWorkers": 1}}
    snapshot["1.0"] |= {"batchSize": 1, "maxBatchDelay": 10, "responseTimeout": 60}
    lines = [
        "inference_address=http://0.0.0.0:8085",
        "management_address=http://0.0.0.0:8085",
        "metrics_address=http://0.0.0.0:8082",
        "grpc_inference_port=7070",
        "grpc_management_port=7071",
        "enable_metrics_api=true",
        "number_of_netty_threads=1",
        "job_queue_size=10",
        "enable_envvars_config=true",
        "install_py_dep_per_model=true",
        f"model_store={folder}/models/model-store",
        "preload_modules=",
        "model_snapshot="
        + json.dumps({"name": "startup.cfg", "modelCount": 1, "models": {"mnist": snapshot}}, separators=(",", ":")),
    ]
    (folder / "models" / "config" / "config.properties").write_text("\n".join(lines) + "\n")
    yield folder
    shutil.rmtree(folder)


#: The digit that an image of one number says.
MNIST = """
def handle(data, context):
    if data is None:
        return None
    return [int(row["data"]) if isinstance(row, dict) else int(row) for row in data]
"""


@pytest.mark.skipif(not is_possible(), reason="namespaces take root, unshare and setpriv")
def test_the_runtime_of_kserve_starts_as_its_manifest_says(models: Path) -> None:
    (runtime,) = documents("clusterservingruntime.yaml")
    (container,) = runtime["spec"]["containers"]
    ports = dict(zip(("8080", "8081", "8082", "7070", "7071"), free_ports(5), strict=True))
    properties = models / "models" / "config" / "config.properties"
    text = properties.read_text()
    for port in ("8082", "7070", "7071"):
        text = text.replace(port, str(ports[port]))
    properties.write_text(text)
    variables = {row["name"]: row["value"].replace("{{.Labels.serviceEnvelope}}", "kserve") for row in container["env"]}
    for name, value in variables.items():
        variables[name] = re.sub(r"\b808[01]\b", lambda match: str(ports[match[0]]), value)
    # Those of the image count where the manifest gives none; its places are in the sandbox's folder.
    of_image = {name: re.sub(r"^/tmp\b", f"{models}/tmp", value) for name, value in image_variables().items()}
    variables = {**of_image, **variables, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    arguments = [word.replace("/mnt/models", f"{models}/models") for word in container["args"]]
    arguments[arguments.index("--drain-delay=15")] = "--drain-delay=1"
    command = sandboxed(models / "tmp", os.fspath(DOCKER / "entrypoint.sh"), *arguments)
    with (models / "output").open("wb") as output:
        own = environment(models / "tmp", **variables)
        process = subprocess.Popen(command, env=own, stdout=output, stderr=output, cwd="/")
    try:

        def is_ready() -> bool:
            assert process.poll() is None, (models / "output").read_text()
            try:
                return http.request(ports["8080"], "GET", container["readinessProbe"]["httpGet"]["path"]).status == 200
            except OSError:
                return False

        eventually(is_ready, within=60)
        headers = {"content-type": "application/json"}
        body = json.dumps({"instances": [{"data": "7"}]})
        reply = http.request(ports["8080"], "POST", "/v1/models/mnist:predict", body=body, headers=headers)
        assert (reply.status, reply.json()) == (200, {"predictions": [7]})
        # What KServe's wrapper asks before it says that it is ready.
        described = http.request(ports["8081"], "GET", "/models/mnist?customized=false").json()
        assert described[0]["workers"][0]["status"] == "READY"
        eventually(lambda: "ts_queue_depth" in http.request(ports["8082"], "GET", "/metrics").text, within=10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    finally:
        process.kill()
        process.wait()
