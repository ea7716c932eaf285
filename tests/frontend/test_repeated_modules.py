"""Repeated modules traced once give eager's results, and whatever cannot be shared is inlined with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from effcc.frontend.repeated_modules import (
    RegionReport,
    repeated_regions,
    trace_repeated_modules_once,
    without_repeated_regions,
)
from some_by_default import some_by_default
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
LLAMA = TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "use_cache": False}


class Recorder:
    """A backend that runs AOTAutograd's partitioned graphs as they are, and keeps Dynamo's."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        return aot_autograd(
            fw_compiler=lambda module, _: module.forward, partition_fn=min_cut_rematerialization_partition
        )(gm, inputs)

    @property
    def region_calls(self) -> int:
        return sum(
            node.target is torch.ops.higher_order.invoke_subgraph for gm in self.graphs for node in gm.graph.nodes
        )

    @property
    def bodies(self) -> int:
        targets = [
            node.args[0].target
            for gm in self.graphs
            for node in gm.graph.nodes
            if node.target is torch.ops.higher_order.invoke_subgraph
        ]
        return len(set(targets))


def tensors(outputs: Any) -> list[torch.Tensor]:
    values = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def loss_of(outputs: Any) -> torch.Tensor:
    return sum((leaf * leaf).mean() for leaf in tensors(outputs) if leaf.is_floating_point())  # type: ignore[return-value]


