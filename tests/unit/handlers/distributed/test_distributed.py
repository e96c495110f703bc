"""Cutting models into stages, sharing rows out, values on their way, settings: all of it within one process."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wsgi_ts.handlers.distributed.caches import put_in_place
from wsgi_ts.handlers.distributed.deepspeed import BaseDeepSpeedHandler, get_ds_engine
from wsgi_ts.handlers.distributed.pipeline import get_pipeline_driver
from wsgi_ts.handlers.distributed.ranks import BasePippyHandler, DistributedHandler, parallel_sizes
from wsgi_ts.handlers.distributed.rows import merge_rows, split_rows
from wsgi_ts.handlers.distributed.stages import Stage, find_cut
from wsgi_ts.handlers.distributed.tensor_parallel import BaseTensorParallelHandler, parallelize
from wsgi_ts.handlers.distributed.transfer import (
    CachePlace,
    Failure,
    Output,
    form_of,
    pack,
    tensors_from,
    to_bytes,
    unpack,
)
from wsgi_ts.handlers.serving.context import Context

CPU = torch.device("cpu")


def context(model_dir: str = "/", **config: Any) -> Context:
    return Context("m", model_dir, None, 4, None, model_yaml_config=config)


class Transformer(nn.Module):
    """Embeddings before the layers, a norm that is registered before them and used behind, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.words = nn.Embedding(30, 8)
        self.body.places = nn.Embedding(20, 8)
        self.body.norm = nn.LayerNorm(8)
        self.body.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(5)])
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.body.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.body.words(ids) + self.body.places(torch.arange(ids.shape[1]))
        for layer in self.body.layers:
            states = layer(states)
        scores: torch.Tensor = self.head(self.body.norm(states))
        return scores


class Nested(nn.Module):
    """Layers that have lists of their own, longer than the list of layers."""

    def __init__(self) -> None:
        super().__init__()
        parts = [nn.Sequential(*[nn.Linear(6, 6) for _ in range(9)]) for _ in range(4)]
        self.stem = nn.Linear(3, 6)
        self.layers = nn.Sequential(*parts)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(self.stem(rows))
        return result


def repeated() -> nn.Module:
    """One activation, used again and again."""
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 6), act)


def stages_of(model: nn.Module, count: int) -> list[Stage]:
    cut = find_cut(model, count)
    return [Stage(copy.deepcopy(model), cut, number, CPU) for number in range(count)]


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Transformer, [torch.randint(0, 30, shape) for shape in ((1, 3), (4, 9))]),
        (Nested, [torch.rand(2, 3), torch.rand(7, 3)]),
        (repeated, [torch.rand(2, 6), torch.rand(1, 6)]),
    ],
)
def test_stages_one_after_another_are_the_model(
    make: Callable[[], nn.Module], inputs: list[torch.Tensor], count: int
) -> None:
    model = make().eval()
    stages = stages_of(model, count)
    for value in inputs:
        received = None
        with torch.inference_mode():
            for stage in stages:
                received = stage.run([value], {}, received)
            torch.testing.assert_close(received, model(value))


def test_a_stage_keeps_its_own_parameters() -> None:
    model = Transformer()
    sizes = [bytes_of(stage.model) for stage in stages_of(model, 5)]
    layer, norm = bytes_of(model.body.layers[0]), bytes_of(model.body.norm)
    words, places = bytes_of(model.body.words), bytes_of(model.body.places)
    assert sizes == [layer + norm + words + places, *[layer + norm] * 3, layer + norm + words]


def test_the_list_is_cut_that_makes_the_stages_alike() -> None:
    cut = find_cut(Nested(), 4)
    assert (cut.name, cut.starts) == ("layers", (0, 1, 2, 3))


def test_large_embeddings_leave_the_first_stage_fewer_layers() -> None:
    model = nn.Module()
    model.words = nn.Embedding(300, 10)
    model.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(40)])
    starts = find_cut(model, 2).starts
    assert starts[0] == 0
    assert 0 < starts[1] < 10


def test_a_model_without_so_many_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be cut into 6 stages: .* has 5\. Start fewer processes"):
        find_cut(Transformer(), 6)
    with pytest.raises(ValueError, match="has 0"):
        find_cut(nn.Linear(2, 2), 2)


def test_an_encoder_decoder_is_refused() -> None:
    model = Transformer()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_cut(model, 2)


