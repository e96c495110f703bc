"""A model in stages, one per process: pipeline parallelism for `parallelType` pp and pptp.

Under pp rank 0's handler calls the driver, and the driver tells the others its inputs; under pptp, and outside of a
server, every rank calls it with the same inputs. Each rank then does the same: it cuts the batch into micro-batches,
and for each receives what the stage before made of it, runs its own stage and sends the outcome on, while the other
stages work on the micro-batches before and behind. What the last stage returns goes to whoever called.

`torch.distributed.pipelining` is not used: its stages have buffers of one shape, where lengths differ with each
request, and a stage that raises leaves the others with the tensors of the next call.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from wsgi_ts.handlers.distributed.caches import PipelineCache, StageCaches, put_in_place
from wsgi_ts.handlers.distributed.ranks import (
    group_backend,
    join_process_group,
    parallel_sizes,
    parallel_type,
    rank_device,
    section,
)
from wsgi_ts.handlers.distributed.rows import merge_rows, split_rows
from wsgi_ts.handlers.distributed.stages import Cut, Stage, find_cut
from wsgi_ts.handlers.distributed.tensor_parallel import parallelize, tensor_mesh
from wsgi_ts.handlers.distributed.transfer import (
    TOLD_BYTES,
    CachePlace,
    Failure,
    Link,
    empty_tensors,
    form_of,
    pack,
    size_of,
    tensors_from,
    to_bytes,
    unpack,
)
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.handlers.toolkit.library_names import ROW_INPUTS

log = logging.getLogger(__name__)

#: Arguments that ask for what the other stages know.
_REFUSED = ("output_hidden_states", "output_attentions")


class Teller(Protocol):
    """Rank 0's way to the others, as a model worker offers it in `context.group`."""

    def tell(self, message: bytes) -> None:
        """Gives all others a message, after they are done with the one before."""


