"""BaseHandler loads every kind of model file that can be made here, and runs its phases in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wsgi_ts.handlers.bundled.base import BaseHandler, _compile_options
from wsgi_ts.handlers.bundled.image import ImageClassifier
from wsgi_ts.handlers.bundled.text import TextClassifier
from wsgi_ts.handlers.bundled.trt_llm import TRTLLMHandler
from wsgi_ts.handlers.bundled.vllm import VLLMHandler
from wsgi_ts.handlers.serving.errors import LoadError
from wsgi_ts.handlers.serving.inputs import Request
from wsgi_ts.handlers.serving.service import Service
from wsgi_ts.handlers.testing import MockContext

LoadModel = Callable[..., Service]

HANDLER = """
import torch
from ts.torch_handler.base_handler import BaseHandler

class Lin(BaseHandler):
    def preprocess(self, data):
        return torch.tensor([[float(x) for x in (r.get("data") or r.get("body"))["x"]] for r in data])
    def postprocess(self, out):
        return [[round(v, 4) for v in r] for r in out.tolist()]
"""

#: An `initialize` of the handler's own, which has BaseHandler make the model.
OWN_LOADING = """
    def initialize(self, context):
        self.device = "cpu"
        folder, model = context.system_properties["model_dir"], context.manifest["model"]
        self.model = self._load_pickled_model(folder, model["modelFile"], f"{folder}/{model['serializedFile']}")
