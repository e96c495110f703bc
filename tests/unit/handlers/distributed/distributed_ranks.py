"""The ranks of the models in test_distributed_ranks.py.

Reads lines `CASE RANKS PORT`. For each it forks so many ranks, which have all that is imported here; rank 0 prints its
findings as a JSON object, and this process the ranks' exit codes as a list.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from wsgi_ts.handlers.distributed.pipeline import get_pipeline_driver
from wsgi_ts.handlers.distributed.tensor_parallel import get_tensor_parallel_model
from wsgi_ts.handlers.serving.context import Context
from wsgi_ts.process import die_with_parent

#: Seconds that a case may take; then its ranks are ended by a signal.
LIMIT_S = 100
#: Which rank this process is, and of how many.
RANK, WORLD = 0, 1


class Group:
    """The way from rank 0 to the others, over gloo; its messages are those of a model worker's group."""

    def __init__(self) -> None:
        self.follow: Callable[[bytes], None] | None = None
        self.told: list[int] = []
        self.ranks = WORLD

    def tell(self, message: bytes) -> None:
        self.told.append(len(message))
        dist.broadcast(torch.tensor([len(message)]), 0)
        dist.broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8), 0)

    def serve(self) -> None:
        assert self.follow is not None
        while True:
            length = torch.zeros(1, dtype=torch.long)
            dist.broadcast(length, 0)
            message = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(message, 0)
            if bytes(message.numpy()) == b"stop":
                return
            self.follow(bytes(message.numpy()))


class Block(nn.Module):
    """A block with the names of Llama's matrices, and attention that counts its heads."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_size = size // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size) for _ in range(3))
        self.o_proj = nn.Linear(size, size)
        self.up_proj, self.gate_proj = nn.Linear(size, 3 * size), nn.Linear(size, 3 * size)
        self.down_proj = nn.Linear(3 * size, size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows, length, _ = states.shape
        q, k, v = (
            matrix(states).view(rows, length, self.num_heads, self.head_size).transpose(1, 2)
            for matrix in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        states = states + self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        return states + self.down_proj(self.up_proj(states) * self.gate_proj(states).sigmoid())


class Language(nn.Module):
    """Words in, scores of words out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([Block(16, 4) for _ in range(6)])
        self.lm_head = nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        states = self.words(ids)
        for layer in self.layers:
            states = layer(states)
        scores = self.lm_head(states if scale is None else states * scale[:, None, None])
        return scores, {"mean": states.mean(dim=(1, 2)), "kind": "language"}


def language() -> Language:
    """The same model each time."""
    torch.manual_seed(0)
    return Language().eval()


def context(parallel_type: str, **sections: Any) -> Context:
    config = {"parallelType": parallel_type, **sections}
    return Context("m", "/", None, 4, None, model_yaml_config=config)


def inputs() -> list[dict[str, torch.Tensor]]:
    """Batches of different sizes and lengths; the last one is too large to be told in a message."""
    torch.manual_seed(1)
    shapes = [(1, 5), (4, 3), (5, 9), (2, 1), (50, 100)]
    return [{"ids": torch.randint(0, 50, shape), "scale": torch.rand(shape[0])} for shape in shapes]


def difference(model: Any) -> float:
    """How far the model's results are from those in one process."""
    whole = language()
    worst = 0.0
    for arguments in inputs():
        with torch.inference_mode():
            scores, more = model(**arguments)
            wanted, wanted_more = whole(**arguments)
        assert more["kind"] == "language"
        worst = max(
            worst, (scores - wanted).abs().max().item(), (more["mean"] - wanted_more["mean"]).abs().max().item()
        )
    return worst


