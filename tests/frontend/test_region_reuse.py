"""What may share a trace, what a switched-off option does, and that the result does not depend on the process."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from effcc.frontend.capture_speed import ALLOCATIONS_BETWEEN_COLLECTIONS
from effcc.frontend.repeated_modules import trace_repeated_modules_once
from some_by_default import some_by_default
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

CALLS: list[int] = []


@trace_repeated_modules_once
def recorder(gm: torch.fx.GraphModule, inputs: Any, *, options: Mapping[str, Any] | None = None) -> Any:
    CALLS.append(sum(node.target is torch.ops.higher_order.invoke_subgraph for node in gm.graph.nodes))
    return aot_autograd(fw_compiler=lambda module, _: module.forward, partition_fn=min_cut_rematerialization_partition)(
        gm, inputs
    )


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    CALLS.clear()


def gradients(model: torch.nn.Module, runner: Any, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients of one step with the seed 5."""
    model.zero_grad()
    torch.manual_seed(5)
    outputs = runner(**inputs)
    loss = (outputs.logits if hasattr(outputs, "logits") else outputs).square().mean()
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal_to_eager(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], **settings: Any) -> None:
    model = model.double()
    reference = copy.deepcopy(model)
    found = gradients(model, torch.compile(model, backend=recorder, **settings), inputs)
    expected = gradients(reference, reference, inputs)
    assert len(found) == len(expected)
    floor = 1e-4 * max(float(value.detach().abs().max()) for value in expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * max(float(b.abs().max()), floor)


class Block(torch.nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(x))))


def stack(count: int = 4, **settings: Any) -> torch.nn.Module:
    return torch.nn.Sequential(*(Block(**settings) for _ in range(count)))


def rows() -> torch.Tensor:
    return torch.randn(3, 8, dtype=torch.float64)


# The option -----------------------------------------------------------------------------------------------------------

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "use_cache": False}
TOKENS = {"input_ids": torch.arange(24).reshape(2, 12) % 64}


def llama(**settings: Any) -> torch.nn.Module:
    settings = TINY | {"intermediate_size": 48, "num_key_value_heads": 2} | settings
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def t5() -> torch.nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, use_cache=False, dropout_rate=0.0))


def mixtral() -> torch.nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
    config = transformers.MixtralConfig(**TINY, intermediate_size=48, num_key_value_heads=2, **experts)
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("repeated", some_by_default([True, False], {True}), ids=["on", "off"])
@pytest.mark.parametrize("name", some_by_default(["llama", "t5", "mixtral"], {"llama"}))
def test_on_and_off_give_eager_results(name: str, repeated: bool) -> None:
    torch.manual_seed(0)
    inputs = TOKENS | ({"decoder_input_ids": TOKENS["input_ids"][:, :7]} if name == "t5" else {})
    model = {"llama": llama, "t5": t5, "mixtral": mixtral}[name]()
    assert_equal_to_eager(model, inputs, options={"repeated_modules": repeated})
    assert len(CALLS) == 1
    if not repeated:
        assert CALLS == [0]
    elif name != "t5":  # whose layers hand on an input
        assert CALLS[0] >= 2


# What is shared -------------------------------------------------------------------------------------------------------