def step(model: torch.nn.Module, call: Callable[..., Any], inputs: dict[str, Any], seed: int) -> list[torch.Tensor]:
    """Outputs and all gradients (in training mode)."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = call(**inputs)
    results = [leaf.detach().clone() for leaf in tensors(outputs)]
    if model.training:
        loss_of(outputs).backward()
        results += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return results


def check(
    model: torch.nn.Module, inputs: dict[str, Any], train: bool, backward_floor: float = 1e-4
) -> tuple[RegionReport, Recorder]:
    """Two compiled steps against eager ones, on copies that start equal; buffers too."""
    torch._dynamo.reset()
    model = model.double().train(train)
    reference = copy.deepcopy(model)
    recorder = Recorder()
    with repeated_regions() as report, torch.enable_grad() if train else torch.no_grad():
        compiled = torch.compile(model, backend=recorder)
        for seed in (0, 1):
            found = step(model, compiled, inputs, seed)
            expected = step(reference, reference, inputs, seed)
            assert len(found) == len(expected)
            largest = max((float(value.abs().max()) for value in expected if value.is_floating_point()), default=1.0)
            for index, (a, b) in enumerate(zip(found, expected, strict=True)):
                floor = max(float(b.abs().max()) if b.numel() else 0.0, backward_floor * largest)
                assert float((a - b).abs().max() if a.numel() else 0.0) <= 1e-10 * floor, index
    for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    return report, recorder


def token_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {"input_ids": torch.randint(0, 64, (2, 12))}


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, n_positions=16, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], dict[str, Any]]]] = {
    "gpt2": (gpt2, token_inputs),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), token_inputs),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**TINY, intermediate_size=48)), token_inputs),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=4, num_heads=2, use_cache=False
            )
        ),
        lambda: token_inputs() | {"decoder_input_ids": token_inputs()["input_ids"][:, :7]},
    ),
    "vit": (
        lambda: transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=48,
                image_size=16,
                patch_size=8,
            )
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)},
    ),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **LLAMA, num_local_experts=4, num_experts_per_tok=2, experts_implementation="batched_mm"
            )
        ),
        token_inputs,
    ),
    "qwen3_moe": (
        lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **LLAMA,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                head_dim=16,
                experts_implementation="batched_mm",  # grouped_mm has no float64
            )
        ),
        token_inputs,
    ),
}


#: Of 4 layers (T5: 4 and 4), those that must be calls of a shared body.
LEAST_CALLS = {"gpt2": 4, "llama": 4, "bert": 4, "t5": 0, "vit": 4, "mixtral": 4, "qwen3_moe": 4}


@pytest.mark.parametrize("train", some_by_default([True, False], {True}), ids=["train", "eval"])
@pytest.mark.parametrize("name", some_by_default(MODELS, {"llama"}))
def test_transformers_models_equal_eager(name: str, train: bool) -> None:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    report, recorder = check(build(), inputs(), train)
    assert recorder.region_calls >= LEAST_CALLS[name], report.rejections


class Block(torch.nn.Module):
    def __init__(self, width: int = 8, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)
        self.scale = scale
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(x)))) * self.scale


class Stack(torch.nn.Module):
    def __init__(self, blocks: list[torch.nn.Module]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def vectors() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 8, dtype=torch.float64)}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_equal_blocks_are_traced_once(train: bool) -> None:
    report, recorder = check(Stack([Block() for _ in range(5)]), vectors(), train)
    # In training the first block's input needs no gradient: a trace of its own, which torch inlines as it is used once.
    assert report.calls == {"Block": 5} and report.traces == {"Block": 2 if train else 1}
    assert recorder.region_calls == (4 if train else 5) and recorder.bodies == 1


def test_two_siblings_are_inlined() -> None:
    report, recorder = check(Stack([Block(), Block()]), vectors(), True)
    assert recorder.region_calls == 0 and not report.rejections


def test_dropout_is_the_same_for_the_same_seed() -> None:
    _, recorder = check(Stack([Block(dropout=0.5) for _ in range(4)]), vectors(), True)
    assert recorder.region_calls == 3


class NormBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.linear(x)))


def test_batch_norm_is_inlined_where_it_writes_its_buffers() -> None:
    report, recorder = check(Stack([NormBlock() for _ in range(4)]), vectors(), True)
    assert recorder.region_calls == 0
    assert [rejection.class_name for rejection in report.rejections] == ["NormBlock"]
    assert "mutat" in report.rejections[0].reason


def test_batch_norm_in_evaluation_is_shared() -> None:
    _, recorder = check(Stack([NormBlock() for _ in range(4)]), vectors(), False)
    assert recorder.region_calls == 4


def test_scalars_that_differ_per_layer_keep_their_values() -> None:
    two_kinds = [Block(scale=1.0 if index % 2 else 0.5) for index in range(6)]
    _, recorder = check(Stack(two_kinds), vectors(), False)
    assert recorder.region_calls == 6 and recorder.bodies == 2
    check(Stack(two_kinds), vectors(), True)
    report, recorder = check(Stack([Block(scale=0.1 * (index + 1)) for index in range(7)]), vectors(), True)
    assert recorder.region_calls == 0
    assert "differ" in report.rejections[0].reason


def test_different_configurations_are_not_mixed() -> None:
    class Wide(Block):
        pass

    blocks: list[torch.nn.Module] = [Block(), Wide(), Block(), Wide(), Block(), Wide()]
    blocks[2].up.bias.requires_grad_(False)
    check(Stack(blocks), vectors(), True)


def test_one_module_called_three_times() -> None:
    shared = Block()
    _, recorder = check(Stack([shared, shared, shared]), vectors(), False)
    assert recorder.region_calls == 3
    check(Stack([shared, shared, shared]), vectors(), True)


def test_tied_parameters() -> None:
    blocks = [Block() for _ in range(4)]
    for block in blocks[1:]:
        block.up.weight = blocks[0].up.weight
    check(Stack(blocks), vectors(), True)
    blocks = [Block() for _ in range(4)]
    blocks[0].up.weight = blocks[3].up.weight
    check(Stack(blocks), vectors(), True)


class TiedToEmbedding(torch.nn.Module):
    """Only the first block's weight belongs to another module: a shared trace would give its weight to all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 16)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(4))
        self.blocks[0].up.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)[:, :8]
        for block in self.blocks:
            x = block(x)
        return x


def test_a_weight_shared_with_another_module() -> None:
    check(TiedToEmbedding(), vectors(), True)


class TwoInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, *, gain: float = 1.0) -> torch.Tensor:
        return torch.tanh(self.query(x) * self.key(memory)) * gain


