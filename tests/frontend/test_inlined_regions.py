"""Repeated modules that were traced once and written out again: the graphs of a capture in which nothing was shared."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from effcc.frontend.fx_aliases import node_aliases
from effcc.frontend.repeated_modules import (
    RegionReport,
    inline_repeated,
    inlined_regions,
    repeated_regions,
    trace_repeated_modules_once,
    without_repeated_regions,
)
from functorch.compile import min_cut_rematerialization_partition
from some_by_default import some_by_default
from torch._dynamo.backends.common import aot_autograd

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
LLAMA = TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "use_cache": False}

INVOKE = torch.ops.higher_order.invoke_subgraph


def everything(gm: torch.fx.GraphModule) -> list[dict[str, Any]]:
    """All that is known of each node, comparable between captures. Of inputs, where they come from is left out: an
    input belongs to no line. Autograd's numbers count from the process's begin, here from the graph's."""
    places = {node: index for index, node in enumerate(gm.graph.nodes)}
    first = min((node.meta["seq_nr"] for node in gm.graph.nodes if "seq_nr" in node.meta), default=0)
    rows = []
    for node in gm.graph.nodes:
        row = {"op": node.op, "target": str(node.target)}
        row["args"] = str(torch.fx.map_arg((node.args, node.kwargs), lambda argument: f"%{places[argument]}"))
        row["value"] = torch.utils._pytree.tree_map(described, node.meta.get("val", node.meta.get("example_value")))
        if node.op != "placeholder":
            row["keys"] = sorted(node.meta)
            row["line"] = node.meta.get("stack_trace")
            row["number"] = node.meta["seq_nr"] - first if "seq_nr" in node.meta else None
            row["tag"] = node.meta.get("partitioner_tag")
            for stack in ("nn_module_stack", "fwd_nn_module_stack"):
                row[stack] = list((node.meta.get(stack) or {}).values())
            row["functions"] = [function for _, function in node.meta.get("source_fn_stack", ())]
        rows.append(row)
    return rows


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.shape), str(value.stride()), value.dtype, value.device, value.requires_grad
    return str(value)


class Watch:
    """A backend that runs AOTAutograd's graphs as they are, and notes all that it is given."""

    def __init__(self) -> None:
        self.dynamo: list[Any] = []
        #: What is a view of what, and what is written.
        self.aliases: list[Any] = []
        self.joint: list[Any] = []
        self.names: list[str] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        inline_repeated(gm)
        self.dynamo.append(everything(gm))
        number = {node.name: index for index, node in enumerate(gm.graph.nodes)}
        aliases = node_aliases(gm, set(number))
        self.aliases += [(number[each.name], number[each.base], each.writes) for each in aliases]
        return aot_autograd(fw_compiler=self.keep, partition_fn=self.partition)(gm, inputs)

    def partition(self, joint: torch.fx.GraphModule, inputs: Any, **others: Any) -> Any:
        self.keep(joint, inputs)
        return min_cut_rematerialization_partition(joint, inputs, **others)

    def keep(self, gm: torch.fx.GraphModule, _: Any) -> Any:
        self.joint.append(everything(gm))
        self.names += [node.name for node in gm.graph.nodes]
        return gm.forward


def run(
    build: Callable[[], torch.nn.Module], inputs: dict[str, Any], inlined: bool, train: bool, dynamic: bool | None
) -> tuple[Watch, RegionReport, list[torch.Tensor]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, watch = build().train(train), Watch()
    way = inlined_regions() if inlined else without_repeated_regions()
    with repeated_regions() as report, way, contextlib.nullcontext() if train else torch.no_grad():
        outputs = torch.compile(model, backend=watch, dynamic=dynamic)(**inputs)
        leaves = torch.utils._pytree.tree_leaves(list(outputs.values()) if isinstance(outputs, dict) else outputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if train:
            sum((leaf * leaf).mean() for leaf in tensors).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return watch, report, [*(t.detach() for t in tensors), *gradients, *model.buffers()]


def check(
    build: Callable[[], torch.nn.Module], inputs: dict[str, Any], train: bool = True, dynamic: bool | None = None
) -> tuple[Watch, RegionReport]:
    """The same graphs in all that is known of them, and the same numbers bit for bit."""
    watch, report, found = run(build, inputs, True, train, dynamic)
    apart, nothing, expected = run(build, inputs, False, train, dynamic)
    assert not nothing.calls
    assert watch.dynamo == apart.dynamo
    assert watch.aliases == apart.aliases
    assert watch.joint == apart.joint
    assert watch.names == apart.names
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    return watch, report


def tokens() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {"input_ids": torch.randint(0, 64, (2, 12))}


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "gpt2 with dropout": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=4, n_head=2, n_positions=16, use_cache=False, resid_pdrop=0.3
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TINY, intermediate_size=48)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **LLAMA, num_local_experts=4, num_experts_per_tok=2, experts_implementation="batched_mm"
        )
    ),
}


