"""What a model-config.yaml says of workers that span several processes or GPUs."""

from __future__ import annotations

from wsgi_ts.errors import InvalidModel
from wsgi_ts.models.model_yaml import ModelYaml, TorchrunOptions

#: Parallel types whose ranks are started by torchrun; under `custom` one process has all the GPUs.
TORCHRUN_TYPES = ("pp", "tp", "pptp")


def check_parallel(yaml: ModelYaml) -> None:
    """Refuses contradictions that would show as a hanging or failing group only.

    Raises:
        InvalidModel: the keys `parallelType`, `parallelLevel` and `torchrun` do not go together.
    """
    torchrun = yaml.raw.get("torchrun")
    launched = isinstance(torchrun, dict) and "nproc-per-node" in torchrun
    if launched and "parallelLevel" in yaml.raw:
        raise InvalidModel(
            "model-config.yaml: parallelLevel and torchrun.nproc-per-node both say how many processes a worker has: "
            "remove one of them"
        )
    if yaml.parallel_type in TORCHRUN_TYPES and yaml.parallel_level < 1:
        raise InvalidModel(
            f"model-config.yaml: parallelType {yaml.parallel_type} needs the number of processes of a worker: "
            "add torchrun.nproc-per-node"
        )
    if yaml.async_communication and yaml.parallel_type in TORCHRUN_TYPES:
        raise InvalidModel(
            f"model-config.yaml: asyncCommunication does not go with parallelType {yaml.parallel_type}: set "
            "parallelType to custom, and the handler's one process gets all the GPUs"
        )
    if launched and not yaml.parallel_type:
        raise InvalidModel(
            "model-config.yaml: torchrun.nproc-per-node has no effect without parallelType (pp, tp or pptp): add it"
        )


def launch_options(yaml: ModelYaml) -> TorchrunOptions | None:
    """How torchrun starts a worker of this model; None where it does not."""
    if yaml.parallel_type not in TORCHRUN_TYPES:
        return None
    return yaml.torchrun or TorchrunOptions(nproc_per_node=yaml.parallel_level)