"""

MODEL = """
import torch
class Lin(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.l(x)
"""

WEIGHTS = {"l.weight": torch.tensor([[1.0, 2, 3], [4, 5, 6]]), "l.bias": torch.tensor([0.5, -0.5])}


class Lin(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.l(x)
        return result


def ask(service: Service, **headers: str) -> Any:
    (answer,) = service.predict([Request("id", {"body": {"x": [1, 0, 0]}}, headers)])
    assert not answer.error, answer
    return json.loads(bytes(answer.body))


@pytest.mark.parametrize("config", [None, "pt2: {compile: {enable: true, backend: eager}}"])
def test_an_eager_model_gets_its_weights(load_model: LoadModel, tmp_path: Path, config: str | None) -> None:
    torch.save(WEIGHTS, tmp_path / "lin.pth")
    manifest = {"model": {"modelFile": "lin_model.py", "serializedFile": "lin.pth"}}
    files = {"base_h.py": HANDLER, "lin_model.py": MODEL}
    if config is not None:
        files["config.yaml"] = config
    service = load_model("base_h.py", files, manifest=manifest, config_file=None if config is None else "config.yaml")
    assert ask(service) == [1.5, 3.5]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_model_is_loaded(load_model: LoadModel, tmp_path: Path) -> None:
    model = Lin()
    model.load_state_dict(WEIGHTS)
    torch.jit.save(torch.jit.script(model), str(tmp_path / "lin.pt"))
    manifest = {"model": {"serializedFile": "lin.pt"}}
    service = load_model("base_h.py", {"base_h.py": HANDLER}, manifest=manifest)
    assert ask(service) == [1.5, 3.5]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_model_compiled_ahead_of_time_is_loaded(
    load_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = Lin()
    model.load_state_dict(WEIGHTS)
    exported = torch.export.export(model, (torch.zeros(1, 3),))
    # Not optimised, no headers compiled beforehand for a single use, no trials of what the processor can do: a fifth
    # of the compiler's time.
    cheaply = {
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.precompile_headers": False,
        "cpp.vec_isa_ok": False,
    }
    package = str(tmp_path / "lin.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=cheaply)
    files = {"base_h.py": HANDLER, "config.yaml": "pt2: {export: {aot_compile: true}}"}
    manifest = {"model": {"serializedFile": "lin.pt2"}}
    service = load_model("base_h.py", files, manifest=manifest, config_file="config.yaml")
    assert ask(service) == [1.5, 3.5]


def test_pickled_objects_are_loaded_only_when_allowed(load_model: LoadModel, tmp_path: Path) -> None:
    torch.save({**WEIGHTS, "l.extra": Path("x")}, tmp_path / "lin.pth")
    model = MODEL.replace(
        "def forward",
        "def load_state_dict(self, s): s.pop('l.extra'); super().load_state_dict(s)\n    def forward",
    )
    files = {"base_h.py": HANDLER, "lin_model.py": model}
    manifest = {"model": {"modelFile": "lin_model.py", "serializedFile": "lin.pth"}}
    with pytest.raises(Exception, match="Weights only"):
        load_model("base_h.py", files, manifest=manifest)
    assert ask(load_model("base_h.py", files, manifest=manifest, weights_only=False)) == [1.5, 3.5]
    files["own_h.py"] = HANDLER + OWN_LOADING
    assert ask(load_model("own_h.py", files, manifest=manifest, weights_only=False)) == [1.5, 3.5]


@pytest.mark.parametrize(
    ("model", "files", "reason"),
    [
        ({}, {}, "neither a model file nor a serialized file"),
        ({"serializedFile": "a.bin"}, {}, "a.bin is no"),
        ({"modelFile": "gone.py"}, {}, "Missing the model.py file"),
        ({"serializedFile": "a.pt"}, {"a.pt": "rubbish"}, "PytorchStreamReader"),
    ],
)
def test_models_that_cannot_be_loaded(
    load_model: LoadModel, model: dict[str, str], files: dict[str, str], reason: str
) -> None:
    with pytest.raises(LoadError) as failure:
        load_model("base_h.py", {"base_h.py": HANDLER, **files}, manifest={"model": model})
    assert failure.value.status == 500
    assert reason in str(failure.value.__cause__)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_weights_without_a_model_file_say_what_is_missing(load_model: LoadModel, tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "lin.pt")
    with pytest.raises(LoadError) as failure:
        load_model("base_h.py", {"base_h.py": HANDLER}, manifest={"model": {"serializedFile": "lin.pt"}})
    assert "lin.pt is no TorchScript" in str(failure.value.__cause__)
    assert "--model-file" in str(failure.value.__cause__)


def test_a_model_file_needs_exactly_one_class(load_model: LoadModel) -> None:
    files = {"base_h.py": HANDLER, "two.py": MODEL + "\nclass Second: pass\n"}
    with pytest.raises(ValueError, match="Expected only one class as model definition"):
        load_model("base_h.py", files, manifest={"model": {"modelFile": "two.py"}})


class Recorder(BaseHandler):
    """Knows no model; tells what was called."""

    def preprocess(self, data: Any) -> Any:
        return [row["body"] for row in data]

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        return [value * 2 for value in data]

    def postprocess(self, data: Any) -> Any:
        return data

    def describe_handle(self) -> Any:
        return {"described": True}

    def get_insights(self, tensor_data: Any, raw_data: Any, target: Any) -> Any:
        return [[tensor_data, raw_data, target]]


def test_handle_predicts_explains_and_describes() -> None:
    handler, context = Recorder(), MockContext()
    assert handler.handle([{"body": 3}], context) == [6]
    assert [str(metric).partition(".")[0] for metric in context.metrics.store] == ["HandlerTime"]
    context.request_processor[0]._request_header = {"explain": "True"}
    assert handler.handle([{"body": 3, "target": 2}], context) == [[[3], 3, 2]]
    context.request_processor[0]._request_header = {"describe": "True"}
    assert handler.handle([{"body": 3}], context) == [{"described": True}]


def test_the_double_of_a_context_says_explain_as_torchserves_does() -> None:
    """Not of the first row, by which handlers decide: TorchServe's own tests set it and get predictions."""
    context = MockContext(gpu_id="", model_yaml_config_file="")
    context.explain = True
    assert Recorder().handle([{"body": 3, "target": 2}] * 2, context) == [6, 6]
    assert [context.get_request_header(row, "explain") for row in (0, 1)] == [False, True]
    assert context.get_request_header(1, "any") is True
    context.explain = False
    assert [context.get_request_header(row, "explain") for row in (0, 1)] == [False, False]


def test_the_default_phases_run_a_model_on_tensors() -> None:
    handler = BaseHandler()
    handler._choose_device(None)
    handler.model = torch.nn.Identity()
    assert handler.handle([1.0, 2.0], MockContext()) == [1.0, 2.0]  # type: ignore[list-item]
    assert str(handler.get_device()) == "cpu"
    with pytest.raises(NotImplementedError, match="define get_insights"):
        handler.explain_handle(None, [{}])


def test_the_profiler_runs_around_the_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ENABLE_TORCH_PROFILER", "1")
    monkeypatch.setattr("wsgi_ts.handlers.bundled.base.PROFILER_FOLDER", str(tmp_path))
    caplog.set_level("INFO")
    handler = Recorder()
    handler.manifest = {"model": {"modelName": "m"}}
    handler.profiler_args = {"activities": [torch.profiler.ProfilerActivity.CPU]}
    assert handler.handle([{"body": 3}], MockContext()) == [6]
    assert list((tmp_path / "m").glob("*.json"))
    assert f"Saving chrome trace to : {tmp_path}/m" in caplog.text
    handler.manifest = None
    assert handler.handle([{"body": 3}], MockContext(model_name="of-context")) == [6]
    assert list((tmp_path / "of-context").glob("*.json"))
    for count, manifest in enumerate((None, {}, {"model": {"modelFile": "model.py"}}), 1):
        context = MockContext()
        context.manifest = manifest
        assert handler.handle([{"body": 3}], context) == [6]
        assert len(list(tmp_path.glob("*.json"))) == count


@pytest.mark.parametrize(
    ("pt2", "options"),
    [
        (None, None),
        ({}, None),
        ("inductor", {"backend": "inductor"}),
        ({"backend": "eager"}, {"backend": "eager"}),
        (
            {"compile": {"enable": True, "backend": "inductor", "mode": "x"}},
            {"backend": "inductor", "mode": "x"},
        ),
        ({"compile": {"enable": False, "backend": "inductor"}}, None),
        ({"compile": {"backend": "inductor"}}, None),
        ({"compile": True}, None),
        ({"export": {"aot_compile": True}}, None),
    ],
)
def test_what_the_yaml_compiles(pt2: Any, options: dict[str, Any] | None) -> None:
    assert _compile_options(pt2) == options


def test_compiling_says_so_and_an_unknown_backend_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    handler = BaseHandler()
    handler.model = torch.nn.Identity()
    handler.model_yaml_config = {"pt2": {"compile": {"enable": True, "backend": "eager", "dynamic": True}}}
    handler._compile()
    assert "Compiled model with backend eager, dynamic True" in caplog.text
    compiled = handler.model
    handler.model_yaml_config = {"pt2": "nosuch"}
    handler._compile()
    assert "nosuch is not a supported backend" in caplog.text
    assert handler.model is compiled


def test_a_handler_need_not_call_our_init(load_model: LoadModel, tmp_path: Path) -> None:
    text = HANDLER + "    def __init__(self):\n        self.mine = 1\n"
    manifest = {"model": {"modelFile": "lin_model.py"}}
    service = load_model("base_h.py", {"base_h.py": text, "lin_model.py": MODEL}, manifest=manifest)
    assert len(ask(service)) == 2


@pytest.mark.parametrize("handler_class", [BaseHandler, TextClassifier, ImageClassifier, TRTLLMHandler, VLLMHandler])
def test_what_our_init_sets_is_there_without_it(handler_class: type[BaseHandler]) -> None:
    bare = handler_class.__new__(handler_class)
    for name, value in vars(handler_class()).items():
        assert getattr(bare, name) == value
    assert bare.mapping is None and bare.device is None and bare.model_pt_path is None


def test_the_default_phases_are_measured_where_the_yaml_says_so() -> None:
    handler, context = BaseHandler(), MockContext()
    handler._choose_device(None)
    handler.model = torch.nn.Identity()
    context.model_yaml_config = {"handler": {"profile": True}}
    handler.handle([1.0], context)  # type: ignore[list-item]
    names = [metric.name for metric in context.metrics.store]
    assert names == ["ts_handler_preprocess", "ts_handler_inference", "ts_handler_postprocess", "HandlerTime"]
    context.model_yaml_config = {"handler": "a section that is no section"}
    assert handler.handle([1.0], context) == [1.0]  # type: ignore[list-item]
