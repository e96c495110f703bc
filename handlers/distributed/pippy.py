"""What handlers written for PiPPy import: their base class, and the call that connects the processes."""

from __future__ import annotations

from wsgi_ts.handlers.distributed.ranks import DistributedHandler, join_process_group, rank_device
from wsgi_ts.handlers.serving.context import Context


class BasePippyHandler(DistributedHandler):
    """The handler to derive from for `parallelType: pp`.

    `initialize` of the base class joins the ranks and chooses the device; yours loads the model and gives it to
    `get_pipeline_driver`. `handle` is called on rank 0 only.
    """


def initialize_rpc_workers(local_rank: int, world_size: int, context: Context) -> None:
    """Connects the processes of the group; `get_pipeline_driver` does it where nobody has.

    `pippy: rpc_timeout` of the model's YAML (s) is how long an exchange between them may take.
    """
    join_process_group(rank_device(local_rank, context), world_size, context)