class Inputs(NamedTuple):
    """The arguments of one call of the model, with what the ranks have to know besides.

    Attributes:
        cache: number of the key-value cache to use, None for none.
        freed: numbers of caches that nobody will use again.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    cache: int | None
    freed: Sequence[int]


class PipelineDriver:
    """A model in stages, called like the model itself: `driver(input_ids=…, attention_mask=…)`.

    Rows are shared out among micro-batches by tensors whose first dimension is the batch; all else goes to each.

    Args:
        members: global rank of each stage.
        options: the `pippy` section of the model's YAML.
        teller: rank 0's way to the others; None where every rank makes the calls.
        receivers: global ranks that get the result, besides the last stage's own.
    """

    def __init__(
        self,
        stage: Stage,
        link: Link,
        members: Sequence[int],
        number: int,
        options: Mapping[str, Any],
        device: torch.device,
        teller: Teller | None,
        receivers: Sequence[int],
    ) -> None:
        self.device = device
        self._stage = stage
        self._link = link
        self._members = members
        self._number = number
        self._chunks = _chunks(options)
        self._input_names = [str(name) for name in options.get("input_names") or ()]
        self._caches = StageCaches(stage.model, stage.first_layer)
        self._teller = teller
        self._receivers = receivers
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Args:
            args: positional inputs, tensors (B, …) or whatever else the model takes; they get the names in
                `input_names`, if there are any.
            kwargs: named inputs.

        Returns:
            What the model returns for all B rows; a transformers output as an `Output`.

        Raises:
            RuntimeError: a stage on another rank has failed; the message has its error. This rank's own error is
                raised as it is.
        """
        with self._lock:
            named = dict(zip(self._input_names, args, strict=False)) | kwargs
            cache = self._caches.handle_for(named)
            inputs = self._inputs(args[len(self._input_names) :], named, cache)
            if self._teller is not None:
                self._tell(self._teller, inputs)
            result = self._run(inputs)
        if cache is not None:
            new = next((named[name] for name in ROW_INPUTS if named.get(name) is not None), None)
            cache.tokens += 0 if new is None else new.shape[1]
            result = put_in_place(result, _is_place, cache)
        return result

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of a model of transformers, whose loop runs here, each step on all stages.

        Raises:
            TypeError: the model has no `generate`.
            ValueError: a way to choose tokens was asked for that reorders keys and values, which beam search does.
        """
        handle = self._caches.take_handle(kwargs)
        if handle is None and kwargs.get("use_cache", True):
            handle = self._caches.new_handle()
        if handle is not None:
            kwargs[self._caches.name] = handle
        model = self._stage.model
        if not hasattr(model, "generate"):
            raise TypeError(f"{type(model).__name__} has no generate: call the driver in a loop of your own")
        # The stage's own modules, in another shell: the stage is called while this runs.
        shell: Any = copy.copy(model)

        @functools.wraps(model.forward)  # generate looks at its parameters
        def forward(*inputs: Any, **named: Any) -> Any:
            return self(*inputs, **named)

        shell.forward = forward
        return shell.generate(*args, **kwargs)

    @torch.inference_mode()
    def follow(self, message: bytes) -> None:
        """Takes part in a call that rank 0 has told of.

        Raises:
            Exception: this rank cannot go on: its CUDA context is broken.
        """
        form, contents = form_of(message)
        if contents:
            tensors = tensors_from(form, contents, self.device)
        else:
            tensors = empty_tensors(form, self.device)
            self._link.broadcast(tensors, self._members[0])
        try:
            self._run(Inputs(*unpack(form, iter(tensors))))
        except Exception as error:
            # Rank 0 has the error's text and answers. The ranks are in step; the next call may well succeed.
            log.warning("Stage %d of the model failed.", self._number, exc_info=error)
            if "CUDA" in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise

    def _inputs(self, args: Sequence[Any], named: Mapping[str, Any], cache: PipelineCache | None) -> Inputs:
        for name in _REFUSED:
            if named.get(name):
                raise ValueError(f"{name} is not available of a model in stages: each of them knows its own only")
        return Inputs(args, named, None if cache is None else cache.number, self._caches.take_freed())

    def _tell(self, teller: Teller, inputs: Inputs) -> None:
        form, tensors = pack(tuple(inputs))
        if size_of(tensors) <= TOLD_BYTES:
            teller.tell(to_bytes(form, tensors))
        else:  # broadcast after their form
            teller.tell(to_bytes(form, []))
            self._link.broadcast([tensor.to(self.device).contiguous() for tensor in tensors], self._members[0])

    def _run(self, inputs: Inputs) -> Any:
        """This rank's part of a call; returns the result where it is wanted."""
        self._caches.drop(inputs.freed)
        link, number, last = self._link, self._number, len(self._members) - 1
        pieces = split_rows(inputs.args, inputs.kwargs, self._chunks)
        caches = self._caches.of(inputs.cache, len(pieces))
        outcomes = []
        error: Exception | None = None
        # Every piece goes through every stage, a failed one as a failure: so the stages stay in step.
        for (args, kwargs), cache in zip(pieces, caches, strict=True):
            outcome = link.receive(self._members[number - 1]) if number else None
            if error is None and not isinstance(outcome, Failure):
                try:
                    outcome = self._piece(args, kwargs, outcome, cache)
                except Exception as raised:
                    error = raised
            if error is not None:
                outcome = self._failure(error)
            if number < last:
                link.send(outcome, self._members[number + 1])
            outcomes.append(outcome)
        link.finish()
        result = self._end(outcomes) if number == last else self._receive_result()
        if error is not None:
            raise error
        if isinstance(result, Failure):
            raise RuntimeError(result.text)
        return result

    def _piece(self, args: Sequence[Any], kwargs: Mapping[str, Any], received: Any, cache: Any) -> Any:
        args = [_to(value, self.device) for value in args]
        kwargs = {name: _to(value, self.device) for name, value in kwargs.items()}
        if cache is not None:
            kwargs[self._caches.name] = cache
            received = put_in_place(received, _is_place, cache)
        outcome = self._stage.run(args, kwargs, received)
        if cache is not None:
            outcome = put_in_place(outcome, lambda value: value is cache, CachePlace())
        pack(outcome)  # raises here what could not be sent
        return outcome

    def _failure(self, error: Exception) -> Failure:
        return Failure(f"stage {self._number} of the model: {type(error).__name__}: {error}")

    def _end(self, outcomes: list[Any]) -> Any:
        """On the last stage: puts the result together and sends it to the ranks that want it."""
        result: Any = next((outcome for outcome in outcomes if isinstance(outcome, Failure)), None)
        if result is None:
            try:
                result = merge_rows(outcomes)
            except ValueError as error:
                result = self._failure(error)
        for rank in self._receivers:
            self._link.send(result, rank)
        self._link.finish()
        return result

    def _receive_result(self) -> Any:
        wanted = self._members[self._number] in self._receivers
        return self._link.receive(self._members[-1]) if wanted else None