class Crossing(torch.nn.Module):
    """The first call passes one tensor twice, the others two tensors; one call has a constant of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(TwoInputs() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = torch.cos(x)
        first = self.blocks[0](x, x)
        second = self.blocks[1](first, memory)
        third = self.blocks[2](second, memory, gain=2)
        return self.blocks[3](third, third, gain=2.0)


def test_arguments_that_alias_each_other_differently() -> None:
    check(Crossing(), vectors(), True)


class Caching(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        x = self.second(torch.relu(self.first(x)))
        cache.append(x)
        return x


class WithCache(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Caching() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache: list[torch.Tensor] = []
        for block in self.blocks:
            x = block(x, cache)
        return torch.stack(cache).sum(0)


def test_a_list_that_is_appended_to_is_inlined() -> None:
    report, recorder = check(WithCache(), vectors(), True)
    assert recorder.region_calls == 0 and report.rejections


class Returning(torch.nn.Module):
    """Returns its second input, and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return self.second(torch.relu(self.first(x))) + bias, bias, None


class PassingOn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Returning() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.sin(x)
        for block in self.blocks:
            x, bias, _ = block(x, bias)
        return x + bias


def test_an_input_that_is_returned() -> None:
    check(PassingOn(), vectors(), True)


class Checkpointed(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x


def test_checkpoint_around_the_blocks() -> None:
    _, recorder = check(Checkpointed([Block() for _ in range(4)]), vectors(), True)
    assert recorder.region_calls == 0


def test_checkpoint_inside_the_layers() -> None:
    model = MODELS["llama"][0]()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(model, token_inputs(), True)


class Modes(torch.nn.Module):
    """The same blocks with and without gradients, and under autocast: one trace may not serve another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.blocks[1](self.blocks[0](x))
        x = self.blocks[3](self.blocks[2](x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.blocks[4](x)
        return self.blocks[5](x).double()


def test_modes_within_a_frame() -> None:
    model = Modes()
    torch._dynamo.reset()
    x = torch.randn(3, 8)
    reference = copy.deepcopy(model)
    recorder = Recorder()
    with repeated_regions():
        compiled = torch.compile(model, backend=recorder)
        found = step(model, compiled, {"x": x}, 0)
    expected = step(reference, reference, {"x": x}, 0)
    # The two calls under no_grad share one trace, the next two another; the last two are used once each and inlined.
    assert recorder.region_calls == 4 and recorder.bodies == 2
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert all(p.grad is None for block in model.blocks[:2] for p in block.parameters())


def test_changing_one_later_layer_recompiles() -> None:
    """A guard on layer 3 exists although only layer 0 was traced."""
    torch._dynamo.reset()
    model = Stack([Block(dropout=0.5) for _ in range(4)]).double().train()
    recorder = Recorder()
    x = vectors()["x"]
    with repeated_regions():
        compiled = torch.compile(model, backend=recorder)
        compiled(x)
        model.blocks[2].scale = 3.0
        model.blocks[3].dropout.eval()
        torch.manual_seed(3)
        found = compiled(x)
    torch.manual_seed(3)
    assert torch.equal(found, model(x))


def test_a_hook_on_one_layer_is_kept() -> None:
    model = Stack([Block() for _ in range(4)])
    calls = []
    model.blocks[2].register_forward_hook(lambda module, args, output: (calls.append(1), output * 2)[1])
    check(model, vectors(), True)


def test_dynamic_sizes() -> None:
    torch._dynamo.reset()
    model = Stack([Block() for _ in range(4)]).double()
    recorder = Recorder()
    with repeated_regions():
        compiled = torch.compile(model, backend=recorder, dynamic=True)
        for rows in (3, 5, 11):
            x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    with_ops = [gm for gm in recorder.graphs if gm.graph.find_nodes(op="placeholder")]
    assert len(with_ops) == 1 and recorder.region_calls == 4


def test_other_backends_are_left_alone() -> None:
    torch._dynamo.reset()
    marked, plain = trace_repeated_modules_once(Recorder()), Recorder()
    model = Stack([Block() for _ in range(4)]).double()
    x = vectors()["x"]
    torch.testing.assert_close(torch.compile(model, backend=plain)(x), model(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=marked)(x), model(x))
    assert plain.region_calls == 0 and marked.region_calls == 3
    torch._dynamo.reset()
    with without_repeated_regions():
        marked.graphs.clear()
        torch.compile(model, backend=marked)(x)
    assert marked.region_calls == 0