class ConvolutionBlock(torch.nn.Module):
    """As in a ResNet; with ``functional`` the convolution is called without its module."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        self.first, self.second = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.scale, self.shift = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        if functional:
            self.weights = torch.nn.ParameterList([self.first.weight, self.second.weight])
            del self.first, self.second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.functional:
            y = torch.nn.functional.conv2d(torch.relu(self.scale(x)), self.weights[0], padding=1)
            return x + self.shift(torch.nn.functional.conv2d(y, self.weights[1], padding=1))
        return x + torch.relu(self.norm(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize("functional", [False, True], ids=["modules", "functions"])
def test_convolutional_blocks_stay_one_stretch(functional: bool) -> None:
    model = torch.nn.Sequential(*(ConvolutionBlock(functional) for _ in range(4))).double().eval()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=recorder)(x), model(x), rtol=1e-12, atol=1e-12)
    assert CALLS == [0]


def test_dropout_differs_from_layer_to_layer() -> None:
    torch.manual_seed(1)
    model = stack(4, dropout=0.5, width=256).train()
    with torch.no_grad():
        for block in model:
            block.load_state_dict(model[0].state_dict())
    compiled = torch.compile(lambda x: [block(x) - x for block in model], backend=recorder)
    x = torch.randn(4, 256)
    torch.manual_seed(7)
    with torch.no_grad():
        masks = [output != 0 for output in compiled(x)]
    assert CALLS == [4]
    for index, mask in enumerate(masks):
        assert 0.4 < float(mask.float().mean()) < 0.6
        assert all(not torch.equal(mask, other) for other in masks[:index])
    torch.manual_seed(7)
    with torch.no_grad():
        again = [output != 0 for output in compiled(x)]
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


def test_a_growing_cache_is_written_by_every_layer() -> None:
    torch.manual_seed(0)
    model = llama(use_cache=True).double().eval()
    compiled = torch.compile(model, backend=recorder)
    with torch.no_grad():
        found, expected = compiled(**TOKENS), model(**TOKENS)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
        following = {"input_ids": TOKENS["input_ids"][:, :1]}
        second = compiled(**following, past_key_values=found.past_key_values)
        wanted = model(**following, past_key_values=expected.past_key_values)
        torch.testing.assert_close(second.logits, wanted.logits, rtol=1e-12, atol=1e-12)
    assert second.past_key_values.get_seq_length() == 13


class Nested(torch.nn.Module):
    """Arguments in tuples, lists and dictionaries; the same shapes nested differently must not share a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, pair: Any, *, named: Any = None, flag: Any = None) -> torch.Tensor:
        several = isinstance(pair, tuple | list)
        y = self.first(x) * pair[0] - self.second(pair[1]) if several else self.first(x) + pair
        return torch.tanh(y if named is None else y * named["gain"] - named["bias"]) * (2 if flag is None else flag)


class Nesting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Nested() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.sin(x), torch.cos(x)
        x = self.blocks[0](x, (a, b))
        x = self.blocks[1](x, [a, b])
        x = self.blocks[2](x, (a, b), named={"gain": a, "bias": b})
        x = self.blocks[3](x, (a, b), named={"bias": a, "gain": b})
        x = self.blocks[4](x, (a, b), flag=True)
        x = self.blocks[5](x, (a, b), flag=1.5)
        x = self.blocks[6](x, (b, a))
        return self.blocks[7](x, a)  # type: ignore[no-any-return]


def test_nested_arguments() -> None:
    assert_equal_to_eager(Nesting(), {"x": rows()})


CAPTURE = """
import hashlib, torch
from effcc.frontend.repeated_modules import trace_repeated_modules_once

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)
    def forward(self, x):
        return self.norm(x + self.down(self.up(x).relu()))

@trace_repeated_modules_once
def show(gm, inputs):
    names = [f"{node.name}:{node.target if node.op == 'placeholder' else ''}" for node in gm.graph.nodes]
    print(hashlib.sha256(" ".join(names).encode()).hexdigest())
    return gm.forward

torch.compile(torch.nn.Sequential(*(Block() for _ in range(5))), backend=show)(torch.randn(3, 8, requires_grad=True))
"""


@pytest.mark.slow
def test_captures_of_two_processes_are_equal() -> None:
    """Plans made in one process are matched in another, so nothing may depend on the order of sets."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CAPTURE],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    first, second = (process.communicate()[0] for process in running)
    assert first and first == second


# Cost -----------------------------------------------------------------------------------------------------------------


def test_the_collector_runs_seldom_only_while_our_frames_are_compiled() -> None:
    before = gc.get_threshold()
    seen: list[int] = []

    def watch(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(gc.get_threshold()[0])
        return gm.forward

    model = stack()
    torch.compile(model, backend=watch)(torch.randn(3, 8))
    torch._dynamo.reset()
    torch.compile(model, backend=trace_repeated_modules_once(watch))(torch.randn(3, 8))
    assert seen == [before[0], max(before[0], ALLOCATIONS_BETWEEN_COLLECTIONS)] and gc.get_threshold() == before


def test_the_threshold_comes_back_after_a_failed_compilation() -> None:
    before = gc.get_threshold()

    @trace_repeated_modules_once
    def failing(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        raise ValueError("no")

    with pytest.raises(Exception, match="no"):
        torch.compile(stack(), backend=failing)(torch.randn(3, 8))
    assert gc.get_threshold() == before