def get_pipeline_driver(
    model: torch.nn.Module, world_size: int, context: Context, plan: Mapping[str, Any] | None = None
) -> PipelineDriver:
    """Cuts a model into as many stages as there are processes, keeps this process's own, and connects them.

    Under `parallelType: pptp` there are `world_size / tp_size` stages, each shared out among `tp_size` ranks.

    Args:
        model: the whole model, on the CPU, with the same weights in all processes. It is changed: what belongs to
            other stages is dropped.
        world_size: number of processes.
        context: the handler's context; the `pippy` section of its YAML is read.
        plan: for pptp: how layers are shared out, see `parallelize`.

    Raises:
        ValueError: the model cannot be cut like this, or a setting is wrong.
    """
    pp_size, tp_size = parallel_sizes(world_size, context)
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = rank_device(local_rank, context)
    join_process_group(device, world_size, context)
    number, column = divmod(rank, tp_size)
    options = section(context, "pippy")
    cut = find_cut(model, pp_size) if pp_size > 1 else Cut("", (0,), 0, 0)
    stage = Stage(model, cut, number, device)
    if tp_size > 1:
        parallelize(model, tensor_mesh(device, pp_size, tp_size), plan)
    model.requires_grad_(False).to(device).eval()
    columns = [[row * tp_size + each for row in range(pp_size)] for each in range(tp_size)]
    members = columns[column]
    # Under pptp every rank's handler calls the driver, whatever tp_size is.
    group = getattr(context, "group", None) if parallel_type(context) == "pp" and world_size > 1 else None
    if group is not None and group.ranks != world_size:
        raise ValueError(
            f"a pipeline of {world_size} processes of which {group.ranks} are on this machine cannot be served: "
            "model-config.yaml should have torchrun.nnodes 1"
        )
    receivers = [rank for rank in members[:-1] if group is None or rank == members[0]]
    link = Link(_own_group(columns, column, device) if pp_size > 1 else None, device)
    driver = PipelineDriver(
        stage, link, members, number, options, device, group if group is not None and rank == 0 else None, receivers
    )
    if group is not None and rank != 0:
        group.follow = driver.follow
    return driver


#: As tutorials spell it.
get_pipline_driver = get_pipeline_driver


def _chunks(options: Mapping[str, Any]) -> int:
    chunks = options.get("chunks", 1)
    if not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"model-config.yaml: pippy.chunks should be an integer of at least 1, and is {chunks!r}")
    return chunks


def _own_group(columns: Sequence[Sequence[int]], column: int, device: torch.device) -> dist.ProcessGroup:
    """Makes the process groups of all pipelines, as every rank has to, and returns this rank's."""
    groups: list[dist.ProcessGroup] = [
        dist.new_group(list(members), backend=group_backend(device)) for members in columns
    ]
    return groups[column]


def _is_place(value: Any) -> bool:
    return isinstance(value, CachePlace)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