def test_what_is_registered_behind_the_layers_but_used_before_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
            self.stem = nn.Linear(4, 4)

        def forward(self, rows: torch.Tensor) -> Any:
            rows = self.stem(rows)
            for layer in self.layers:
                rows = layer(rows)
            return rows

    with pytest.raises(RuntimeError, match="stem is on the last stage of the pipeline"):
        stages_of(Odd(), 2)[0].run([torch.rand(1, 4)], {}, None)


def test_embeddings_used_for_more_than_the_first_layer_show() -> None:
    class Twice(Transformer):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + self.body.words(ids).sum()

    last = stages_of(Twice(), 2)[1]
    assert last.run([torch.tensor([[1, 2]])], {}, torch.rand(1, 2, 8)).isnan().all()


def test_one_process_alone_needs_no_group() -> None:
    model = Transformer()
    driver = get_pipeline_driver(copy.deepcopy(model), 1, context(parallelType="pp", pippy={"input_names": ["ids"]}))
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(driver(ids), model.eval()(ids))


def test_a_pipeline_over_several_machines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_ts.handlers.distributed.pipeline.join_process_group", lambda *arguments: None)
    ctx = context(parallelType="pp")
    ctx.group = SimpleNamespace(rank=0, ranks=2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"4 processes of which 2 are on this machine.*torchrun\.nnodes 1"):
        get_pipeline_driver(Transformer(), 4, ctx)


