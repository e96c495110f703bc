"""What handlers lean on in libraries that change under them: one list, and one place to look a name up.

Importing this module imports none of the libraries. A test goes through `LIBRARY_NAMES` with each that is installed,
and says so when one has renamed something; a handler that meets such a version raises an error that names it.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

from wsgi_ts.handlers.serving.errors import PredictionException

#: Names under which models of transformers take and return their keys and values: up to 5.23, and from then on.
CACHE_NAMES = ("past_key_values", "cache")
#: What models of transformers have a row of for each row of the batch, whatever else they are given.
ROW_INPUTS = ("input_ids", "inputs_embeds")
#: Tensors that they are given once for the whole batch, which may happen to be as long as it: a place per token.
SHARED_INPUTS = ("cache_position", "logits_to_keep")
#: The operator of DeepSpeed that must not be used on a CPU, in `COMPATIBLE_OPERATORS`.
DEEPSPEED_SHARED_MEMORY = "deepspeed_shm_comm"


#: Name for pip where it is not the import name.
_DISTRIBUTIONS = {"PIL": "pillow", "nvidia": "nvidia-dali", "tensorrt_llm": "tensorrt-llm"}


@dataclass(frozen=True)
class LibraryName:
    """A class, function or table of a library.

    Attributes:
        name: how it is reached from the module, with dots.
        modules: where it is, or was in some versions: the first that has it counts.
        parameters: what calls of it give by name.
        members: attributes that are used of it.
    """

    name: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The package's import name."""
        return self.modules[0].partition(".")[0]

    def __str__(self) -> str:
        return f"{self.modules[0]}.{self.name}"

    def load(self, purpose: str) -> Any:
        """Imports the library and returns what has this name; `purpose` is who needs it, for the message.

        Raises:
            ImportError: the library is not installed, cannot be imported, or has no such name.
        """
        for module in self.modules:
            if module != self.modules[-1] and not _is_there(module):
                continue
            found = import_extra(module, purpose)
            for step in self.name.split("."):
                found = getattr(found, step, None)
            if found is not None:
                return found
        version = getattr(sys.modules.get(self.library), "__version__", "of unknown number")
        raise ImportError(
            f"{purpose}: the installed {self.library} ({version}) has no {self.name} in {' or '.join(self.modules)}, "
            "which is leaned on here: install a version of the range in wsgi-ts's extras, or tell us of this one."
        )


def import_extra(module: str, purpose: str) -> Any:
    """Imports a package that only some handlers need.

    Raises:
        ImportError: it is not installed, or cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        top = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs the package {_DISTRIBUTIONS.get(top, top)}, which cannot be imported here ({error}): "
            f"install it beside torch in the environment of the model workers."
        ) from error


def load_for_explanation(name: LibraryName) -> Any:
    """Loads what an explanation needs while a request for one is being answered.

    Raises:
        PredictionException: 501, it cannot be loaded; unlike an ImportError its text reaches the client.
    """
    try:
        return name.load("An explanation")
    except ImportError as error:
        raise PredictionException(str(error), 501) from error


def _is_there(module: str) -> bool:
    """Returns whether a module exists; that another package is missing, which it needs, is told by its import."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return error.name is None or not f"{module}.".startswith(f"{error.name}.")
    return True


# transformers

DYNAMIC_CACHE = LibraryName("DynamicCache", ("transformers",), members=("update", "get_seq_length", "reorder_cache"))
#: Positional arguments of `DynamicCache.update`: stages shift the layer's number.
CACHE_UPDATE = LibraryName("DynamicCache.update", ("transformers",), ("key_states", "value_states", "layer_idx"))
GENERATE = LibraryName("GenerationMixin.generate", ("transformers",))
BASE_STREAMER = LibraryName("BaseStreamer", ("transformers.generation.streamers",), members=("put", "end"))
TEXT_STREAMER = LibraryName(
    "TextIteratorStreamer",
    ("transformers.generation.streamers",),
    parameters=("tokenizer", "skip_prompt", "timeout"),
    members=("put", "end", "__next__"),
)
DOWNLOAD = LibraryName(
    "snapshot_download", ("huggingface_hub",), ("repo_id", "revision", "allow_patterns", "cache_dir", "token")
)

