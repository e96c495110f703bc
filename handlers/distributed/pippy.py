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

    Args:
        local_rank: number of this process on its machine.
        world_size: how many processes there are.
        context: the handler's context; `pippy: rpc_timeout` (s) is read.
    """
    join_process_group(rank_device(local_rank, context), world_size, context)