class Remembering(nn.Module):
    """Adds to a cache of transformers, and says how long it is by now."""

    config = SimpleNamespace(use_cache=True)

    def forward(self, ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        if past_key_values is None:
            return Output(length=0)
        if ids.max() > 9:
            raise IndexError("no such word")
        states = ids[:, None, :, None].float()
        return Output(length=past_key_values.update(states, states, 0)[0].shape[2], past_key_values=past_key_values)


def test_caches_live_as_long_as_their_handle() -> None:
    driver = get_pipeline_driver(Remembering(), 1, context(parallelType="pp"))
    assert driver(ids=torch.tensor([[1, 2, 3]])) == {"length": 0}
    first = driver(ids=torch.tensor([[1, 2, 3]]), use_cache=True)
    other = driver(ids=torch.tensor([[1]]), use_cache=True)
    again = driver(ids=torch.tensor([[4]]), past_key_values=first.past_key_values)
    assert [first.length, other.length, again.length] == [3, 1, 4]
    with pytest.raises(IndexError):
        driver(ids=torch.tensor([[99]]), use_cache=True)
    with pytest.raises(TypeError, match="past_key_values must be what an earlier call"):
        driver(ids=torch.tensor([[4]]), past_key_values=((),))
    assert len(driver._caches._caches) == 3
    del first, again
    gc.collect()
    driver(ids=torch.tensor([[1]]), past_key_values=other.past_key_values)
    assert len(driver._caches._caches) == 1


class Renaming(Remembering):
    """The same in the manner of newer versions of transformers; a tuple if asked for."""

    def forward(self, ids: torch.Tensor, cache: Any = None, use_cache: bool = False, as_tuple: bool = False) -> Any:  # type: ignore[override]
        output = super().forward(ids, cache, use_cache)
        fields = {"length": output.length, "cache": output.past_key_values}
        return tuple(fields.values()) if as_tuple else Output(fields)


@pytest.mark.parametrize("model", [Remembering, Renaming])
def test_a_cache_is_known_by_what_it_is(model: type[nn.Module]) -> None:
    driver = get_pipeline_driver(model(), 1, context(parallelType="pp"))
    lengths = []
    given: dict[str, Any] = {"use_cache": True}
    for name in ("past_key_values", "cache", "past_key_values"):
        output = driver(ids=torch.tensor([[1, 2]]), **given)
        assert output.past_key_values is output.cache is output["cache"] is output["past_key_values"] is output[1]
        lengths.append(output.length)
        given = {name: output[name]}
    assert lengths == [2, 4, 6]
    for name in ("past_key_values", "cache"):
        with pytest.raises(TypeError, match=f"{name} must be what an earlier call"):
            driver(ids=torch.tensor([[4]]), **{name: ((),)})


def test_a_cache_in_a_tuple_is_one_too() -> None:
    driver = get_pipeline_driver(Renaming(), 1, context(parallelType="pp"))
    _, cache = driver(ids=torch.tensor([[1, 2, 3]]), use_cache=True, as_tuple=True)
    assert driver(ids=torch.tensor([[4]]), cache=cache, as_tuple=True)[0] == 4


def test_a_cache_travels_as_its_place() -> None:
    value = (torch.ones(1), [{"cache": CachePlace()}])
    tensors = pack(value)[1]
    arrived = unpack(form_of(to_bytes(*pack(value)))[0], iter(tensors))
    assert put_in_place(arrived, lambda each: isinstance(each, CachePlace), "mine")[1] == [{"cache": "mine"}]


def test_a_model_without_generate_says_so() -> None:
    with pytest.raises(TypeError, match="Transformer has no generate: call the driver in a loop"):
        get_pipeline_driver(Transformer(), 1, context(parallelType="pp")).generate(torch.tensor([[1]]))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_only_other_stages_know_is_refused(name: str) -> None:
    driver = get_pipeline_driver(Transformer(), 1, context(parallelType="pp"))
    with pytest.raises(ValueError, match=name):
        driver(torch.tensor([[1]]), **{name: True})


# Rows


def test_rows_are_shared_out_and_come_together() -> None:
    ids, mask, table = torch.arange(10).view(5, 2), torch.ones(5, 2), torch.ones(3)
    parts = split_rows([ids], {"mask": mask, "table": table, "flag": True}, 2)
    assert [len(args[0]) for args, _ in parts] == [3, 2]
    assert [kwargs["mask"].shape[0] for _, kwargs in parts] == [3, 2]
    assert all(kwargs["table"] is table and kwargs["flag"] is True for _, kwargs in parts)
    merged = merge_rows([Output(a=args[0], b=(kwargs["mask"], "x")) for args, kwargs in parts])
    assert torch.equal(merged.a, ids)
    assert torch.equal(merged["b"][0], mask)
    assert merged[1][1] == "x"


def test_the_places_of_tokens_are_no_rows_even_if_they_are_as_many() -> None:
    places, ids = torch.arange(2), torch.ones(2, 2)
    parts = split_rows([], {"cache_position": places, "input_ids": ids}, 2)
    assert [(len(kwargs["input_ids"]), kwargs["cache_position"] is places) for _, kwargs in parts] == [(1, True)] * 2
    longer = split_rows([], {"cache_position": torch.arange(5), "input_ids": ids}, 2)
    assert [kwargs["input_ids"].shape for _, kwargs in longer] == [(1, 2)] * 2


@pytest.mark.parametrize(("rows", "chunks", "sizes"), [(1, 4, [1]), (2, 4, [1, 1]), (5, 4, [2, 2, 1]), (0, 2, [0])])
def test_there_are_never_more_parts_than_rows(rows: int, chunks: int, sizes: list[int]) -> None:
    assert [len(args[0]) for args, _ in split_rows([torch.ones(rows, 2)], {}, chunks)] == sizes


def test_one_value_for_the_whole_batch_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match=r"pippy\.chunks"):
        merge_rows([torch.tensor(1.0), torch.tensor(2.0)])


# Values on their way


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8, torch.complex64]
)
def test_values_arrive_as_they_were(dtype: torch.dtype) -> None:
    value = {
        "all": [torch.ones(2, 3, dtype=dtype), torch.zeros(0, 4, dtype=dtype), torch.ones((), dtype=dtype)],
        "more": (1, 2.5, None, True, "ü"),
        "output": Output(logits=torch.arange(6).view(2, 3).t()),
    }
    form, rest = form_of(to_bytes(*pack(value)))
    arrived = unpack(form, iter(tensors_from(form, rest, CPU)))
    assert arrived["more"] == value["more"]
    for got, wanted in zip(arrived["all"], value["all"], strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    assert isinstance(arrived["output"], Output)
    assert torch.equal(arrived["output"].logits, value["output"][0])


def test_failures_arrive() -> None:
    assert unpack(pack(Failure("stage 1: out of order"))[0], iter(())) == Failure("stage 1: out of order")


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(TypeError, match="a set cannot go"):
        pack({"a": [{1, 2}]})


def test_an_output_without_a_field_says_which_it_has() -> None:
    with pytest.raises(AttributeError, match="no loss, only logits"):
        _ = Output(logits=1).loss


# Settings


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"parallelType": "pp"}, (4, 1)),
        ({"parallelType": "tp"}, (1, 4)),
        ({"parallelType": "pptp", "tensor_parallel": {"tp_size": 2}}, (2, 2)),
        ({}, (4, 1)),
    ],
)
def test_stages_and_shares(config: dict[str, Any], sizes: tuple[int, int]) -> None:
    assert parallel_sizes(4, context(**config)) == sizes


