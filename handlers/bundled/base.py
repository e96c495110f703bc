"""The handler to derive from: loads a model as its archive says; runs preprocess, inference, postprocess."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from wsgi_ts.cgroup import usable_cores
from wsgi_ts.handlers.metrics.cache import SAMPLE_INTERVAL_S
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.serving.errors import PredictionException
from wsgi_ts.handlers.serving.inputs import content_of
from wsgi_ts.handlers.serving.loader import import_from, list_classes_from_module
from wsgi_ts.handlers.toolkit.library_names import AOT_LIBRARY, AOT_PACKAGE, ONNX_OPTIONS, ONNX_SESSION
from wsgi_ts.handlers.toolkit.phase_times import measure_phases, phase
from wsgi_ts.handlers.toolkit.tensors import as_tensor
from wsgi_ts.handlers.toolkit.utils import PT2Backend, check_valid_pt2_backend, load_label_mapping

log = logging.getLogger(__name__)

#: Environment variable that, when set, has each batch run under the PyTorch profiler.
PROFILER_VARIABLE = "ENABLE_TORCH_PROFILER"
#: Where profiler traces go, one folder per model.
PROFILER_FOLDER = "/tmp/pytorch_profiler"


class BaseHandler:
    """Default behaviour of a model: tensors in, `model(tensors)`, lists out. Override what differs.

    Attributes:
        model: the loaded model; a module, a compiled function or an ONNX session.
        mapping: class index -> label from `index_to_name.json`, None without that file.
        device: where the model runs.
        map_location: device name that weights are loaded to.
        explain: set by handlers that want explanations.
        target: class that explanations are for.
        profiler_args: arguments of `torch.profiler.profile`.
    """

    # Of the class, since handlers do not always call our `__init__`.
    model: Any = None
    mapping: dict[str, str] | None = None
    device: Any = None
    initialized = False
    _context: Any = None
    model_pt_path: str | None = None
    manifest: Any = None
    map_location: str | None = None
    explain = False
    target: Any = 0
    profiler_args: Mapping[str, Any] = MappingProxyType({})
    model_yaml_config: Mapping[str, Any] = MappingProxyType({})
    _weights_only = True
    #: When HandlerTime is recorded next.
    _next_handler_time = 0.0
    #: When the stages of the last batch began, and the last one ended (the monotonic clock's seconds), for its trace.
    _stages_at: tuple[float, float, float, float] | None = None

    def __init__(self) -> None:
        self.profiler_args = {}
        self.model_yaml_config = {}

    @property
    def context(self) -> Any:
        """The context of the current batch."""
        return self._context

    @context.setter
    def context(self, context: Any) -> None:
        # Handlers set it in `initialize`, their own as well as ours, or in `handle`; it is the same one for good.
        if context is not self._context:
            self._context = context
            measure_phases(type(self), context)

    def initialize(self, context: Context) -> None:
        """Chooses the device and loads the model, compiled if its YAML says so, and the label mapping.

        Raises:
            RuntimeError: the archive names no weights that can be loaded, or its model file is missing.
            ValueError: the model file defines no class, or more than one.
        """
        self._take_context(context)
        self._weights_only = getattr(context, "_weights_only", True)
        properties = context.system_properties
        self._choose_device(properties.get("gpu_id"))
        model_dir = properties["model_dir"]
        description = (self.manifest or {}).get("model", {})
        serialized_file = description.get("serializedFile")
        self.model_pt_path = os.path.join(model_dir, serialized_file) if serialized_file else None
        model_file = description.get("modelFile", "")
        self.model = self._load_model(model_dir, model_file, serialized_file or "")
        # An exported program is in evaluation mode for good, and refuses the call.
        if isinstance(self.model, torch.nn.Module) and not isinstance(self.model, torch.fx.GraphModule):
            self.model.eval()
        self._compile()
        self.mapping = load_label_mapping(os.path.join(model_dir, "index_to_name.json"))
        self.initialized = True

    def _take_context(self, context: Context) -> None:
        self.context = context
        self.manifest = context.manifest
        self.model_yaml_config = context.model_yaml_config or {}

    def _choose_device(self, gpu_id: int | str | None) -> None:
        device = "cpu"
        if gpu_id is not None and torch.cuda.is_available():
            device = f"cuda:{gpu_id}"
        elif gpu_id is not None and os.environ.get("TS_IPEX_GPU_ENABLE") == "true":
            device = f"xpu:{gpu_id}"
        elif gpu_id is not None and torch.backends.mps.is_available():
            device = "mps"
        self.map_location, self.device = device.partition(":")[0], torch.device(device)
        if device == "cpu" and importlib.util.find_spec("torch_xla") is not None:
            self.device = importlib.import_module("torch_xla.core.xla_model").xla_device()

    def _load_model(self, model_dir: str, model_file: str, serialized_file: str) -> Any:
        path = self.model_pt_path or ""
        if model_file:
            log.debug("Loading eager model")
            model = self._load_pickled_model(model_dir, model_file, self.model_pt_path)
            return model.to(self.device)
        if self._wants_aot_load() and serialized_file.endswith((".so", ".pt2")):
            return self._load_torch_export_aot_compile(path)
        if serialized_file.endswith(".pt"):
            return self._load_torchscript_model(path)
        if serialized_file.endswith(".pt2"):
            return self._load_exported_program(path)
        if serialized_file.endswith(".onnx"):
            return self._load_onnx_model(path)
        raise RuntimeError(
            "No model weights could be loaded: "
            + (
                f"{serialized_file} is no *.pt, *.pt2, *.onnx or, with pt2.export.aot_compile, *.so file"
                if path
                else "the archive has neither a model file nor a serialized file"
            )
        )

    def _load_torchscript_model(self, model_pt_path: str) -> Any:
        with warnings.catch_warnings():
            # The archive's author chose the format; whoever runs the server cannot act on this.
            warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
            try:
                return torch.jit.load(model_pt_path, map_location=self.device)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if "constants.pkl" not in str(error):
                    raise
                # Only TorchScript has this record: the file is intact, but torch.save wrote it.
                raise RuntimeError(
                    f"No model weights could be loaded: {os.path.basename(model_pt_path)} is no TorchScript. "
                    "For weights saved with torch.save, give the archiver the model's class with --model-file, "
                    "or save the model with torch.jit.script(model).save(path)."
                ) from error

    def _load_torch_export_aot_compile(self, model_path: str) -> Any:
        if model_path.endswith(".pt2"):
            return AOT_PACKAGE.load(f"The model {model_path}")(model_path)
        return AOT_LIBRARY.load(f"The model {model_path}")(model_path, self.map_location or "cpu")

    def _load_exported_program(self, path: str) -> Any:
        if self._weights_only:
            raise RuntimeError(
                f"No model weights could be loaded: {os.path.basename(path)} is an exported program, which may hold "
                f"pickled objects; where you trust the archive, write weightsOnly: false into its model-config.yaml."
            )
        return torch.export.load(path).module().to(self.device)

    def _load_onnx_model(self, path: str) -> Any:
        try:
            importlib.import_module("onnxruntime")
        except ImportError as error:
            raise RuntimeError(
                f"No model weights could be loaded: {os.path.basename(path)} needs the package onnxruntime"
            ) from error
        options = ONNX_OPTIONS.load(f"The model {path}")()
        options.intra_op_num_threads = usable_cores()
        providers = ["CPUExecutionProvider"]
        if self.map_location == "cuda":
            providers.insert(0, "CUDAExecutionProvider")
        session = ONNX_SESSION.load(f"The model {path}")(path, providers=providers, sess_options=options)
        log.info("Succesfully setup ort session")
        return session

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str | None) -> Any:
        """Makes the model of the archive's model file and fills it with the archive's weights.

        Raises:
            RuntimeError: there is no such file.
            ValueError: it defines no class, or more than one.
        """
        if not os.path.isfile(os.path.join(model_dir, model_file)):
            raise RuntimeError("Missing the model.py file")
        module = import_from(model_file.partition(".")[0], model_dir)
        classes = list_classes_from_module(module)
        if len(classes) != 1:
            raise ValueError(f"Expected only one class as model definition. {classes} in {model_file}")
        model = classes[0]()
        if model_pt_path:
            model.load_state_dict(self._load_weights(model_pt_path))
        return model

    def _load_weights(self, path: str) -> Any:
        try:
            return torch.load(path, map_location=self.device, weights_only=self._weights_only)
        except Exception:
            if self._weights_only:
                log.error(
                    "%s was loaded as weights only; where it holds pickled objects and you trust the "
                    "archive, turn weights_only off in the server's configuration.",
                    os.path.basename(path),
                )
            raise

    def _wants_aot_load(self) -> bool:
        pt2 = self.model_yaml_config.get("pt2")
        export = pt2.get("export") if isinstance(pt2, dict) else None
        return isinstance(export, dict) and bool(export.get("aot_compile"))

    def _compile(self) -> None:
        """Has torch.compile prepare the model if the YAML's `pt2` says so; goes on without if that fails."""
        options = _compile_options(self.model_yaml_config.get("pt2"))
        if options is None or not check_valid_pt2_backend(str(options.get("backend", "inductor"))):
            return
        try:
            self.model = torch.compile(self.model, **options)
        except Exception as error:
            log.warning("Compiling the model with %s has failed, going on without: %s", options, error)
            return
        shown = options or {"backend": PT2Backend.INDUCTOR.value}
        log.info("Compiled model with %s", ", ".join(f"{name} {value}" for name, value in shown.items()))

    @phase
    def preprocess(self, data: Any) -> Any:
        """Turns the rows of a batch into the model's input.

        Args:
            data: list of B rows, each a dict with numbers in `data` or `body`, or the numbers themselves.

        Returns:
            Tensor (B, …) on the model's device; its type follows the numbers: int64, or float32.

        Raises:
            ValueError, TypeError, RuntimeError: the rows hold no numbers, or not all have one shape.
        """
        if isinstance(data, list):
            data = [content_of(row) for row in data]
        return as_tensor(data, self.device)

    @phase
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on a batch, without gradients.

        Args:
            data: tensor (B, …), as `preprocess` returned it.
            args: further inputs; an ONNX session gets data and these as its inputs, in order.
            kwargs: named inputs; of an ONNX session without effect.

        Returns:
            What the model returns, as a rule a tensor (B, …); of an ONNX session a list where it has several outputs.
        """
        if hasattr(self.model, "get_inputs"):
            return self._run_session(data, *args)
        with torch.inference_mode():
            return self.model(data.to(self.device), *args, **kwargs)

    def _run_session(self, *inputs: Any) -> Any:
        names = [described.name for described in self.model.get_inputs()]
        arrays = [value.cpu().numpy() if isinstance(value, torch.Tensor) else value for value in inputs]
        outputs = [torch.as_tensor(array) for array in self.model.run(None, dict(zip(names, arrays, strict=False)))]
        return outputs[0] if len(outputs) == 1 else outputs

    @phase
    def postprocess(self, data: Any) -> Any:
        """Turns the model's output, a tensor (B, …), into a list of B numbers or nested lists."""
        return data.tolist()

    def handle(self, data: list[dict[str, Any]], context: Context) -> Any:
        """Answers one batch of B rows, a dict each: a description, explanations or predictions, whichever is asked for.

        Returns:
            List of B results. What a phase raises goes through to the service, which answers the batch.
        """
        started_at = time.perf_counter()
        self.context = context
        if self._is_describe():
            output = [self.describe_handle()]
        elif os.environ.get(PROFILER_VARIABLE) is not None:
            output, _ = self._infer_with_profiler(data)
        else:
            prepared = self.preprocess(data)
            prepared_at = time.perf_counter()
            if self._is_explain():
                output = self.explain_handle(prepared, data)
            else:
                inferred = self.inference(prepared)
                inferred_at = time.perf_counter()
                output = self.postprocess(inferred)
                self._stages_at = started_at, prepared_at, inferred_at, time.perf_counter()
        self._record_handler_time(context, started_at)
        return output

    def _record_handler_time(self, context: Context, started_at: float) -> None:
        """Records how long the handler took; of the calls that begin within SAMPLE_INTERVAL_S, the first one's."""
        if started_at >= self._next_handler_time:
            self._next_handler_time = started_at + SAMPLE_INTERVAL_S
            elapsed_ms = (time.perf_counter() - started_at) * 1000
            context.metrics.add_time("HandlerTime", round(elapsed_ms, 2), None, "ms")

    def _infer_with_profiler(self, data: Any) -> tuple[Any, Any]:
        """Runs the phases under the profiler; returns the results and the profiler."""
        arguments = dict(self.profiler_args)
        arguments.setdefault("activities", [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA])
        arguments.setdefault("record_shapes", True)
        if "on_trace_ready" not in arguments:
            # A handler's own `initialize` may not have set the manifest, and a test's may have no name in it.
            manifest = self.manifest or self.context.manifest or {}
            folder = os.path.join(PROFILER_FOLDER, manifest.get("model", {}).get("modelName", ""))
            arguments["on_trace_ready"] = torch.profiler.tensorboard_trace_handler(folder)
            log.info("Saving chrome trace to : %s", folder)
        record = torch.profiler.record_function
        with torch.profiler.profile(**arguments) as profiler:
            with record("preprocess"):
                prepared = self.preprocess(data)
            if self._is_explain():
                with record("explain"):
                    output = self.explain_handle(prepared, data)
            else:
                with record("inference"):
                    output = self.inference(prepared)
                with record("postprocess"):
                    output = self.postprocess(output)
        log.info(profiler.key_averages().table(sort_by="cpu_time_total", row_limit=10))
        return output, profiler

    def explain_handle(self, data_preprocess: Any, raw_data: list[dict[str, Any]]) -> Any:
        """Explains a prediction through the method `get_insights` of the derived handler.

        Args:
            data_preprocess: what `preprocess` returned, as a rule a tensor (B, …).
            raw_data: list of B rows; `target` in the first one is the class to explain, 0 without it.

        Returns:
            List of B explanations, in the form of the derived handler.

        Raises:
            NotImplementedError: the handler has no `get_insights`.
            PredictionException: 400, the target is not the number of a class.
        """
        log.info("Calculating Explanations")
        inputs: Any = None
        target: Any = 0
        if isinstance(raw_data[0], dict):
            inputs = content_of(raw_data[0])
            target = _as_target(raw_data[0].get("target"))
        # Looked up by name: a handler may get it from a mixin that comes after this class.
        get_insights = getattr(self, "get_insights", None)
        if get_insights is None:
            raise NotImplementedError(
                f"{type(self).__name__} gives no explanations: define get_insights(tensor_data, raw_data, target)"
            )
        return get_insights(data_preprocess, inputs, target)

    def describe_handle(self) -> Any:
        """Returns the handler's own part of a describe answer; None where it has nothing to add."""
        return None

    def get_device(self) -> Any:
        """Returns where the model runs."""
        return self.device

    def _is_explain(self) -> bool:
        return self._has_flag("explain")

    def _is_describe(self) -> bool:
        return self._has_flag("describe")

    def _has_flag(self, header: str) -> bool:
        if self.context is None:
            return False
        value = self.context.get_request_header(0, header)
        return str(value).lower() == "true"


def _as_target(target: Any) -> Any:
    """Returns the class to explain; 0 where none is given. A form field brings it as text.

    Raises:
        PredictionException: 400, the text is not JSON.
    """
    if isinstance(target, (str, bytes, bytearray)) and target:
        try:
            return json.loads(target)
        except (ValueError, RecursionError) as error:
            raise PredictionException("target is not the number of a class.", 400) from error
    return target or 0


def _compile_options(pt2: Any) -> dict[str, Any] | None:
    """Returns the arguments of torch.compile that the YAML's `pt2` stands for, None for no compilation."""
    if isinstance(pt2, str):
        return {"backend": pt2}
    if not isinstance(pt2, dict) or "export" in pt2 or not pt2:
        return None
    if "compile" not in pt2:
        log.warning("Options of torch.compile right under pt2 are deprecated: put them under pt2.compile.")
        return dict(pt2)
    options = pt2["compile"]
    if not isinstance(options, dict) or not options.get("enable", False):
        return None
    return {name: value for name, value in options.items() if name != "enable"}