def failure(model: Any) -> str:
    """What a call with a word that there is not raises."""
    try:
        model(ids=torch.tensor([[1, 2, 99]]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def told(chunks: int) -> dict[str, Any]:
    """Pipeline parallelism: rank 0 calls, the others follow."""
    ctx = context("pp", pippy={"chunks": chunks, "input_names": ["ids"]})
    group = Group()
    ctx.group = group  # type: ignore[assignment]
    driver = get_pipeline_driver(language(), WORLD, ctx)
    if RANK:
        group.serve()
        return {}
    found = {"first": difference(driver), "failure": failure(driver), "again": difference(driver)}
    with torch.inference_mode():
        by_position = driver(torch.tensor([[1, 2]]))[0] - language()(torch.tensor([[1, 2]]))[0]
    group.tell(b"stop")
    return found | {"by_position": by_position.abs().max().item(), "longest": max(group.told)}


def last_fails() -> dict[str, Any]:
    """A stage behind the first one raises: rank 0 gets its error, and the next call succeeds."""
    ctx = context("pp", pippy={"chunks": 2})
    group = Group()
    ctx.group = group  # type: ignore[assignment]
    driver = get_pipeline_driver(language(), WORLD, ctx)
    if RANK:
        group.serve()
        return {}
    try:
        driver(ids=torch.zeros(4, 2, dtype=torch.long), scale=torch.ones(4, 1, 1, 7, 7))
        text = "nothing"
    except RuntimeError as error:
        text = str(error)
    found = {"failure": text, "again": difference(driver)}
    group.tell(b"stop")
    return found


def everywhere(parallel_type: str) -> dict[str, Any]:
    """Tensor parallelism, also within stages: every rank calls, and has the whole result."""
    ctx = context(parallel_type, pippy={"chunks": 2}, tensor_parallel={"tp_size": 2})
    if parallel_type == "tp":
        model = get_tensor_parallel_model(language(), ctx)
    else:
        model = get_pipeline_driver(language(), WORLD, ctx)
    differences = [difference(model), float(failure(model) == "nothing"), difference(model)]
    worst = torch.tensor(max(differences))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {"worst": worst.item()}


def planned() -> dict[str, Any]:
    """Tensor parallelism by a plan of the handler's author."""
    plan = {"layers.*.up_proj": ColwiseParallel(), "layers.*.gate_proj": ColwiseParallel()}
    plan |= {"layers.*.down_proj": RowwiseParallel()}  # type: ignore[dict-item]
    model = get_tensor_parallel_model(language(), context("tp"), plan)
    own = sum(parameter.to_local().numel() for parameter in model.parameters() if hasattr(parameter, "to_local"))
    return {"worst": difference(model), "own": own}


def generated() -> dict[str, Any]:
    """`generate` of transformers, on rank 0: which ways to choose tokens give what they give in one process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 60}
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.3)).eval()
    ctx = context("pp", pippy={"chunks": 2})
    group = Group()
    ctx.group = group  # type: ignore[assignment]
    driver = get_pipeline_driver(copy.deepcopy(whole), WORLD, ctx)
    if RANK:
        group.serve()
        return {}
    rows = {"input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 11, 12, 13]])}
    rows |= {"attention_mask": (rows["input_ids"] != 0).long(), "max_new_tokens": 9, "eos_token_id": 99}  # type: ignore[dict-item]
    ways: dict[str, dict[str, Any]] = {
        "likeliest": {},
        "drawn": {"do_sample": True, "top_k": 5},
        "penalty": {"repetition_penalty": 1.5},
        "beams": {"num_beams": 2, "use_cache": False},
    }
    found = {}
    for name, way in ways.items():
        texts = []
        for model in (whole, driver):
            torch.manual_seed(1)
            texts.append(model.generate(**rows, pad_token_id=0, **way))
        found[name] = torch.equal(*texts) and len(set(texts[0][1].tolist())) > 6
    # A generation that goes on where another has ended.
    first = driver.generate(**rows, pad_token_id=0, return_dict_in_generate=True)
    more = {"input_ids": first.sequences, "max_new_tokens": 3, "eos_token_id": 99, "pad_token_id": 0}
    more["attention_mask"] = torch.cat([rows["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    found["again"] = torch.equal(driver.generate(**more, past_key_values=first.past_key_values), whole.generate(**more))
    try:
        driver.generate(**rows, pad_token_id=0, num_beams=2)
        found["error"] = ""
    except ValueError as error:
        found["error"] = str(error)
    group.tell(b"stop")
    return found


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "pp": lambda: told(1),
    "pp-chunks": lambda: told(3),
    "last-fails": last_fails,
    "tp": lambda: everywhere("tp"),
    "pptp": lambda: everywhere("pptp"),
    "planned": planned,
    "generated": generated,
}


def fork_rank(rank: int, case: str, ranks: int, port: str) -> int:
    """Starts a rank; returns its pid."""
    global RANK, WORLD
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent(parent)
        signal.alarm(LIMIT_S)
        RANK, WORLD = rank, ranks
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
        result = CASES[case]()
        if RANK == 0:
            print(json.dumps(result), flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        case, ranks, port = line.split()
        pids = [fork_rank(rank, case, int(ranks), port) for rank in range(int(ranks))]
        print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)


if __name__ == "__main__":
    main()