@pytest.mark.parametrize("tensor_parallel", [None, {}, {"tp_size": 3}, {"tp_size": "2"}, {"tp_size": 0}])
def test_pptp_needs_a_tp_size_that_divides_the_ranks(tensor_parallel: Any) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel\.tp_size, a divisor of the 4 processes"):
        parallel_sizes(4, context(parallelType="pptp", tensor_parallel=tensor_parallel))


@pytest.mark.parametrize("pippy", [{"chunks": 0}, {"chunks": "2"}, "chunks"])
def test_wrong_settings_of_pippy_are_named(pippy: Any) -> None:
    with pytest.raises(ValueError, match=r"model-config\.yaml: pippy"):
        get_pipeline_driver(Transformer(), 1, context(pippy=pippy))


def test_heads_that_cannot_be_shared_out_are_named() -> None:
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.q_proj = nn.Linear(6, 6)
    model.attention.num_heads = 3
    with pytest.raises(ValueError, match="attention: num_heads is 3, which cannot be shared out among 2 ranks"):
        parallelize(model, SimpleNamespace(size=lambda: 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Transformer has no blocks in the manner of Llama"):
        parallelize(Transformer(), SimpleNamespace(size=lambda: 2))  # type: ignore[arg-type]


def test_a_rank_knows_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    handler = BasePippyHandler()
    assert (handler.rank, handler.local_rank, handler.world_size) == (5, 1, 8)
    # As tutorials choose a device: the number of a GPU, or the CPU where there is none.
    assert [handler.local_rank % count for count in (4, 1, 0)] == [1, 0, CPU]


@pytest.mark.parametrize("kind", [BasePippyHandler, BaseTensorParallelHandler, BaseDeepSpeedHandler])
def test_a_handler_that_has_an_init_of_its_own_knows_them_too(
    kind: type[DistributedHandler], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    own = type("Own", (kind,), {"__init__": lambda self: None})()
    assert (own.rank, own.local_rank, own.world_size) == (5, 1, 8)
    own.local_rank = 3  # as TorchServe's examples do in `initialize`
    assert own.local_rank == 3


# DeepSpeed


def test_without_deepspeed_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "ds.json").write_text("{}")
    with pytest.raises(ImportError, match="needs the package deepspeed"):
        get_ds_engine(nn.Linear(1, 1), context(str(tmp_path), deepspeed={"config": "ds.json"}))
    with pytest.raises(ImportError, match="needs the package deepspeed"):
        BaseDeepSpeedHandler().initialize(context())


def test_deepspeed_gets_the_files_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    recorder = ModuleType("deepspeed")
    recorder.init_inference = lambda **arguments: calls.append(arguments)  # type: ignore[attr-defined]
    kernels = {"deepspeed_shm_comm": True}
    recorder.ops = SimpleNamespace(__compatible_ops__=kernels)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", recorder)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    model = nn.Linear(1, 1)
    for name in ("ds.json", "checkpoint.json"):
        (tmp_path / name).write_text("{}")
    get_ds_engine(model, context(str(tmp_path), deepspeed={"config": "ds.json", "checkpoint": "checkpoint.json"}))
    files = {"config": str(tmp_path / "ds.json"), "checkpoint": str(tmp_path / "checkpoint.json")}
    assert calls == [{"model": model, **files}]
    assert kernels == {"deepspeed_shm_comm": False}


def test_deepspeed_without_a_model_says_so() -> None:
    with pytest.raises(ValueError, match="None instead of a model"):
        get_ds_engine(None, context(deepspeed={"config": "ds.json"}))


@pytest.mark.parametrize(
    ("deepspeed", "text"),
    [(None, "deepspeed.config is missing"), ({"config": "no.json"}, "deepspeed.config names no.json, which is not in")],
)
def test_a_missing_deepspeed_file_is_named(tmp_path: Path, deepspeed: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        get_ds_engine(nn.Linear(1, 1), context(str(tmp_path), deepspeed=deepspeed))