# DeepSpeed

DEEPSPEED_JOIN = LibraryName("init_distributed", ("deepspeed",), parameters=("dist_backend",))
DEEPSPEED_INFERENCE = LibraryName("init_inference", ("deepspeed",), parameters=("model", "config"))
COMPATIBLE_OPERATORS = LibraryName("ops.__compatible_ops__", ("deepspeed",))

# Explanations

INTEGRATED_GRADIENTS = LibraryName("IntegratedGradients", ("captum.attr",), members=("attribute",))
ATTRIBUTE = LibraryName("IntegratedGradients.attribute", ("captum.attr",), parameters=("inputs", "target", "n_steps"))

# Images

OPEN_IMAGE = LibraryName("open", ("PIL.Image",))
MAX_IMAGE_PIXELS = "MAX_IMAGE_PIXELS"
COMPOSE = LibraryName("Compose", ("torchvision.transforms",))
RESIZE = LibraryName("Resize", ("torchvision.transforms",))
CENTER_CROP = LibraryName("CenterCrop", ("torchvision.transforms",))
TO_TENSOR = LibraryName("ToTensor", ("torchvision.transforms",))
NORMALIZE = LibraryName("Normalize", ("torchvision.transforms",), parameters=("mean", "std"))
DALI_PIPELINE = LibraryName("Pipeline", ("nvidia.dali.pipeline",), members=("deserialize", "run"))

# Models that are not modules

ONNX_SESSION = LibraryName("InferenceSession", ("onnxruntime",), members=("get_inputs", "run"))
ONNX_OPTIONS = LibraryName("SessionOptions", ("onnxruntime",), members=("intra_op_num_threads",))
AOT_PACKAGE = LibraryName("_inductor.aoti_load_package", ("torch",))
AOT_LIBRARY = LibraryName("_export.aot_load", ("torch",))

# Language models

_OLD_VLLM = "vllm.entrypoints.openai.api_server"
VLLM_ENGINE = LibraryName("AsyncLLMEngine", ("vllm",), members=("from_engine_args",))
VLLM_ARGUMENTS = LibraryName("AsyncEngineArgs", ("vllm",), members=("from_cli_args",))
VLLM_BUILD_APP = LibraryName("build_app", ("vllm.entrypoints.launchers.app", _OLD_VLLM))
VLLM_APP_STATE = LibraryName("init_app_state", ("vllm.entrypoints.launchers.api_server.app_state", _OLD_VLLM))
VLLM_PARSER = LibraryName("FlexibleArgumentParser", ("vllm.utils.argparse_utils", "vllm.utils"))
VLLM_MAKE_PARSER = LibraryName(
    "make_arg_parser", ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.openai.cli_args")
)
VLLM_LORA = LibraryName(
    "LoRAModulePath",
    ("vllm.entrypoints.openai.models.protocol", "vllm.entrypoints.openai.serving_models"),
    parameters=("name", "path"),
)
#: Where vLLM registers its metrics, and the names that its gauge of KV cache use has had, the present one first.
PROMETHEUS_REGISTRY = LibraryName("REGISTRY", ("prometheus_client",), members=("restricted_registry",))
VLLM_KV_CACHE_GAUGES = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
TRT_LLM = LibraryName("LLM", ("tensorrt_llm",), members=("generate_async",))
TRT_SAMPLING = LibraryName("SamplingParams", ("tensorrt_llm",))
TRT_CACHE = LibraryName("KvCacheConfig", ("tensorrt_llm.llmapi",))

#: All of the above.
LIBRARY_NAMES: tuple[LibraryName, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, LibraryName)
)