@pytest.mark.parametrize("train", some_by_default([True, False], {True}), ids=["train", "eval"])
@pytest.mark.parametrize("name", some_by_default(MODELS, {"gpt2 with dropout"}))
def test_transformers_models(name: str, train: bool) -> None:
    watch, report = check(MODELS[name], tokens(), train)
    assert list(report.calls.values()) == [4]
    layers = {where for row in watch.dynamo[0] for where, _ in row.get("nn_module_stack", ())}
    assert sum(str(where).endswith(("h.3", "layers.3", "layer.3")) for where in layers) == 1, layers


class Block(torch.nn.Module):
    def __init__(self, scale: float = 1.0, writes: bool = False) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.scale, self.writes = scale, writes
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.writes:
            self.count += 1
        noise = torch.nn.functional.dropout(self.down(torch.relu(self.up(x))), 0.4, self.training)
        return x + (noise * self.scale + self.count)  # the result and what is added to it are of one kind


class Lines(torch.nn.Module):
    """Each sibling is called on a line of its own."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)
        self.last = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        third = self.blocks[2](second) + torch.rand_like(second)
        fourth = self.blocks[3](third)
        again = self.blocks[1](fourth + first)
        return self.last(again)  # type: ignore[no-any-return]


def vectors() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {"x": torch.randn(3, 8)}


def test_calls_on_lines_of_their_own_and_one_module_twice() -> None:
    watch, report = check(lambda: Lines([Block() for _ in range(4)]), vectors())
    assert report.calls == {"Block": 4}, "the first makes the frame's argument an input"
    lines = {row["line"].rpartition("in forward")[0] for row in watch.dynamo[0] if "relu" in row["target"]}
    assert len(lines) == 5 and not any("repeated_modules.py" in line for line in lines)


def test_tied_weights() -> None:
    def build() -> Lines:
        model = Lines([Block() for _ in range(4)])
        model.tied = torch.nn.Parameter(torch.randn(16, 8))
        for block in model.blocks:
            block.up.weight = model.tied
        return model

    _, report = check(build, vectors())
    assert report.calls == {"Block": 4}


def test_tensors_used_before_the_first_call() -> None:
    class Peeking(Lines):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.abs() * self.blocks[0].down.bias.abs().sum())

    _, report = check(lambda: Peeking([Block() for _ in range(4)]), vectors())
    assert not report.calls and "was used before" in report.rejections[0].reason


def test_attributes_that_differ() -> None:
    """A trace for each of two scales."""
    _, report = check(lambda: Lines([Block(scale) for scale in (1.0, 0.5, 0.5, 1.0)]), vectors())
    assert report.calls == {"Block": 4} and report.traces == {"Block": 2}


def test_buffers_that_are_written_are_left_apart() -> None:
    _, report = check(lambda: Lines([Block(writes=True) for _ in range(4)]), vectors())
    assert not report.calls and report.rejections


def test_symbolic_sizes_are_left_apart() -> None:
    _, report = check(lambda: Lines([Block() for _ in range(4)]), vectors(), dynamic=True)
    assert not report.calls and "may vary" in report.rejections[0].reason


def test_a_region_of_the_users_own_stays() -> None:
    @torch.compiler.nested_compile_region
    def region(x: torch.Tensor) -> torch.Tensor:
        return x.sin().cos()

    class Mixed(Lines):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return region(super().forward(region(x)))

    seen: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        inline_repeated(gm)
        seen.append(gm)
        return gm.forward

    model = Mixed([Block() for _ in range(4)]).eval()
    with repeated_regions() as report, inlined_regions(), torch.no_grad():
        torch._dynamo.reset()
        found = torch.compile(model, backend=keep)(**vectors())
    assert report.calls == {"Block": 5}  # the first region has made the frame's argument an input
    assert sum(node.target is INVOKE for node in seen[0].graph.nodes) == 2
    assert found.shape == (3, 8)


def test_a_frame_compiled_again_is_left_apart() -> None:
    """What changed since may have become a symbol."""
    torch._dynamo.reset()
    watch, model = Watch(), Lines([Block() for _ in range(4)])
    with repeated_regions() as report, inlined_regions():
        compiled = torch.compile(model, backend=watch)
        compiled(**vectors())
        with torch.no_grad():
            compiled(**vectors())
    assert len(watch.dynamo) == 2
    assert report.calls == {"Block": 4} and "may vary" in report.rejections[0].reason


def test_each_compilation_has_its_own_way_also_after_a_reset() -> None:
    """Dynamo then numbers its frames anew. No model is kept alive by what is remembered of its compilation."""
    calls: list[int] = []

    @trace_repeated_modules_once
    def keep(gm: torch.fx.GraphModule, _: Any, options: dict[str, Any] | None = None) -> Any:
        inline_repeated(gm)
        calls.append(sum(node.target is INVOKE for node in gm.graph.nodes))
        return gm.forward

    model = Lines([Block() for _ in range(4)]).eval()
    for options in ({}, {"memory_budget": 1 << 20}, {}):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=keep, options=options)(**vectors())
    assert calls[1] == 0 and calls[0] == calls[2] >= 4
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
